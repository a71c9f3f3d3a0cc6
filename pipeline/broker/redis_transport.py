"""Puts messages into the queues of a Redis, and takes them out so that a message is never in a socket alone.

kombu takes a message with BRPOP and adds it to the unacked set in a second step. If the worker dies between the two, or
its machine is gone, the message is in no queue and in no set: an accepted lead or event would be lost. Here one script
on the server does both, so that a message is in a queue or in the unacked set at every moment. If its worker never saw
it, it is delivered again after the visibility timeout.

A script cannot block. So an idle worker waits in a BRPOP of the wake-up keys of its queues, and the script runs behind
that in the same request. `RedisQueues` pushes onto the wake-up key with each message. What is pushed carries nothing: a
worker that wakes up and finds no message does no harm. Foreign producers, and kombu when it puts a message back, push
nothing; the wait ends by itself after a moment, so that their messages are found too.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty
from time import monotonic, time
from typing import Any

import kombu
import orjson
import redis
import redis.exceptions
from celery.app.amqp import AMQP
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual as kombu_virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

WAIT_SECONDS = 0.09  # at the wake-up keys; less would gain nothing, as an idle server looks for ended waits every 0.1 s
_AHEAD_SECONDS = 60  # an unacked message further ahead of the server's clock is from before that was set back
_CAUGHT_UP_AT_ONCE = 1000  # unacked messages
_WAKE_UPS = 16  # that a key keeps while no worker waits; each makes an idle worker look once

# KEYS: the queue, its wake-up key. ARGV: the message, the most wake-ups that are kept
_PUT = """
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LPUSH', KEYS[2], 1)
redis.call('LTRIM', KEYS[2], 0, ARGV[2] - 1)
"""

# KEYS: the queues in their order, then kombu's unacked set and its index by time, for which the server's clock counts
# A message without a tag is left to kombu, which adds it to the set itself or finds that it is no message.
_TAKE = """
for i = 1, #KEYS - 2 do
    local item = redis.call('RPOP', KEYS[i])
    if item then
        local read, message = pcall(cjson.decode, item)
        local properties = read and type(message) == 'table' and message.properties
        local info = type(properties) == 'table' and properties.delivery_info
        local tag = type(info) == 'table' and properties.delivery_tag
        if type(tag) == 'string' and type(info.exchange) == 'string' and type(info.routing_key) == 'string' then
            local home = cjson.encode(info.exchange) .. ', ' .. cjson.encode(info.routing_key)
            redis.call('HSET', KEYS[#KEYS - 1], tag, '[' .. item .. ', ' .. home .. ']')
            local clock = redis.call('TIME')
            redis.call('ZADD', KEYS[#KEYS], clock[1] + clock[2] / 1000000, tag)
            return {KEYS[i], item, 1}
        end
        return {KEYS[i], item, 0}
    end
end
return false
"""

# KEYS: the index by time. ARGV: seconds ahead, the most messages. Answers the server's time as TIME does.
# A message that was taken before the clock was set back waits from now on, as if it had just been taken.
_CATCH_UP = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local ahead = string.format('%.6f', now + ARGV[1])
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], ahead, '+inf', 'LIMIT', 0, ARGV[2])) do
    redis.call('ZADD', KEYS[1], now, tag)
end
return clock
"""

# KEYS: the unacked set. ARGV: how the entries of a queue end. Answers the tags of its messages.
_HELD = """
local tags, entries = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
    if string.sub(entries[i + 1], -#ARGV[1]) == ARGV[1] then tags[#tags + 1] = entries[i] end
end
return tags
"""


def held(channel: Any, queue: str) -> frozenset[bytes]:
    """The tags of a queue's messages that workers hold unacknowledged; none where *channel* is not one to a Redis."""
    if not hasattr(channel, "unacked_key"):
        return frozenset()
    with channel.conn_or_acquire() as client:
        return frozenset(client.eval(_HELD, 1, channel.unacked_key, f'"{queue}"]'))


class RedisQueues:
    """Puts tasks into the queues of a Redis by one command each; safe for threads and across forks.

    It writes kombu's own envelope, field by field, without kombu, whose stages between a task and a socket cost some
    420 µs of CPU time a message; this costs a third of that. Raises redis-py's errors.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        # The pool checks each connection before it lends it, and other threads run three times meanwhile. Here a
        # dead connection is noticed when it is used.
        self._idle: list[Any] = []
        self._pid = os.getpid()

    def put(self, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any], body: bytes) -> None:
        """Return once the message is in the queue; *body* is JSON.

        A connection that breaks is replaced once, which may put the message in twice; a server that does not answer in
        time is not asked again.
        """
        item = envelope(queue, headers, properties, body)
        try:
            self._send(self._take_idle(), queue, item)
        except redis.exceptions.ConnectionError:
            while (connection := self._take_idle()) is not None:  # a server that was started anew forgot them too
                self._give_back(connection)
            self._send(None, queue, item)

    def _send(self, connection: Any, queue: str, item: bytes) -> None:
        if connection is None:
            connection = self._pool.get_connection()  # redis-py has no types for what it sends
        try:
            command = connection.pack_command("EVAL", _PUT, 2, queue, wake_up_key(queue), item, _WAKE_UPS)
            connection.send_packed_command([b"".join(command)])  # in one piece, for which redis-py takes three writes
            connection.read_response()
        except BaseException:
            self._give_back(connection)
            raise
        self._idle.append(connection)

    def _take_idle(self) -> Any:
        if self._pid != os.getpid():
            self._idle, self._pid = [], os.getpid()  # the parent's
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _give_back(self, connection: Any) -> None:
        """Give a connection back to the pool, closed: it may hold the answer to another command."""
        connection.disconnect()
        self._pool.release(connection)


def envelope(queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any], body: bytes) -> bytes:
    """A message as it lies in a Redis queue, with all that kombu 5.7 writes for a task in its default exchange."""
    return orjson.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                **properties,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def wake_up_key(queue: str) -> str:
    """The key at which idle workers wait for a message in this queue."""
    return f"{queue}.bell"


def quarantine_malformed(quarantine: Callable[[bytes], bool]) -> None:
    """Give what is no message at all to *quarantine*, which must not raise; else kombu's error ends the consumer.

    It returns whether it could; if not, the item stays in the unacked set, and is delivered again. Producers may push
    the envelope onto the list themselves, and so get it wrong.
    """
    _Unacked.quarantine = staticmethod(quarantine)


class _QoS(kombu_redis.QoS):
    """kombu's record of what a worker holds, without a second write of what is in the unacked set already."""

    @property
    def visibility_timeout(self) -> float:
        """What kombu subtracts from this host's time to find old messages, corrected so that the server's clock counts.

        By the clock of a host, what a dead worker held would stay for an hour where that clock was set back by one. By
        the server's own clock too: kombu does not look at the future, so messages of its future are moved to now first.
        """
        with self.channel.conn_or_acquire() as client:
            limits = (_AHEAD_SECONDS, _CAUGHT_UP_AT_ONCE)
            seconds, microseconds = client.eval(_CATCH_UP, 1, self.unacked_index_key, *limits)
        return float(self.channel.visibility_timeout + time() - (int(seconds) + int(microseconds) / 1_000_000))

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record that the worker holds a message."""
        if self.channel.in_unacked_set:
            kombu_virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Take a message out of the unacked set; raises redis-py's errors, and frees its prefetch place even then.

        kombu frees the place only after the server's answer. A worker whose last place is lost in that way lives on
        and takes nothing more, for the connection on which it takes messages is another one and does not break. If
        the message is still in the unacked set, it is delivered again after the visibility timeout.
        """
        try:
            super().ack(delivery_tag)
        except BaseException:
            kombu_virtual.QoS.ack(self, delivery_tag)
            raise

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a message, or put it back into its queue; errors and the prefetch place are as in `ack`."""
        try:
            super().reject(delivery_tag, requeue=requeue)
        except BaseException:
            kombu_virtual.QoS.ack(self, delivery_tag)
            raise


class _Unacked:
    """Replaces kombu's BRPOP; kombu's poller calls `_brpop_start` and `_brpop_read` by these names."""

    QoS = _QoS
    unacked_mutex_expire = 10
    """Seconds for which a process that dies while it restores messages keeps all others from it; kombu's are 300."""
    in_unacked_set = False
    """Whether the message that is being delivered is in the unacked set."""
    quarantine: Callable[[bytes], bool] | None = None
    _waits = False
    _last_queue = ""

    @property
    def pool(self: Any) -> Any:
        """kombu's pool of connections."""
        self._refuse_if_closed()
        return super().pool  # type: ignore[misc]  # of the class that it is mixed into

    @property
    def async_pool(self: Any) -> Any:
        """kombu's pool of connections that its poller watches."""
        self._refuse_if_closed()
        return super().async_pool  # type: ignore[misc]

    def _refuse_if_closed(self: Any) -> None:
        """Raise an error that every caller expects, where kombu raises an AttributeError that ends the worker.

        Celery closes a broken connection twice, and late acknowledgements come after that. What cannot be acknowledged
        or put back any more is in the unacked set, and is delivered again.
        """
        if self.connection.client is None:
            raise redis.exceptions.ConnectionError("this connection to the broker was closed")

    def _brpop_start(self: Any, timeout: float | None = None) -> None:  # noqa: ARG002 - kombu's signature
        queues = self.active_queues
        if not queues:
            return
        if self._last_queue in queues:  # each queue in its turn, so that a busy one does not block the others
            next_ = queues.index(self._last_queue) + 1
            queues = queues[next_:] + queues[:next_]
        keys = [f"{queue}{self.sep}{step}" if step else queue for step in self.priority_steps for queue in queues]
        keys += [self.unacked_key, self.unacked_index_key]
        commands: list[tuple[Any, ...]] = [("EVAL", _TAKE, len(keys), *keys)]
        if self._waits:
            commands.insert(0, ("BRPOP", *map(wake_up_key, queues), WAIT_SECONDS))
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        connection.send_packed_command(connection.pack_commands(commands))

    def _brpop_read(self: Any, **options: Any) -> bool:
        connection = self.client.connection
        try:
            try:
                if self._waits:
                    self.client.parse_response(connection, "BRPOP", **options)
                found = self.client.parse_response(connection, "EVAL", **options)
            except BaseException:
                self._waits = False
                connection.disconnect()  # one of the answers may still be in it
                raise
            self._waits = not found
            if not found:
                raise Empty
            key, item, in_unacked_set = found
            self.in_unacked_set = bool(in_unacked_set)
            self._last_queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._deliver_or_quarantine(item)
            return True
        finally:
            self._in_poll, self.in_unacked_set = None, False
            self.maybe_reauth()

    def _deliver_or_quarantine(self: Any, item: bytes) -> None:
        try:
            self.connection._deliver(loads(bytes_to_str(item)), self._last_queue)
        except Exception as error:
            # kombu counts KeyError among a Redis' errors; here it means that the envelope lacks a part.
            if isinstance(error, self.connection_errors) and not isinstance(error, KeyError):
                raise
            if self.quarantine is None:
                raise
            if self.quarantine(item):
                with suppress(ValueError, TypeError, KeyError):  # it has no tag, so it is not in the unacked set
                    if isinstance(tag := loads(bytes_to_str(item))["properties"]["delivery_tag"], str):
                        self.qos.ack(tag)


_LOSSES = (*kombu_redis.Transport.connection_errors, redis.exceptions.ResponseError)
"""What a worker connects again after: a lost connection, and a server that refuses, as it may do for a while.

READONLY, MISCONF, BUSY, NOPERM, OOM and their like end a worker over kombu's own transport.
"""


class Channel(_Unacked, kombu_redis.Channel):
    """kombu's channel to a Redis, which adds what it takes to the unacked set in the same step."""


class Transport(kombu_redis.Transport):
    """kombu's transport over such channels."""

    Channel = Channel
    connection_errors = _LOSSES


class SentinelChannel(_Unacked, kombu_redis.SentinelChannel):
    """The same behind a Sentinel."""


class SentinelTransport(kombu_redis.SentinelTransport):
    """kombu's transport over such channels, behind a Sentinel."""

    Channel = SentinelChannel
    connection_errors = _LOSSES


TRANSPORTS = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}


class WorkerConnection(kombu.Connection):
    """kombu's connection, which speaks to a Redis through our transport."""

    def get_transport_cls(self) -> Any:
        """The transport of the address; kombu asks for it at each connection, also after it changed the address."""
        return TRANSPORTS.get(self.transport_cls) or super().get_transport_cls()


class WorkerAMQP(AMQP):
    """Celery's factory of connections and messages, with our connection."""

    Connection = WorkerConnection
