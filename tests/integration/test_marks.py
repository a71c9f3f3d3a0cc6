"""Marks and counts that end by themselves, and the questions about a server, on a real server."""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis

from pipeline.coordination.connection import RedisUnavailable, connect
from pipeline.coordination.inspection import inspecting
from pipeline.coordination.marks import Marks

NOBODY = "redis://127.0.0.1:9/0"
HOUR = timedelta(hours=1)


def test_a_mark_is_set_for_its_time_and_can_be_removed(valkey: redis.Redis) -> None:
    marks = Marks(valkey, prefix="test:marks")

    marks.set("ended:1", duration=HOUR)

    assert marks.is_set("ended:1") and not marks.is_set("ended:2")
    assert 3590 <= valkey.ttl("test:marks:ended:1") <= 3600
    marks.forget("ended:1")
    assert not marks.is_set("ended:1")


def test_a_count_keeps_the_window_of_its_first(valkey: redis.Redis) -> None:
    marks = Marks(valkey, prefix="test:marks")

    marks.count("tries", window=timedelta(seconds=100))

    assert [marks.count("tries", window=HOUR) for _ in range(2)] == [2, 3]
    assert valkey.ttl("test:marks:tries") <= 100
    marks.forget("tries")
    assert marks.count("tries", window=HOUR) == 1


@pytest.mark.parametrize("marks", [Marks(None, prefix="test"), Marks(connect(NOBODY), prefix="test")])
def test_without_a_redis_every_method_says_so(marks: Marks) -> None:
    for ask in (
        lambda: marks.set("a", duration=HOUR),
        lambda: marks.is_set("a"),
        lambda: marks.count("a", window=HOUR),
        lambda: marks.forget("a"),
    ):
        with pytest.raises(RedisUnavailable):
            ask()


def test_a_server_that_is_away_is_unavailable_before_the_first_question() -> None:
    with pytest.raises(RedisUnavailable, match="the Redis of the broker"), inspecting(NOBODY, "the broker"):
        pytest.fail("nothing is there to inspect")
