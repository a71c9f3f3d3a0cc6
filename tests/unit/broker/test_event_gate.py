"""The gate chooses between the broker and the spool."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline.broker import MESSAGE_BYTES, Broker, BrokerUnavailable, encode_events
from pipeline.broker.gate import EventGate
from pipeline.broker.spool import Spool, SpoolFull, drain_spool
from tests.unit.broker.conftest import bodies, files_of, make_event
from tests.waiting import patience, until

# The gate


class Switch:
    """A broker that can be switched off; what it takes is kept in order."""

    def __init__(self) -> None:
        self.on = True
        self.asked = 0
        self.taken: list[bytes] = []
        self.lock = threading.Lock()

    def publish(self, task: str, payload: Any, *, about: str) -> None:  # noqa: ARG002
        assert task == "pipeline.events"
        with self.lock:
            self.asked += 1
            if not self.on:
                raise BrokerUnavailable("away")
            self.taken += bodies(payload)

    def ping(self) -> None:
        if not self.on:
            raise BrokerUnavailable("away")


@pytest.fixture
def broker() -> Any:
    return Switch()


@pytest.fixture
def gate(broker: Broker, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> EventGate:
    monkeypatch.setattr(EventGate, "RETRY_SECONDS", 0.05)
    return EventGate(broker, spool)


def test_events_go_to_the_broker_while_it_answers(gate: EventGate, broker: Switch, spool: Spool) -> None:
    gate.submit(make_event(1))
    assert broker.taken == [make_event(1).body]
    assert gate.spooled == 0
    assert files_of(spool) == []


def test_while_the_broker_is_away_events_are_kept_on_disk_and_only_one_request_waits_for_it(
    gate: EventGate, broker: Switch, spool: Spool
) -> None:
    broker.on = False
    for number in range(20):
        gate.submit(make_event(number))
    assert gate.spooled == 20
    assert spool.size()[0] == 20
    assert broker.asked == 1


def test_the_spool_drains_by_itself_when_the_broker_is_back_and_the_direct_way_opens(
    gate: EventGate, broker: Switch, spool: Spool
) -> None:
    broker.on = False
    for number in range(5):
        gate.submit(make_event(number))
    broker.on = True
    until(lambda: spool.size()[0] == 0)
    assert sorted(broker.taken) == sorted(make_event(number).body for number in range(5))
    until(lambda: gate._drainer is None)
    gate.submit(make_event(9))
    assert broker.taken[-1] == make_event(9).body
    assert gate.spooled == 5


def test_what_an_earlier_process_left_is_drained_without_a_new_event(
    broker: Switch, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventGate, "RETRY_SECONDS", 0.05)
    spool.write([make_event(1)])
    EventGate(broker, Spool(spool._directory, max_bytes=1_000_000))
    until(lambda: broker.taken == [make_event(1).body])
    until(lambda: files_of(spool) == [])


def test_only_if_broker_and_disk_both_fail_an_event_is_refused(
    broker: Switch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventGate, "RETRY_SECONDS", 0.05)
    (tmp_path / "spool").write_text("not a folder")
    gate = EventGate(broker, Spool(tmp_path / "spool", max_bytes=1_000_000))
    broker.on = False
    for number in range(3):
        with pytest.raises(SpoolFull):
            gate.submit(make_event(number))
    assert broker.taken == []
    broker.on = True  # even before the drainer has seen it
    gate.submit(make_event(7))
    assert broker.taken == [make_event(7).body]
    until(lambda: gate._drainer is None)


def test_nothing_is_lost_and_nothing_waits_while_the_broker_comes_and_goes(
    gate: EventGate, broker: Switch, spool: Spool
) -> None:
    stop = threading.Event()

    def flicker() -> None:
        jitter = random.Random(3)
        while not stop.wait(jitter.uniform(0.001, 0.03)):
            broker.on = not broker.on
        broker.on = True

    switcher = threading.Thread(target=flicker)
    switcher.start()
    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(gate.submit, make_event(number)) for number in range(2000)]:
            future.result(patience())
    stop.set()
    switcher.join()
    until(lambda: spool.size()[0] == 0)
    until(lambda: gate._drainer is None)
    assert sorted(set(broker.taken)) == sorted(make_event(number).body for number in range(2000))
    assert len(broker.taken) == 2000


def test_a_group_of_large_events_never_outgrows_a_message(broker: Switch, gate: EventGate) -> None:
    largest = 0
    publish = broker.publish

    def slow(task: str, payload: Any, *, about: str) -> None:
        nonlocal largest
        largest = max(largest, sum(len(body) for body in bodies(payload)))
        time.sleep(0.02)
        publish(task, payload, about=about)

    broker.publish = slow  # type: ignore[method-assign]  # so that the requests meet
    with ThreadPoolExecutor(32) as pool:
        events = [make_event(body=b"%04d" % number + b"x" * 1_000_000) for number in range(32)]
        list(pool.map(gate.submit, events))
    assert len(broker.taken) == 32
    assert 1_000_000 < largest <= MESSAGE_BYTES


def test_a_file_that_the_broker_refuses_does_not_keep_the_others_waiting(broker: Any, spool: Spool) -> None:
    """Such as a message that is larger than the broker takes: it answers, and refuses this one each time."""
    for number in range(3):
        spool.write([make_event(number)])
    publish = broker.publish

    def choosy(task: str, payload: Any, *, about: str) -> None:
        if bodies(payload) == [make_event(0).body]:
            raise BrokerUnavailable("too large")
        publish(task, payload, about=about)

    broker.publish = choosy
    assert drain_spool(spool, broker) == 2
    assert broker.taken == [make_event(1).body, make_event(2).body]
    assert spool.size()[0] == 1


def test_a_message_is_at_most_twice_as_long_as_its_events() -> None:
    """A broker's messages have a bound, and as JSON text a control character takes six bytes."""
    for body in (b"\x00" * 10_000, b'"' * 10_000, b"\\\n" * 5_000, b"\x1f\xff" * 5_000):
        assert len(orjson.dumps(encode_events([make_event(body=body)]))) < 2 * len(body) + 200


def test_draining_tells_when_the_broker_is_away(broker: Any, spool: Spool) -> None:
    spool.write([make_event()])
    broker.on = False
    with pytest.raises(BrokerUnavailable):
        drain_spool(spool, broker)
    broker.on = True
    assert drain_spool(spool, broker) == 1
