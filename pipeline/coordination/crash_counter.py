"""How many processes crashed over a piece of work, counted in Redis over all workers, and a mutex for it."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator

import redis

_MEMORY_SECONDS = 24 * 3600
MUTEX_SECONDS = 30  # that a mutex lasts if its holder's whole host is gone

# KEYS: a mutex. ARGV: its holder; the next one, or nothing to give it up; the seconds that it lasts
_HAND_OVER = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
    return 0
end
if ARGV[2] == '' then
    redis.call('DEL', KEYS[1])
else
    redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
end
return 1
"""


class CrashCounter:
    """Counts work when it begins, and forgets it when it ends in an orderly way: what stays counted crashed.

    Without a Redis, or while it is away, every count is zero: uncounted is better than not done.
    """

    def __init__(self, client: redis.Redis | None, *, prefix: str = "futwork:deaths") -> None:
        self._client = client
        self._prefix = prefix

    @contextlib.contextmanager
    def counted(self, work: str) -> Iterator[int]:
        """How many times *work* was begun before and did not end; it counts as begun until the block ends."""
        if self._client is None:
            yield 0
            return
        key, begun = f"{self._prefix}:{work}", 1
        with contextlib.suppress(redis.RedisError):
            begun = int(self._client.incr(key))
            self._client.expire(key, _MEMORY_SECONDS)
        try:
            yield begun - 1
        finally:
            with contextlib.suppress(redis.RedisError):
                self._client.delete(key)

    @contextlib.contextmanager
    def mutex(self, work: str) -> Iterator[bool]:
        """Whether this process holds the mutex of *work*, as one process at a time does, until the block ends.

        So work that is counted as begun is not that of a living process. The mutex of a process that died is free at
        once on its own host, and elsewhere after `MUTEX_SECONDS`.
        """
        if self._client is None:
            yield True
            return
        key, holder = f"{self._prefix}:turn:{work}", f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"
        is_ours = True
        with contextlib.suppress(redis.RedisError):
            is_ours = self._take_mutex(key, holder)
        try:
            yield is_ours
        finally:
            with contextlib.suppress(redis.RedisError):
                self._client.eval(_HAND_OVER, 1, key, holder, "", 0)

    def _take_mutex(self, key: str, holder: str) -> bool:
        assert self._client is not None
        if self._client.set(key, holder, nx=True, ex=MUTEX_SECONDS):
            return True
        found = self._client.get(key)
        other = found.decode() if isinstance(found, bytes) else found
        if not isinstance(other, str) or not _is_dead(other):
            return False
        # Of several that find it dead one gets the mutex; for the others the holder has changed meanwhile.
        return bool(self._client.eval(_HAND_OVER, 1, key, other, holder, MUTEX_SECONDS))

    def mark_requeued(self, work: str) -> None:
        """Remember that *work* is delivered again although no process crashed over it."""
        if self._client is not None:
            with contextlib.suppress(redis.RedisError):
                self._client.set(f"{self._prefix}:spared:{work}", 1, ex=_MEMORY_SECONDS)

    def was_requeued(self, work: str) -> bool:
        """Whether `mark_requeued` was called for *work*; asking forgets it."""
        if self._client is not None:
            with contextlib.suppress(redis.RedisError):
                return bool(self._client.delete(f"{self._prefix}:spared:{work}"))
        return False


def _is_dead(holder: str) -> bool:
    """Whether a mutex' holder was a process of this host that is gone."""
    host, pid, _ = holder.split(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, as another user
    return False
