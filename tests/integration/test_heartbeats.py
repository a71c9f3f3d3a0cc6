"""Signs of life on a real Valkey: who lives, who fell silent, and that noting never hurts whoever notes."""

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
def pulse(valkey: redis.Redis) -> Heartbeats:
    return Heartbeats(valkey)


def grow_older(valkey: redis.Redis, kind: str, name: str, seconds: float) -> None:
    valkey.zincrby(f"{{futwork:pulse}}:{kind}:times", -seconds, name)


def names(signs: list[Heartbeat]) -> list[tuple[str, str]]:
    return [(sign.kind, sign.name) for sign in signs]


def test_whoever_noted_itself_is_alive_with_its_queues(pulse: Heartbeats) -> None:
    pulse.note("beat", "beat@a")
    pulse.note("worker", "intake@a", ["upkeep", "intake"])
    pulse.note("worker", "dispatch@a", ("dispatch",))
    pulse.note("worker", "intake@a", ["intake"])

    found = pulse.alive()

    assert [(sign.kind, sign.name, sign.queues) for sign in found] == [
        ("worker", "dispatch@a", ("dispatch",)),
        ("worker", "intake@a", ("intake",)),
        ("beat", "beat@a", ()),
    ]
    assert all(0 <= sign.seconds_ago < 15 for sign in found)


def test_whoever_fell_silent_is_not_alive_and_is_told_of_for_an_hour(pulse: Heartbeats, valkey: redis.Redis) -> None:
    pulse.note("worker", "old@a", ["intake"])
    pulse.note("worker", "new@a", ["intake"])
    grow_older(valkey, "worker", "old@a", 100)

    assert names(pulse.alive()) == [("worker", "new@a")]
    silent = next(sign for sign in pulse.alive(within=HOUR) if sign.name == "old@a")
    assert 100 <= silent.seconds_ago < 130

    grow_older(valkey, "worker", "old@a", 3600)
    pulse.note("worker", "new@a", ["intake"])

    assert names(pulse.alive(within=10 * HOUR)) == [("worker", "new@a")]
    assert list(valkey.hgetall("{futwork:pulse}:worker:queues")) == [b"new@a"]


def test_names_that_change_at_every_start_do_not_fill_the_memory(pulse: Heartbeats, valkey: redis.Redis) -> None:
    times = "{futwork:pulse}:worker:times"
    with valkey.pipeline() as pipeline:
        for number in range(1000):
            pipeline.eval("return redis.call('ZADD', KEYS[1], redis.call('TIME')[1] - 60, ARGV[1])", 1, times, number)
            pipeline.hset("{futwork:pulse}:worker:queues", str(number), "[]")
        pipeline.execute()

    pulse.note("worker", "one more", [])

    assert valkey.zcard(times) == valkey.hlen("{futwork:pulse}:worker:queues") == 1000
    assert names(pulse.alive()) == [("worker", "one more")]
    assert 0 < valkey.ttl(times) <= 3600


def test_when_a_periodic_task_last_ended(pulse: Heartbeats, valkey: redis.Redis) -> None:
    assert pulse.last_run("sweep") is None

    pulse.ran("sweep")
    pulse.ran("tidy")
    valkey.hincrbyfloat("{futwork:pulse}:runs:ended", "tidy", -50)

    assert 0 <= pulse.last_run("sweep") < 15
    assert 49 < pulse.last_run("tidy") < 65


def test_without_its_redis_a_reader_is_told_and_a_process_goes_on() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"

    with pytest.raises(RedisUnavailable):
        Heartbeats(redis.Redis.from_url(url)).alive()
    with pytest.raises(RedisUnavailable):
        Heartbeats(redis.Redis.from_url(url)).last_run("sweep")
    HeartbeatSender(url, "worker", "w@a").note()


def test_a_redis_that_is_silent_is_asked_once_and_left_in_peace() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        noting = HeartbeatSender(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", "worker", "w@a")
        for _ in range(1000):  # a second each, if it asked each time
            noting.note()

        silent.accept()[0].close()
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_each_round_of_beats_loop_is_a_sign_however_seldom_it_sends(
    make_settings: Callable[..., Settings], valkey_url: str, pulse: Heartbeats
) -> None:
    """So one that hangs while it sends is silent."""
    app = build_app(make_settings(broker_url=valkey_url, sweep_seconds=3600))
    app.conf.beat_schedule = {"sweep": app.conf.beat_schedule["sweep"]}
    scheduler = Service(app=app, scheduler_cls=app.conf.beat_scheduler).scheduler
    assert pulse.alive() == []

    waits = [scheduler.tick() for _ in range(3)]

    assert names(pulse.alive()) == [("beat", f"beat@{socket.gethostname()}")]
    assert max(waits) <= 5
