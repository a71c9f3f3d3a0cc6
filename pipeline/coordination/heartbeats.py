"""Heartbeats: which workers, beats and web processes live, and when the periodic tasks last ended.

Each process sends a heartbeat every few seconds to Redis, on Redis' clock. A worker sends it from the loop that takes
messages in, and beat from the loop that sends them, so a process that hangs falls silent like one that is dead. A
heartbeat is forgotten after an hour. If all are lost, they are there again after `HEARTBEAT_SECONDS`.

They hold no personal data: names of hosts, of queues and of periodic tasks.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.coordination.connection import RedisUnavailable, open_client, reaching, run
from pipeline.observability.logs import logger

log = logger(__name__)

Kind = Literal["worker", "beat", "web"]
_WHAT = "the heartbeats"
KINDS: tuple[Kind, ...] = get_args(Kind)

HEARTBEAT_SECONDS = 5.0  # between two of a process
ALIVE_SECONDS = 20.0  # a process that was silent for longer is taken for dead: three heartbeats are missing
PATIENCE_SECONDS = 10.0  # after one that failed: a loop must not wait for Redis at each of its rounds
_FORGET_SECONDS = 3600
_MOST = 1000  # processes of one kind, so that names that change at each start cannot fill the memory
_WAIT_SECONDS = 1.0  # for Redis, to connect and to answer

# KEYS: the times of the kind, its queues. ARGV: name, queues as JSON, most, seconds until it is forgotten
_RECORD = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
local gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[4])
local over = redis.call('ZCARD', KEYS[1]) - #gone - ARGV[3]
if over > 0 then
    for _, name in ipairs(redis.call('ZRANGE', KEYS[1], #gone, #gone + over - 1)) do gone[#gone + 1] = name end
end
for _, name in ipairs(gone) do
    redis.call('ZREM', KEYS[1], name)
    redis.call('HDEL', KEYS[2], name)
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
"""

# KEYS: times and queues of each kind in turn. ARGV: seconds. Answers kind, name, age in ms, queues, and so on.
_READ = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local heard = {}
for i = 1, #KEYS, 2 do
    local found = redis.call('ZRANGEBYSCORE', KEYS[i], now - ARGV[1], '+inf', 'WITHSCORES')
    for j = 1, #found, 2 do
        heard[#heard + 1] = (i + 1) / 2
        heard[#heard + 1] = found[j]
        heard[#heard + 1] = math.floor((now - found[j + 1]) * 1000)
        heard[#heard + 1] = redis.call('HGET', KEYS[i + 1], found[j]) or '[]'
    end
end
return heard
"""

# KEYS: the times of runs. ARGV: name, seconds until all is forgotten
_END = """
local clock = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.6f', clock[1] + clock[2] / 1000000))
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last heartbeat of one process."""

    kind: Kind
    name: str
    queues: tuple[str, ...]
    """The queues that a worker takes messages from; empty for others."""
    seconds_ago: float


class Heartbeats:
    """Records and reads heartbeats; safe for threads."""

    def __init__(self, client: redis.Redis, *, prefix: str = "futwork:pulse") -> None:
        self._client = client
        self._prefix = prefix
        self._record = client.register_script(_RECORD)
        self._read = client.register_script(_READ)
        self._end = client.register_script(_END)

    def record(self, kind: Kind, name: str, queues: tuple[str, ...] | list[str] = ()) -> None:
        """Record that a process lives; raise `RedisUnavailable` if that fails."""
        args = [name[:200], json.dumps(sorted(queues)), _MOST, _FORGET_SECONDS]
        run(self._record, _WHAT, [self._key(kind, "times"), self._key(kind, "queues")], args)

    def alive(self, *, within: timedelta = timedelta(seconds=ALIVE_SECONDS)) -> list[Heartbeat]:
        """Every process with a heartbeat *within* this time, by kind and name; raises `RedisUnavailable`.

        With a longer time it also contains those that fell silent, up to an hour ago.
        """
        keys = [self._key(kind, part) for kind in KINDS for part in ("times", "queues")]
        flat = run(self._read, _WHAT, keys, [within.total_seconds()])
        rows = zip(flat[0::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
        found = [
            Heartbeat(KINDS[int(kind) - 1], _text(name), tuple(json.loads(queues)), max(0, int(age)) / 1000)
            for kind, name, age, queues in rows
        ]
        return sorted(found, key=lambda one: (KINDS.index(one.kind), one.name))

    def ran(self, what: str) -> None:
        """Record that the periodic task *what* ended just now; raise `RedisUnavailable` if that fails."""
        run(self._end, _WHAT, [self._key("runs", "ended")], [what, 7 * 24 * 3600])

    def last_run(self, what: str) -> float | None:
        """How many seconds ago the periodic task *what* last ended; None if that is not known.

        It is negative where Redis' clock was set back since.
        """
        with reaching(_WHAT):
            ended = self._client.hget(self._key("runs", "ended"), what)
            if ended is None:
                return None
            seconds, micro = self._client.time()
        return float(seconds + micro / 1_000_000 - float(ended))

    def _key(self, kind: str, part: str) -> str:
        return f"{{{self._prefix}}}:{kind}:{part}"  # one hash slot, so that a script may touch all of them


class HeartbeatSender:
    """Sends the heartbeats of one process; never raises, and never waits for longer than a moment.

    Each heartbeat has a connection of its own that is closed again: a worker's parent must keep none that its children
    would inherit. After one that failed, Redis is not asked for `PATIENCE_SECONDS`.
    """

    def __init__(self, url: str, kind: Kind, name: str, queues: tuple[str, ...] | list[str] = ()) -> None:
        self._url, self._kind, self._name, self._queues = url, kind, name, queues
        self._next = 0.0

    def send(self) -> None:
        """Send a heartbeat, unless one was sent, or failed, a moment ago; call it as often as you like."""
        if time.monotonic() < self._next:
            return
        wait = HEARTBEAT_SECONDS * 0.9 if self._sent() else PATIENCE_SECONDS
        self._next = time.monotonic() + wait

    def start_thread(self) -> None:
        """Send heartbeats from a thread of their own for as long as the process lives."""
        threading.Thread(target=self._send_for_ever, name="heartbeat", daemon=True).start()

    def _send_for_ever(self) -> None:
        while True:
            self.send()
            time.sleep(HEARTBEAT_SECONDS)

    def _sent(self) -> bool:
        wait = {"socket_timeout": _WAIT_SECONDS, "socket_connect_timeout": _WAIT_SECONDS}
        try:
            with open_client(self._url, retry=Retry(NoBackoff(), 0), **wait) as client:
                Heartbeats(client).record(self._kind, self._name, self._queues)
        except (RedisUnavailable, redis.RedisError, OSError, ValueError) as error:
            log.debug("a heartbeat was not sent", kind=self._kind, error=type(error).__name__)
            return False
        return True


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
