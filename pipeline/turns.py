"""Whose turn it is to dispatch: how many dispatchers a campaign has, and which campaigns wait for one.

A *turn* is a lease in Redis that one dispatch task holds while it works on a campaign. A campaign that has none and has
work is *waiting*: exactly one message asks for its turn, however many batches of leads come in meanwhile. Dispatchers
see how many campaigns wait, and end their slice early for them. Losing all of this loses nothing: leases run out, and
`sweep` asks again for every campaign that has due work. Redis' clock may be set back: times that lie further ahead
of it than any of them can were written before that, and count for nothing.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta

import redis

LEASE = timedelta(seconds=10)
"""Of a turn; it is renewed all the time, so a killed dispatcher blocks its campaign no longer than this."""
ASKED_SECONDS = 15  # a message that was not taken up in this time is taken for lost, and asked for again

# KEYS: the campaign's leases, the waiting campaigns. ARGV: campaign, most dispatchers, patience in seconds, lease in
# seconds. One second more than a lease is for those that were taken while the clock was set a little.
_ASK = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. string.format('%.6f', now + ARGV[4] + 1), '+inf')
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
local asked = redis.call('ZSCORE', KEYS[2], ARGV[1])
if asked and math.abs(now - asked) < tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[2], now, ARGV[1])
return 1
"""

# KEYS: the campaign's leases, the waiting campaigns. ARGV: campaign, most dispatchers, token, lease in seconds
_TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. string.format('%.6f', now + ARGV[4] + 1), '+inf')
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[4], ARGV[3])
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[4]) + 60)
return 1
"""

# KEYS: the campaign's leases. ARGV: token, lease in seconds
_RENEW = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[2]) + 60)
"""

# KEYS: the waiting campaigns. ARGV: campaign that does not count, patience in seconds
_WAITING = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], string.format('%.6f', now + ARGV[2]), '+inf')
local own = redis.call('ZSCORE', KEYS[1], ARGV[1]) and 1 or 0
return redis.call('ZCARD', KEYS[1]) - own
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to dispatch a campaign until its lease runs out or it is given up."""

    campaign_id: str
    token: str


class Turns:
    """The turns' client. Raises redis-py's errors; whoever dispatches needs the same Redis for the limit anyway."""

    def __init__(self, client: redis.Redis, *, prefix: str = "futwork:turns") -> None:
        self._client = client
        self._prefix = prefix
        self._ask = client.register_script(_ASK)
        self._take = client.register_script(_TAKE)
        self._renew = client.register_script(_RENEW)
        self._waiting = client.register_script(_WAITING)

    def ask(self, campaign_id: str, *, most: int = 1, lease: timedelta = LEASE) -> bool:
        """Whether to send a message that asks for a turn: fewer than *most* are held and none is asked for yet."""
        keys = [self._leases(campaign_id), self._waiting_key]
        return bool(self._ask(keys=keys, args=[campaign_id, most, ASKED_SECONDS, lease.total_seconds()]))

    def unask(self, campaign_id: str) -> None:
        """Forget that a turn was asked for, because the message could not be sent."""
        self._client.zrem(self._waiting_key, campaign_id)

    def take(self, campaign_id: str, *, most: int, lease: timedelta) -> Turn | None:
        """Take a turn, or None where *most* dispatchers work on the campaign already."""
        turn = Turn(campaign_id, uuid.uuid4().hex)
        keys = [self._leases(campaign_id), self._waiting_key]
        taken = self._take(keys=keys, args=[campaign_id, most, turn.token, lease.total_seconds()])
        return turn if taken else None

    def renew(self, turn: Turn, *, lease: timedelta) -> None:
        """Keep a turn for another *lease*; one that ran out meanwhile is taken again, whoever else works by now."""
        self._renew(keys=[self._leases(turn.campaign_id)], args=[turn.token, lease.total_seconds()])

    def give_up(self, turn: Turn) -> None:
        """End a turn."""
        self._client.zrem(self._leases(turn.campaign_id), turn.token)

    def others_waiting(self, campaign_id: str) -> int:
        """How many campaigns other than this one wait for a dispatcher."""
        return int(self._waiting(keys=[self._waiting_key], args=[campaign_id, ASKED_SECONDS]))

    @property
    def _waiting_key(self) -> str:
        return f"{{{self._prefix}}}:waiting"

    def _leases(self, campaign_id: str) -> str:
        return f"{{{self._prefix}}}:held:{campaign_id}"
