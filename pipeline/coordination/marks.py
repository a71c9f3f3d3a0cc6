"""Marks and counts in Redis that end by themselves, such as sessions that were ended and sign-in attempts."""

from __future__ import annotations

from datetime import timedelta

from pipeline.coordination.connection import Redis, RedisUnavailable, reaching


class Marks:
    """Sets marks and counts for a time. Every method raises `RedisUnavailable`, also if there is no Redis at all."""

    def __init__(self, client: Redis | None, *, prefix: str) -> None:
        self._redis = client
        self._prefix = prefix

    def set(self, name: str, *, duration: timedelta) -> None:
        """Set a mark that ends after *duration*."""
        client = self._client()
        with reaching("the marks"):
            client.set(self._key(name), 1, ex=duration)

    def is_set(self, name: str) -> bool:
        """Whether the mark is set and has not ended."""
        client = self._client()
        with reaching("the marks"):
            return bool(client.exists(self._key(name)))

    def count(self, name: str, *, window: timedelta) -> int:
        """Add one to a count and return it; it starts again at one when *window* has passed since its first."""
        client = self._client()
        with reaching("the marks"), client.pipeline() as pipe:
            pipe.incr(self._key(name))
            pipe.expire(self._key(name), window, nx=True)
            return int(pipe.execute()[0])

    def forget(self, name: str) -> None:
        """Remove a mark or a count."""
        client = self._client()
        with reaching("the marks"):
            client.delete(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _client(self) -> Redis:
        if self._redis is None:
            raise RedisUnavailable("no Redis is configured for the marks: set REDIS_URL")
        return self._redis
