"""Rates: a sliding-window limit, and the busiest second so far."""

import re
from collections import deque
from typing import NamedTuple

_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Rate(NamedTuple):
    """At most *limit* in any window of *seconds*."""

    limit: int
    seconds: float


def parse_rate(text: str) -> Rate:
    """Read a rate such as `50/s`, `600/m` or `20000/h`; anything else raises ValueError."""
    match = re.fullmatch(r"\s*([1-9][0-9]*)\s*/\s*([smh])\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write a whole number and a unit, such as 50/s, 600/m or 20000/h")
    return Rate(int(match[1]), _UNIT_SECONDS[match[2]])


class SlidingWindow:
    """A limit that counts what was admitted within the last window; refused attempts cost nothing."""

    __slots__ = ("_admitted", "_rate")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._admitted: deque[float] = deque()

    def wait_seconds(self, now: float) -> float:
        """Seconds until the next one fits, 0 when it fits now."""
        admitted = self._admitted
        while admitted and admitted[0] <= now - self._rate.seconds:
            admitted.popleft()
        if len(admitted) < self._rate.limit:
            return 0.0
        return admitted[0] + self._rate.seconds - now

    def admit(self, now: float) -> None:
        """Count one more at *now*."""
        self._admitted.append(now)


class BusiestSecond:
    """The largest number of occurrences in any one-second window so far."""

    __slots__ = ("_recent", "most")

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self.most = 0

    def note(self, now: float) -> None:
        """Count one occurrence at *now* (a monotonic clock, never going back)."""
        recent = self._recent
        recent.append(now)
        while recent[0] <= now - 1.0:
            recent.popleft()
        self.most = max(self.most, len(recent))
