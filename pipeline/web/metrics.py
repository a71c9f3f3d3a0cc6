"""The scrape: what the web processes count, what the workers counted, and how the pipeline stands now.

`observability.metrics` defines every metric. What the web processes of a host count is added up over them through files
where `PROMETHEUS_MULTIPROC_DIR` is set, as `gunicorn.conf.py` does: it must be told even while Redis is away. All else
is asked for at the scrape, each source on a thread of its own, and never waited for longer than `PATIENCE_SECONDS`: a
source that is slow is told of as it was last, with its age.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import metadata
from typing import Any, Generic, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from pipeline.broker import QUEUES, BrokerUnavailable
from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.counters import Reading
from pipeline.coordination.heartbeats import Heartbeat
from pipeline.ledger import ledger_is_at_fault
from pipeline.observability import metrics as definitions
from pipeline.observability.logs import logger
from pipeline.observability.metrics import METRICS, OTHER, Metric
from pipeline.settings import Settings, SettingsError
from pipeline.wiring import Services

log = logger(__name__)

PATIENCE_SECONDS = 4.0  # for all sources together; Prometheus gives a scrape ten by default
STALE_SECONDS = 30.0  # without an answer from a source, after which it is taken to be away
_LEDGER_SECONDS = 20.0  # for one of its statements
_ENDED = ("called", "rejected", "exhausted", "expired", "cancelled", "suppressed")

T = TypeVar("T")


def _counter(metric: Metric) -> Counter:
    counter = Counter(metric.name, metric.text, metric.labels)
    for labels in metric.known_labels():  # from nought, or the first one would be no increase
        counter.labels(*labels)
    return counter


WEBHOOK_ANSWERS = _counter(definitions.WEBHOOK_ANSWERS)
INTAKE_ROWS = _counter(definitions.INTAKE_ROWS)
HANDOFF_SECONDS = Histogram(
    definitions.HANDOFF_SECONDS.name, definitions.HANDOFF_SECONDS.text, buckets=definitions.HANDOFF_SECONDS.buckets
)


def scrape(mine: Services) -> tuple[bytes, str]:
    """The metrics in Prometheus' text form, with their content type; answers within five seconds."""
    state = CollectorRegistry()
    state.register(_State(mine))
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        counted = CollectorRegistry()
        MultiProcessCollector(counted)  # type: ignore[no-untyped-call]
    else:
        counted = REGISTRY
    return generate_latest(counted) + generate_latest(state), CONTENT_TYPE_LATEST


class Source(Generic[T]):
    """Something that is asked on a thread of its own, by one thread at a time, and may take as long as it likes."""

    def __init__(self, ask: Callable[[], T], is_absence: Callable[[Exception], bool]) -> None:
        self._ask = ask
        self._is_absence = is_absence
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last: tuple[T, float, float] | None = None

    def begin(self) -> None:
        """Ask, unless an earlier question is not answered yet."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._try, name="metrics", daemon=True)
                self._thread.start()

    def answer(self, until: float) -> tuple[T, float, float] | None:
        """What it said last, how many seconds ago, and how long it took; None if it is away or silent for too long."""
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, until - time.monotonic()))
        last = self._last
        if last is None:
            return None
        said, asked_at, took = last
        age = time.monotonic() - asked_at
        return (said, age, took) if age < STALE_SECONDS else None

    def _try(self) -> None:
        started = time.monotonic()
        try:
            said = self._ask()
        except Exception as error:
            if not self._is_absence(error):
                log.exception("a part of the metrics could not be read")
            self._last = None
        else:
            self._last = (said, started, time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Redis:
    """What Redis says of the limit, of the processes that live and of what the workers counted."""

    accounts: dict[str, tuple[float, float]]
    """For each account how long it is still stopped, in seconds, and the share of its rate that it may use."""
    signs: list[Heartbeat]
    runs: dict[str, float | None]
    counted: dict[str, dict[tuple[str, ...], Reading]]


class _Sources:
    """The sources of one process."""

    def __init__(self, mine: Services) -> None:
        self.ledger = Source(lambda: _ask_ledger(mine), lambda error: ledger_is_at_fault(error) or _is_os(error))
        self.broker = Source(mine.broker.depths, lambda error: isinstance(error, BrokerUnavailable))
        absent = (
            RedisUnavailable,
            SettingsError,
            OSError,
        )
        self.redis = Source(lambda: _ask_redis(mine), lambda error: isinstance(error, absent))


@cache
def _sources(mine: Services) -> _Sources:
    return _Sources(mine)


def _ask_ledger(mine: Services) -> dict[str, Any]:
    return mine.ledger.reports.overview(now=datetime.now(UTC), within=timedelta(seconds=_LEDGER_SECONDS))


def _ask_redis(mine: Services) -> _Redis:
    accounts = {}
    for account in sorted(mine.settings.api_keys()) or ["default"]:
        stopped, factor = mine.limiter.standing(account)
        accounts[account] = (stopped.total_seconds(), factor)
    last = {task: mine.heartbeats.last_run(task) for task in definitions.LAST_RUN.values["task"]}
    runs = {task: None if ago is None else max(0.0, ago) for task, ago in last.items()}
    return _Redis(accounts, mine.heartbeats.alive(), runs, mine.counters.read())


def _is_os(error: Exception) -> bool:
    return isinstance(error, OSError)


class _State(Collector):
    def __init__(self, mine: Services) -> None:
        self._mine = mine

    def collect(self) -> Iterable[Any]:
        sources = _sources(self._mine)
        for source in (sources.ledger, sources.broker, sources.redis):
            source.begin()
        until = time.monotonic() + PATIENCE_SECONDS
        yield from _of_spool(self._mine)
        yield from _of_broker(sources.broker.answer(until))
        yield from _of_redis(sources.redis.answer(until), self._mine.settings)
        yield from _of_ledger(sources.ledger.answer(until), self._mine.settings)
        yield _gauge(definitions.BUILD, {(_version(),): 1})


def _of_ledger(found: tuple[dict[str, Any], float, float] | None, settings: Settings) -> Iterator[Any]:
    yield _gauge(definitions.LEDGER_UP, {(): int(found is not None)})
    if found is None:
        return
    overview, age, took = found
    yield _gauge(definitions.LEDGER_AGE, {(): age})
    yield _gauge(definitions.LEDGER_SECONDS, {(): took})
    accepted = CounterMetricFamily(definitions.LEADS_ACCEPTED.name, definitions.LEADS_ACCEPTED.text)
    accepted.add_metric([], overview["accepted"])
    yield accepted
    yield _gauge(definitions.LEADS_UNACCOUNTED, {(): overview["accepted"] - sum(overview["leads"].values())})
    yield from _of_campaigns(overview["campaigns"], settings)
    calls: dict[tuple[str, ...], float] = {
        (outcome,): n for outcome, n in overview["calls"].items() if outcome != "total"
    }
    yield _gauge(definitions.CALLS, calls)
    yield _gauge(definitions.ORPHANS, {(): overview["orphans"]})
    yield _gauge(definitions.QUARANTINED, {(): overview["quarantined"]})
    yield _gauge(definitions.UNCERTAIN_OLDEST, {(): overview["uncertain"]["oldest_seconds"] or 0})


def _of_campaigns(campaigns: list[dict[str, Any]], settings: Settings) -> Iterator[Any]:
    """The metrics with a campaign's name, for the busiest by their own and for the rest together."""
    busiest = sorted(campaigns, key=lambda one: (-_unfinished(one), -one["accepted"], one["id"]))
    named = {one["id"] for one in busiest[: settings.metrics_campaigns]}
    leads: dict[tuple[str, ...], float] = {}
    due: dict[tuple[str, ...], float] = {}
    posts: dict[tuple[str, ...], float] = {}
    overdue: dict[tuple[str, ...], float] = {}
    states = dict.fromkeys(definitions.CAMPAIGNS.values["state"], 0)
    for one in busiest:
        name = one["id"] if one["id"] in named else OTHER
        states[one["state"]] += 1
        for state, n in one["leads"].items():
            leads[name, state] = leads.get((name, state), 0) + n
        if one["state"] == "active":
            due[name,] = max(due.get((name,), 0), one["oldest_due_seconds"] or 0)
        posts[name,] = posts.get((name,), 0) + sum(one["posts_last_minutes"].values())
        patience = one["uncertain_after_seconds"] or settings.uncertain_after_seconds
        past = max(0.0, (one["uncertain"]["oldest_seconds"] or 0) - patience)
        overdue[name,] = max(overdue.get((name,), 0), past)
    yield _gauge(definitions.LEADS, leads)
    yield _gauge(definitions.DUE_OLDEST, due)
    yield _gauge(definitions.CAMPAIGN_POSTS, posts)
    yield _gauge(definitions.UNCERTAIN_OVERDUE, overdue)
    yield _gauge(definitions.CAMPAIGNS, {(state,): n for state, n in states.items()})
    # Who is stopped is named before who is busy: it is they whom somebody looks for.
    stopped: dict[tuple[str, ...], float] = {}
    for place, one in enumerate(one for one in busiest if one["state"] != "active"):
        name = one["id"] if place < settings.metrics_campaigns else OTHER
        key = (name, one["hold_kind"] or one["state"])
        stopped[key] = stopped.get(key, 0) + 1
    yield _gauge(definitions.CAMPAIGN_STOPPED, stopped)


def _unfinished(campaign: dict[str, Any]) -> int:
    return sum(n for state, n in campaign["leads"].items() if state not in _ENDED)


def _of_broker(found: tuple[dict[str, int], float, float] | None) -> Iterator[Any]:
    yield _gauge(definitions.BROKER_UP, {(): int(found is not None)})
    if found is not None:
        yield _gauge(definitions.QUEUE_MESSAGES, {(queue,): depth for queue, depth in found[0].items()})


def _of_redis(found: tuple[_Redis, float, float] | None, settings: Settings) -> Iterator[Any]:
    yield _gauge(definitions.LIMITER_UP, {(): int(found is not None)})
    if found is None:
        return
    said = found[0]
    rate = settings.account_rate.per_second
    yield _gauge(definitions.LIMITER_CONFIGURED, {(account,): rate for account in said.accounts})
    yield _gauge(
        definitions.LIMITER_ALLOWED,
        {(account,): 0 if stopped else rate * factor for account, (stopped, factor) in said.accounts.items()},
    )
    yield _gauge(definitions.LIMITER_STOPPED, {(account,): stopped for account, (stopped, _) in said.accounts.items()})
    kinds = dict.fromkeys(definitions.PROCESSES.values["kind"], 0)
    queues = dict.fromkeys(QUEUES, 0)
    for sign in said.signs:
        kinds[sign.kind] += 1
        for queue in sign.queues:
            if queue in queues:
                queues[queue] += 1
    yield _gauge(definitions.PROCESSES, {(kind,): n for kind, n in kinds.items()})
    yield _gauge(definitions.QUEUE_WORKERS, {(queue,): n for queue, n in queues.items()})
    yield _gauge(definitions.LAST_RUN, {(task,): ago for task, ago in said.runs.items() if ago is not None})
    for metric in METRICS:
        if metric.source == "workers":
            yield _counted(metric, said.counted[metric.name])


def _of_spool(mine: Services) -> Iterator[Any]:
    files, size = mine.spool.size()
    yield _gauge(definitions.SPOOL_FILES, {(): files})
    yield _gauge(definitions.SPOOL_BYTES, {(): size})
    yield _gauge(definitions.SPOOL_LIMIT, {(): mine.settings.spool_max_bytes})
    yield _gauge(definitions.SPOOL_DAMAGED, {(): mine.spool.damaged()})


def _counted(metric: Metric, readings: dict[tuple[str, ...], Reading]) -> Any:
    if metric.kind == "counter":
        counter = CounterMetricFamily(metric.name, metric.text, labels=metric.labels)
        for labels, reading in sorted(readings.items()):
            counter.add_metric(labels, reading.value)
        return counter
    histogram = HistogramMetricFamily(metric.name, metric.text, labels=metric.labels)
    for labels, reading in sorted(readings.items()):
        so_far, buckets = 0.0, []
        for bound in (*(f"{bound:g}" for bound in metric.buckets), "+Inf"):
            so_far += reading.buckets.get(bound, 0)
            buckets.append((bound, so_far))
        histogram.add_metric(labels, buckets, reading.value)
    return histogram


def _gauge(metric: Metric, values: dict[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(metric.name, metric.text, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


@cache
def _version() -> str:
    try:
        return metadata.version("futwork-lead-pipeline")
    except metadata.PackageNotFoundError:
        return "unknown"
