"""What a worker does with messages: good ones, and those that nobody can work on."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import signal
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery

from pipeline import enqueue
from pipeline.broker import WebEvent, encode_events
from pipeline.ledger import LeadFilter
from tests.conftest import CAMPAIGN, empty
from tests.journey.conftest import (
    in_flight,
    is_idle,
    own_client,
    phones_in,
    push_raw,
    quarantined,
    rows,
    slow_ledger,
    task_headers,
)
from tests.journey.fleet import Fleet, Process, Valkey, signal_process
from tests.waiting import patience, until


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
        assert worker.stop() == 0
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


# The way in


def test_leads_that_were_enqueued_are_in_the_ledger_and_in_no_log(watched: tuple[Fleet, Process]) -> None:
    fleet, worker = watched
    report = enqueue(CAMPAIGN, rows(1200), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1200, what=lambda: worker.log)
    found = {str(lead["id"]) for lead in fleet.ledger.reports.leads(LeadFilter(), limit=2000)}
    assert found == {str(id_) for id_ in report.ids}
    assert phones_in(worker.log) == []
    assert fleet.broker.depths()["intake"] == 0


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
        listener.join(patience())
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
    for part in ("unknown task name", "not a Celery task", "body cannot be decoded", "untrusted content of type"):
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


def test_bad_rows_of_a_foreign_batch_are_quarantined_and_the_good_ones_taken_in(watched: tuple[Fleet, Process]) -> None:
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
    until(lambda: fleet.accepted() == 500 and in_flight(fleet) == 0, what=lambda: worker.log)
    assert killed == 2
    assert worker.log.count("WorkerLostError") > lost
    assert fleet.broker.depths()["intake"] == 0
    assert quarantined(fleet) == []
