"""How long ten leads take behind a campaign of a million, against the same ten alone.

Two dispatch processes and one account's limit. The large campaign has been sending for a while when the ten are handed
to intake; the clock runs from there until Futwork has accepted the tenth. Alone, nothing else is in the ledger.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import sqlalchemy as sa

from bench import fake_leads
from bench.backends import CAMPAIGN, Absent, Backends, Sandbox, await_
from bench.figures import Figure, compare, interleave
from pipeline.broker import lead_batch
from pipeline.ledger import Ledger
from pipeline.wiring import Services

LEADS = 1_000_000
_TEN = 10
_RATE = "200/s"
_LARGE, _SMALL = CAMPAIGN[:-1] + "a", CAMPAIGN[:-1] + "b"
_SAMPLE = 5  # times ten leads in a round, one after the other; their mean is the round's number
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")

_FILL = """
INSERT INTO leads (id, campaign_id, key, phone, data, state, due_at, expires_at, batch_id, accepted_at, changed_at)
SELECT gen_random_uuid(), :campaign, phone, phone, '{"customer_name": "Asha"}', 'queued', now(),
       now() + interval '2 days', :batch, now(), now()
FROM (SELECT '+91' || (7000000000 + n) AS phone FROM generate_series(1, :number) AS n) AS numbered
"""

_OPEN = sa.text("SELECT count(*) FROM leads WHERE campaign_id = :campaign AND state IN ('queued', 'sending')")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    number = LEADS // 10 if quick else LEADS
    with services.ledger() as crowded, services.ledger() as empty:
        crowded.campaigns.ensure(_LARGE, now=crowded.now())
        with crowded.database.write() as connection:
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.execute(sa.text(_FILL), {"campaign": _LARGE, "batch": uuid.uuid4(), "number": number})
        with crowded.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("SET statement_timeout = 0"))
            connection.execute(sa.text("VACUUM ANALYZE leads"))
        starts = iter(range(0, 10_000_000, _TEN))
        numbers = interleave(
            rounds,
            {
                f"10 behind {number:,}": lambda: _mean(services, crowded, starts, busy=True),
                "10 alone": lambda: _mean(services, empty, starts, busy=False),
            },
        )
    behind, alone = numbers.values()
    note = f"seconds from intake to the tenth acceptance at {_RATE}, 2 dispatch processes, mean of {_SAMPLE} a round"
    return [compare("fairness", behind, alone, unit="s", goal=2.0, better="lower", note=note)]


def _mean(services: Backends, ledger: Ledger, starts: Iterator[int], *, busy: bool) -> float:
    services.clean_valkey()
    with services.sandbox() as sandbox:
        settings = services.settings(
            database_url=ledger.database.url.render_as_string(hide_password=False),
            futwork_base_url=sandbox.base_url,
            account_rate=_RATE,
            campaign_rate=_RATE,
        )
        with services.processes(services.environment(settings)) as stack:
            stack.celery("dispatch", "worker", "-Q", "dispatch", "-c", "2", "-n", "dispatch@%h", *_QUIET)
            parts = Services(settings)
            if busy:
                parts.wake(_LARGE)
                await_(lambda: sandbox.accepted() >= 100, "the large campaign")
            _one(parts, sandbox, next(starts))  # the worker has started when it is done
            mean = sum(_one(parts, sandbox, next(starts)) for _ in range(_SAMPLE)) / _SAMPLE
            parts.ledger.close()
    return mean


def _one(parts: Backends, sandbox: Sandbox, start: int) -> float:
    """Hand ten leads to intake, and say how long it took until the last of them arrived at the sandbox."""
    rows = [{**row, "phone": f"+91{row['phone']}"} for row in fake_leads.rows(_TEN, start=start)]
    phones = {row["phone"][-10:] for row in rows}
    began = time.time()
    parts.intake.take_in(lead_batch(_SMALL, rows, batch_id=uuid.uuid4()))

    def are_sent() -> bool:
        with parts.ledger.database.read() as connection:
            return not connection.scalar(_OPEN, {"campaign": _SMALL})

    await_(are_sent, "ten leads")
    arrived = [one["time"] for one in sandbox.journal() if one["phone"][-10:] in phones]
    if len(arrived) != _TEN:
        raise RuntimeError(f"{len(arrived)} POSTs for {_TEN} leads")
    return max(arrived) - began
