"""Publishing without a broker: shared publishes, the spool on disk, and the gate that chooses between them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline.broker import (
    MESSAGE_BYTES,
    Broker,
    BrokerUnavailable,
    EventGate,
    GroupCommit,
    Spool,
    SpoolFull,
    WebEvent,
    decode_events,
    drain_spool,
    encode_events,
)
from tests.waiting import until

RECEIVED = datetime(2026, 5, 8, 12, 0, 0, 123456, tzinfo=UTC)


def make_event(number: int = 0, **overrides: Any) -> WebEvent:
    values: dict[str, Any] = {"body": b'{"callSid":"CA%d"}' % number, "received_at": RECEIVED}
    return WebEvent(**(values | overrides))


def bodies(message: Any) -> list[bytes]:
    return [event.body for event in decode_events(message)]


# The message of events


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1}',
        b"",
        "नमस्ते".encode(),
        b"\xff\xfe\x00\x01",
        b'{"a": "\xed\xa0\x80"}',  # a lone surrogate, as some encoders write it
        b'{"a": "\\ud800"}',
        b"\x00" * 100,
        bytes(range(256)),
    ],
)
def test_a_body_travels_unchanged_whatever_its_bytes(body: bytes) -> None:
    event = make_event(body=body, fault="not JSON")
    assert decode_events(encode_events([event])) == [event]


def test_a_fault_with_a_lone_surrogate_can_be_spooled_and_published(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=10_000)
    spool.write([make_event(fault="bad \ud800 text")])
    taken: list[Any] = []
    spool.drain(taken.append)
    assert decode_events(taken[0])[0].fault == "bad ? text"


def test_the_time_of_receipt_comes_back_in_utc() -> None:
    event = make_event(received_at=RECEIVED.astimezone(timezone(timedelta(hours=5, minutes=30))))
    [decoded] = decode_events(encode_events([event]))
    assert decoded.received_at == RECEIVED
    assert decoded.received_at.tzinfo is UTC


@pytest.mark.parametrize(
    "message",
    [
        {},
        [],
        None,
        "x",
        {"events": None},
        {"events": [None]},
        {"events": [{"body": "x"}]},
        {"events": [{"body": "x", "received_at": "2026-05-08T12:00:00"}]},
        {"events": [{"body": "x", "received_at": "soon"}]},
        {"events": [{"body64": "*", "received_at": "2026-05-08T12:00:00Z"}]},
        {"events": [{"body": 7, "received_at": "2026-05-08T12:00:00Z"}]},
        {"events": [{"body": "x", "received_at": "2026-05-08T12:00:00Z", "fault": 7}]},
    ],
)
def test_what_is_no_message_of_events_is_told_apart(message: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        decode_events(message)


# Group commit


class Gated:
    """A publish that waits for a permit each time, and keeps what it published."""

    def __init__(self) -> None:
        self.groups: list[list[Any]] = []
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.error: Exception | None = None

    def __call__(self, items: list[Any]) -> None:
        self.entered.release()
        assert self.permits.acquire(timeout=20)
        if self.error is not None:
            raise self.error
        self.groups.append(list(items))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def waiting(commit: GroupCommit[Any]) -> int:
    return len(commit._open.items) if commit._open else 0


def test_the_first_publishes_at_once_and_alone() -> None:
    groups: list[list[int]] = []
    commit: GroupCommit[int] = GroupCommit(groups.append)
    commit.submit(1)
    commit.submit(2)
    assert groups == [[1], [2]]


def test_one_of_a_group_learns_how_long_each_of_it_waited(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish)
    began = time.perf_counter()
    first = pool.submit(commit.submit, 0)
    assert publish.entered.acquire(timeout=10)
    others = [pool.submit(commit.submit, number) for number in range(1, 6)]
    until(lambda: waiting(commit) == 5)
    publish.permits.release(2)
    told = [list(one.result(10)) for one in (first, *others)]
    took = time.perf_counter() - began

    assert len(told[0]) == 1
    assert sorted(len(waits) for waits in told[1:]) == [0, 0, 0, 0, 5]
    assert all(0 < seconds <= took for waits in told for seconds in waits)


def test_those_who_come_meanwhile_share_one_publish_in_order(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish)
    first = pool.submit(commit.submit, 0)
    assert publish.entered.acquire(timeout=10)
    others = []
    for number in range(1, 6):
        others.append(pool.submit(commit.submit, number))
        until(lambda number=number: waiting(commit) == number)
    assert not any(other.done() for other in others)
    publish.permits.release()
    first.result(10)
    assert publish.entered.acquire(timeout=10)
    assert not any(other.done() for other in others)
    publish.permits.release()
    for other in others:
        other.result(10)
    assert publish.groups == [[0], [1, 2, 3, 4, 5]]


def test_full_groups_follow_each_other_in_order(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish, most=2)
    futures = [pool.submit(commit.submit, 0)]
    assert publish.entered.acquire(timeout=10)
    for number in range(1, 8):
        futures.append(pool.submit(commit.submit, number))
        until(lambda number=number: waiting(commit) == 2 - number % 2)
    for _ in range(5):
        publish.permits.release()
    for future in futures:
        future.result(10)
    assert publish.groups == [[0], [1, 2], [3, 4], [5, 6], [7]]


def test_a_group_is_bounded_in_size_and_an_item_that_is_larger_goes_alone(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[str] = GroupCommit(publish, most_size=10, size_of=len)
    futures = [pool.submit(commit.submit, "first")]
    assert publish.entered.acquire(timeout=10)
    for item in ("aaaa", "bbbb", "cccc", "d" * 50, "e"):
        futures.append(pool.submit(commit.submit, item))
        until(lambda item=item: commit._open is not None and item in commit._open.items)
    for _ in range(5):
        publish.permits.release()
    for future in futures:
        future.result(10)
    assert publish.groups == [["first"], ["aaaa", "bbbb"], ["cccc"], ["d" * 50], ["e"]]


def test_a_failure_reaches_every_member_of_its_group_and_nobody_else(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish)
    first = pool.submit(commit.submit, 0)
    assert publish.entered.acquire(timeout=10)
    failing = [pool.submit(commit.submit, number) for number in range(1, 4)]
    until(lambda: waiting(commit) == 3)
    publish.permits.release()
    first.result(10)
    assert publish.entered.acquire(timeout=10)
    after = [pool.submit(commit.submit, number) for number in range(4, 6)]
    until(lambda: waiting(commit) == 2)
    publish.error = BrokerUnavailable("away")
    publish.permits.release()
    for future in failing:
        with pytest.raises(BrokerUnavailable, match="away"):
            future.result(10)
    assert publish.entered.acquire(timeout=10)
    publish.error = None
    publish.permits.release()
    for future in after:
        future.result(10)
    assert publish.groups[0] == [0]
    assert sorted(publish.groups[1]) == [4, 5]


def test_no_wakeup_is_lost_and_nothing_is_published_twice_or_out_of_order(pool: ThreadPoolExecutor) -> None:
    """64 threads with 500 items each, publishes that take a random time, and some that fail."""
    jitter = random.Random(7)
    published: list[tuple[int, int]] = []
    running = threading.Lock()
    sizes = []

    def publish(items: list[tuple[int, int]]) -> None:
        assert running.acquire(blocking=False), "two publishes at once"
        try:
            sizes.append(len(items))
            time.sleep(jitter.choice((0, 0, 0.0002, 0.002)))
            if jitter.random() < 0.05:
                raise BrokerUnavailable("away")
            published.extend(items)
        finally:
            running.release()

    commit: GroupCommit[tuple[int, int]] = GroupCommit(publish, most=20)

    def work(thread: int) -> list[tuple[int, int]]:
        kept = []
        for number in range(500):
            try:
                commit.submit((thread, number))
            except BrokerUnavailable:
                continue
            kept.append((thread, number))
        return kept

    kept = [future.result(60) for future in [pool.submit(work, thread) for thread in range(64)]]
    assert sorted(published) == sorted(item for items in kept for item in items)
    for thread in range(64):  # what one thread said after another stays after it
        assert [item for item in published if item[0] == thread] == kept[thread]
    assert max(sizes) == 20
    assert sum(sizes) == 64 * 500


# The spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "var" / "spool", max_bytes=1_000_000)


def files_of(spool: Spool) -> list[Path]:
    return sorted(spool._directory.iterdir()) if spool._directory.exists() else []


def test_a_spool_that_was_never_written_is_empty_and_creates_nothing(spool: Spool) -> None:
    assert spool.size() == (0, 0)
    assert spool.drain(pytest.fail) == 0
    assert not spool._directory.exists()


def test_events_come_out_in_the_order_in_which_they_went_in_and_leave_nothing(spool: Spool) -> None:
    for number in range(30):
        spool.write([make_event(2 * number), make_event(2 * number + 1, body=b"\xff")])
    files, size = spool.size()
    assert files == 30
    assert size == sum(path.stat().st_size for path in files_of(spool))
    taken: list[bytes] = []
    assert spool.drain(lambda message: taken.extend(bodies(message))) == 30
    assert taken == [body for number in range(30) for body in (make_event(2 * number).body, b"\xff")]
    assert spool.size() == (0, 0)
    assert files_of(spool) == []


def test_only_its_owner_may_read_the_spool(spool: Spool) -> None:
    spool.write([make_event()])
    assert spool._directory.stat().st_mode & 0o777 == 0o700


def test_a_drain_takes_at_most_what_it_is_told_oldest_first(spool: Spool) -> None:
    for number in range(5):
        spool.write([make_event(number)])
    taken: list[bytes] = []
    assert spool.drain(lambda message: taken.extend(bodies(message)), most=2) == 2
    assert taken == [make_event(0).body, make_event(1).body]
    assert spool.size()[0] == 3


def test_a_publish_that_fails_leaves_its_file_and_all_later_ones(spool: Spool) -> None:
    for number in range(3):
        spool.write([make_event(number)])
    taken: list[bytes] = []

    def publish(message: dict[str, Any]) -> None:
        if taken:
            raise BrokerUnavailable("away")
        taken.extend(bodies(message))

    with pytest.raises(BrokerUnavailable):
        spool.drain(publish)
    assert spool.size()[0] == 2
    spool.drain(lambda message: taken.extend(bodies(message)))
    assert taken == [make_event(number).body for number in range(3)]


def test_a_drainer_that_dies_after_the_publish_only_repeats_it(spool: Spool) -> None:
    spool.write([make_event()])
    taken: list[bytes] = []

    def publish_and_die(message: dict[str, Any]) -> None:
        taken.extend(bodies(message))
        raise SystemExit

    with pytest.raises(SystemExit):
        spool.drain(publish_and_die)
    assert spool.drain(lambda message: taken.extend(bodies(message))) == 1
    assert taken == [make_event().body] * 2


def test_a_damaged_file_is_set_aside_and_the_others_go_on(spool: Spool) -> None:
    for number in range(3):
        spool.write([make_event(number)])
    broken = files_of(spool)[1]
    content = bytearray(broken.read_bytes())
    content[-5] ^= 1
    broken.write_bytes(content)
    taken: list[bytes] = []
    assert spool.drain(lambda message: taken.extend(bodies(message))) == 2
    assert taken == [make_event(0).body, make_event(2).body]
    assert files_of(spool) == [broken.with_suffix(".damaged")]
    assert broken.with_suffix(".damaged").read_bytes() == content
    assert spool.size() == (0, 0)


@pytest.mark.parametrize("content", [b"", b"garbage", b"00000000\n", b"\n\n\n"])
def test_a_file_that_is_none_of_ours_is_set_aside(content: bytes, spool: Spool) -> None:
    spool.write([make_event()])
    stranger = spool._directory / "0-stranger.events"
    stranger.write_bytes(content)
    taken: list[Any] = []
    assert spool.drain(taken.append) == 1
    assert stranger.with_suffix(".damaged").read_bytes() == content


def test_a_file_has_its_name_only_when_it_is_complete(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append(next((file.suffix for file in files_of(spool)), "folder")))
    spool.write([make_event()])
    assert (set(synced[:-2]), synced[-2:]) == ({"folder"}, [".draft", ".events"])


def test_the_drafts_of_writers_that_died_are_no_events_and_are_removed_after_an_hour(spool: Spool) -> None:
    spool.write([make_event()])
    young, old = spool._directory / "1-young.draft", spool._directory / "1-old.draft"
    for draft in (young, old):
        draft.write_bytes(b"half")
    os.utime(old, (time.time() - 3700,) * 2)
    taken: list[Any] = []
    assert spool.drain(taken.append) == 1
    assert files_of(spool) == [young]


def test_drainers_side_by_side_drain_each_file_once(spool: Spool) -> None:
    for number in range(300):
        spool.write([make_event(number)])
    taken: list[bytes] = []
    start = threading.Barrier(6)

    def drain() -> int:
        own = Spool(spool._directory, max_bytes=1_000_000)
        start.wait(10)
        return sum(own.drain(lambda message: taken.extend(bodies(message))) for _ in range(3))

    with ThreadPoolExecutor(6) as pool:
        drained = [future.result(30) for future in [pool.submit(drain) for _ in range(6)]]
    assert sum(drained) == 300
    assert sorted(taken) == sorted(make_event(number).body for number in range(300))
    assert spool.size() == (0, 0)


def test_a_file_that_another_drainer_holds_is_left_to_it(spool: Spool) -> None:
    spool.write([make_event()])
    inner: list[int] = []

    def publish(_message: Any) -> None:
        inner.append(Spool(spool._directory, max_bytes=1_000_000).drain(pytest.fail))

    assert spool.drain(publish) == 1
    assert inner == [0]


def test_a_full_spool_refuses_by_files_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=3)
    for number in range(3):
        spool.write([make_event(number)])
    with pytest.raises(SpoolFull, match="holds 3 files, "):
        spool.write([make_event(3)])
    assert spool.size()[0] == len(files_of(spool)) == 3


def test_a_full_spool_refuses_by_bytes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1000)
    spool.write([make_event(body=b"x" * 600)])
    with pytest.raises(SpoolFull, match="that is its bound"):
        spool.write([make_event(body=b"x" * 600)])
    spool.write([make_event(body=b"x" * 100)])
    assert spool.size()[0] == 2


def test_a_full_spool_takes_events_again_once_this_process_has_drained_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=1)
    spool.write([make_event(0)])
    with pytest.raises(SpoolFull):
        spool.write([make_event(1)])
    spool.drain(lambda _: None)
    spool.write([make_event(2)])
    assert spool.size()[0] == 1


def test_a_full_spool_takes_events_again_soon_after_another_process_has_drained_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=1)
    spool.write([make_event(0)])
    Spool(tmp_path / "spool", max_bytes=1_000_000).drain(lambda _: None)

    def takes() -> bool:
        try:
            spool.write([make_event(1)])
        except SpoolFull:
            return False
        return True

    until(takes, seconds=5)


def test_what_earlier_processes_left_counts_towards_the_bound(tmp_path: Path) -> None:
    Spool(tmp_path / "spool", max_bytes=1_000_000).write([make_event(0)])
    with pytest.raises(SpoolFull):
        Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=1).write([make_event(1)])


def test_a_disk_that_takes_nothing_is_told_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000)
    spool.write([make_event(0)])

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(SpoolFull, match="could not be written: No space left on device"):
        spool.write([make_event(1)])
    assert [path.suffix for path in files_of(spool)] == [".events"]


def test_a_spool_where_a_file_stands_is_told(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("not a folder")
    with pytest.raises(SpoolFull, match="could not be written: Not a directory"):
        Spool(tmp_path / "spool", max_bytes=1_000_000).write([make_event()])


def test_writing_does_not_slow_down_when_tens_of_thousands_of_files_wait(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1_000_000_000)
    for number in range(30_000):
        (tmp_path / f"{number:020d}-x.events").touch()
    scans = 0
    size = spool.size

    def counted() -> tuple[int, int]:
        nonlocal scans
        scans += 1
        return size()

    spool.size = counted  # type: ignore[method-assign]  # counts how often, and does the same
    started = time.monotonic()
    for number in range(300):
        spool.write([make_event(number)])
    assert scans <= 1 + (time.monotonic() - started) / 0.5
    assert size()[0] == 30_300


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
            future.result(30)
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
