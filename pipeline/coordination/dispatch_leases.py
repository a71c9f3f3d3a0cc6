"""Dispatch leases: how many dispatchers a campaign has, and which campaigns wait for one.

A dispatch task holds a lease in Redis while it works on a campaign. A campaign that has work and no lease is *waiting*:
exactly one message requests a dispatcher for it, however many batches of leads come in meanwhile. Dispatchers see how
many campaigns wait, and end their slice early for them. Losing all of this loses nothing: leases run out, and `sweep`
requests a dispatcher again for every campaign that has due work. If Redis' clock is set back, times that lie further
ahead of it than any can were written before that, and are ignored.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta

import redis

from pipeline.coordination.connection import reaching, run

LEASE = timedelta(seconds=10)
"""How long a lease lasts; it is renewed all the time, so a killed dispatcher blocks its campaign for no longer."""
ASKED_SECONDS = 15  # a message that was not taken up in this time is taken for lost, and asked for again

_WHAT = "the dispatch leases"

# KEYS: the campaign's leases, the waiting campaigns. ARGV: campaign, most dispatchers, patience in seconds, lease in
# seconds. One second more than a lease is for those that were taken while the clock was set a little.
_REQUEST = """
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
class DispatchLease:
    """The right to dispatch a campaign until its lease runs out or it is given up."""

    campaign_id: str
    token: str


class DispatchLeases:
    """The client of the leases; every method raises `RedisUnavailable`."""

    def __init__(self, client: redis.Redis, *, prefix: str = "futwork:turns") -> None:
        self._client = client
        self._prefix = prefix
        self._request = client.register_script(_REQUEST)
        self._take = client.register_script(_TAKE)
        self._renew = client.register_script(_RENEW)
        self._waiting = client.register_script(_WAITING)

    def request(self, campaign_id: str, *, most: int = 1, duration: timedelta = LEASE) -> bool:
        """Whether to send a message that requests a dispatcher: fewer than *most* work and none is requested yet."""
        keys = [self._leases(campaign_id), self._waiting_key]
        return bool(run(self._request, _WHAT, keys, [campaign_id, most, ASKED_SECONDS, duration.total_seconds()]))

    def withdraw(self, campaign_id: str) -> None:
        """Forget the request, because its message could not be sent."""
        with reaching(_WHAT):
            self._client.zrem(self._waiting_key, campaign_id)

    def take(self, campaign_id: str, *, most: int, duration: timedelta) -> DispatchLease | None:
        """Take a lease, or None where *most* dispatchers work on the campaign already."""
        lease = DispatchLease(campaign_id, uuid.uuid4().hex)
        keys = [self._leases(campaign_id), self._waiting_key]
        taken = run(self._take, _WHAT, keys, [campaign_id, most, lease.token, duration.total_seconds()])
        return lease if taken else None

    def renew(self, lease: DispatchLease, *, duration: timedelta) -> None:
        """Keep a lease for another *duration*; one that ran out is taken again, even if others work by now."""
        run(self._renew, _WHAT, [self._leases(lease.campaign_id)], [lease.token, duration.total_seconds()])

    def give_up(self, lease: DispatchLease) -> None:
        """End a lease."""
        with reaching(_WHAT):
            self._client.zrem(self._leases(lease.campaign_id), lease.token)

    def others_waiting(self, campaign_id: str) -> int:
        """How many campaigns other than this one wait for a dispatcher."""
        return int(run(self._waiting, _WHAT, [self._waiting_key], [campaign_id, ASKED_SECONDS]))

    @property
    def _waiting_key(self) -> str:
        return f"{{{self._prefix}}}:waiting"

    def _leases(self, campaign_id: str) -> str:
        return f"{{{self._prefix}}}:held:{campaign_id}"
