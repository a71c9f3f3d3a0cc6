"""Tallies that triggers keep, the index that lists leads, and the audit log.

The triggers count whatever changes leads, batches, calls and attempts, this release or another. On SQLite a later
migration that rebuilds one of these tables drops its triggers, and must create them again; a test looks for them.
"""

import sqlalchemy as sa
from alembic import op

from pipeline.ledger.database import UtcDateTime

revision = "0002"
down_revision = "0001"

_INTO = "INSERT INTO tallies (minute, campaign_id, name, part, n)"
_ADD = "ON CONFLICT (minute, campaign_id, name, part) DO UPDATE SET n = tallies.n + excluded.n"

# What a row counts as: (name, minute), with `{row}.` before each column. A null name counts as nothing.
_LEADS = [("'lead.' || {row}.state", "0")]
_BATCHES = [("'accepted'", "0")]
_CALLS = [
    ("CASE WHEN {row}.is_final THEN 'call.' || {row}.outcome ELSE 'call.open' END", "0"),
    ("CASE WHEN {row}.lead_id IS NULL THEN 'call.orphan' END", "0"),
    ("'disposition.' || {row}.disposition", "0"),
    ("CASE WHEN {row}.is_final THEN 'ended.' || {row}.outcome END", "{minute_of_call}"),
]
_ATTEMPTS = [("'post.' || {row}.outcome", "{minute_of_attempt}")]

_OF = {
    # table: (counts as, campaign, how many, columns whose change matters)
    "leads": (_LEADS, "{row}.campaign_id", "1", ("campaign_id", "state")),
    "batches": (_BATCHES, "{row}.campaign_id", "{row}.accepted", ("campaign_id", "accepted")),
    "calls": (_CALLS, "coalesce({row}.campaign_id, '')", "1",
              ("campaign_id", "is_final", "outcome", "lead_id", "disposition", "last_event_at")),
    "attempts": (_ATTEMPTS, "(SELECT campaign_id FROM leads WHERE leads.id = {row}.lead_id)", "1",
                 ("lead_id", "outcome", "started_at")),
}  # fmt: skip


def upgrade() -> None:
    """Create the tables, the triggers, and then count what is there: nobody writes in between."""
    op.create_table(
        "tallies",
        sa.Column("minute", sa.Integer(), autoincrement=False, nullable=False, comment="since 1970; 0: since ever"),
        sa.Column("campaign_id", sa.String(length=64), nullable=False, comment="empty: a call that names none"),
        sa.Column(
            "name", sa.String(length=120), nullable=False, comment="accepted, lead.STATE, call.OUTCOME, post.OUTCOME, …"
        ),
        sa.Column(
            "part", sa.BigInteger(), autoincrement=False, nullable=False, comment="0, or the transaction that adds"
        ),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("minute", "campaign_id", "name", "part", name=op.f("pk_tallies")),
    )
    op.create_table(
        "recounts",
        sa.Column("at", UtcDateTime, nullable=False),
        sa.Column("took_ms", sa.Integer(), nullable=False),
        sa.Column("accepted", sa.BigInteger(), nullable=False, comment="by the batches"),
        sa.Column("leads", sa.BigInteger(), nullable=False, comment="by the leads, every one counted"),
        sa.Column(
            "differences", sa.Text(), nullable=False, comment="tallies that were wrong, and by how much, as JSON"
        ),
        sa.PrimaryKeyConstraint("at", name=op.f("pk_recounts")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", UtcDateTime, nullable=False),
        sa.Column("who", sa.String(length=80), nullable=False, comment="the name that signed in, or the system's user"),
        sa.Column("via", sa.String(length=10), nullable=False, comment="ops or cli"),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("campaign_id", sa.String(length=64), nullable=True),
        sa.Column("lead_id", sa.Uuid(), nullable=True),
        sa.Column("details", sa.Text(), nullable=False, comment="as JSON: the filter, the policies, the reason"),
        sa.Column("changed", sa.Integer(), nullable=True, comment="how many rows the action changed"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_campaign_id", "audit", ["campaign_id", "id"])
    op.create_index("ix_audit_lead_id", "audit", ["lead_id", "id"])
    op.create_index("ix_leads_listed", "leads", ["campaign_id", "state", "accepted_at", "id"])
    op.create_index(
        "ix_quarantine_waiting",
        "quarantine",
        ["received_at"],
        postgresql_where=sa.text("released_at IS NULL"),
        sqlite_where=sa.text("released_at IS NULL"),
    )
    sqlite = op.get_bind().dialect.name == "sqlite"
    for table in _OF:
        for statement in _on_sqlite(table) if sqlite else _on_postgres(table):
            op.execute(statement)
    for table in _OF:
        part = f"SELECT {{columns}} FROM {table}"
        op.execute(f"{_INTO} {_counted(table, [(part, table, '')], part='0', sqlite=sqlite)} {_ADD}")


def _counted(table: str, sources: list[tuple[str, str, str]], *, part: str, sqlite: bool) -> str:
    """A query that adds up what rows count as; a source is (query, name of its rows, sign)."""
    counts_as, campaign, many, _ = _OF[table]
    queries = []
    for query, row, sign in sources:
        for name, minute in counts_as:
            names = _names(row, sqlite=sqlite)
            columns = [
                f"{minute.format(**names)} AS minute", f"{campaign.format(**names)} AS campaign_id",
                f"{name.format(**names)} AS name", f"{sign}{many.format(**names)} AS n",
            ]  # fmt: skip
            queries.append(query.format(columns=", ".join(columns)))
    rows = " UNION ALL ".join(queries)
    return (
        f"SELECT minute, campaign_id, name, {part}, sum(n) FROM ({rows}) AS counted"
        " WHERE name IS NOT NULL AND campaign_id IS NOT NULL GROUP BY minute, campaign_id, name HAVING sum(n) <> 0"
    )


def _names(row: str, *, sqlite: bool) -> dict[str, str]:
    def minute(column: str) -> str:
        if sqlite:
            return f"strftime('%s', {row}.{column}) / 60"
        return f"floor(extract(epoch FROM {row}.{column}) / 60)::int"

    return {"row": row, "minute_of_call": minute("last_event_at"), "minute_of_attempt": minute("started_at")}


def _on_postgres(table: str) -> list[str]:
    """Once a statement, over all its rows. Each transaction adds to rows of its own, so that none waits for another."""
    part = "pg_current_xact_id()::text::bigint"
    fresh = ("SELECT {columns} FROM fresh", "fresh", "")
    stale = ("SELECT {columns} FROM stale", "stale", "-")
    bodies = {"INSERT": [fresh], "UPDATE": [stale, fresh], "DELETE": [stale]}
    rows = {
        "INSERT": "NEW TABLE AS fresh", "UPDATE": "OLD TABLE AS stale NEW TABLE AS fresh", "DELETE": "OLD TABLE AS stale",
    }  # fmt: skip
    statements = []
    for event, sources in bodies.items():
        body = f"{_INTO} {_counted(table, sources, part=part, sqlite=False)} {_ADD}"
        statements += _trigger(table, event, body, referencing=f"REFERENCING {rows[event]}")
    names = {"leads": "lead.%", "batches": "accepted", "calls": "call.%,disposition.%,ended.%", "attempts": "post.%"}
    like = " OR ".join(f"name LIKE '{one}'" for one in names[table].split(","))
    return statements + _trigger(table, "TRUNCATE", f"DELETE FROM tallies WHERE {like}")


def _trigger(table: str, event: str, body: str, *, referencing: str = "") -> list[str]:
    name = f"tally_{table}_{event.lower()}"
    head, when = f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$", f"AFTER {event} ON {table}"
    return [
        f"{head} BEGIN {body}; RETURN NULL; END $$",
        f"CREATE TRIGGER {name} {when} {referencing} FOR EACH STATEMENT EXECUTE FUNCTION {name}()",
    ]


def _on_sqlite(table: str) -> list[str]:
    """Once a row; there is one writer at a time anyway."""
    counts_as, campaign, many, matters = _OF[table]

    def adds(row: str, sign: str) -> str:
        names = _names(row, sqlite=True)
        return " ".join(
            f"{_INTO} SELECT {minute.format(**names)}, {campaign.format(**names)}, {name.format(**names)}, 0,"
            f" {sign}{many.format(**names)} WHERE {name.format(**names)} IS NOT NULL"
            f" AND {campaign.format(**names)} IS NOT NULL {_ADD};"
            for name, minute in counts_as
        )

    changed = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in matters)
    bodies = {
        "INSERT": adds("NEW", ""), "UPDATE": adds("OLD", "-") + " " + adds("NEW", ""), "DELETE": adds("OLD", "-"),
    }  # fmt: skip
    return [
        f"CREATE TRIGGER tally_{table}_{event.lower()} AFTER {event} ON {table}"
        f"{f' WHEN {changed}' if event == 'UPDATE' else ''} BEGIN {body} END"
        for event, body in bodies.items()
    ]
