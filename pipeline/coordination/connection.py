"""The connection to the Redis that processes share, and the one error for its absence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.addresses import read_address

WAIT_SECONDS = 3.0  # for Redis, to connect and to answer; then nothing is sent

Redis = redis.Redis


class RedisUnavailable(Exception):
    """The Redis that processes share does not answer, or refuses; the message says what is kept in it."""


def connect(url: str) -> Redis:
    """A client that answers or fails within seconds, so that POSTs that are out go on.

    It tries again once, at once, and only where the connection broke: an idle one may have been closed meanwhile.
    """
    return open_client(
        url,
        socket_timeout=WAIT_SECONDS,
        socket_connect_timeout=WAIT_SECONDS,
        health_check_interval=25,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


def open_client(url: str, **options: Any) -> Redis:
    """A client with redis-py's *options*; its TLS is that of `pipeline.addresses`."""
    address = read_address(url)
    return redis.Redis.from_url(address.url, **address.for_redis(), **options)


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Raise `RedisUnavailable` for whatever redis-py raises in the block; *what* is kept in that Redis."""
    try:
        yield
    except redis.RedisError as error:
        raise RedisUnavailable(f"the Redis of {what} cannot be reached: {error}") from error


def run(script: Any, what: str, keys: Sequence[str], args: Sequence[object]) -> Any:
    """What a registered script answers; raises `RedisUnavailable`."""
    with reaching(what):
        return script(keys=keys, args=args)
