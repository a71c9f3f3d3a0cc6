"""What workers count, on a real Valkey: nothing is lost but what a killed process had not handed in."""

from __future__ import annotations

import json
import multiprocessing
import threading
from typing import Any

import pytest
import redis

from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.counters import Counters
from pipeline.devstack.embedded_valkey import free_port
from pipeline.observability.metrics import (
    EVENT_LAG,
    INTAKE_LEADS,
    LIMITER_SLOTS,
    METRICS,
    SUBMISSION_SECONDS,
    SUBMISSIONS,
    TASKS_DONE,
)
from tests.waiting import until

COUNTS = "{futwork:metrics}:counts"


def value(counters: Counters, measure: Any, *labels: str) -> float:
    return counters.read()[measure.name][labels].value


def test_everything_that_can_be_counted_begins_at_nought(valkey: redis.Redis) -> None:
    """A counter that first appears with a value shows no increase to Prometheus."""
    found = Counters(valkey).read()

    assert {one.name for one in METRICS} == set(found)
    assert [found[SUBMISSIONS.name][labels].value for labels in SUBMISSIONS.known_labels()] == [0] * 9
    assert len(found[TASKS_DONE.name]) == 5 * 4
    assert found[LIMITER_SLOTS.name] == {}  # an account is known once it sends


def test_counts_of_several_processes_add_up(valkey: redis.Redis, valkey_url: str) -> None:
    def work() -> None:
        counters = Counters(redis.Redis.from_url(valkey_url))
        for _ in range(50):
            counters.count(SUBMISSIONS, "accepted")
            counters.count(INTAKE_LEADS, "known", by=3)
            counters.observe(SUBMISSION_SECONDS, 0.02, "accepted")
            counters.observe(SUBMISSION_SECONDS, 61, "accepted")
        assert counters.flush()

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    counters = Counters(valkey)

    assert [child.exitcode for child in children] == [0, 0, 0]
    assert value(counters, SUBMISSIONS, "accepted") == 150
    assert value(counters, INTAKE_LEADS, "known") == 450
    seconds = counters.read()[SUBMISSION_SECONDS.name]["accepted",]
    assert seconds.buckets == {"0.025": 150, "+Inf": 150}
    assert seconds.value == pytest.approx(150 * 61.02)


def test_counts_reach_redis_by_themselves(valkey: redis.Redis) -> None:
    counters = Counters(valkey)

    counters.count(SUBMISSIONS, "busy")

    until(lambda: value(Counters(valkey), SUBMISSIONS, "busy") == 1)


def test_a_bucket_holds_what_is_no_larger_than_its_bound(valkey: redis.Redis) -> None:
    counters = Counters(valkey)
    for seconds in (0.05, 0.1, 0.1001, 7200, 7201):
        counters.observe(EVENT_LAG, seconds)
    counters.flush()

    assert counters.read()[EVENT_LAG.name][()].buckets == {"0.1": 2, "0.25": 1, "7200": 1, "+Inf": 1}


def test_what_was_counted_while_redis_was_away_is_handed_in_later(valkey: redis.Redis, valkey_url: str) -> None:
    counters = Counters(redis.Redis.from_url(f"redis://127.0.0.1:{free_port()}/0"))
    for _ in range(5):
        counters.count(SUBMISSIONS, "failed")
        assert not counters.flush()
    with pytest.raises(RedisUnavailable):
        counters.read()

    back = Counters(valkey)
    counters._add = back._add
    counters.count(SUBMISSIONS, "failed")
    assert counters.flush()

    assert value(back, SUBMISSIONS, "failed") == 6
    assert counters.flush()
    assert value(back, SUBMISSIONS, "failed") == 6


def test_threads_lose_no_count(valkey: redis.Redis) -> None:
    counters, barrier = Counters(valkey), threading.Barrier(8)

    def count() -> None:
        barrier.wait()
        for _ in range(500):
            counters.count(SUBMISSIONS, "accepted")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counters.flush()
    counters.flush()

    until(lambda: value(counters, SUBMISSIONS, "accepted") == 4000)  # the counters's own thread may hold some


def test_what_another_release_counted_is_left_out(valkey: redis.Redis) -> None:
    counters = Counters(valkey)
    for key in (
        "no json", json.dumps(["pipeline_gone", [], ""]), json.dumps([SUBMISSIONS.name, ["a", "b"], ""]),
        json.dumps([EVENT_LAG.name, [], "0.3"]), json.dumps([SUBMISSIONS.name, "x", ""]), json.dumps(7),
    ):  # fmt: skip
        valkey.hset(COUNTS, key, "1")
    valkey.hset(COUNTS, json.dumps([SUBMISSIONS.name, ["accepted"], ""]), "2")

    found = counters.read()

    assert {name: {k: v.value for k, v in one.items() if v.value or v.buckets} for name, one in found.items() if one}[
        SUBMISSIONS.name
    ] == {("accepted",): 2}
    assert found[EVENT_LAG.name][()].buckets == {}


def test_the_counts_are_not_kept_for_ever(valkey: redis.Redis) -> None:
    counters = Counters(valkey)
    counters.count(SUBMISSIONS, "accepted")
    counters.flush()

    assert 0 < valkey.ttl(COUNTS) <= 90 * 24 * 3600
