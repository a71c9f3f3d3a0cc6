"""The message of events, and publishing together."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from pipeline.broker import BrokerUnavailable, GroupCommit, decode_events, encode_events
from pipeline.broker.spool import Spool
from tests.unit.broker.conftest import RECEIVED, make_event
from tests.waiting import patience, until

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
        assert self.permits.acquire(timeout=patience())
        if self.error is not None:
            raise self.error
        self.groups.append(list(items))


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
    assert publish.entered.acquire(timeout=patience())
    others = [pool.submit(commit.submit, number) for number in range(1, 6)]
    until(lambda: waiting(commit) == 5)
    publish.permits.release(2)
    told = [list(one.result(patience())) for one in (first, *others)]
    took = time.perf_counter() - began

    assert len(told[0]) == 1
    assert sorted(len(waits) for waits in told[1:]) == [0, 0, 0, 0, 5]
    assert all(0 < seconds <= took for waits in told for seconds in waits)


def test_those_who_come_meanwhile_share_one_publish_in_order(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish)
    first = pool.submit(commit.submit, 0)
    assert publish.entered.acquire(timeout=patience())
    others = []
    for number in range(1, 6):
        others.append(pool.submit(commit.submit, number))
        until(lambda number=number: waiting(commit) == number)
    assert not any(other.done() for other in others)
    publish.permits.release()
    first.result(patience())
    assert publish.entered.acquire(timeout=patience())
    assert not any(other.done() for other in others)
    publish.permits.release()
    for other in others:
        other.result(patience())
    assert publish.groups == [[0], [1, 2, 3, 4, 5]]


def test_full_groups_follow_each_other_in_order(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish, most=2)
    futures = [pool.submit(commit.submit, 0)]
    assert publish.entered.acquire(timeout=patience())
    for number in range(1, 8):
        futures.append(pool.submit(commit.submit, number))
        until(lambda number=number: waiting(commit) == 2 - number % 2)
    for _ in range(5):
        publish.permits.release()
    for future in futures:
        future.result(patience())
    assert publish.groups == [[0], [1, 2], [3, 4], [5, 6], [7]]


def test_a_group_is_bounded_in_size_and_an_item_that_is_larger_goes_alone(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[str] = GroupCommit(publish, most_size=10, size_of=len)
    futures = [pool.submit(commit.submit, "first")]
    assert publish.entered.acquire(timeout=patience())
    for item in ("aaaa", "bbbb", "cccc", "d" * 50, "e"):
        futures.append(pool.submit(commit.submit, item))
        until(lambda item=item: commit._open is not None and item in commit._open.items)
    for _ in range(5):
        publish.permits.release()
    for future in futures:
        future.result(patience())
    assert publish.groups == [["first"], ["aaaa", "bbbb"], ["cccc"], ["d" * 50], ["e"]]


def test_a_failure_reaches_every_member_of_its_group_and_nobody_else(pool: ThreadPoolExecutor) -> None:
    publish = Gated()
    commit: GroupCommit[int] = GroupCommit(publish)
    first = pool.submit(commit.submit, 0)
    assert publish.entered.acquire(timeout=patience())
    failing = [pool.submit(commit.submit, number) for number in range(1, 4)]
    until(lambda: waiting(commit) == 3)
    publish.permits.release()
    first.result(patience())
    assert publish.entered.acquire(timeout=patience())
    after = [pool.submit(commit.submit, number) for number in range(4, 6)]
    until(lambda: waiting(commit) == 2)
    publish.error = BrokerUnavailable("away")
    publish.permits.release()
    for future in failing:
        with pytest.raises(BrokerUnavailable, match="away"):
            future.result(patience())
    assert publish.entered.acquire(timeout=patience())
    publish.error = None
    publish.permits.release()
    for future in after:
        future.result(patience())
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

    kept = [future.result(patience()) for future in [pool.submit(work, thread) for thread in range(64)]]
    assert sorted(published) == sorted(item for items in kept for item in items)
    for thread in range(64):  # what one thread said after another stays after it
        assert [item for item in published if item[0] == thread] == kept[thread]
    assert max(sizes) == 20
    assert sum(sizes) == 64 * 500
