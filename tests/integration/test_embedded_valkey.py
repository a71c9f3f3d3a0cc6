"""The private broker of development commands: a real Valkey over a folder of its own."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import redis

from pipeline.devstack.embedded_valkey import embedded_broker, free_port, running_broker
from tests.waiting import patience


def client(url: str) -> contextlib.closing[redis.Redis]:
    return contextlib.closing(redis.Redis.from_url(url, socket_timeout=patience()))


def test_it_lives_as_long_as_its_block_and_listens_on_loopback_only(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "valkey") as url, client(url) as valkey:
        assert valkey.ping()
        assert valkey.config_get("bind")["bind"] == "127.0.0.1"
        assert running_broker(tmp_path / "valkey") == url
    assert running_broker(tmp_path / "valkey") is None
    with client(url) as valkey, pytest.raises(redis.ConnectionError):
        valkey.ping()


def test_what_waits_in_it_survives_a_restart_and_is_never_evicted(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "valkey") as url, client(url) as valkey:
        valkey.lpush("intake", "a batch")
        assert valkey.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    with embedded_broker(tmp_path / "valkey") as url, client(url) as valkey:
        assert valkey.lrange("intake", 0, -1) == [b"a batch"]


def test_a_second_user_of_a_folder_shares_the_server_and_does_not_end_it(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "valkey") as first:
        with embedded_broker(tmp_path / "valkey") as second:
            assert second == first
        with client(first) as valkey:
            assert valkey.ping()


def test_an_old_address_where_somebody_elses_server_listens_is_not_taken_for_ours(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "theirs") as theirs:
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "broker.url").write_text(theirs)
        assert running_broker(tmp_path / "ours") is None
        with embedded_broker(tmp_path / "ours") as ours:
            assert ours != theirs


def test_a_port_that_somebody_takes_first_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_broker(tmp_path / "theirs") as theirs:
        ports = [int(theirs.rpartition(":")[2].partition("/")[0]), free_port()]
        monkeypatch.setattr("pipeline.devstack.embedded_valkey.free_port", lambda: ports.pop(0))
        with embedded_broker(tmp_path / "ours") as ours, client(ours) as valkey:
            assert valkey.config_get("dir")["dir"] == str(tmp_path / "ours")
