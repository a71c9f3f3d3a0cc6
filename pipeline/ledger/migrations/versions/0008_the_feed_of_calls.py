"""The feed of calls: triggers mark each call that changes, and a reader gives the marks their numbers.

The triggers notice whatever changes a call, this release or another. On SQLite a later migration that rebuilds `calls`
drops its triggers, and must create them again; a test looks for them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0005"

_MARK = "ON CONFLICT (call_sid) DO UPDATE SET number = NULL"
_COLUMNS = (
    "lead_id", "linked_by", "campaign_id", "futwork_lead_id", "reference", "phone", "status", "is_final", "outcome",
    "disposition", "duration_seconds", "callback_at", "recording_url", "details", "first_event_at", "last_event_at",
)  # fmt: skip

_POSTGRES = {
    "INSERT": ("NEW TABLE AS fresh", f"INSERT INTO call_changes (call_sid) SELECT call_sid FROM fresh {_MARK}"),
    "UPDATE": (
        "OLD TABLE AS stale NEW TABLE AS fresh",
        (
            "INSERT INTO call_changes (call_sid) SELECT fresh.call_sid FROM fresh JOIN stale USING (call_sid)"
            f" WHERE fresh IS DISTINCT FROM stale {_MARK}"
        ),
    ),
    "DELETE": ("OLD TABLE AS stale", "DELETE FROM call_changes WHERE call_sid IN (SELECT call_sid FROM stale)"),
}
_SQLITE = {
    "INSERT": f"INSERT INTO call_changes (call_sid) VALUES (NEW.call_sid) {_MARK}",
    "UPDATE": f"INSERT INTO call_changes (call_sid) VALUES (NEW.call_sid) {_MARK}",
    "DELETE": "DELETE FROM call_changes WHERE call_sid = OLD.call_sid",
}


def upgrade() -> None:
    """Create the tables and the triggers, then number the calls that are there, oldest first: nobody writes meanwhile."""
    op.create_table(
        "call_changes",
        sa.Column("call_sid", sa.String(length=200), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=True, comment="its place in the feed; null: not given yet"),
        sa.PrimaryKeyConstraint("call_sid", name=op.f("pk_call_changes")),
    )
    op.create_index("ix_call_changes_number", "call_changes", ["number"])
    op.create_table(
        "feeds",
        sa.Column("name", sa.String(length=20), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False, comment="the highest number that was ever given"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_feeds")),
    )
    for statement in _on_sqlite() if op.get_bind().dialect.name == "sqlite" else _on_postgres():
        op.execute(statement)
    op.execute(
        "INSERT INTO call_changes (call_sid, number)"
        " SELECT call_sid, row_number() OVER (ORDER BY last_event_at, call_sid) FROM calls"
    )
    op.execute("INSERT INTO feeds (name, last) SELECT 'calls', count(*) FROM call_changes")


def _on_postgres() -> list[str]:
    """Once a statement, over all its rows."""
    found = []
    for event, (rows, body) in _POSTGRES.items():
        name = f"feed_calls_{event.lower()}"
        found += [
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$",
            f"CREATE TRIGGER {name} AFTER {event} ON calls REFERENCING {rows} FOR EACH STATEMENT EXECUTE FUNCTION {name}()",
        ]
    return found


def _on_sqlite() -> list[str]:
    """Once a row."""
    changed = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in _COLUMNS)
    return [
        f"CREATE TRIGGER feed_calls_{event.lower()} AFTER {event} ON calls"
        f"{f' WHEN {changed}' if event == 'UPDATE' else ''} BEGIN {body}; END"
        for event, body in _SQLITE.items()
    ]
