"""How messages are taken out of a Redis queue: into the unacked set in one step, so that none is in a socket alone."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import kombu
import pytest
import redis

from pipeline.broker.redis_transport import (
    WAIT_SECONDS,
    RedisQueues,
    WorkerConnection,
    held,
    quarantine_malformed,
    wake_up_key,
)
from pipeline.observability.logs import logger
from tests.waiting import patience, until

QUEUE = kombu.Queue("delivery", kombu.Exchange("delivery", type="direct"), routing_key="delivery")


@pytest.fixture
def connection(valkey: redis.Redis, valkey_url: str) -> Iterator[kombu.Connection]:
    """A worker's connection."""
    options = {"visibility_timeout": 1, "unacked_restore_throttle": 1}  # kombu looks for the abandoned when it can
    with WorkerConnection(valkey_url, transport_options=options) as made:
        yield made


def publish(connection: kombu.Connection, payload: object) -> None:
    """Put a message into the queue."""
    with connection.clone() as other:
        other.Producer().publish(payload, exchange=QUEUE.exchange, routing_key="delivery", declare=[QUEUE])


def drain(connection: kombu.Connection, *, until: Callable[[], Any]) -> None:
    """Let a consumer work until a condition holds."""
    deadline = time.monotonic() + patience()
    while not until():
        assert time.monotonic() < deadline, "it did not happen"
        try:
            connection.drain_events(timeout=0.1)
        except (TimeoutError, socket.timeout):  # noqa: UP041 - kombu raises the old name on some systems
            continue


def take_and_die(connection: kombu.Connection, valkey: redis.Redis) -> None:
    """A worker takes what is in the queue, and its machine is gone before it has read the answer."""
    received: list[Any] = []
    with connection.Consumer(QUEUE, callbacks=[lambda body, _: received.append(body)]) as consumer:
        connection.transport.cycle.on_poll_start()  # the request is out, and nobody reads its answer
        until(lambda: valkey.llen("delivery") == 0)
        assert received == []
        assert valkey.hlen("unacked") == valkey.zcard("unacked_index") == 1
        consumer.channel.client.connection.disconnect()


def taken_by_another(connection: kombu.Connection) -> list[Any]:
    """What another worker gets, once it has got something; it looks for what was abandoned while it waits."""
    received: list[Any] = []

    def take(body: Any, message: Any) -> None:
        received.append(body)
        message.ack()

    with connection.clone() as other, other.Consumer(QUEUE, callbacks=[take]) as consumer:
        drain(other, until=lambda: consumer.channel.qos.restore_visible(interval=1) or received)
    return received


def test_a_message_is_in_the_unacked_set_before_its_worker_has_read_it(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """The message of a worker that died before it read it, or whose machine is gone, is delivered again."""
    publish(connection, {"lead": 1})
    take_and_die(connection, valkey)
    assert taken_by_another(connection) == [{"lead": 1}]
    assert valkey.hlen("unacked") == valkey.llen("delivery") == 0


def test_what_a_dead_worker_holds_is_seen_until_it_is_acknowledged(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """It is in no queue, and yet it may be the evidence that a policy must wait for."""
    publish(connection, {"lead": 1})
    assert held(connection.default_channel, "delivery") == frozenset()
    take_and_die(connection, valkey)
    assert held(connection.default_channel, "delivery") == frozenset(valkey.hkeys("unacked"))
    assert len(held(connection.default_channel, "delivery")) == 1
    assert held(connection.default_channel, "other") == frozenset()
    assert taken_by_another(connection) == [{"lead": 1}]
    assert held(connection.default_channel, "delivery") == frozenset()


def test_a_process_that_dies_while_it_restores_messages_keeps_the_others_from_it_for_seconds_only(
    connection: kombu.Connection, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where Valkey was killed in that moment: the lock was in its file, and events waited for five minutes."""
    publish(connection, {"lead": 1})
    take_and_die(connection, valkey)
    waits: list[int] = []

    def die(*_: Any, **__: Any) -> None:
        waits.append(valkey.pttl("unacked_mutex"))
        monkeypatch.setattr("redis.lock.Lock.release", lambda _: None)
        raise MemoryError

    with connection.clone() as dying, dying.Consumer(QUEUE) as consumer:
        monkeypatch.setattr(consumer.channel.qos, "restore_by_tag", die)
        with pytest.raises(MemoryError):
            until(lambda: consumer.channel.qos.restore_visible(interval=1))
    assert 0 < waits[0] <= 10_000
    assert valkey.exists("unacked_mutex")
    valkey.pexpire("unacked_mutex", 100)
    assert taken_by_another(connection) == [{"lead": 1}]


def test_what_a_dead_worker_held_comes_back_although_the_next_hosts_clock_was_set_back(
    connection: kombu.Connection, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where a clock went back by an hour after a kill: what was held stayed in the unacked set for an hour."""
    publish(connection, {"lead": 1})
    take_and_die(connection, valkey)
    for module in ("pipeline.broker.redis_transport", "kombu.transport.redis"):
        monkeypatch.setattr(f"{module}.time", lambda: time.time() - 3600)
    assert taken_by_another(connection) == [{"lead": 1}]


def test_what_a_dead_worker_held_comes_back_although_the_servers_clock_was_set_back(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """kombu does not look at the future, so the message would stay there until the clock has caught up."""
    publish(connection, {"lead": 1})
    take_and_die(connection, valkey)
    for tag in valkey.zrange("unacked_index", 0, -1):
        valkey.zincrby("unacked_index", 3600, tag)
    assert taken_by_another(connection) == [{"lead": 1}]
    assert valkey.hlen("unacked") == valkey.zcard("unacked_index") == 0


def test_a_message_is_written_into_the_unacked_set_once(connection: kombu.Connection, valkey: redis.Redis) -> None:
    """kombu would write each message that it takes into the set again: a round trip and the whole message."""
    publish(connection, {"lead": 1})
    received: list[Any] = []
    valkey.config_resetstat()
    with connection.Consumer(QUEUE, callbacks=[lambda _, message: received.append(message)]) as consumer:
        drain(connection, until=lambda: received)
        assert valkey.info("commandstats")["cmdstat_hset"]["calls"] == 1
        assert list(consumer.channel.qos._delivered) == [received[0].delivery_tag]
        received[0].ack()
    assert valkey.hlen("unacked") == 0


def test_a_message_without_a_tag_as_text_is_put_into_the_unacked_set_by_kombu(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """Such as a message whose tag is a number, which a foreign producer may give it."""
    properties = {"delivery_tag": 7, "delivery_info": {"exchange": "", "routing_key": "delivery"}}
    valkey.lpush("delivery", json.dumps({"body": "1", "content-type": "application/json", "properties": properties}))
    received: list[Any] = []
    with connection.Consumer(QUEUE, callbacks=[lambda _, message: received.append(message)]):
        drain(connection, until=lambda: received)
        assert valkey.hkeys("unacked") == [b"7"]
        received[0].ack()
    assert valkey.hlen("unacked") == 0


def test_a_malformed_message_that_could_not_be_kept_comes_again(
    connection: kombu.Connection, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.broker.redis_transport._Unacked.quarantine", None)
    given, answers = [], [False, True]

    def keep(item: bytes) -> bool:
        given.append(json.loads(item)["body"])
        return answers.pop(0)

    quarantine_malformed(keep)
    publish(connection, {"lead": 1})
    message = json.loads(valkey.rpop("delivery"))
    valkey.lpush("delivery", json.dumps(message | {"body": 5}))
    with connection.Consumer(QUEUE) as consumer:
        drain(connection, until=lambda: given)
        assert (given, 1) == ([5], valkey.hlen("unacked"))
        drain(connection, until=lambda: consumer.channel.qos.restore_visible(interval=1) or not answers)
    assert given == [5, 5]
    assert 0 == valkey.hlen("unacked") == valkey.zcard("unacked_index") == valkey.llen("delivery")


def test_messages_come_in_their_order_and_an_acknowledged_one_leaves_no_trace(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """What kombu promises of its own way of taking holds for this one."""
    for number in range(20):
        publish(connection, number)
    received: list[int] = []

    def take(body: int, message: Any) -> None:
        received.append(body)
        message.ack()

    with connection.Consumer(QUEUE, callbacks=[take]):
        drain(connection, until=lambda: len(received) == 20)
    assert list(range(20)) == received
    assert 0 == valkey.hlen("unacked") == valkey.zcard("unacked_index")


def test_a_message_that_is_rejected_with_requeue_comes_again(connection: kombu.Connection) -> None:
    """The set that the script writes is the one that kombu restores from."""
    publish(connection, {"text": 'quotes " and \\ and ü'})
    received: list[Any] = []

    def take(body: Any, message: Any) -> None:
        received.append(body)
        message.ack() if len(received) > 1 else message.reject(requeue=True)

    with connection.Consumer(QUEUE, callbacks=[take]):
        drain(connection, until=lambda: len(received) == 2)
    assert received == [{"text": 'quotes " and \\ and ü'}] * 2


def test_an_idle_worker_waits_between_two_looks(connection: kombu.Connection, valkey: redis.Redis) -> None:
    """It must not spin."""
    with connection.Consumer(QUEUE, callbacks=[lambda _, message: message.ack()]):
        before = int(valkey.info("commandstats").get("cmdstat_eval", {"calls": 0})["calls"])
        started, looks = time.monotonic(), 0
        while looks < 6 or time.monotonic() - started < 1:
            with contextlib.suppress(TimeoutError, socket.timeout):
                connection.drain_events(timeout=0.2)
            looks = int(valkey.info("commandstats")["cmdstat_eval"]["calls"]) - before
        seconds = time.monotonic() - started
    assert looks <= seconds / WAIT_SECONDS + 5


@pytest.fixture
def queues(valkey_url: str) -> Iterator[RedisQueues]:
    """What our own producers put messages in with."""
    pool = redis.ConnectionPool.from_url(valkey_url)
    yield RedisQueues(pool)
    pool.disconnect()


def put(queues: RedisQueues, number: int) -> None:
    """Put a message into the queue in our own way."""
    queues.put("delivery", {}, {}, b"%d" % number)


def test_a_wait_and_the_look_behind_it_are_one_request(connection: kombu.Connection, valkey: redis.Redis) -> None:
    """Each request is one more time that an idle worker wakes up."""
    valkey.config_resetstat()
    with connection.Consumer(QUEUE):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.3)
    stats = valkey.info("commandstats")
    waits, looks = stats["cmdstat_brpop"]["calls"], stats["cmdstat_eval"]["calls"]
    assert looks - 1 <= waits <= looks  # the first look has no wait before it; the last answers may be on their way
    assert waits >= 3


def test_an_answer_that_is_an_error_is_not_followed_by_the_answer_to_another_request(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """The wait and the look have an answer each; if the first is an error, the second must not stay in the socket."""
    received: list[Any] = []
    with connection.Consumer(QUEUE, callbacks=[lambda body, message: (received.append(body), message.ack())]):
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.1)
        valkey.set(wake_up_key("delivery"), "not a list")
        with pytest.raises(redis.ResponseError):
            drain(connection, until=lambda: False)
        valkey.delete(wake_up_key("delivery"))
        for number in range(3):
            publish(connection, number)
        drain(connection, until=lambda: len(received) == 3)
    assert received == [0, 1, 2]
    assert valkey.hlen("unacked") == 0


def test_a_busy_queue_does_not_block_the_others(connection: kombu.Connection, queues: RedisQueues) -> None:
    names = ["first", "delivery", "third"]
    for name in names:
        for number in range(3):
            queues.put(name, {}, {}, b"[%d]" % number)
    every = [kombu.Queue(name, kombu.Exchange(name, type="direct"), routing_key=name) for name in names]
    received: list[str] = []

    def take(_body: Any, message: Any) -> None:
        received.append(message.delivery_info["routing_key"])
        message.ack()

    with connection.Consumer(every, callbacks=[take]):
        drain(connection, until=lambda: len(received) == 9)
    assert received == names * 3


def test_no_message_is_lost_over_connections_that_died_while_nobody_used_them(
    queues: RedisQueues, valkey: redis.Redis
) -> None:
    queues._idle += [queues._pool.get_connection() for _ in range(3)]
    for number in range(4):
        valkey.client_kill_filter(_type="normal", skipme=True)
        put(queues, number)
    bodies = [base64.b64decode(json.loads(item)["body"]) for item in valkey.lrange("delivery", 0, -1)]
    assert sorted(bodies) == [b"%d" % number for number in range(4)]
    assert len(queues._idle) == 1


def test_a_connection_with_another_ones_answer_in_it_is_not_used_again(
    queues: RedisQueues, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(queues, 0)
    with monkeypatch.context() as patched:
        patched.setattr(type(queues._idle[0]), "read_response", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            put(queues, 1)
    assert queues._idle == []
    put(queues, 2)
    assert valkey.llen("delivery") == 3


def test_a_child_of_a_fork_uses_none_of_its_parents_connections(
    queues: RedisQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(queues, 0)
    (parents,) = queues._idle
    monkeypatch.setattr("os.getpid", lambda: 1)
    put(queues, 1)
    assert parents not in queues._idle


def test_an_idle_worker_is_woken_by_the_wake_up_key_of_its_queue(
    connection: kombu.Connection, queues: RedisQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is half a minute here: nothing else could end it in time."""
    monkeypatch.setattr("pipeline.broker.redis_transport.WAIT_SECONDS", 30)
    received: list[Any] = []
    other = kombu.Queue("other", kombu.Exchange("other", type="direct"), routing_key="other")

    def take(body: Any, message: Any) -> None:
        received.append(body)
        message.ack()

    with connection.Consumer([other, QUEUE], callbacks=[take]) as consumer:
        for number in range(3):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.1)
            assert consumer.channel._waits
            put(queues, number)
            drain(connection, until=lambda: len(received) == number + 1)  # noqa: B023 - called before it changes
    assert received == [0, 1, 2]


def test_each_of_two_idle_workers_is_woken_for_one_of_two_messages(
    connection: kombu.Connection, queues: RedisQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One push wakes one worker, so two messages must wake two."""
    monkeypatch.setattr("pipeline.broker.redis_transport.WAIT_SECONDS", 30)
    received: dict[str, list[Any]] = {"one": [], "two": []}
    with connection.clone() as other:
        consumers = [
            each.Consumer(QUEUE, callbacks=[lambda body, _, name=name: received[name].append(body)], prefetch_count=1)
            for name, each in (("one", connection), ("two", other))
        ]
        for consumer, each in zip(consumers, (connection, other), strict=True):
            consumer.consume()
            with pytest.raises(TimeoutError):
                each.drain_events(timeout=0.1)
            assert consumer.channel._waits
        put(queues, 1)
        put(queues, 2)
        for name, each in (("one", connection), ("two", other)):
            drain(each, until=lambda: received[name])  # noqa: B023 - called before it changes
    assert sorted(received["one"] + received["two"]) == [1, 2]


def test_a_wake_up_key_at_which_no_worker_waits_stays_short_and_does_no_harm(
    connection: kombu.Connection, queues: RedisQueues, valkey: redis.Redis
) -> None:
    """Without an idle worker the pushes must not pile up; each that is left is one look for nothing."""
    for number in range(100):
        put(queues, number)
    assert (valkey.llen("delivery"), valkey.llen(wake_up_key("delivery"))) == (100, 16)
    received: list[Any] = []

    def take(body: Any, message: Any) -> None:
        received.append(body)
        message.ack()

    with connection.Consumer(QUEUE, callbacks=[take]):
        drain(connection, until=lambda: len(received) == 100 and not valkey.llen(wake_up_key("delivery")))
        put(queues, 100)
        drain(connection, until=lambda: len(received) == 101)
    assert list(range(101)) == received


def test_the_channel_survives_a_broker_that_forgets_everything(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """A restarted or emptied server has no scripts and no queues; the next message arrives all the same."""
    received: list[Any] = []

    def take(body: Any, message: Any) -> None:
        received.append(body)
        message.ack()

    with connection.Consumer(QUEUE, callbacks=[take]):
        publish(connection, 1)
        drain(connection, until=lambda: received)
        valkey.flushall()
        valkey.script_flush()
        publish(connection, 2)
        drain(connection, until=lambda: len(received) == 2)
    assert received == [1, 2]


def test_a_connection_that_was_given_up_does_not_take_the_worker_with_it(
    connection: kombu.Connection, valkey: redis.Redis
) -> None:
    """Seen when the broker died again while Celery gave a connection up: a close and an acknowledgement came after it.

    kombu answers both with an AttributeError, which ends the worker, instead of an error of the connection.
    """
    publish(connection, {"lead": 1})
    received: list[Any] = []
    consumer = connection.Consumer(QUEUE, callbacks=[lambda _, message: received.append(message)])
    consumer.consume()
    drain(connection, until=lambda: received)  # it is not acknowledged yet
    connection.transport.client = None  # what `Connection.collect` does
    connection.default_channel._disconnect_pools()

    received[0].ack_log_error(logger(__name__), connection.connection_errors)
    connection.maybe_close_channel(connection.default_channel)

    assert valkey.hlen("unacked") == 1, "it is given out again after the visibility timeout"
