"""Workers as an operator runs them, and everything that can happen to one between a message and the ledger."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import pickle
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis
import sqlalchemy as sa
from celery import Celery

from pipeline import EnqueueFailed, enqueue
from pipeline.broker import VISIBILITY_SECONDS, WebEvent, encode_events, lead_batch
from pipeline.ledger import LeadFilter, Ledger
from pipeline.worker.app import _MOST_DEATHS
from tests.chaos.brokers import RabbitVhost, ServiceMissing
from tests.conftest import CAMPAIGN, empty, make_lead, missing
from tests.integration.test_broker import rabbitmq_alone
from tests.journey import deadly_worker_names as deadly
from tests.journey.fleet import Fleet, Process, Valkey, signal_process
from tests.waiting import until

pytestmark = [pytest.mark.journey, pytest.mark.timeout(150)]


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    valkey = Valkey(tmp_path / "valkey")
    yield valkey
    valkey.kill()


@pytest.fixture
def make_fleet(own_valkey: Valkey, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    fleets = []

    def make(**overrides: Any) -> Fleet:
        values = {
            "broker_url": own_valkey.url,
            "redis_url": own_valkey.url,
            "database_url": f"sqlite:///{tmp_path / 'ledger.db'}",
        }
        fleets.append(Fleet(tmp_path, **(values | overrides)))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.end()


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Iterator[Fleet]:
    """A fleet on SQLite and a Valkey of its own; at its end no log holds a phone number that was sent."""
    fleet = make_fleet()
    fleet.ledger.migrate()
    yield fleet
    assert phones_in(fleet.logs()) == []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Process]]:
    """A worker on SQLite for the journeys that leave it as it is; it ends in good order, with nothing in the broker."""
    folder = tmp_path_factory.mktemp("running")
    valkey = Valkey(folder / "valkey")
    fleet = Fleet(folder, broker_url=valkey.url, redis_url=valkey.url, database_url=f"sqlite:///{folder / 'ledger.db'}")
    fleet.ledger.migrate()
    worker = fleet.worker(log_level="debug")
    try:
        yield fleet, worker
        assert worker.stop() < 10
        assert is_idle(fleet)
    finally:
        fleet.end()
        valkey.kill()


@pytest.fixture
def watched(running: tuple[Fleet, Process]) -> Iterator[tuple[Fleet, Process]]:
    """That worker and its fleet, with an empty ledger and nothing under way, which it is again at the end."""
    fleet, worker = running
    empty(fleet.ledger)
    yield fleet, worker
    until(lambda: is_idle(fleet), what=lambda: worker.log)
    assert worker.alive
    assert phones_in(worker.log) == []


@pytest.fixture(scope="module")
def running_on_postgresql(
    tmp_path_factory: pytest.TempPathFactory, _postgres_migrated: str
) -> Iterator[tuple[Fleet, Process]]:
    folder = tmp_path_factory.mktemp("postgresql")
    valkey = Valkey(folder / "valkey")
    fleet = Fleet(folder, broker_url=valkey.url, redis_url=valkey.url, database_url=_postgres_migrated)
    worker = fleet.worker()
    try:
        yield fleet, worker
    finally:
        fleet.end()
        valkey.kill()


@pytest.fixture
def on_postgresql(
    running_on_postgresql: tuple[Fleet, Process], postgres_ledger: Ledger
) -> Iterator[tuple[Fleet, Process]]:
    """A worker on PostgreSQL, for whatever befalls the database, and an empty ledger."""
    fleet, worker = running_on_postgresql
    yield fleet, worker
    until(lambda: is_idle(fleet), what=lambda: worker.log)
    assert worker.alive
    assert phones_in(worker.log) == []


def is_idle(fleet: Fleet) -> bool:
    return sum(fleet.broker.depths().values()) == in_flight(fleet) == 0


@contextlib.contextmanager
def says_anew(worker: Process, text: str) -> Iterator[None]:
    """Its log holds *text* once more, at the latest a while after the block."""
    before = worker.log.count(text)
    yield
    until(lambda: worker.log.count(text) > before, what=lambda: f"{text!r} not once more in\n{worker.log}")


def phones_in(text: str) -> list[str]:
    """The numbers of `rows` and `make_lead` that a log gives away; digests and durations are none."""
    return re.findall(r"(?<![0-9a-f.])(?:91)?9800\d{6}(?![0-9a-f])", text)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"phone": f"9800{number:06d}", "data": {"name": f"Lead {number}"}} for number in numbers]


def quarantined(fleet: Fleet) -> list[Any]:
    return fleet.ledger.quarantine.waiting(limit=1000)


def push_raw(fleet: Fleet, body: Any, *, queue: str = "intake", **properties: Any) -> None:
    """Put a message into a queue as some other program might."""
    with kombu.Connection(fleet.broker_url) as connection:
        kombu.Producer(connection).publish(
            body, routing_key=queue, exchange="", **({"content_type": "application/json"} | properties)
        )


def task_headers(task: str = "pipeline.intake", **overrides: Any) -> dict[str, Any]:
    return {"lang": "py", "task": task, "id": str(uuid.uuid4()), "retries": 0} | overrides


# The way in


def test_leads_that_were_enqueued_are_in_the_ledger_and_in_no_log(watched: tuple[Fleet, Process]) -> None:
    fleet, worker = watched
    report = enqueue(CAMPAIGN, rows(1200), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1200, what=lambda: worker.log)
    found = {str(lead["id"]) for lead in fleet.ledger.reports.leads(LeadFilter(), limit=2000)}
    assert found == {str(id_) for id_ in report.ids}
    assert phones_in(worker.log) == []
    assert fleet.broker.depths()["intake"] == 0


def test_leads_that_were_enqueued_are_in_a_ledger_on_postgresql(on_postgresql: tuple[Fleet, Process]) -> None:
    fleet, worker = on_postgresql
    enqueue(CAMPAIGN, rows(700), settings=fleet.settings)
    until(lambda: fleet.accepted() == 700, what=lambda: worker.log)


def test_a_foreign_celery_client_can_hand_leads_in_and_events_do_not_show_them(watched: tuple[Fleet, Process]) -> None:
    """As the wire contract has it: no code of ours, no batch id, no version."""
    fleet, _ = watched
    client = Celery("somebody-elses", broker=fleet.broker_url, set_as_current=False)
    seen: list[dict[str, Any]] = []
    stop = threading.Event()

    def listen() -> None:
        with client.connection_for_read() as connection:
            receiver = client.events.Receiver(connection, handlers={"*": seen.append})
            while not stop.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.3, wakeup=False)
                except TimeoutError:
                    continue

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        until(lambda: [event for event in seen if event["type"] == "worker-heartbeat"])
        client.send_task("pipeline.intake", [{"campaign_id": CAMPAIGN, "leads": rows(3)}], queue="intake")
        until(lambda: fleet.accepted() == 3, what=fleet.logs)
        until(lambda: [event for event in seen if event["type"] == "task-succeeded"])
    finally:
        stop.set()
        listener.join(10)
    [received] = [event for event in seen if event["type"] == "task-received" and event["name"] == "pipeline.intake"]
    assert received["args"] == f"({CAMPAIGN}, 3 leads)"
    assert phones_in(json.dumps(seen, default=str)) == []


def test_a_wrong_setting_ends_a_worker_with_one_clear_line(fleet: Fleet) -> None:
    worker = fleet.worker(ready=False, account_rate="fast")
    until(lambda: not worker.alive)
    assert worker.log == "pipeline: ACCOUNT_RATE: must be a positive rate such as 20/s, 600/m or 5000/h\n"


def test_a_worker_on_rabbitmq_without_a_redis_for_the_limit_does_not_start(fleet: Fleet) -> None:
    own = {"broker_url": "amqp://guest:guest@127.0.0.1:1//", "redis_url": ""}
    worker = fleet.start(["-c", "import worker"], name="worker", **own)
    until(lambda: not worker.alive)
    assert worker.log.startswith("pipeline: REDIS_URL is not set, and BROKER_URL is no Redis")
    assert worker.log.count("\n") == 1


# Messages that nobody can work on


def deeply_nested(levels: int) -> str:
    return '{"campaign_id":"c","leads":[{"phone":"9800000001","data":' + '{"a":' * levels + "1" + "}" * levels + "}]}"


lengths = itertools.count()


def malformed() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Messages for the queue `intake`, each with how it is sent."""
    good = {"campaign_id": CAMPAIGN, "leads": rows(1)}

    def body(args: Any, kwargs: Any = None, embed: Any = None) -> str:
        # Each of its own length, for the quarantine keeps a body once.
        return json.dumps([args, {} if kwargs is None else kwargs, {} if embed is None else embed]) + " " * next(
            lengths
        )

    def task(text: str | bytes, **headers: Any) -> tuple[Any, dict[str, Any]]:
        return text, {"headers": task_headers(**headers)}

    return {
        "unknown task": task(body([good]), task="pipeline.nonsense"),
        "task name no text": task(body([good]), task=["pipeline.intake"]),
        "task name missing": (body([good]), {"headers": {"id": "x"}}),
        "id missing": (body([good]), {"headers": {"task": "pipeline.intake", "lang": "py"}}),
        "no task at all": ('"hello 9800000001"', {}),
        "null": ("null", {"headers": task_headers()}),
        "a number": task("7"),
        "wrong json": task('[[{"campaign_id": "98000000'),
        "not utf-8": task(b"\xff\xfe[[]]"),
        "empty body": task(b""),
        "arguments missing": task("[]"),
        "two parts only": task(json.dumps([[good], {}])),
        "arguments an object": task(body({"campaign_id": CAMPAIGN})),
        "arguments text": task(body("9800000001")),
        "no argument": task(body([])),
        "two arguments": task(body([good, good])),
        "named arguments": task(body([good], {"phone": "9800000001"})),
        "named arguments a list": task(body([good], [1])),
        "argument text": task(body(["9800000001"])),
        "argument null": task(body([None])),
        "leads no list": task(body([{"campaign_id": CAMPAIGN, "leads": {"phone": "9800000001"}}])),
        "no campaign": task(body([{"leads": rows(1)}])),
        "campaign a path": task(body([{"campaign_id": "../x", "leads": rows(1)}])),
        "batch no uuid": task(body([good | {"batch": "x"}])),
        "version text": task(body([{"v": "9", "leads": 1}])),
        "pickle": (pickle.dumps([[good], {}, {}]), {
            "headers": task_headers(), "content_type": "application/x-python-serialize", "content_encoding": "binary"
        }),
        "content type unknown": (body([good]), {"headers": task_headers(), "content_type": "application/x-9800000001"}),
        "protocol 1 without arguments": (json.dumps({"task": "pipeline.intake", "id": "p1", "kwargs": {"p1": 1}}), {}),
        "protocol 1 garbage": (json.dumps({"task": "pipeline.intake", "id": "p2", "args": 7, "kwargs": 8}), {}),
        "protocol 1 unknown": (json.dumps({"task": "nonsense", "id": "p3", "args": [good], "kwargs": {}}), {}),
        "eta no time": task(body([good]), eta="soon"),
        "expires no time": task(body([good]), expires={"a": 1}),
        "5 MB of nothing": task(body([{"campaign_id": CAMPAIGN, "leads": "9800000001" * 500_000}])),
        "deep arguments": task(body([json.loads("[" * 900 + "]" * 900)])),
        "deeper than json goes": task("[[" + "[" * 100_000 + "]" * 100_000 + "],{},{}]"),
        "typed json": task(body([{"__type__": "nonsense", "__value__": "9800000001"}])),
        "lone surrogate": task('[[{"campaign_id":"\\ud800","leads":[]}],{},{}]'),
        "huge number": task(body([{"campaign_id": 10**400, "leads": []}])),
        "nul": task(body([{"campaign_id": "a\0b", "leads": []}])),
    }  # fmt: skip


def test_malformed_messages_are_kept_in_quarantine_and_the_worker_goes_on(watched: tuple[Fleet, Process]) -> None:
    fleet, worker = watched
    children = {child.pid for child in worker.children()}
    messages = malformed()
    for body, properties in messages.values():
        push_raw(fleet, body, **properties)
    until(
        lambda: len(quarantined(fleet)) >= len(messages),
        what=lambda: worker.log + f"\n{len(quarantined(fleet))} of {len(messages)}",
    )
    enqueue(CAMPAIGN, rows(10), settings=fleet.settings)
    until(lambda: fleet.accepted() == 10, what=lambda: worker.log)
    kept = quarantined(fleet)
    assert len(kept) == len(messages)
    assert {one.kind for one in kept} == {"batch", "message"}
    assert {child.pid for child in worker.children()} == children
    until(lambda: is_idle(fleet), what=lambda: worker.log)
    reasons = {one.reason for one in kept}
    for part in ("nobody knows its task", "it is no Celery task", "it cannot be decoded", "untrusted content of type"):
        assert [reason for reason in reasons if part in reason], (part, reasons)


def envelope(leads: list[dict[str, Any]]) -> dict[str, Any]:
    """What kombu pushes onto a Redis list, as the wire contract shows it."""
    body = json.dumps([[{"campaign_id": CAMPAIGN, "leads": leads}], {}, {}]).encode()
    delivery = {"delivery_info": {"exchange": "", "routing_key": "intake"}, "delivery_tag": str(uuid.uuid4())}
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": task_headers(),
        "properties": {"body_encoding": "base64"} | delivery,
    }


def test_an_envelope_that_is_wrong_is_kept_in_quarantine_too(watched: tuple[Fleet, Process]) -> None:
    """The wire contract lets a producer push the envelope onto the list by itself, and so get it wrong."""
    fleet, worker = watched
    good = envelope(rows(1))
    properties = good["properties"]
    wrong = [
        "9800000001",
        '"9800000001"',
        "[1]",
        "{}",
        "not json 9800000001",
        b"\xff\xfe\x00",
        json.dumps({key: value for key, value in good.items() if key != "properties"}),
        json.dumps({key: value for key, value in good.items() if key != "body"}),
        json.dumps(good | {"properties": "9800000001"}),
        json.dumps(good | {"properties": properties | {"delivery_info": 7}}),
        json.dumps(good | {"properties": properties | {"delivery_tag": [1]}}),
        json.dumps(good | {"properties": {"body_encoding": "base64"}}),
        json.dumps(good | {"properties": properties | {"body_encoding": "rot13"}}),
        json.dumps(good | {"body": "*** no base64 9800000001 ***"}),
        json.dumps(good | {"body": 7}),
        json.dumps(good | {"headers": 7}),
    ]
    with own_client(fleet) as client:
        for one in wrong:
            client.lpush("intake", one)
        client.lpush("intake", json.dumps(envelope(rows(5))))
        until(lambda: fleet.accepted() == 5, what=lambda: worker.log)
        until(lambda: client.llen("intake") == client.hlen("unacked") == 0, what=lambda: worker.log)
    assert len(quarantined(fleet)) == len(wrong)
    assert {one.body for one in quarantined(fleet)} >= {one.encode() for one in wrong[:5] if isinstance(one, str)}
    assert worker.alive
    assert "Connection to broker lost" not in worker.log


@pytest.mark.parametrize("queue", ["events", "dispatch", "upkeep"])
def test_malformed_messages_in_the_other_queues_do_not_stop_the_worker(
    queue: str, watched: tuple[Fleet, Process]
) -> None:
    fleet, worker = watched
    task = {"events": "pipeline.events", "dispatch": "pipeline.dispatch", "upkeep": "pipeline.sweep"}[queue]
    bodies = ["[]", "null", "[[],{},{}]", "[[1,2,3],{},{}]", '[["9800000001"],{"x":1},{}]', '[[{"events":7}],{},{}]']
    for body in bodies:
        push_raw(fleet, body, queue=queue, headers=task_headers(task))
    fleet.broker.publish("pipeline.events", encode_events([WebEvent(b"{}", datetime.now(UTC))]), about="(1 events)")
    enqueue(CAMPAIGN, rows(1), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1 and sum(fleet.broker.depths().values()) == 0, what=lambda: worker.log)
    until(lambda: fleet.status()["events"]["raw"] == 1, what=lambda: worker.log)
    assert worker.alive
    if queue == "events":
        until(lambda: len(quarantined(fleet)) == len(bodies) + 1, what=lambda: worker.log)


def test_bad_rows_of_a_foreign_batch_are_kept_aside_and_the_good_ones_taken_in(watched: tuple[Fleet, Process]) -> None:
    bad = [
        '{"phone":"9800000009","data":{"a":"\\ud800"}}',
        '{"phone":"9800000009","data":{},"key":"\\ud800"}',
        '{"phone":"9800000009","data":{},"key":"a\\u0000b"}',
        '{"phone":"9800000009","data":{"a":%s}}' % ("9" * 400),
        '{"phone":"9800000009","data":%s}' % ('{"a":' * 500 + "1" + "}" * 500),
        '{"phone":"9800000009","data":{"a":NaN}}',
        "null",
        "7",
    ]
    leads = ",".join([json.dumps(row) for row in rows(5)] + bad)
    fleet, worker = watched
    push_raw(fleet, f'[[{{"campaign_id":"{CAMPAIGN}","leads":[{leads}]}}],{{}},{{}}]', headers=task_headers())
    until(lambda: fleet.accepted() == 5, what=lambda: worker.log)
    assert sorted(one.kind for one in quarantined(fleet)) == ["lead"] * len(bad)


def test_every_depth_of_nesting_ends_in_quarantine(watched: tuple[Fleet, Process]) -> None:
    """Parent, child and quarantine each have another limit; no depth may fall between them."""
    depths = range(800, 1000, 4)
    fleet, worker = watched
    for depth in depths:
        push_raw(fleet, "[[" + "[" * depth + "]" * depth + "],{},{}]", headers=task_headers())
        push_raw(fleet, f"[[{deeply_nested(depth)}],{{}},{{}}]", headers=task_headers())
    until(lambda: len(quarantined(fleet)) == 2 * len(depths), what=lambda: worker.log)
    assert worker.alive


def test_a_newer_message_is_left_in_the_queue_and_said_in_the_log(fleet: Fleet) -> None:
    worker = fleet.worker()
    fleet.broker.publish("pipeline.intake", {"v": 2, "campaign_id": CAMPAIGN, "rows": []}, about="()")
    worker.says("a newer release's message is left to newer workers")
    enqueue(CAMPAIGN, rows(5), settings=fleet.settings)
    until(lambda: fleet.accepted() == 5, what=lambda: worker.log)
    worker.stop()
    assert fleet.broker.depths()["intake"] == 1
    assert quarantined(fleet) == []
    assert worker.log.count("a newer release's message is left to newer workers") < 10  # it does not spin


# A ledger that is away


def test_while_the_sqlite_ledger_cannot_be_used_messages_stay_in_the_broker(make_fleet: Callable[..., Fleet]) -> None:
    """Good ones and malformed ones: first there are no tables yet, later the file cannot be opened."""
    fleet = make_fleet()
    worker = fleet.worker()
    push_raw(fleet, "null", headers=task_headers())
    push_raw(fleet, "[[7],{},{}]", headers=task_headers())
    worker.says("a message goes back to its queue")
    worker.says("the message goes back to its queue")
    enqueue(CAMPAIGN, rows(600), settings=fleet.settings)
    worker.says("run `pipeline migrate`")
    fleet.ledger.migrate()
    until(lambda: fleet.accepted() == 600 and len(quarantined(fleet)) == 2, what=lambda: worker.log)
    assert worker.log.count("the message goes back to its queue") < 20  # it does not spin

    fleet.ledger.close()
    for child in worker.children():  # those that come after them have the file to open
        child.kill()
    # Each in one step, for where SQLite finds no file it makes one, and drops the write-ahead log of the other.
    ledger, hidden, no_file = (fleet.folder / name for name in ("ledger.db", "hidden.db", "no_file"))
    no_file.symlink_to(fleet.folder)
    hidden.hardlink_to(ledger)
    no_file.replace(ledger)
    with says_anew(worker, "the message goes back to its queue"):
        enqueue(CAMPAIGN, rows(600, start=600), settings=fleet.settings)
    hidden.replace(ledger)
    until(lambda: fleet.accepted() == 1200, what=lambda: worker.log)
    assert len(quarantined(fleet)) == 2
    assert not (fleet.folder / "spool").exists()
    assert phones_in(worker.log) == []


def test_while_the_postgresql_database_is_away_messages_stay_in_the_broker(
    on_postgresql: tuple[Fleet, Process], postgres_ledger: Ledger, postgres_url: str
) -> None:
    fleet, worker = on_postgresql
    enqueue(CAMPAIGN, rows(1), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1, what=lambda: worker.log)
    name = sa.make_url(postgres_url).database
    server = sa.create_engine(sa.make_url(postgres_url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    fleet.ledger.close()
    postgres_ledger.close()
    with server.connect() as connection:
        end = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(end, {"name": name})
        try:
            with says_anew(worker, "the message goes back to its queue"):
                enqueue(CAMPAIGN, rows(600), settings=fleet.settings)
        finally:
            connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    server.dispose()
    until(lambda: fleet.accepted() == 600, what=lambda: worker.log)
    assert quarantined(fleet) == []


@pytest.mark.parametrize("trouble", ["table gone", "column gone", "standby"])
def test_a_database_that_answers_but_cannot_take_leads_loses_none(
    trouble: str, on_postgresql: tuple[Fleet, Process], postgres_ledger: Ledger, postgres_url: str
) -> None:
    """It is the database's fault, so nothing goes to quarantine: a failover would put every batch there."""
    fleet, worker = on_postgresql
    enqueue(CAMPAIGN, rows(1), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1, what=lambda: worker.log)
    name = sa.make_url(postgres_url).database
    everybody_out = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    break_it, mend_it = {
        "table gone": (["ALTER TABLE batches RENAME TO hidden"], ["ALTER TABLE hidden RENAME TO batches"]),
        "column gone": (["ALTER TABLE batches RENAME leads TO hidden"], ["ALTER TABLE batches RENAME hidden TO leads"]),
        "standby": (
            [f"ALTER DATABASE {name} SET default_transaction_read_only = on", everybody_out],
            [
                "SET default_transaction_read_only = off",
                f"ALTER DATABASE {name} RESET default_transaction_read_only",
                everybody_out,
            ],
        ),
    }[trouble]
    fleet.ledger.close()
    postgres_ledger.close()
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def change(statements: list[str]) -> None:
        with server.connect() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    change(break_it)
    try:
        with says_anew(worker, "the message goes back to its queue"):
            enqueue(CAMPAIGN, rows(600), settings=fleet.settings)
    finally:
        change(mend_it)
    until(lambda: fleet.accepted() == 600, what=lambda: worker.log)
    assert quarantined(fleet) == []


# CrashCounter


def test_killing_children_in_mid_intake_loses_nothing_and_takes_nothing_in_twice(
    watched: tuple[Fleet, Process],
) -> None:
    fleet, worker = watched
    killed, lost = 0, worker.log.count("WorkerLostError")
    with slow_ledger(fleet):
        for batch in range(10):
            enqueue(CAMPAIGN, rows(50, start=50 * batch), settings=fleet.settings)
        until(lambda: in_flight(fleet) >= 2, what=lambda: worker.log)
        for child in worker.children():
            signal_process(child, signal.SIGKILL)
            killed += 1
    until(lambda: fleet.accepted() == 500 and in_flight(fleet) == 0, seconds=60, what=lambda: worker.log)
    assert killed == 2
    assert worker.log.count("WorkerLostError") > lost
    assert fleet.broker.depths()["intake"] == 0
    assert quarantined(fleet) == []


def test_what_a_killed_worker_held_is_taken_up_by_another_in_time(fleet: Fleet) -> None:
    """The whole worker is killed in mid-intake; nothing tells the broker, which waits for VISIBILITY_SECONDS."""
    first = fleet.worker()
    with slow_ledger(fleet):
        for batch in range(4):
            enqueue(CAMPAIGN, rows(50, start=50 * batch), settings=fleet.settings)
        until(lambda: in_flight(fleet) >= 2, what=lambda: first.log)
        held = time.monotonic()
        first.kill()
    assert fleet.accepted() == 0
    second = fleet.worker()
    until(lambda: fleet.accepted() == 200, seconds=VISIBILITY_SECONDS + 20, what=lambda: second.log)
    assert time.monotonic() - held < VISIBILITY_SECONDS + 12
    until(lambda: in_flight(fleet) == 0)
    assert quarantined(fleet) == []


def test_a_batch_on_which_every_process_dies_ends_in_quarantine_after_a_few(fleet: Fleet) -> None:
    worker = fleet.worker(app="tests.journey.deadly_worker")
    message = lead_batch(deadly.KILLS_ITS_PROCESS, rows(3), batch_id=uuid.uuid4())
    fleet.broker.publish("pipeline.intake", message, about="()")
    enqueue(CAMPAIGN, rows(600, start=100), settings=fleet.settings)
    [kept] = until(lambda: quarantined(fleet), seconds=60, what=lambda: worker.log)
    assert json.loads(kept.body) == [[message], {}]
    assert "WorkerLostError" in kept.reason
    assert (fleet.folder / "deaths").read_text().count("\n") == _MOST_DEATHS + 1 == 4
    until(lambda: fleet.accepted() == 600, what=lambda: worker.log)
    until(lambda: fleet.broker.depths()["intake"] == in_flight(fleet) == 0)


@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_a_batch_on_which_every_worker_dies_ends_in_quarantine_after_a_few(
    broker: str, make_fleet: Callable[..., Fleet], request: pytest.FixtureRequest
) -> None:
    """A few are two here: the test above counts as many as there are."""
    if broker == "rabbitmq":
        url = request.getfixturevalue("rabbitmq_url")
        request.getfixturevalue("alone_on_rabbitmq")
        fleet = make_fleet(broker_url=url)
    else:
        fleet = make_fleet()
    fleet.ledger.migrate()
    message = lead_batch(deadly.KILLS_THE_WORKER, rows(3), batch_id=uuid.uuid4())
    fleet.broker.publish("pipeline.intake", message, about="()")
    deaths = 0
    while not quarantined(fleet):
        own = {"processes": 1, "ready": False, "deadly_visibility_seconds": 2}  # a test need not wait as long as a user
        own |= {"deadly_most_deaths": 1}
        worker = fleet.worker(app="tests.journey.deadly_worker", **own)
        until(
            lambda worker=worker: not worker.alive or quarantined(fleet),
            seconds=60,
            what=lambda worker=worker: worker.log,
        )
        deaths += not worker.alive
        assert deaths <= 2
    [kept] = quarantined(fleet)
    assert json.loads(kept.body) == [[message], {}]
    assert kept.reason == f"{deaths} worker processes died on it"
    assert deaths == 2
    assert phones_in(fleet.logs()) == []


# Ends and beginnings


def test_a_worker_that_is_told_to_end_in_mid_slice_ends_soon_and_loses_nothing(fleet: Fleet) -> None:
    sandbox = fleet.sandbox("--latency", "1000")  # some twenty are always out
    own = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key", "account_rate": "20/s"}
    own |= {"campaign_rate": "20/s", "slice_seconds": 60}
    worker = fleet.worker(**own)
    enqueue(CAMPAIGN, rows(1000), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1000, seconds=60, what=lambda: worker.log)
    until(lambda: sandbox.stats()["accepted"] >= 20, what=lambda: worker.log)
    assert worker.stop() < 15
    states = fleet.states()
    assert set(states) == {"submitted", "queued"}
    assert sum(states.values()) == 1000
    assert states["submitted"] == sandbox.stats()["accepted"] < 1000
    assert states["submitted"] == fleet.status()["leads"]["submitted"]
    assert in_flight(fleet) == 0


def test_a_worker_goes_on_after_its_broker_was_killed_and_came_back(fleet: Fleet, own_valkey: Valkey) -> None:
    worker = fleet.worker()
    enqueue(CAMPAIGN, rows(100), settings=fleet.settings)
    until(lambda: fleet.accepted() == 100, what=lambda: worker.log)
    enqueue(CAMPAIGN, rows(100, start=100), settings=fleet.settings)
    own_valkey.kill()
    own_valkey.start()
    until(lambda: succeeds_to_enqueue(fleet, rows(100, start=200)), what=lambda: worker.log)
    until(lambda: fleet.accepted() == 300, seconds=60, what=lambda: worker.log)
    assert worker.alive
    assert quarantined(fleet) == []


def test_beats_find_due_work_and_two_of_them_send_no_lead_twice_and_nobody_warns(fleet: Fleet) -> None:
    sandbox = fleet.sandbox()
    own = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key", "sweep_seconds": 0.3}
    now = datetime.now(UTC)
    campaign = fleet.ledger.campaigns.ensure(CAMPAIGN, now=now)
    leads = [make_lead(number) for number in range(200)]
    fleet.ledger.leads.take_in(campaign, leads, batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=now)
    worker = fleet.worker(account_rate="500/s", campaign_rate="500/s", **own)
    beats = [fleet.celery("beat", **own) for _ in range(2)]
    until(lambda: fleet.states() == {"submitted": 200}, what=lambda: worker.log)
    stats = sandbox.stats()
    assert (stats["accepted"], stats["duplicates"]) == (200, 0)
    for beat in beats:
        assert beat.alive
        assert [record for record in beat.records() if record["level"] in ("warning", "error")] == []
        assert beat.stop() < 5
    worker.stop()
    assert [record for record in worker.records() if record["level"] not in ("debug", "info")] == []
    assert [line for line in worker.log.splitlines() if "Warning" in line and "superuser" not in line] == []
    assert sorted(path.name for path in fleet.folder.glob("celerybeat*")) == []  # it remembers nothing on disk


@pytest.fixture
def alone_on_rabbitmq(rabbitmq_url: str) -> Iterator[None]:
    with rabbitmq_alone(rabbitmq_url):
        yield


@pytest.fixture
def own_vhost(rabbitmq_url: str) -> Iterator[str]:
    """The address of a RabbitMQ virtual host of the test's own: quorum queues cannot take the names of classic ones."""
    vhost = RabbitVhost()
    try:
        vhost.start()
    except ServiceMissing as error:
        missing("RabbitMQ's control", error)
    yield vhost.url
    vhost.close()


def test_leads_travel_over_quorum_queues_also_when_a_worker_is_killed(
    make_fleet: Callable[..., Fleet], own_vhost: str
) -> None:
    fleet = make_fleet(broker_url=own_vhost, rabbitmq_queue_type="quorum")
    fleet.ledger.migrate()
    sandbox = fleet.sandbox()
    own = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key"}
    own |= {"account_rate": "10/s", "campaign_rate": "10/s"}
    first = fleet.worker(**own)
    enqueue(CAMPAIGN, rows(500), settings=fleet.settings)
    until(lambda: sandbox.stats()["accepted"] > 0, what=lambda: first.log)
    with slow_ledger(fleet):  # so that it is killed in the middle of taking in
        for batch in range(1, 5):
            enqueue(CAMPAIGN, rows(500, start=500 * batch), settings=fleet.settings)
        until(lambda: fleet.broker.depths()["intake"] < 4, what=lambda: first.log)
        first.kill()
    assert fleet.accepted() == 500
    second = fleet.worker(**own)
    until(lambda: fleet.accepted() == 2500, seconds=60, what=lambda: second.log)
    assert sandbox.stats()["duplicates"] == 0
    assert second.stop() < 15


def test_leads_travel_to_futwork_over_rabbitmq_with_a_redis_for_the_limit(
    make_fleet: Callable[..., Fleet], rabbitmq_url: str, alone_on_rabbitmq: None
) -> None:
    """Also those that came before the tables were there: their message goes back to its queue, and does not spin."""
    fleet = make_fleet(broker_url=rabbitmq_url)
    sandbox = fleet.sandbox()
    worker = fleet.worker(
        futwork_base_url=sandbox.url, futwork_api_key="sandbox-key", account_rate="500/s", campaign_rate="500/s"
    )
    enqueue(CAMPAIGN, rows(10), settings=fleet.settings)
    worker.says("the message goes back to its queue")
    fleet.ledger.migrate()
    until(lambda: fleet.accepted() == 10, what=lambda: worker.log)
    assert worker.log.count("the message goes back to its queue") < 10
    enqueue(CAMPAIGN, rows(690, start=10), settings=fleet.settings)
    until(lambda: fleet.states() == {"submitted": 700}, what=lambda: worker.log)
    assert quarantined(fleet) == []
    assert sandbox.stats()["accepted"] == 700
    assert fleet.broker.depths() == {"intake": 0, "dispatch": 0, "events": 0, "upkeep": 0}
    assert phones_in(worker.log) == []
    assert worker.stop() < 15


# Around


def own_client(fleet: Fleet) -> Any:
    return contextlib.closing(redis.Redis.from_url(fleet.redis_url, socket_timeout=5))


def in_flight(fleet: Fleet) -> int:
    """How many messages a Redis broker has given out that nobody acknowledged."""
    with own_client(fleet) as client:
        return int(client.hlen("unacked"))


def slow_ledger(fleet: Fleet) -> Any:
    """Hold SQLite's write lock, so that every intake that runs waits in the middle of its work."""
    return fleet.ledger.database.write()


def succeeds_to_enqueue(fleet: Fleet, leads: list[dict[str, Any]]) -> bool:
    try:
        enqueue(CAMPAIGN, leads, settings=fleet.settings)
    except EnqueueFailed:
        return False
    return True
