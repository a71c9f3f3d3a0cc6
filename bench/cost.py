"""What a lead costs, stage by stage: CPU time, transactions, Redis commands, bytes; and the CPU against bare POSTs.

A journey with real processes: leads are enqueued and taken in, dispatched to the sandbox, and called back, each stage
to its end before the next begins (the campaign is paused meanwhile), so that the counters of each can be told apart:
CPU time of the worker's processes, of the ledger's backends in PostgreSQL and of Valkey; `pg_stat_database`; Valkey's
`commandstats`; the sizes of tables with their indexes. `docs/scaling.md` is made of these numbers.

The figure `cpu` is that of enqueue, intake and dispatch in our own processes, against a loop over prepared requests on
the same libcurl, as many at once. The baseline keeps nothing and decides nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime

import psutil
import sqlalchemy as sa
from rich.table import Table

from bench import fake_leads
from bench.backends import CAMPAIGN, Absent, Backends, Sandbox, await_, run_json
from bench.calls import stories
from bench.events import in_order_of_time
from bench.figures import Figure, compare, console, interleave
from pipeline import enqueue
from pipeline.broker import EVENTS_A_MESSAGE, Broker, WebEvent, celery_app, encode_events
from pipeline.ledger import Ledger
from pipeline.wiring import Services

LEADS = 20_000
_CONCURRENCY = 128
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")
_TABLES = ("leads", "attempts", "batches", "calls", "call_events")


@dataclass(slots=True)
class Counters:
    """What the journey has used up to now."""

    producer_us: float
    """CPU time of `enqueue`."""
    worker_us: float
    """CPU time of the worker's processes."""
    postgres_us: float
    valkey_us: float
    transactions: float
    redis_commands: float
    leads_bytes: float
    attempts_bytes: float
    batches_bytes: float
    calls_bytes: float
    call_events_bytes: float

    def since(self, before: Counters, number: int) -> Counters:
        """The difference a lead."""
        return Counters(*((getattr(self, f.name) - getattr(before, f.name)) / number for f in fields(self)))


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    leads = LEADS // 4 if quick else LEADS
    journeys: list[dict[str, Counters]] = []

    def ours() -> float:
        journeys.append(_journey(services, leads))
        return sum(journeys[-1][stage].producer_us + journeys[-1][stage].worker_us for stage in ("take in", "dispatch"))

    numbers = interleave(
        rounds,
        {
            "a journey, CPU us a lead": ours,
            "bare POSTs, CPU us": lambda: _bare(services, leads),
            "bare POSTs one by one, CPU us": lambda: _bare(services, leads, ONE_BY_ONE="1"),
        },
    )
    mine, bare, one_by_one = numbers.values()
    beside = _show(journeys, leads)
    note = f"enqueue, intake and dispatch of {leads:,} leads in our processes ({beside})"
    return [
        compare("cpu", mine, bare, unit="us/lead", goal=1.6, better="lower", note=f"{note}; {_CONCURRENCY} at once"),
        compare("cpu_one_by_one", mine, one_by_one, unit="us/lead", goal=None, better="lower", note=note),
    ]


def _bare(services: Backends, number: int, **shape: str) -> float:
    with services.sandbox() as sandbox:
        url = f"{sandbox.base_url}/campaigns/{CAMPAIGN}/leads"
        return run_json(["-m", "bench.peers.bare_posts", url, str(number), str(_CONCURRENCY)], shape)["us"]


def _journey(services: Backends, number: int) -> dict[str, Counters]:
    """The cost a lead of each stage."""
    services.clean_valkey()
    producer_seconds = 0.0
    with services.ledger() as ledger, services.sandbox() as sandbox:
        settings = services.settings(
            database_url=ledger.database.url.render_as_string(hide_password=False), futwork_base_url=sandbox.base_url
        )

        def take_in() -> None:
            nonlocal producer_seconds
            rows = list(fake_leads.rows(number))
            begun = time.process_time()
            enqueue(CAMPAIGN, rows, settings=settings, publisher=publisher)
            producer_seconds += time.process_time() - begun
            _await_count(ledger, "leads", 500 + number)

        ledger.campaigns.ensure(CAMPAIGN, now=datetime.now(UTC))
        ledger.campaigns.pause(CAMPAIGN, reason="bench", now=datetime.now(UTC))
        publisher = Broker(celery_app(settings, works=False))
        enqueue(CAMPAIGN, list(fake_leads.rows(500, start=90_000_000)), settings=settings, publisher=publisher)
        parts = Services(settings)
        with services.processes(services.environment(settings)) as stack:
            part = stack.celery(
                "all", "worker", "-Q", "intake,dispatch,events,upkeep", "-c", "2", "-n", "all@%h", *_QUIET
            )
            worker = psutil.Process(part.process.pid)
            _await_count(ledger, "leads", 500)  # warm: connections, imports, prepared statements
            stages: dict[str, Callable[[], None]] = {
                "take in": take_in,
                "dispatch": lambda: _dispatch(ledger, sandbox, parts, number + 500),
                "events": lambda: _call_back(ledger, publisher, number),
            }
            found: dict[str, Counters] = {}
            for name, run in stages.items():
                before = _count(services, ledger, worker, producer_seconds)
                run()
                _settle(ledger)
                found[name] = _count(services, ledger, worker, producer_seconds).since(before, number)
        parts.ledger.close()
    return found


def _dispatch(ledger: Ledger, sandbox: Sandbox, parts: Backends, number: int) -> None:
    ledger.campaigns.resume(CAMPAIGN)
    parts.wake(CAMPAIGN)
    await_(lambda: sandbox.accepted() >= number or parts.wake(CAMPAIGN), "dispatch", seconds=300, step=0.5)
    await_(lambda: _scalar(ledger, "SELECT count(*) FROM leads WHERE state = 'submitted'") >= number, "the record")


def _call_back(ledger: Ledger, publisher: Broker, number: int) -> None:
    bodies = in_order_of_time(stories(number))
    for place in range(0, len(bodies), EVENTS_A_MESSAGE):
        group = [WebEvent(body, datetime.now(UTC)) for body in bodies[place : place + EVENTS_A_MESSAGE]]
        publisher.publish("pipeline.events", encode_events(group), about="(bench)")
    merged = "SELECT count(*) FROM call_events WHERE state = 'merged'"
    await_(lambda: _scalar(ledger, merged) >= len(set(bodies)), "the events", seconds=300, step=0.5)


def _await_count(ledger: Ledger, table: str, number: int) -> None:
    await_(lambda: _scalar(ledger, f"SELECT count(*) FROM {table}") >= number, table, seconds=300, step=0.2)


def _scalar(ledger: Ledger, query: str) -> float:
    with ledger.database.read() as connection:
        return connection.scalar(sa.text(query)) or 0


def _settle(ledger: Ledger) -> None:
    """Let PostgreSQL's counters catch up with what its backends did: each adds to them once a second at most."""
    time.sleep(1.5)
    _scalar(ledger, "SELECT count(*) FROM pg_stat_clear_snapshot()")


def _count(services: Backends, ledger: Ledger, worker: psutil.Process, producer_seconds: float) -> Counters:
    database = ledger.database.url.database or ""
    tree = [worker, *worker.children(recursive=True)]
    valkey = services.valkey.info("cpu")
    commands = sum(one["calls"] for one in services.valkey.info("commandstats").values())
    sizes = [_scalar(ledger, f"SELECT pg_total_relation_size('{table}')") for table in _TABLES]
    return Counters(
        producer_seconds * 1e6,
        sum(_cpu_seconds(one) for one in tree) * 1e6,
        sum(_cpu_seconds(one) for one in psutil.process_iter(["name"]) if _serves(one, database)) * 1e6,
        (valkey["used_cpu_sys"] + valkey["used_cpu_user"]) * 1e6,
        _scalar(ledger, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"),
        commands,
        *sizes,
    )


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0  # it ended meanwhile; its share is lost, and small
    return times.user + times.system


def _serves(process: psutil.Process, database: str) -> bool:
    try:
        return process.info["name"] == "postgres" and database in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _show(journeys: list[dict[str, Counters]], leads: int) -> str:
    """Print the medians as a table; return the CPU time beside ours in a few words."""
    table = Table("a lead", *journeys[0], title=f"medians of {len(journeys)} journeys of {leads:,} leads")
    medians: dict[str, list[float]] = {}
    for field in fields(Counters):
        medians[field.name] = [statistics.median(getattr(one[s], field.name) for one in journeys) for s in journeys[0]]
        table.add_row(field.name, *(f"{value:,.2f}" for value in medians[field.name]))
    console.print(table)
    postgres, valkey = sum(medians["postgres_us"][:2]), sum(medians["valkey_us"][:2])
    return f"PostgreSQL's backends take {postgres:.0f} us more, Valkey {valkey:.0f}"
