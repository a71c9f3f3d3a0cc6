"""Submissions a second of a worker with two processes: from the ledger to the sandbox and back into the ledger.

The leads are in the ledger (ours) or in the queue (the peers) before the worker starts. The clock runs from the tenth
lead in a hundred to the last, so that start-up does not count; ours stops only when the ledger shows every lead as
submitted. Each has a sandbox of its own, whose share of a core is reported, because it must not be the bottleneck.
`submit_async` has the peers that are no Celery.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import sqlalchemy as sa

from bench import fake_leads
from bench.backends import CAMPAIGN, Backends, Sandbox, await_
from bench.figures import Figure, compare, interleave
from pipeline.domain.lead import Lead
from pipeline.ledger import Ledger
from pipeline.wiring import Services

LEADS = 20_000
POSTED = 4_000  # by a peer, whose cost a lead does not depend on their number
_SWEEP_SECONDS = 2.0
_LONGEST_SECONDS = 300
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    leads = LEADS // 2 if quick else LEADS
    posted = POSTED // 2 if quick else POSTED
    shares: list[float] = []
    numbers = interleave(
        rounds,
        {
            "dispatch from the ledger": lambda: ours(services, leads, shares),
            "a task a lead, requests.post": lambda: celery(services, posted, session=False),
            "a task a lead, shared Session": lambda: celery(services, posted, session=True),
        },
    )
    mine, plain, shared = numbers.values()
    note = note_on(services, leads, posted, shares)
    return [
        compare("submit", mine, plain, unit="leads/s", goal=8, note=f"against requests.post in a task a lead; {note}"),
        compare("submit_session", mine, shared, unit="leads/s", goal=6, note=f"the same, shared Session; {note}"),
    ]


def note_on(services: Backends, leads: int, posted: int, shares: list[float]) -> str:
    """What was run, for a figure's note."""
    return (
        f"2 worker processes, {'PostgreSQL' if services.has_postgres else 'SQLite'} ledger, {leads:,} leads"
        f" ({posted:,} for the peer); the sandbox used {max(shares):.0%} of a core at most"
    )


def fill(ledger: Ledger, number: int, *, start: int = 0, campaign_id: str = CAMPAIGN) -> None:
    """Put leads into the ledger."""
    now = datetime.now(UTC)
    campaign = ledger.campaigns.ensure(campaign_id, now=now)
    leads = [
        Lead.model_construct(phone=f"+91{row['phone']}", data=row["data"], key=row["phone"])
        for row in fake_leads.rows(number, start=start)
    ]
    for place in range(0, number, 500):
        ledger.leads.take_in(
            campaign, leads[place : place + 500], batch_id=uuid.uuid4(), max_age=timedelta(days=2), now=now
        )


def ours(services: Backends, number: int, shares: list[float], **overrides: Any) -> float:
    """Submissions a second of two dispatch processes; the sandbox's share of a core goes to *shares*."""
    services.clean_valkey()
    with services.ledger() as ledger, services.sandbox() as sandbox:
        settings = services.settings(
            database_url=ledger.database.url.render_as_string(hide_password=False),
            futwork_base_url=sandbox.base_url,
            **overrides,
        )
        fill(ledger, number)
        if not ledger.database.is_sqlite:
            with ledger.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("VACUUM ANALYZE leads"))
        parts = Services(settings)
        with services.processes(services.environment(settings)) as stack:
            stack.celery("dispatch", "worker", "-Q", "dispatch", "-c", "2", "-n", "dispatch@%h", *_QUIET)
            process = psutil.Process(sandbox.pid)
            cpu, clock = sum(process.cpu_times()[:2]), time.perf_counter()

            def submitted() -> int:
                with ledger.database.read() as connection:
                    return connection.scalar(sa.text("SELECT count(*) FROM leads WHERE state = 'submitted'"))

            rate = clocked(sandbox, number, recorded=lambda: submitted() == number, nudge=lambda: parts.wake(CAMPAIGN))
            shares.append((sum(process.cpu_times()[:2]) - cpu) / (time.perf_counter() - clock))
    return rate


def celery(services: Backends, number: int, *, session: bool) -> float:
    """Submissions a second of the plain task, two processes."""
    from celery import Celery

    services.clean_valkey()
    app = Celery("filler", broker=services.broker_url, set_as_current=False)
    with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
        for row in fake_leads.rows(number):
            app.send_task(
                "bench.peers.celery_task.submit_lead", args=[CAMPAIGN, row["phone"], row["data"]], producer=producer
            )
    shape = {"SHARED_SESSION": "1" if session else "0"}
    with services.sandbox() as sandbox, services.processes(peer_environment(services, sandbox) | shape) as stack:
        stack.start(
            "peer", ["-m", "celery", "-A", "bench.peers.celery_task", "worker", "-c", "2", "-n", "peer@%h", *_QUIET]
        )
        return clocked(sandbox, number)


def peer_environment(services: Backends, sandbox: Sandbox) -> dict[str, str]:
    """Where a peer finds its broker and its sink."""
    return {"BROKER_URL": services.broker_url, "FUTWORK_BASE_URL": sandbox.base_url}


def clocked(
    sandbox: Sandbox,
    number: int,
    *,
    recorded: Callable[[], bool] = lambda: True,
    nudge: Callable[[], None] = lambda: None,
) -> float:
    """Leads a second from the tenth part of *number* to all of them, by the sandbox's journal, and *recorded*.

    *nudge* is called every two seconds, as the sweep would.
    """
    nudged = float("-inf")
    deadline = time.monotonic() + _LONGEST_SECONDS
    while (accepted := sandbox.accepted()) < number:
        if time.monotonic() - nudged > _SWEEP_SECONDS:
            nudged = time.monotonic()
            nudge()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{accepted:,} of {number:,} leads in {_LONGEST_SECONDS} s")
        time.sleep(0.1)
    written = 0.0  # of the last record; for a peer, which records nothing, the last arrival counts
    if not recorded():
        await_(recorded, "the record of the last lead", seconds=30)
        written = time.time()
    arrived = sorted(entry["time"] for entry in sandbox.journal() if entry["accepted"])
    if len(arrived) != number or sandbox.stats()["duplicates"]:
        raise RuntimeError(f"{len(arrived):,} submissions for {number:,} leads")
    begin = number // 10
    return (number - begin) / (max(arrived[-1], written) - arrived[begin - 1])
