"""Questions about a Redis server itself: how it keeps data, how much memory it has, and what time it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import redis

from pipeline.coordination.connection import WAIT_SECONDS, open_client, reaching


@dataclass(frozen=True, slots=True)
class Condition:
    """How a server keeps what it is given."""

    append_only: bool
    """Whether the append-only file is on, so that a restart loses nothing."""
    can_write: bool
    """Whether the last write to that file worked."""
    eviction: str
    """The `maxmemory-policy`; every other than `noeviction` may drop keys."""
    used_bytes: int
    most_bytes: int
    """The `maxmemory`; 0 if there is none."""


class Inspection:
    """One connection to a server. Every method raises `RedisUnavailable`."""

    def __init__(self, client: redis.Redis, what: str) -> None:
        self._client = client
        self._what = what

    def condition(self) -> Condition:
        """How the server keeps data; what it does not report counts as well set up."""
        with reaching(self._what):
            info = self._client.info("persistence") | self._client.info("memory")
        return Condition(
            append_only=bool(info.get("aof_enabled")),
            can_write=info.get("aof_last_write_status", "ok") == "ok",
            eviction=info.get("maxmemory_policy", "noeviction"),
            used_bytes=int(info.get("used_memory", 0)),
            most_bytes=int(info.get("maxmemory", 0)),
        )

    def clock(self) -> datetime:
        """The server's time."""
        with reaching(self._what):
            seconds, micro = self._client.time()
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micro)


@contextmanager
def inspecting(url: str, what: str) -> Iterator[Inspection]:
    """A connection to the server at *url*, which is open when the block begins; *what* is kept in that Redis."""
    with open_client(url, socket_timeout=WAIT_SECONDS, decode_responses=True) as client:
        with reaching(what):
            client.ping()
        yield Inspection(client, what)
