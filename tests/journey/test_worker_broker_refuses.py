"""A Redis that answers with a refusal is like one that is away: the worker lives, and goes on when it is well again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import redis

from pipeline import enqueue
from tests.conftest import CAMPAIGN
from tests.journey.conftest import quarantined, rows
from tests.journey.fleet import Fleet, Process, Valkey
from tests.waiting import until

USER = ("ACL", "SETUSER", "default")


def replica(server: redis.Redis) -> None:
    server.execute_command("REPLICAOF", "127.0.0.1", "1")


def master(server: redis.Redis) -> None:
    server.execute_command("REPLICAOF", "NO", "ONE")


def replicas_wanted(server: redis.Redis) -> None:
    server.config_set("min-replicas-to-write", 1)


def replicas_not_wanted(server: redis.Redis) -> None:
    server.config_set("min-replicas-to-write", 0)


def cannot_save(server: redis.Redis) -> None:
    server.config_set("save", "3600 1")
    snapshot = Path(server.config_get("dir")["dir"], "dump.rdb")
    snapshot.unlink(missing_ok=True)
    snapshot.mkdir()  # a file cannot take its place
    server.set("a key", 1)
    with contextlib.suppress(redis.ResponseError):
        server.bgsave()
    until(lambda: server.info("persistence")["rdb_last_bgsave_status"] == "err")


def need_not_save(server: redis.Redis) -> None:
    server.config_set("stop-writes-on-bgsave-error", "no")


def no_channels(server: redis.Redis) -> None:
    server.execute_command(*USER, "resetchannels")


def channels(server: redis.Redis) -> None:
    server.execute_command(*USER, "allchannels")


def no_scripts(server: redis.Redis) -> None:
    server.execute_command(*USER, "-eval", "-evalsha")


def scripts(server: redis.Redis) -> None:
    server.execute_command(*USER, "+@all")


REFUSALS = {
    "READONLY": (replica, master),
    "NOREPLICAS": (replicas_wanted, replicas_not_wanted),
    "MISCONF": (cannot_save, need_not_save),
    "NOPERM for channels": (no_channels, channels),
    "NOPERM for scripts": (no_scripts, scripts),
}


def refused(worker: Process) -> int:
    """How often the worker has connected again."""
    return worker.log.count("Connection to broker lost") + worker.log.count("Cannot connect to")


def test_a_worker_outlasts_every_refusal_of_its_redis(fleet: Fleet, own_valkey: Valkey) -> None:
    """One after the other, in one worker: each refusal is met by a new connection, or by one that had worked."""
    worker = fleet.worker()
    count = 0
    with contextlib.closing(own_valkey.client()) as server:
        for name, (refuse, recover) in REFUSALS.items():
            enqueue(CAMPAIGN, rows(10, start=count), settings=fleet.settings)
            count += 10
            until(lambda: fleet.accepted() == count, what=lambda: worker.log)  # noqa: B023 - it waits here
            met = refused(worker)
            refuse(server)
            until(lambda: refused(worker) > met + 1 or not worker.alive, what=lambda: f"{name}\n{worker.log}")  # noqa: B023
            assert worker.alive, f"{name}\n{worker.log}"
            recover(server)
    enqueue(CAMPAIGN, rows(10, start=count), settings=fleet.settings)
    until(lambda: fleet.accepted() == count + 10, what=lambda: worker.log)
    assert worker.alive
    assert worker.log.count("Frequent restarts") == 0
    assert quarantined(fleet) == []
