"""Post-call events persisted and merged a second, on PostgreSQL, by a worker with two processes.

The events wait in the broker when the worker starts: ours in messages of as many as the webhook's 16 threads put into
one under load, the peer's one a message. Each call has its usual one to four events, and its lead in the ledger. The
clock runs from the tenth event in a hundred to the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

import orjson
import sqlalchemy as sa

from bench.backends import Absent, Backends, run_json
from bench.calls import stories
from bench.figures import Figure, compare, interleave
from bench.submit import fill
from pipeline.broker import EVENTS_A_MESSAGE, Broker, WebEvent, celery_app, encode_events
from pipeline.ledger import Ledger

CALLS = 4_000
PEER_CALLS = 800
_THREADS = 16
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    calls = CALLS // 4 if quick else CALLS
    peer_calls = PEER_CALLS // 2 if quick else PEER_CALLS
    numbers = interleave(
        rounds,
        {
            f"messages of {_THREADS}": lambda: ours(services, calls, _THREADS),
            f"messages of {EVENTS_A_MESSAGE}": lambda: ours(services, calls, EVENTS_A_MESSAGE),
            "a task an event, ORM upsert": lambda: peer(services, peer_calls),
        },
    )
    small, full, other = numbers.values()
    note = f"2 worker processes, events of {calls:,} calls ({peer_calls:,} for the peer), against a task an event"
    return [
        compare(
            "events", small, other, unit="events/s", goal=10, note=f"messages of {_THREADS}, as under load; {note}"
        ),
        compare(
            "events_full", full, other, unit="events/s", goal=None, note=f"full messages of {EVENTS_A_MESSAGE}; {note}"
        ),
    ]


def ours(services: Backends, calls: int, size: int) -> float:
    """Events a second of the `events` stage."""
    services.clean_valkey()
    with services.ledger() as ledger:
        settings = services.settings(database_url=ledger.database.url.render_as_string(hide_password=False))
        fill(ledger, calls)
        with ledger.database.write() as connection:
            connection.execute(sa.text("UPDATE leads SET state = 'submitted', submitted_at = now(), attempts = 1"))
        bodies = in_order_of_time(stories(calls))
        broker = Broker(celery_app(settings, works=False))
        for place in range(0, len(bodies), size):
            group = [WebEvent(body, datetime.now(UTC)) for body in bodies[place : place + size]]
            broker.publish("pipeline.events", encode_events(group), about="(bench)")
        with services.processes(services.environment(settings)) as stack:
            stack.celery("records", "worker", "-Q", "events", "-c", "2", "-n", "records@%h", *_QUIET)
            rate = _clocked(ledger, "SELECT count(*) FROM call_events WHERE state = 'merged'", len(set(bodies)))
        with ledger.database.read() as connection:
            called = connection.scalar(sa.text("SELECT count(*) FROM leads WHERE state = 'called'"))
        if called != calls:
            raise RuntimeError(f"{called:,} of {calls:,} leads are called")
    return rate


def peer(services: Backends, calls: int) -> float:
    """Events a second of the peer."""
    from celery import Celery

    services.clean_valkey()
    with services.ledger() as ledger:
        url = ledger.database.url.render_as_string(hide_password=False)
        run_json(["-m", "bench.peers.orm_event"], {"BROKER_URL": services.broker_url, "DATABASE_URL": url})
        bodies = in_order_of_time(stories(calls))
        app = Celery("filler", broker=services.broker_url, set_as_current=False)
        with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
            for body in bodies:
                app.send_task("bench.peers.orm_event.handle_event", args=[orjson.loads(body)], producer=producer)
        environment = {"BROKER_URL": services.broker_url, "DATABASE_URL": url}
        with services.processes(environment) as stack:
            stack.start(
                "peer", ["-m", "celery", "-A", "bench.peers.orm_event", "worker", "-c", "2", "-n", "peer@%h", *_QUIET]
            )
            # It keeps no row an event: what it has not acknowledged yet is what is left.
            left = services.valkey

            def done() -> int:
                return len(bodies) - left.llen("celery") - left.hlen("unacked")

            return _clocked_by(done, len(bodies))


def in_order_of_time(told: list[list[bytes]]) -> list[bytes]:
    """First events first, as they come in while hundreds of calls are under way."""
    longest = max(map(len, told))
    window = 200
    return [
        story[stage]
        for place in range(0, len(told), window)
        for stage in range(longest)
        for story in told[place : place + window]
        if stage < len(story)
    ]


def _clocked(ledger: Ledger, query: str, number: int) -> float:
    def done() -> int:
        with ledger.database.read() as connection:
            return connection.scalar(sa.text(query))

    return _clocked_by(done, number)


def _clocked_by(done: Callable[[], int], number: int) -> float:
    """Events a second from the tenth part of *number* to all of them."""
    deadline = time.monotonic() + 300
    first, started = 0, 0.0
    while (now := done()) < number:
        if not first and now >= number // 10:
            first, started = now, time.perf_counter()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{now:,} of {number:,} events in 300 s")
        time.sleep(0.03)
    return (number - first) / (time.perf_counter() - started)
