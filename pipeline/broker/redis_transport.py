"""Puts messages into the queues of a Redis, and takes them off so that none of them is ever in a socket alone.

kombu takes a message with BRPOP and books it as unacknowledged in a second step. What was given to a worker that dies
between the two, or to the socket of a machine that is gone, is in no queue and in no book: an accepted lead or event
would be lost. Here one script on the server does both, so that a message is waiting or booked at every moment, and one
whose worker never saw it is given out again after the visibility timeout.

A script cannot block, so an idle worker rests at the bells of its queues, which whoever puts a message in by
`RedisQueues` rings. A bell carries nothing: whoever hears it looks, and a look that finds nothing is no harm. Foreign
producers, and kombu where it gives a message back, ring none; for those an idle worker looks again after each short
rest, which the server counts for it.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Callable, Mapping
from queue import Empty
from time import monotonic, time
from typing import Any

import kombu.transport
import orjson
import redis
import redis.exceptions
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual as kombu_virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

REST_SECONDS = 0.025  # between two looks into empty queues: the most that it adds to the way of one that rings no bell
_AHEAD_SECONDS = 60  # a booking further ahead of the server's clock was made before that was set back
_CAUGHT_UP_AT_ONCE = 1000  # bookings
_RINGS = 16  # that a bell keeps while nobody rests; each is one look of an idle worker

# KEYS: the queue, its bell. ARGV: the message, the most rings that are kept
_PUT = """
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LPUSH', KEYS[2], 1)
redis.call('LTRIM', KEYS[2], 0, ARGV[2] - 1)
"""

# KEYS: the queues in the order of asking, then kombu's two books, which are kept by the server's clock
# What has no tag to be booked under is left to kombu, which books it or finds that it is no message.
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

# KEYS: the book of times. ARGV: seconds ahead, the most bookings. Answers the server's time as TIME does.
# What was booked by a clock that was set back since waits from now on, as if it had just been booked.
_CATCH_UP = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local ahead = string.format('%.6f', now + ARGV[1])
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], ahead, '+inf', 'LIMIT', 0, ARGV[2])) do
    redis.call('ZADD', KEYS[1], now, tag)
end
return clock
"""


class RedisQueues:
    """Puts tasks into the queues of a Redis by one command each. Safe for threads and across forks, as its pool is.

    What is put is kombu's own envelope, field by field, but neither kombu nor its stages between a task and a socket
    are asked: they cost some 420 µs of CPU time a message, and this a third of that. Raises redis-py's errors.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        # Each look whether one of the pool's connections is alive costs three calls in which other threads get their
        # turn before this one; here a dead one shows when it is used.
        self._idle: list[Any] = []
        self._pid = os.getpid()

    def put(self, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any], body: bytes) -> None:
        """Return once the message is in the queue; *body* is JSON.

        A connection that breaks is replaced once, which may put the message in twice; one that does not answer in its
        time is given up.
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
            command = connection.pack_command("EVAL", _PUT, 2, queue, bell_of(queue), item, _RINGS)
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
        """Give a connection back to the pool, closed: there may be an answer in it that is another's."""
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


def bell_of(queue: str) -> str:
    """The key of a queue's bell."""
    return f"{queue}.bell"


def book_when_taken() -> None:
    """Let every consumer of this process that connects to a Redis from now on take messages in this way."""
    TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = "pipeline.broker.redis_transport:Transport"
    TRANSPORT_ALIASES["sentinel"] = "pipeline.broker.redis_transport:SentinelTransport"
    for alias in ("redis", "rediss", "sentinel"):
        kombu.transport._transport_cache.pop(alias, None)  # kombu remembers what an alias meant at its first connection


_keepers: list[Callable[[bytes], bool]] = []


def keep_malformed(keep: Callable[[bytes], bool]) -> None:
    """Give what is no message at all to *keep*, which must not raise; without it, kombu's error ends the consumer.

    *keep* says whether it could; if not, what is in the books stays there, and comes again.
    Producers may push the envelope onto the list by themselves, and so get it wrong.
    """
    _keepers[:] = [keep]


class _QoS(kombu_redis.QoS):
    """kombu's account of what a worker holds, which does not write a second time what is in the books already."""

    @property
    def visibility_timeout(self) -> float:
        """What kombu takes off this host's time to tell which bookings are too old, so that it arrives at the server's.

        By a host's own clock, one that was set back by an hour would leave what a dead worker held lying for an hour.
        So would the server's own: bookings of its future, which kombu is about to look past, are moved to now before.
        """
        with self.channel.conn_or_acquire() as client:
            limits = (_AHEAD_SECONDS, _CAUGHT_UP_AT_ONCE)
            seconds, microseconds = client.eval(_CATCH_UP, 1, self.unacked_index_key, *limits)
        return float(self.channel.visibility_timeout + time() - (int(seconds) + int(microseconds) / 1_000_000))

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note that the worker holds a message."""
        if self.channel._booked:
            kombu_virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)


class _Booking:
    """What is put in the place of kombu's BRPOP; kombu's poller calls both methods by these names."""

    QoS = _QoS
    unacked_mutex_expire = 10
    """Seconds that a process which dies while it gives messages out again keeps all others from it; kombu's are 300."""
    _rests = False
    _booked = False  # whether the message that is being delivered is in the books

    def _connparams(self: Any, asynchronous: bool = False) -> Any:
        if self.connection.client is None:
            # Celery closes a broken connection twice, and late acknowledgements come after it. kombu looks for an
            # address that is gone then, with an AttributeError that ends the worker; this one is expected everywhere.
            # What cannot be given back or acknowledged any more is booked, and comes again.
            raise redis.exceptions.ConnectionError("this connection to the broker was closed")
        return super()._connparams(asynchronous=asynchronous)  # type: ignore[misc]  # of the class that it is mixed into

    def _brpop_start(self: Any, timeout: float | None = None) -> None:  # noqa: ARG002 - kombu's signature
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        if self._rests:
            self.client.connection.send_command("BRPOP", *map(bell_of, queues), REST_SECONDS)
            return
        keys = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        keys += [self.unacked_key, self.unacked_index_key]
        self.client.connection.send_command("EVAL", _TAKE, len(keys), *keys)

    def _brpop_read(self: Any, **options: Any) -> bool:
        try:
            try:
                found = self.client.parse_response(self.client.connection, "EVAL", **options)
            except self.connection_errors:
                self._rests = False
                self.client.connection.disconnect()
                raise
            rested, self._rests = self._rests, not found and not self._rests
            if rested or not found:
                raise Empty  # the bell rang, or the rest is over: the next look will tell
            queue, item, booked = found
            self._booked = bool(booked)
            queue = bytes_to_str(queue).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            try:
                self.connection._deliver(loads(bytes_to_str(item)), queue)
            except Exception as error:
                # kombu counts KeyError among a Redis' errors; here it is a part that the envelope lacks.
                if not _keepers or (isinstance(error, self.connection_errors) and not isinstance(error, KeyError)):
                    raise
                if _keepers[0](item):
                    self._unbook(item)
            return True
        finally:
            self._in_poll, self._booked = None, False
            self._flush_brpop_reauth()

    def _unbook(self: Any, item: bytes) -> None:
        """Take what was kept aside off the books, in case that it had a tag."""
        try:
            tag = loads(bytes_to_str(item))["properties"]["delivery_tag"]
        except (ValueError, TypeError, KeyError):
            return
        if isinstance(tag, str):
            self.qos.ack(tag)


class Channel(_Booking, kombu_redis.Channel):
    """kombu's channel to a Redis, which books what it takes in the same step."""


class Transport(kombu_redis.Transport):
    """kombu's transport over such channels."""

    Channel = Channel


class SentinelChannel(_Booking, kombu_redis.SentinelChannel):
    """The same behind a Sentinel."""


class SentinelTransport(kombu_redis.SentinelTransport):
    """kombu's transport over such channels, behind a Sentinel."""

    Channel = SentinelChannel
