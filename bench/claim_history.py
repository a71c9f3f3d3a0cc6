"""What a claim and its record cost with ten million leads of history, against ten thousand.

Two ledgers on PostgreSQL, each with its history of called leads, one attempt each. A round claims 32 leads, and records
them as accepted, until it has done so with two thousand; the leads wait at the side of the history, in its campaign.
"""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from bench.backends import CAMPAIGN, Absent, Backends
from bench.figures import Figure, compare, console, interleave
from bench.submit import fill
from pipeline.domain.lead import Answer, LeadState, Outcome, Settlement
from pipeline.ledger import Ledger

LONG, SHORT = 10_000_000, 10_000
_DUE = 2_000
_AT_ONCE = 32

_HISTORY = """
INSERT INTO leads (id, campaign_id, key, phone, data, state, attempts, due_at, expires_at, claim, futwork_lead_id,
                   batch_id, accepted_at, submitted_at, called_at, changed_at)
SELECT gen_random_uuid(), :campaign, '+9170' || lpad(n::text, 8, '0'), '+9170' || lpad(n::text, 8, '0'),
       '{"customer_name": "Asha Rao", "place": "Pune"}', 'called', 1, t, t + interval '2 days', gen_random_uuid(),
       md5(n::text), gen_random_uuid(), t, t, t, t
FROM generate_series(1, :number) AS n, LATERAL (SELECT now() - n * interval '1 second' AS t) AS moment
"""
_ATTEMPTS = """
INSERT INTO attempts (lead_id, claim, started_at, duration_ms, outcome, http_status, excerpt)
SELECT id, claim, submitted_at, 80, 'accepted', 200, '' FROM leads
"""

# Keys that refer to the leads before the leads' own.
_CONSTRAINTS = """
SELECT conrelid::regclass AS table_name, conname AS name, pg_get_constraintdef(oid) AS definition
FROM pg_constraint
WHERE contype IN ('f', 'p', 'u') AND ('leads'::regclass IN (conrelid, confrelid) OR conrelid = 'attempts'::regclass)
ORDER BY contype = 'f' DESC
"""
_FILLED = ("leads", "attempts")
_INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename IN ('leads', 'attempts') ORDER BY indexname"


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    long = LONG // 50 if quick else LONG
    with contextlib.ExitStack() as stack:
        ledgers = {number: stack.enter_context(services.ledger()) for number in (long, SHORT)}
        for number, ledger in ledgers.items():
            console.print(f"  writing a history of {number:,} leads")
            _write_history(ledger, number)
        for ledger in ledgers.values():
            _cost(ledger, start=0)  # warms caches and prepared statements
        starts = iter(range(_DUE, 1_000_000_000, _DUE))
        numbers = interleave(
            rounds,
            {
                f"us a lead, history {long:,}": lambda: _cost(ledgers[long], start=next(starts)),
                f"us a lead, history {SHORT:,}": lambda: _cost(ledgers[SHORT], start=next(starts)),
            },
        )
    after, before = numbers.values()
    note = f"claim and record of {_AT_ONCE} leads at a time, PostgreSQL, {long:,} leads of history against {SHORT:,}"
    return [compare("claim_history", after, before, unit="us/lead", goal=1.2, better="lower", note=note)]


def _write_history(ledger: Ledger, number: int) -> None:
    """Write it without indexes and foreign keys, which are built afterwards: minutes for ten million, not an hour."""
    ledger.campaigns.ensure(CAMPAIGN, now=datetime.now(UTC))
    with ledger.database.write() as connection:
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
        connection.execute(sa.text("SET LOCAL maintenance_work_mem = '512MB'"))
        constraints = connection.execute(sa.text(_CONSTRAINTS)).all()
        for one in constraints:
            connection.execute(sa.text(f"ALTER TABLE {one.table_name} DROP CONSTRAINT {one.name}"))
        indexes = connection.execute(sa.text(_INDEXES)).all()
        for one in indexes:
            connection.execute(sa.text(f"DROP INDEX {one.indexname}"))
        for table in _FILLED:  # the tallies look up the lead of each attempt, by the key that is gone
            connection.execute(sa.text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
        connection.execute(sa.text(_HISTORY), {"campaign": CAMPAIGN, "number": number})
        connection.execute(sa.text(_ATTEMPTS))
        for one in indexes:
            connection.execute(sa.text(one.indexdef))
        for one in reversed(constraints):
            connection.execute(sa.text(f"ALTER TABLE {one.table_name} ADD CONSTRAINT {one.name} {one.definition}"))
        for table in _FILLED:
            connection.execute(sa.text(f"ALTER TABLE {table} ENABLE TRIGGER USER"))
    _vacuum(ledger)


def _vacuum(ledger: Ledger) -> None:
    with ledger.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE leads"))
        connection.execute(sa.text("VACUUM ANALYZE attempts"))
        connection.execute(sa.text("CHECKPOINT"))


def _cost(ledger: Ledger, *, start: int) -> float:
    """Microseconds a lead for claim and record."""
    fill(ledger, _DUE, start=start)
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=datetime.now(UTC))
    began, done = time.perf_counter(), 0
    while True:
        now = datetime.now(UTC)
        claims = ledger.leads.claim(CAMPAIGN, _AT_ONCE, lease=timedelta(minutes=2), now=now)
        if not claims:
            break
        answers = [
            Answer(one, Outcome.ACCEPTED, now, timedelta(milliseconds=80), 200, one.lead_id.hex[:24]) for one in claims
        ]
        settled = [Settlement(one, LeadState.SUBMITTED, now, one.claim.attempts + 1) for one in answers]
        done += ledger.leads.record(campaign, settled, probe_after=timedelta(seconds=30), now=now).settled
    took = time.perf_counter() - began
    if done != _DUE:
        raise RuntimeError(f"{done:,} of {_DUE:,} leads were settled")
    return took / done * 1e6
