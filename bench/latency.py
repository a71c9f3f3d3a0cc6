"""Latency of an idle pipeline: from `enqueue` to the POST on the wire, and from a webhook to the merged call.

One lead at a time, with a rest between: every part waits for work when it comes. Workers run as the Procfile has them,
web server included. A POST has arrived when the sandbox notes it; an event is merged when PostgreSQL tells of the
commit that wrote its call. The baseline is one Celery round trip, `delay()` and `get()` of a task that does nothing, on
the same broker, by a worker with the same options. Leads, events and round trips take turns.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator

import psycopg
import sqlalchemy as sa

from bench import fake_leads
from bench.backends import CAMPAIGN, Absent, Backends, Sandbox, await_
from bench.calls import event_bodies
from bench.figures import Figure, compare, console
from bench.webhook import listens
from pipeline import enqueue
from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Supervisor
from pipeline.ledger import Ledger
from pipeline.settings import Settings

_LEADS = 20  # a round
_REST_SECONDS = 0.2  # after each lead, event and round trip
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")
_TELL = """
CREATE FUNCTION tell_of_call() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_notify('merged', NEW.call_sid); RETURN NULL; END $$;
CREATE TRIGGER tell AFTER INSERT OR UPDATE ON calls FOR EACH ROW EXECUTE FUNCTION tell_of_call();
"""


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    leads = _LEADS // 2 if quick else _LEADS
    services.clean_valkey()
    with services.ledger() as ledger, services.sandbox() as sandbox:
        settings = services.settings(
            database_url=ledger.database.url.render_as_string(hide_password=False), futwork_base_url=sandbox.base_url
        )
        with services.processes(services.environment(settings)) as stack, _merges(ledger) as merged:
            port = _start(stack)
            os.environ["BROKER_URL"] = services.broker_url  # the peer, like its own users, reads it at import
            pipeline = _Pipeline(settings, sandbox, port, merged)
            pipeline.take_turns(range(2))  # everything that happens once happens now
            numbers: dict[str, list[float]] = {"post": [], "merge": [], "celery": []}
            for number in range(rounds):
                taken = pipeline.take_turns(range((number + 1) * leads, (number + 2) * leads))
                for name, seconds in taken.items():
                    numbers[name].append(statistics.median(seconds) * 1000)
                shown = ", ".join(f"{name} {each[-1]:.1f} ms" for name, each in numbers.items())
                console.print(f"  round {number + 1}/{rounds}  {shown}", highlight=False)
    services.clean_valkey()
    note = f"p50 of {leads} in each round, against delay() and get() of a Celery task; PostgreSQL, prefork, 2 processes"
    return [
        compare(
            "latency_post", numbers["post"], numbers["celery"], unit="ms", goal=4.0, better="lower",
            note=f"enqueue to the POST at the sandbox; {note}",
        ),
        compare(
            "latency_merge", numbers["merge"], numbers["celery"], unit="ms", goal=4.0, better="lower",
            note=f"webhook request to the commit that merged its event; {note}",
        ),
    ]  # fmt: skip


class _Pipeline:
    """A running pipeline that is asked one thing at a time."""

    def __init__(self, settings: Settings, sandbox: Sandbox, port: int, merged: dict[str, float]) -> None:
        self._settings = settings
        self._sandbox = sandbox
        self._web = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._merged = merged

    def take_turns(self, numbers: range) -> dict[str, list[float]]:
        """How long each lead, each event and each round trip took, in seconds."""
        from bench.peers.round_trip import round_trip

        enqueued: dict[str, float] = {}
        called: dict[str, float] = {}
        trips: list[float] = []
        rows = list(fake_leads.rows(len(numbers), start=numbers.start))
        bodies = [
            body.replace(b"NNNNNNNNNNNN", b"%012d" % number)
            for number, body in zip(numbers, event_bodies(len(numbers), start=numbers.start), strict=True)
        ]
        for row, body in zip(rows, bodies, strict=True):
            began = time.time()
            if enqueue(CAMPAIGN, [row], settings=self._settings).accepted != 1:
                raise RuntimeError("a lead was refused")
            enqueued[row["phone"]] = began
            time.sleep(_REST_SECONDS)
            began = time.perf_counter()
            round_trip()
            trips.append(time.perf_counter() - began)
            time.sleep(_REST_SECONDS)
            call_sid = json.loads(body)["callSid"]
            called[call_sid] = time.time()
            self._post_event(body)
            time.sleep(_REST_SECONDS)
        await_(lambda: called.keys() <= self._merged.keys(), "merging the last event")
        await_(lambda: enqueued.keys() <= self._arrivals().keys(), "the last POST")
        arrived = self._arrivals()
        return {
            "post": [arrived[phone] - began for phone, began in enqueued.items()],
            "merge": [self._merged[call_sid] - began for call_sid, began in called.items()],
            "celery": trips,
        }

    def _post_event(self, body: bytes) -> None:
        headers = {"x-api-key": "bench-token", "Content-Type": "application/json"}
        self._web.request("POST", "/webhooks/futwork", body, headers)
        answer = self._web.getresponse()
        answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"an event was answered {answer.status}")

    def _arrivals(self) -> dict[str, float]:
        return {one["phone"]: one["time"] for one in self._sandbox.journal()}


def _start(stack: Supervisor) -> int:
    """Start workers and web server as the Procfile has them, and the peer's worker; return the web server's port."""
    stack.celery("dispatch", "worker", "-Q", "dispatch", "-c", "2", "-n", "dispatch@%h", *_QUIET)
    stack.celery("records", "worker", "-Q", "intake,events,upkeep", "-c", "2", "-n", "records@%h", *_QUIET)
    peer = ["-m", "celery", "--quiet", "-A", "bench.peers.round_trip", "worker", "-c", "2", "-n", "peer@%h", *_QUIET]
    stack.start("peer", peer)
    port = free_port()
    stack.start("web", ["-m", "pipeline.web", "--host", "127.0.0.1", "--port", str(port), "--processes", "1"])
    await_(lambda: listens(port), "the web server")
    return port


@contextlib.contextmanager
def _merges(ledger: Ledger) -> Iterator[dict[str, float]]:
    """When each call was committed first, by its id, as PostgreSQL tells of it."""
    with ledger.database.write() as connection:
        connection.execute(sa.text(_TELL))
    url = ledger.database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    merged: dict[str, float] = {}
    over = threading.Event()

    def listen() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("LISTEN merged")
            while not over.is_set():
                for told in connection.notifies(timeout=0.5):
                    merged.setdefault(told.payload, time.time())

    listener = threading.Thread(target=listen, name="merges", daemon=True)
    listener.start()
    try:
        yield merged
    finally:
        over.set()
        listener.join(5)
