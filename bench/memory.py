"""Memory of a worker's process after a million leads, against after ten thousand.

A dispatch worker with one child works off a ledger of leads; the child's own memory (USS: what would be free if it
ended) is read when the sandbox has accepted ten thousand, and again at the end. One round: it lasts minutes.
"""

from __future__ import annotations

import time

import psutil
import sqlalchemy as sa

from bench.backends import CAMPAIGN, Absent, Backends
from bench.figures import Figure, compare
from pipeline.wiring import Services

FEW, MANY = 10_000, 1_000_000
_LONGEST_SECONDS = 1800
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")

_LEADS = """
INSERT INTO leads (id, campaign_id, key, phone, data, state, attempts, due_at, expires_at, batch_id, accepted_at,
                   changed_at)
SELECT gen_random_uuid(), :campaign, '+9198' || lpad(n::text, 8, '0'), '+9198' || lpad(n::text, 8, '0'),
       '{"customer_name": "Asha Rao", "place": "Pune", "product": "home loan"}', 'queued', 0, now(),
       now() + interval '2 days', gen_random_uuid(), now(), now()
FROM generate_series(1, :number) AS n
"""


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:  # noqa: ARG001 - one round says it
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    many = MANY // 10 if quick else MANY
    few, late, seconds = _sizes(services, many)
    note = (
        f"USS of a dispatch worker's child after {many:,} leads against after {FEW:,}, curl engine, PostgreSQL;"
        f" {many / seconds:,.0f} leads/s with one child"
    )
    return [compare("memory", [late], [few], unit="MB", goal=1.1, better="lower", note=note)]


def _sizes(services: Backends, many: int) -> tuple[float, float, float]:
    services.clean_valkey()
    with services.ledger() as ledger, services.sandbox() as sandbox:
        settings = services.settings(
            database_url=ledger.database.url.render_as_string(hide_password=False), futwork_base_url=sandbox.base_url
        )
        ledger.campaigns.ensure(CAMPAIGN, now=ledger.now())
        with ledger.database.write() as connection:
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.execute(sa.text(_LEADS), {"campaign": CAMPAIGN, "number": many})
        with ledger.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE leads"))
        parts = Services(settings)
        with services.processes(services.environment(settings)) as stack:
            part = stack.celery("dispatch", "worker", "-Q", "dispatch", "-c", "1", "-n", "dispatch@%h", *_QUIET)
            worker, few, begun = psutil.Process(part.process.pid), 0.0, time.monotonic()
            while (accepted := sandbox.accepted()) < many:
                parts.wake(CAMPAIGN)
                if not few and accepted >= FEW:
                    few = _uss(worker)
                if time.monotonic() - begun > _LONGEST_SECONDS:
                    raise TimeoutError(f"{accepted:,} of {many:,} leads")
                time.sleep(0.1 if not few else 1.0)
            took = time.monotonic() - begun
            late = _uss(worker)
        parts.ledger.close()
    return few, late, took


def _uss(worker: psutil.Process) -> float:
    """The child's own memory in MB."""
    return max(child.memory_full_info().uss for child in worker.children(recursive=True)) / 1e6
