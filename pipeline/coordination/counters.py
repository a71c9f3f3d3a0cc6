"""What workers count: in memory while they work, added up in Redis once a second, for `/metrics` of any web process.

A worker has several processes, which come and go, and often no port that anybody may ask. So each adds its numbers to
one hash in Redis, and they survive it. Redis being away costs nothing: the numbers wait in memory, where they take no
more room than there are labels. A process that is killed takes up to a second of counting with it, and where the answer
of Redis is lost a second may count twice: these are for rates and alarms; what must be exact is in the ledger.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import orjson
import redis

from pipeline.coordination.connection import RedisUnavailable, reaching, run
from pipeline.observability.logs import logger
from pipeline.observability.metrics import METRICS, Metric

log = logger(__name__)

_WHAT = "the counters"
FLUSH_SECONDS = 1.0
_FORGET_SECONDS = 90 * 24 * 3600  # after the last worker counted anything
_INF = "+Inf"
_SUM = "sum"

Field = tuple[str, tuple[str, ...], str]
"""A metric's name, its labels' values, and what of it: nothing for a counter, `sum` or a bucket's bound otherwise."""

# KEYS: the hash. ARGV: seconds until it is forgotten, then field and increment in turn
_ADD = """
for i = 2, #ARGV, 2 do redis.call('HINCRBYFLOAT', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""


@dataclass(slots=True)
class Reading:
    """One metric with one set of labels, as all workers together have counted it."""

    value: float = 0.0
    """A counter's value, a histogram's sum."""
    buckets: dict[str, float] = field(default_factory=dict)
    """How many observations fell into each bucket, by its upper bound, not added up."""


class Counters:
    """Counts in memory, and adds it up in Redis if it was given a client.

    Counting is quick, safe for threads, and never raises.
    """

    def __init__(self, client: redis.Redis | None = None, *, prefix: str = "futwork:metrics") -> None:
        self._client = client
        self._key = f"{{{prefix}}}:counts"
        self._add = client.register_script(_ADD) if client is not None else None
        self._lock = threading.Lock()
        self._fresh: dict[Field, float] = {}
        self._flusher: threading.Thread | None = None

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        if by:
            self._grow({(metric.name, labels, ""): by})

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add an observation to a histogram."""
        self.observe_all(metric, (value,), *labels)

    def observe_all(self, metric: Metric, values: Iterable[float], *labels: str) -> None:
        """Add observations with the same labels to a histogram, at the price of one."""
        by: dict[Field, float] = {}
        total = 0.0
        for value in values:
            at = bisect.bisect_left(metric.buckets, value)
            field_ = (metric.name, labels, f"{metric.buckets[at]:g}" if at < len(metric.buckets) else _INF)
            by[field_] = by.get(field_, 0) + 1
            total += value
        self._grow(by | {(metric.name, labels, _SUM): total})

    def flush(self) -> bool:
        """Add to Redis what was counted since the last time, and say whether that worked; otherwise it waits."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        if not fresh or self._add is None:
            if fresh:
                self._grow(fresh)
            return self._add is not None
        args: list[str | float] = [_FORGET_SECONDS]
        for (name, labels, part), by in fresh.items():
            args += [orjson.dumps([name, labels, part]).decode(), by]
        try:
            run(self._add, _WHAT, [self._key], args)
        except RedisUnavailable as error:
            self._grow(fresh)
            log.debug("counts wait for redis", error=str(error))
            return False
        return True

    def read(self) -> dict[str, dict[tuple[str, ...], Reading]]:
        """What all workers have counted, by metric and labels; what is known to be countable begins at nought.

        Raises `RedisUnavailable`. Fields that this release does not know are left out.
        """
        if self._client is None:
            stored: Mapping[bytes | str, bytes | str] = {}
        else:
            with reaching(_WHAT):
                stored = self._client.hgetall(self._key)
        found = {one.name: {labels: Reading() for labels in one.known_labels()} for one in METRICS}
        for (name, labels, part), value in _fields(stored):
            reading = found[name].setdefault(labels, Reading())
            if part in ("", _SUM):
                reading.value += value
            else:
                reading.buckets[part] = reading.buckets.get(part, 0) + value
        return found

    def _grow(self, by: Mapping[Field, float]) -> None:
        with self._lock:
            for key, more in by.items():
                self._fresh[key] = self._fresh.get(key, 0) + more
            if self._flusher is None and self._client is not None:
                self._flusher = threading.Thread(target=self._flush_for_ever, name="counters", daemon=True)
                self._flusher.start()

    def _flush_for_ever(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(FLUSH_SECONDS)
            self.flush()


def _fields(stored: Mapping[bytes | str, bytes | str]) -> Iterator[tuple[Field, float]]:
    known = {one.name: one for one in METRICS if one.source == "workers"}
    for raw, value in stored.items():
        try:
            name, labels, part = orjson.loads(raw)
            metric, number = known[name], float(value)
        except (ValueError, TypeError, KeyError):
            continue  # of another release
        parts = {"", _SUM, _INF, *(f"{bound:g}" for bound in metric.buckets)}
        if part in parts and isinstance(labels, list) and len(labels) == len(metric.labels):
            yield (name, tuple(map(str, labels)), part), number
