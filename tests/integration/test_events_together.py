"""Events that several workers have in hand: who merges what, and what becomes of an event that kills its workers."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from celery.exceptions import Reject

from pipeline import events as stage
from pipeline.broker import WebEvent, decode_events
from pipeline.coordination.connection import connect
from pipeline.coordination.crash_counter import MUTEX_SECONDS, CrashCounter
from pipeline.events import Events, Kept
from pipeline.ledger import EVENTS_AT_ONCE, Ledger, StoredEvent, digest_of
from pipeline.ledger.calls import _MERGERS_TURN
from pipeline.ledger.tables import call_events
from pipeline.settings import Settings
from pipeline.wiring import Services, close_services
from pipeline.worker import guard
from pipeline.worker.guard import guarded
from tests.conftest import CAMPAIGN, NOW
from tests.waiting import patience

MakeSettings = Callable[..., Settings]


def make_event(call_sid: str, *, after: int = 0) -> WebEvent:
    body = {"callSid": call_sid, "campaignId": CAMPAIGN, "status": "completed"}
    return WebEvent(json.dumps(body).encode(), NOW + timedelta(seconds=after))


def keep(ledger: Ledger, *given: WebEvent) -> None:
    """Store events as a worker does that leaves them to another."""
    ledger.calls.keep([StoredEvent(digest_of(one.body), one.body, one.received_at) for one in given])


def states(ledger: Ledger) -> dict[str, int]:
    with ledger.database.read() as connection:
        found = list(connection.scalars(sa.select(call_events.c.state)))
    return {state: found.count(state) for state in set(found)}


@contextmanager
def somebody_merges(ledger: Ledger) -> Iterator[None]:
    """Another worker's turn to merge."""
    with ledger.database.write() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MERGERS_TURN)))
        yield


def test_a_task_merges_what_others_stored_too(ledger: Ledger, make_settings: MakeSettings) -> None:
    keep(ledger, *(make_event(f"call-{n}") for n in range(EVENTS_AT_ONCE + 50)))
    assert Events(ledger, make_settings()).take_in([make_event("mine")]) == Kept(651, 651, 651, 0)
    assert states(ledger) == {"merged": 651}


def test_a_worker_leaves_its_events_to_the_one_that_merges(
    postgres_ledger: Ledger, make_settings: MakeSettings
) -> None:
    events = Events(postgres_ledger, make_settings())
    with somebody_merges(postgres_ledger):
        assert events.take_in([make_event("call-1")]) == Kept(0, 0, 0, 0)
        assert states(postgres_ledger) == {"pending": 1}
    assert events.take_in([]) == Kept(1, 1, 1, 0)


def test_who_merges_looks_again_after_its_turn(
    postgres_ledger: Ledger, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker stores its event too late for the portion, and finds the turn taken."""
    events, other = (Events(postgres_ledger, make_settings()) for _ in range(2))
    describe, late = stage.describe, [make_event("late")]

    def meanwhile(*args: Any, **options: Any) -> Any:
        if late:
            assert other.take_in([late.pop()]) == Kept(0, 0, 0, 0)
        return describe(*args, **options)

    monkeypatch.setattr(stage, "describe", meanwhile)
    assert events.take_in([make_event("call-1")]) == Kept(2, 2, 2, 0)
    assert states(postgres_ledger) == {"merged": 2}


def test_a_worker_helps_when_one_cannot_keep_up(postgres_ledger: Ledger, make_settings: MakeSettings) -> None:
    keep(postgres_ledger, *(make_event(f"call-{n % 9}", after=n) for n in range(2)))
    keep(postgres_ledger, *(WebEvent(b'{"callSid": "c", "n": %d}' % n, NOW) for n in range(2 * EVENTS_AT_ONCE)))
    with somebody_merges(postgres_ledger):
        assert Events(postgres_ledger, make_settings()).take_in([]).events == EVENTS_AT_ONCE
    assert states(postgres_ledger) == {"merged": EVENTS_AT_ONCE, "pending": EVENTS_AT_ONCE + 2}


def test_a_worker_does_not_spin_while_others_have_all_that_waits_locked(
    postgres_ledger: Ledger, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portion is empty then, although events wait; each look is three statements."""
    keep(postgres_ledger, make_event("call-1"))
    looks: list[str] = []
    merge_waiting = postgres_ledger.calls.merge_waiting

    def look(*args: Any, **options: Any) -> Any:
        looks.append("one")
        return merge_waiting(*args, **options)

    monkeypatch.setattr(postgres_ledger.calls, "merge_waiting", look)
    monkeypatch.setattr(stage, "_LONGEST_MERGE_SECONDS", 0.4)
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.select(call_events.c.digest).with_for_update())
        assert Events(postgres_ledger, make_settings()).take_in([]) == Kept(0, 0, 0, 0)
    assert 1 <= len(looks) <= 0.4 / 0.02 + 1
    assert Events(postgres_ledger, make_settings()).take_in([]) == Kept(1, 1, 1, 0)


def test_a_task_that_merged_for_long_lets_another_go_on(
    ledger: Ledger, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, valkey_url: str, valkey: redis.Redis
) -> None:
    url = ledger.database.url.render_as_string(hide_password=False)
    parts = Services(make_settings(broker_url=valkey_url, database_url=url))
    monkeypatch.setattr(stage, "_LONGEST_MERGE_SECONDS", 0.0)
    assert parts.events.take_in([make_event("call-1")]) == Kept(0, 0, 0, 0)
    parts.ledger.close()
    assert states(ledger) == {"pending": 1}
    assert parts.broker.depths()["events"] == 1
    message = json.loads(valkey.rpop("events"))
    (arguments, *_) = json.loads(base64.b64decode(message["body"]))
    assert decode_events(arguments[0]) == []


def test_tasks_that_are_behind_leave_their_merge_to_one_behind_them(
    ledger: Ledger, make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis
) -> None:
    """The events are months old. Once a process has stored some hundreds, it merges all the same."""
    url = ledger.database.url.render_as_string(hide_password=False)
    parts = Services(make_settings(broker_url=valkey_url, database_url=url))
    for number in range(3):
        assert parts.events.take_in([make_event(f"call-{number}")]) == Kept(0, 0, 0, 0)
    assert (states(ledger), parts.broker.depths()["events"]) == ({"pending": 3}, 1)
    assert parts.events.take_in([]) == Kept(3, 3, 3, 0)  # the task that they left it to
    assert parts.events.take_in([make_event("call-4")]) == Kept(0, 0, 0, 0)
    assert parts.broker.depths()["events"] == 2  # and the next one
    assert parts.events.take_in([make_event(f"more-{n}") for n in range(300)]).events == 301
    assert parts.events.take_in([WebEvent(b'{"callSid": "new"}', ledger.now())]) == Kept(1, 1, 1, 0)
    parts.ledger.close()


def test_a_task_that_nobody_can_follow_merges_itself(
    ledger: Ledger, make_settings: MakeSettings, valkey_url: str
) -> None:
    url = ledger.database.url.render_as_string(hide_password=False)
    away = "redis://127.0.0.1:9/0"
    parts = Services(make_settings(broker_url=away, redis_url=valkey_url, database_url=url))
    redis.Redis.from_url(valkey_url).delete("futwork:events:later")
    for number in range(2):
        assert parts.events.take_in([make_event(f"call-{number}")]) == Kept(1, 1, 1, 0)
    parts.ledger.close()


def test_an_event_that_kills_its_workers_ends_in_quarantine_and_takes_no_other_with_it(
    ledger: Ledger, make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis
) -> None:
    """It died in the merge of all that waited, so nobody knows which event it was until each is merged by itself."""
    url = ledger.database.url.render_as_string(hide_password=False)
    batch = [make_event("call-1"), make_event("killer", after=1), make_event("call-2", after=2)]

    def die_merging(again: bool) -> None:
        describe = stage.describe

        def deadly(merged: dict[str, Any], **options: Any) -> Any:
            if merged["callSid"] == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            return describe(merged, **options)

        stage.describe = deadly  # type: ignore[assignment]  # in this process alone, which ends with it
        own = CrashCounter(redis.Redis.from_url(valkey_url))
        Events(Ledger(url), make_settings(), crash_counter=own).take_in(batch, again=again)

    for run in range(3):
        process = multiprocessing.get_context("fork").Process(target=die_merging, args=(run > 0,))
        process.start()
        process.join(patience())
        assert process.exitcode == -signal.SIGKILL
    assert states(ledger) == {"merged": 1, "pending": 2}
    kept = Events(ledger, make_settings(), crash_counter=CrashCounter(valkey)).take_in(batch, again=True)
    assert kept == Kept(events=2, calls=1, orphans=1, quarantined=1)
    assert states(ledger) == {"merged": 2, "quarantined": 1}
    (waiting,) = ledger.quarantine.waiting(kind="event")
    assert (waiting.body, waiting.reason) == (batch[1].body, "2 worker processes died when it was merged")
    assert valkey.keys("futwork:deaths:*") == []


def test_living_processes_that_merge_carefully_are_no_deaths(
    postgres_ledger: Ledger, _postgres_migrated: str, make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis
) -> None:
    """Four workers find the ledger back, and each takes its message for one that a process died over."""
    keep(postgres_ledger, *(make_event(f"call-{n}", after=n) for n in range(60)))
    ledgers = [Ledger(_postgres_migrated) for _ in range(4)]

    def run(ledger: Ledger, number: int) -> None:
        own = CrashCounter(redis.Redis.from_url(valkey_url))
        Events(ledger, make_settings(), crash_counter=own).take_in([make_event(f"own-{number}")], again=True)

    threads = [threading.Thread(target=run, args=(one, number)) for number, one in enumerate(ledgers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in ledgers:
        one.close()
    assert (states(postgres_ledger), postgres_ledger.quarantine.waiting()) == ({"merged": 64}, [])
    assert valkey.keys("futwork:deaths:*") == []


def test_who_has_no_turn_to_merge_carefully_leaves_what_it_stored(
    ledger: Ledger, make_settings: MakeSettings, valkey: redis.Redis
) -> None:
    """Neither a message that came again, nor tidy after a death, takes the events of a living process from it."""
    valkey.set("futwork:deaths:left over", 1)
    event, deaths = make_event("call-1"), CrashCounter(valkey)
    events = Events(ledger, make_settings(), crash_counter=deaths)
    with deaths.mutex("merge") as is_ours:
        assert is_ours
        assert events.take_in([event], again=True) == Kept(0, 0, 0, 0)
        assert events.merge_left_over(before=NOW + timedelta(days=1), now=NOW) == 0
        assert states(ledger) == {"pending": 1}
    assert events.take_in([], again=True) == Kept(1, 1, 1, 0)


def test_an_event_that_was_merged_meanwhile_is_not_set_aside(
    ledger: Ledger, make_settings: MakeSettings, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = make_event("call-1")
    keep(ledger, event)
    events = Events(ledger, make_settings(), crash_counter=CrashCounter(valkey))
    valkey.set(f"futwork:deaths:event:{digest_of(event.body)}", 2)
    found = ledger.calls.pending()
    assert Events(ledger, make_settings()).take_in([]) == Kept(1, 1, 1, 0)
    monkeypatch.setattr(ledger.calls, "pending", lambda **_: found)  # as it was when this process looked
    assert events.take_in([], again=True) == Kept(0, 0, 0, 0)
    assert (states(ledger), ledger.quarantine.waiting()) == ({"merged": 1}, [])


def test_left_over_events_are_merged_one_by_one_after_a_death(
    ledger: Ledger, make_settings: MakeSettings, valkey: redis.Redis
) -> None:
    keep(ledger, make_event("call-1"), make_event("killer", after=1), make_event("call-2", after=2))
    valkey.set("futwork:deaths:left over", 1)
    valkey.set(f"futwork:deaths:event:{digest_of(make_event('killer').body)}", 2)
    events = Events(ledger, make_settings(), crash_counter=CrashCounter(valkey))
    assert events.merge_left_over(before=NOW + timedelta(days=1), now=NOW) == 3
    assert states(ledger) == {"merged": 2, "quarantined": 1}
    assert valkey.keys("futwork:deaths:*") == []


def test_a_fault_of_the_reader_keeps_no_other_event_from_being_merged(
    ledger: Ledger, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stage.read_event

    def faulty(body: bytes, **options: Any) -> Any:
        if b"odd" in body:
            raise ZeroDivisionError("a fault of ours")
        return read(body, **options)

    monkeypatch.setattr(stage, "read_event", faulty)
    assert Events(ledger, make_settings()).take_in([make_event("odd"), make_event("call-1")]) == Kept(2, 1, 1, 1)
    (waiting,) = ledger.quarantine.waiting(kind="event")
    assert waiting.reason == "it could not be read: ZeroDivisionError: a fault of ours"


def test_a_message_that_was_put_back_by_itself_is_no_death(
    make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker marks it as given out before; a death at its next run is counted all the same."""
    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0.0)
    request = SimpleNamespace(id="an-id", delivery_info={}, retries=0)
    settings = make_settings(broker_url=valkey_url)
    task = SimpleNamespace(app=SimpleNamespace(pipeline_settings=settings), request=request, name="pipeline.events")
    told: list[bool] = []

    def away(*_: Any, **__: Any) -> None:
        raise sa.exc.TimeoutError

    try:
        with pytest.raises(Reject):
            guarded(away)(task, {})
        assert 0 < valkey.ttl("futwork:deaths:spared:an-id") <= 24 * 3600
        request.delivery_info["redelivered"] = True
        for _ in range(2):
            guarded(lambda _parts, _message, *, again: told.append(again))(task, {})
    finally:
        close_services()
    assert told == [False, True]


def test_deaths_are_not_counted_while_redis_is_away() -> None:
    away = CrashCounter(connect("redis://127.0.0.1:9/0"))
    with away.counted("anything") as deaths, away.mutex("anything") as is_ours:
        assert (deaths, is_ours) == (0, True)
    away.mark_requeued("anything")
    assert not away.was_requeued("anything")


def test_a_turn_is_one_processs_until_it_ends_or_dies(valkey: redis.Redis) -> None:
    def die() -> None:
        with CrashCounter(valkey).mutex("work"):
            os.kill(os.getpid(), signal.SIGKILL)

    one, other = CrashCounter(valkey), CrashCounter(valkey)
    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(patience())
    with one.mutex("work") as first, other.mutex("work") as second:
        assert (first, second) == (True, False)
        with other.mutex("other work") as third:
            assert third
    assert valkey.keys("futwork:deaths:*") == []
    valkey.set("futwork:deaths:turn:work", "another-host 1 a-uuid", ex=MUTEX_SECONDS)
    with one.mutex("work") as first:
        assert not first
    assert valkey.keys("futwork:deaths:*") == [b"futwork:deaths:turn:work"]
