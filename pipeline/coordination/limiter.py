"""The shared rate limit: one decision over the account's and the campaign's bucket, for all workers on all machines.

Each bucket is a GCRA (generic cell rate algorithm). It keeps one number: the *theoretical arrival time* of the next
submission if all before it had been evenly spaced. One Lua script reads the server's clock, computes from both when
each of *n* submissions may go, and books those that may go now or soon. So the answer does not depend on the worker
that asks, nor on its clock. Any span of T seconds has at most `rate * T + burst` moments.

It fails closed: without Redis `RedisUnavailable` is raised and nothing is sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import redis

from pipeline.coordination.connection import run
from pipeline.settings import Rate

_WHAT = "the rate limit"
BURST_SHARE = 0.05  # of a second's rate: enough for a batch, too little for Futwork to notice
_EVEN = 5  # a caller that books ahead gets this part of the burst: a fifth
AHEAD = timedelta(milliseconds=50)  # how long before its moment a slot may be booked
THROTTLE_FACTOR = 2 / 3  # after a 429 the rate falls by a third …
THROTTLE_FLOOR = 0.05  # … but never below a twentieth, or it could not recover
RECOVERY_SECONDS = 300  # … and recovers from zero to the full rate in this time

# The server's time in microseconds, counted from 2026: a double then tells hundredths of one apart, so that neither
# fast rates nor sums drift. The factor by which Futwork's last 429 slowed the account down, as recovered by now.
_NOW_AND_FACTOR = """
local function now_in_microseconds()
    local clock = redis.call('TIME')
    return (clock[1] - 1767225600) * 1000000 + clock[2]
end
local function factor_at(now, slow, recovery_seconds)
    if not slow[1] then return 1 end
    return math.min(1, slow[1] + math.max(0, now - slow[2]) / (recovery_seconds * 1000000))
end
"""

# KEYS: account bucket, campaign bucket, stop marker, slow-down (hash: factor, at)
# ARGV: wanted, then for each bucket the microseconds between submissions and the burst; recovery in seconds; how many
# microseconds ahead slots may be booked at most, and by this one
# Answers how long until the next slot, whether the account stands, and then for each slot how long until its moment.
_RESERVE = (
    _NOW_AND_FACTOR
    + """
local now = now_in_microseconds()
local stopped = redis.call('PTTL', KEYS[3])
if stopped > 0 then return {stopped * 1000, 1} end
local factor = factor_at(now, redis.call('HMGET', KEYS[4], 'factor', 'at'), ARGV[6])
local steps, tolerances, tats = {}, {}, {}
for i = 1, 2 do
    local step = ARGV[i * 2] / factor
    local tolerance = math.max(step, ARGV[i * 2] * ARGV[i * 2 + 1])  -- no larger a burst for a slower rate
    local tat = math.max(now, tonumber(redis.call('GET', KEYS[i]) or now))
    -- further ahead only where the rate was raised since, or the clock set back
    tats[i] = math.min(tat, now + ARGV[7] + tolerance)
    steps[i], tolerances[i] = step, tolerance
end
local moment
local answer = {0, 0}
for n = 1, ARGV[1] + 1 do
    moment = math.max(now, tats[1] + steps[1] - tolerances[1], tats[2] + steps[2] - tolerances[2])
    -- a tenth of a microsecond against rounding
    if moment > now + ARGV[8] + 0.1 or n > tonumber(ARGV[1]) then break end
    for i = 1, 2 do tats[i] = math.max(tats[i], moment) + steps[i] end
    answer[n + 2] = math.ceil(moment - now)
end
answer[1] = math.ceil(moment - now)
if answer[3] then
    for i = 1, 2 do
        -- once its time has come, a bucket says no more than one that is not there
        redis.call('SET', KEYS[i], string.format('%.3f', tats[i]), 'PX', math.ceil((tats[i] - now) / 1000) + 1000)
    end
end
return answer
"""
)

# At the full rate's step: after a slow-down it gives back less than was booked, never more.
_GIVE_BACK = """
for i = 1, 2 do
    local tat = redis.call('GET', KEYS[i])
    if tat then
        redis.call('SET', KEYS[i], string.format('%.3f', tat - ARGV[1] * ARGV[i + 1]), 'KEEPTTL')
    end
end
"""

# KEYS: stop marker, slow-down. ARGV: pause in milliseconds, factor, floor, recovery in seconds
# One slow-down for a burst of 429s: those that were already out when the first came back say nothing new, and while the
# account is stopped no others are.
_STOP = (
    _NOW_AND_FACTOR
    + """
local now = now_in_microseconds()
local slow = redis.call('HMGET', KEYS[2], 'factor', 'at')
local left = redis.call('PTTL', KEYS[1])
if left <= 0 and not (slow[1] and math.abs(now - slow[2]) < 1000000) then
    local factor = math.max(tonumber(ARGV[3]), factor_at(now, slow, ARGV[4]) * ARGV[2])
    redis.call('HSET', KEYS[2], 'factor', tostring(factor), 'at', string.format('%.0f', now))
    redis.call('EXPIRE', KEYS[2], ARGV[4])
end
if tonumber(ARGV[1]) > left then redis.call('SET', KEYS[1], 1, 'PX', ARGV[1]) end
"""
)


# KEYS: stop marker, slow-down. ARGV: recovery in seconds
_STANDING = (
    _NOW_AND_FACTOR
    + """
local factor = factor_at(now_in_microseconds(), redis.call('HMGET', KEYS[2], 'factor', 'at'), ARGV[1])
return {redis.call('PTTL', KEYS[1]), tostring(factor)}
"""
)


@dataclass(frozen=True, slots=True)
class Grant:
    """The submissions that were booked, each with its moment; and how long until there is another."""

    moments: tuple[timedelta, ...]
    """How long from now until each of them may go, in their order; without booking ahead all are nought."""
    wait: timedelta
    """Until the next slot: when to ask again, unless the answer was all that was wanted."""
    stopped: bool
    """Whether Futwork itself asked for a pause (429)."""

    @property
    def slots(self) -> int:
        """How many submissions were booked."""
        return len(self.moments)


@dataclass(frozen=True, slots=True)
class Limits:
    """The two buckets that a submission passes: its account's and its campaign's."""

    account: str
    account_rate: Rate
    campaign: str
    campaign_rate: Rate


class Limiter:
    """The limit's client. Holds a connection, no state; safe for many threads."""

    def __init__(self, client: redis.Redis, *, prefix: str = "futwork:limit") -> None:
        self._prefix = prefix
        self._client = client
        self._reserve = client.register_script(_RESERVE)
        self._give_back = client.register_script(_GIVE_BACK)
        self._stop = client.register_script(_STOP)
        self._standing = client.register_script(_STANDING)

    def reserve(self, limits: Limits, wanted: int, *, ahead: timedelta = timedelta()) -> Grant:
        """Book up to *wanted* submissions on both buckets, also those whose moment comes within *ahead*.

        Who books a little ahead and sends each at its moment loses none of the limit to the time between two questions,
        and needs little of the burst: the rest is left for submissions that arrive later than their moments. *ahead* is
        `AHEAD` at most.
        """
        if wanted < 1:
            return Grant((), timedelta(), stopped=False)
        rates = (limits.account_rate, limits.campaign_rate)
        share = _EVEN if ahead else 1
        numbers = [value for rate in rates for value in (_step(rate), max(1, burst_of(rate) // share))]
        wait, stopped, *moments = run(
            self._reserve,
            _WHAT,
            [*self._buckets(limits), self._key("stop", limits.account), self._key("slow", limits.account)],
            [wanted, *numbers, RECOVERY_SECONDS, _microseconds(AHEAD), _microseconds(min(ahead, AHEAD))],
        )
        return Grant(
            tuple(timedelta(microseconds=int(moment)) for moment in moments),
            timedelta(microseconds=int(wait)),
            bool(stopped),
        )

    def give_back(self, limits: Limits, unused: int) -> None:
        """Return booked submissions that no lead was found for."""
        if unused > 0:
            run(
                self._give_back,
                _WHAT,
                self._buckets(limits),
                [unused, _step(limits.account_rate), _step(limits.campaign_rate)],
            )

    def stop(self, account: str, pause: timedelta) -> None:
        """Stop every submission on the account for *pause*, and go on slower after it: Futwork answered 429."""
        milliseconds = max(1, math.ceil(pause.total_seconds() * 1000))
        run(
            self._stop,
            _WHAT,
            [self._key("stop", account), self._key("slow", account)],
            [milliseconds, THROTTLE_FACTOR, THROTTLE_FLOOR, RECOVERY_SECONDS],
        )

    def standing(self, account: str) -> tuple[timedelta, float]:
        """How long the account is still stopped, and the share of its rate that it may use now, 1 being all of it."""
        stopped, share = run(
            self._standing, _WHAT, [self._key("stop", account), self._key("slow", account)], [RECOVERY_SECONDS]
        )
        return timedelta(milliseconds=max(0, int(stopped))), float(share)

    def _buckets(self, limits: Limits) -> list[str]:
        return [self._key("account", limits.account), self._key("campaign", limits.campaign)]

    def _key(self, kind: str, name: str) -> str:
        return f"{{{self._prefix}}}:{kind}:{name}"  # one hash slot, so that the script may touch all of them


def burst_of(rate: Rate) -> int:
    """How many submissions may go at once after a pause: a twentieth of a second's worth, at least one."""
    return max(1, math.floor(rate.per_second * BURST_SHARE))


def _microseconds(span: timedelta) -> int:
    return round(span.total_seconds() * 1_000_000)


def _step(rate: Rate) -> float:
    """Microseconds between two submissions."""
    return 1_000_000 / rate.per_second
