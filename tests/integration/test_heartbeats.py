"""Heartbeats on a real Valkey: which processes live, which fell silent, and that sending one never hurts a process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import pytest
import redis
from celery.beat import Service

from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.heartbeats import Heartbeat, Heartbeats, HeartbeatSender
from pipeline.devstack.embedded_valkey import free_port
from pipeline.settings import Settings
from pipeline.worker.app import build_app

HOUR = timedelta(hours=1)


@pytest.fixture
def heartbeats(valkey: redis.Redis) -> Heartbeats:
    return Heartbeats(valkey)


def grow_older(valkey: redis.Redis, kind: str, name: str, seconds: float) -> None:
    valkey.zincrby(f"{{futwork:pulse}}:{kind}:times", -seconds, name)


def names(found: list[Heartbeat]) -> list[tuple[str, str]]:
    return [(one.kind, one.name) for one in found]


def test_a_process_with_a_recent_heartbeat_is_alive_with_its_queues(heartbeats: Heartbeats) -> None:
    heartbeats.record("beat", "beat@a")
    heartbeats.record("worker", "intake@a", ["upkeep", "intake"])
    heartbeats.record("worker", "dispatch@a", ("dispatch",))
    heartbeats.record("worker", "intake@a", ["intake"])

    found = heartbeats.alive()

    assert [(one.kind, one.name, one.queues) for one in found] == [
        ("worker", "dispatch@a", ("dispatch",)),
        ("worker", "intake@a", ("intake",)),
        ("beat", "beat@a", ()),
    ]
    assert all(0 <= one.seconds_ago < 15 for one in found)


def test_a_process_that_fell_silent_is_not_alive_and_is_reported_for_an_hour(
    heartbeats: Heartbeats, valkey: redis.Redis
) -> None:
    heartbeats.record("worker", "old@a", ["intake"])
    heartbeats.record("worker", "new@a", ["intake"])
    grow_older(valkey, "worker", "old@a", 100)

    assert names(heartbeats.alive()) == [("worker", "new@a")]
    silent = next(one for one in heartbeats.alive(within=HOUR) if one.name == "old@a")
    assert 100 <= silent.seconds_ago < 130

    grow_older(valkey, "worker", "old@a", 3600)
    heartbeats.record("worker", "new@a", ["intake"])

    assert names(heartbeats.alive(within=10 * HOUR)) == [("worker", "new@a")]
    assert list(valkey.hgetall("{futwork:pulse}:worker:queues")) == [b"new@a"]


def test_names_that_change_at_every_start_do_not_fill_the_memory(heartbeats: Heartbeats, valkey: redis.Redis) -> None:
    times = "{futwork:pulse}:worker:times"
    with valkey.pipeline() as pipeline:
        for number in range(1000):
            pipeline.eval("return redis.call('ZADD', KEYS[1], redis.call('TIME')[1] - 60, ARGV[1])", 1, times, number)
            pipeline.hset("{futwork:pulse}:worker:queues", str(number), "[]")
        pipeline.execute()

    heartbeats.record("worker", "one more", [])

    assert valkey.zcard(times) == valkey.hlen("{futwork:pulse}:worker:queues") == 1000
    assert names(heartbeats.alive()) == [("worker", "one more")]
    assert 0 < valkey.ttl(times) <= 3600


def test_when_a_periodic_task_last_ended(heartbeats: Heartbeats, valkey: redis.Redis) -> None:
    assert heartbeats.last_run("sweep") is None

    heartbeats.ran("sweep")
    heartbeats.ran("tidy")
    valkey.hincrbyfloat("{futwork:pulse}:runs:ended", "tidy", -50)

    assert 0 <= heartbeats.last_run("sweep") < 15
    assert 49 < heartbeats.last_run("tidy") < 65


def test_without_its_redis_a_reader_gets_an_error_and_a_process_goes_on() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"

    with pytest.raises(RedisUnavailable):
        Heartbeats(redis.Redis.from_url(url)).alive()
    with pytest.raises(RedisUnavailable):
        Heartbeats(redis.Redis.from_url(url)).last_run("sweep")
    HeartbeatSender(url, "worker", "w@a").send()


def test_a_redis_that_is_silent_is_asked_once_and_then_not_for_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = HeartbeatSender(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", "worker", "w@a")
        for _ in range(1000):  # a second each, if it asked each time
            sender.send()

        silent.accept()[0].close()
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_each_round_of_beats_loop_is_a_heartbeat_however_seldom_it_sends(
    make_settings: Callable[..., Settings], valkey_url: str, heartbeats: Heartbeats
) -> None:
    """So one that hangs while it sends is silent."""
    app = build_app(make_settings(broker_url=valkey_url, sweep_seconds=3600))
    app.conf.beat_schedule = {"sweep": app.conf.beat_schedule["sweep"]}
    scheduler = Service(app=app, scheduler_cls=app.conf.beat_scheduler).scheduler
    assert heartbeats.alive() == []

    waits = [scheduler.tick() for _ in range(3)]

    assert names(heartbeats.alive()) == [("beat", f"beat@{socket.gethostname()}")]
    assert max(waits) <= 5
