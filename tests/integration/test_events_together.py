"""Events that several workers have in hand, and what becomes of an event that kills its workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from celery.exceptions import Reject

from pipeline import events as stage
from pipeline.broker import WebEvent
from pipeline.coordination.connection import connect
from pipeline.coordination.crash_counter import CrashCounter
from pipeline.events import Events, Kept
from pipeline.ledger import Ledger, StoredEvent, digest_of
from pipeline.ledger.tables import call_events, calls
from pipeline.settings import Settings
from pipeline.wiring import close_services
from pipeline.worker import guard
from pipeline.worker.guard import guarded
from tests.conftest import CAMPAIGN, NOW
from tests.waiting import patience, until

MakeSettings = Callable[..., Settings]
DAY = timedelta(days=1)


def make_event(call_sid: str, *, after: int = 0, **says: Any) -> WebEvent:
    body = {"callSid": call_sid, "campaignId": CAMPAIGN, "status": "completed"} | says
    return WebEvent(json.dumps(body).encode(), NOW + timedelta(seconds=after))


def stored(one: WebEvent) -> StoredEvent:
    return StoredEvent(digest_of(one.body), one.body, one.received_at)


def keep(ledger: Ledger, *given: WebEvent) -> None:
    """Store events as a worker does that dies before it merges them, or one of the release before."""
    ledger.calls.keep([stored(one) for one in given])


def states(ledger: Ledger) -> dict[str, int]:
    with ledger.database.read() as connection:
        found = list(connection.scalars(sa.select(call_events.c.state)))
    return {state: found.count(state) for state in set(found)}


def lock_is_waited_for(ledger: Ledger) -> bool:
    with ledger.database.read() as connection:
        return bool(connection.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


def die_merging(url: str, settings: Settings, valkey_url: str, batch: Sequence[WebEvent], *, again: bool) -> int | None:
    """Take events in as a process that is killed when it folds the call `killer`; return its exit code."""

    def take_in() -> None:
        describe = stage.describe

        def deadly(merged: dict[str, Any], **options: Any) -> Any:
            if merged["callSid"] == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            return describe(merged, **options)

        stage.describe = deadly  # type: ignore[assignment]  # in this process alone, which ends with it
        own = CrashCounter(redis.Redis.from_url(valkey_url))
        Events(Ledger(url), settings, crash_counter=own).take_in(batch, again=again)

    process = multiprocessing.get_context("fork").Process(target=take_in)
    process.start()
    process.join(patience())
    return process.exitcode


# Several workers


@pytest.mark.parametrize("first", ["ringing", "completed"])
def test_two_messages_with_events_of_one_call_at_the_same_time_end_with_both_folded(
    postgres_ledger: Ledger, _postgres_migrated: str, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:  # fmt: skip
    """The first is inside its transaction when the second stores its event and waits for the call."""
    parts = {
        "ringing": [make_event("call-1", status="ringing", agentId="a1"), make_event("call-2")],
        "completed": [make_event("call-0"), make_event("call-1", after=1, disposition="Interested")],
    }
    fold, inside = Events._fold, threading.Event()

    def slow(self: Events, *args: Any) -> Any:
        if self is one and not inside.is_set():
            inside.set()
            until(lambda: lock_is_waited_for(postgres_ledger))
        return fold(self, *args)

    monkeypatch.setattr(Events, "_fold", slow)
    other_ledger = Ledger(_postgres_migrated)
    one, other = Events(postgres_ledger, make_settings()), Events(other_ledger, make_settings())
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(one.take_in, parts.pop(first))
        until(inside.is_set)
        assert other.take_in(*parts.values()) == Kept(2, 2, 2, 0)
        assert begun.result(patience()) == Kept(2, 2, 2, 0)
    other_ledger.close()
    assert states(postgres_ledger) == {"merged": 4}
    with postgres_ledger.database.read() as connection:
        call = connection.execute(sa.select(calls).where(calls.c.call_sid == "call-1")).one()
    assert (call.status, call.disposition, json.loads(call.details)["agent_id"]) == ("completed", "interested", "a1")


def test_an_event_that_another_worker_has_in_hand_is_merged_once(
    postgres_ledger: Ledger, _postgres_migrated: str, make_settings: MakeSettings
) -> None:
    """As where a worker of the release before merges what it stored, and the broker gives the message out again."""
    event = make_event("call-1")
    keep(postgres_ledger, event)
    with ThreadPoolExecutor(1) as pool, postgres_ledger.database.write() as connection:
        connection.execute(sa.select(call_events.c.digest).with_for_update(key_share=True))
        other_ledger = Ledger(_postgres_migrated)
        waiting = pool.submit(Events(other_ledger, make_settings()).take_in, [event])
        until(lambda: lock_is_waited_for(postgres_ledger))
        connection.execute(sa.update(call_events).values(state="merged", call_sid="call-1"))
        connection.commit()
        assert waiting.result(patience()) == Kept()
        other_ledger.close()
    assert states(postgres_ledger) == {"merged": 1}


def test_a_message_without_events_merges_what_waits(ledger: Ledger, make_settings: MakeSettings) -> None:
    """The release before sends such messages, for events that it has stored."""
    keep(ledger, *(make_event(f"call-{n}") for n in range(450)))
    assert Events(ledger, make_settings()).take_in([]) == Kept(450, 450, 450, 0)
    assert states(ledger) == {"merged": 450}


def test_a_message_leaves_what_others_have_stored_to_them(ledger: Ledger, make_settings: MakeSettings) -> None:
    keep(ledger, make_event("call-1"))
    assert Events(ledger, make_settings()).take_in([make_event("call-2")]) == Kept(1, 1, 1, 0)
    assert states(ledger) == {"pending": 1, "merged": 1}


# Processes that die


def test_a_process_that_is_killed_between_storing_and_folding_leaves_nothing_half_done(
    ledger: Ledger, make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis
) -> None:
    """The message was not acknowledged, so it comes again; that tidy comes first does no harm."""
    url = ledger.database.url.render_as_string(hide_password=False)
    batch = [make_event("call-1"), make_event("killer", after=1)]
    assert die_merging(url, make_settings(), valkey_url, batch, again=False) == -signal.SIGKILL
    assert states(ledger) == {}
    assert die_merging(url, make_settings(), valkey_url, batch, again=True) == -signal.SIGKILL
    assert states(ledger) == {"merged": 1, "pending": 1}
    events = Events(ledger, make_settings(), crash_counter=CrashCounter(valkey))
    assert events.merge_left_over(before=NOW + DAY, now=NOW) == 1
    assert events.take_in(batch, again=True) == Kept()
    assert states(ledger) == {"merged": 2}


def test_an_event_that_kills_its_workers_ends_in_quarantine_and_takes_no_other_with_it(
    ledger: Ledger, make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis
) -> None:
    """It died in the merge of the whole message, so nobody knows which event it was until each is merged by itself."""
    url = ledger.database.url.render_as_string(hide_password=False)
    batch = [make_event("call-1"), make_event("killer", after=1), make_event("call-2", after=2)]
    for run in range(3):
        assert die_merging(url, make_settings(), valkey_url, batch, again=run > 0) == -signal.SIGKILL
    assert states(ledger) == {"merged": 1, "pending": 2}
    kept = Events(ledger, make_settings(), crash_counter=CrashCounter(valkey)).take_in(batch, again=True)
    assert kept == Kept(events=2, calls=1, orphans=1, quarantined=1)
    assert states(ledger) == {"merged": 2, "quarantined": 1}
    (waiting,) = ledger.quarantine.waiting(kind="event")
    assert (waiting.body, waiting.reason) == (batch[1].body, "2 worker processes died when it was merged")
    assert valkey.keys("futwork:deaths:*") == []


def test_a_living_process_that_merges_an_event_is_no_death(
    postgres_ledger: Ledger, _postgres_migrated: str, make_settings: MakeSettings, valkey: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The count says that two processes died over it, but one of them is in the middle of its merge."""
    event = make_event("call-1")
    valkey.set(f"futwork:deaths:event:{digest_of(event.body)}", 1)
    fold, inside = Events._fold, threading.Event()

    def slow(self: Events, *args: Any) -> Any:
        inside.set()
        until(lambda: lock_is_waited_for(postgres_ledger))
        return fold(self, *args)

    monkeypatch.setattr(Events, "_fold", slow)
    other_ledger = Ledger(_postgres_migrated)
    one, other = (
        Events(each, make_settings(), crash_counter=CrashCounter(valkey)) for each in (postgres_ledger, other_ledger)
    )
    other_ledger.calls.keep([stored(event)])
    monkeypatch.setattr(other_ledger.calls, "keep", lambda _: None)  # it did so before the first began to merge
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(one.take_in, [event], again=True)
        until(inside.is_set)
        assert other.take_in([event], again=True) == Kept()
        assert begun.result(patience()) == Kept(1, 1, 1, 0)
    other_ledger.close()
    assert (states(postgres_ledger), postgres_ledger.quarantine.waiting()) == ({"merged": 1}, [])


def test_left_over_events_are_merged_one_by_one_after_a_death(
    ledger: Ledger, make_settings: MakeSettings, valkey: redis.Redis
) -> None:
    keep(ledger, make_event("call-1"), make_event("killer", after=1), make_event("call-2", after=2))
    valkey.set("futwork:deaths:left over", 1)
    valkey.set(f"futwork:deaths:event:{digest_of(make_event('killer').body)}", 2)
    events = Events(ledger, make_settings(), crash_counter=CrashCounter(valkey))
    assert events.merge_left_over(before=NOW + DAY, now=NOW) == 3
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


def test_the_events_of_a_message_are_stored_before_it_is_tried_in_halves(
    ledger: Ledger, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies in the middle of it leaves them to tidy, and not to the broker alone."""
    batch = [make_event(f"call-{n}", after=n) for n in range(3)]
    seen: list[dict[str, int]] = []
    fold = Events._fold

    def fail_at_first(self: Events, *args: Any) -> Any:
        seen.append(states(ledger))
        if len(seen) == 1:
            raise ZeroDivisionError("a fault of ours")
        return fold(self, *args)

    monkeypatch.setattr(Events, "_fold", fail_at_first)
    assert Events(ledger, make_settings()).take_in(batch) == Kept(3, 3, 3, 0)
    assert seen[:2] == [{}, {"pending": 3}]
    assert states(ledger) == {"merged": 3}


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
    with away.counted("anything") as deaths:
        assert deaths == 0
    away.mark_requeued("anything")
    assert not away.was_requeued("anything")
