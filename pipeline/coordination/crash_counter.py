"""How many processes crashed over a piece of work, counted in Redis over all workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import redis

_MEMORY_SECONDS = 24 * 3600


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
