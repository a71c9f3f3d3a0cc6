"""The scrape: what the web processes count, what the workers counted, and the state of the pipeline now.

`observability.metrics` defines every metric. What the web processes of a host count is added up over them through files
where `PROMETHEUS_MULTIPROC_DIR` is set, as the web server does: it must be reported even while Redis is away. All else
is the snapshot of `pipeline.status`, and what the workers counted in Redis. A part that is slow is reported as it last
was, with its age.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from pipeline import __version__
from pipeline.coordination.counters import Reading
from pipeline.observability import metrics as definitions
from pipeline.observability.metrics import METRICS, OTHER, Metric
from pipeline.settings import Settings
from pipeline.status.snapshot import Answer, Shared, Source, SpoolContent, Watch
from pipeline.wiring import Services

STALE_SECONDS = 30.0  # without an answer from a part, after which it is taken to be away
_ENDED = ("called", "rejected", "exhausted", "expired", "cancelled", "suppressed")


def _counter(metric: Metric) -> Counter:
    counter = Counter(metric.name, metric.text, metric.labels)
    for labels in metric.known_labels():  # from zero, or the first one would be no increase
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


class _State(Collector):
    def __init__(self, mine: Services) -> None:
        self._mine = mine

    def collect(self) -> Iterable[Any]:
        counted = _counted_by_workers(self._mine)
        counted.begin()
        seen = watch(self._mine).look()
        yield from _of_spool(seen.spool, self._mine.settings)
        yield _gauge(definitions.BROKER_UP, {(): int(seen.broker.value is not None)})
        if seen.broker.value is not None:
            yield _gauge(definitions.QUEUE_MESSAGES, {(queue,): depth for queue, depth in seen.broker.value.items()})
        found = counted.answer(time.monotonic() + 0.5).value
        yield _gauge(definitions.LIMITER_UP, {(): int(seen.shared.value is not None and found is not None)})
        if seen.shared.value is not None and found is not None:
            yield from _of_redis(seen.shared.value, self._mine.settings)
            for metric in METRICS:
                if metric.source == "workers":
                    yield _counted(metric, found[metric.name])
        yield from _of_ledger(seen.ledger, self._mine.settings)
        yield _gauge(definitions.BUILD, {(__version__,): 1})


@cache
def watch(mine: Services) -> Watch:
    """The watch of this process over its services."""
    return Watch(mine, stale_seconds=STALE_SECONDS)


@cache
def _counted_by_workers(mine: Services) -> Source[dict[str, dict[tuple[str, ...], Reading]]]:
    return Source(mine.counters.read, stale_seconds=STALE_SECONDS)


def _of_ledger(answer: Answer[dict[str, Any]], settings: Settings) -> Iterator[Any]:
    overview = answer.value
    yield _gauge(definitions.LEDGER_UP, {(): int(overview is not None)})
    if overview is None:
        return
    yield _gauge(definitions.LEDGER_AGE, {(): answer.age_seconds})
    yield _gauge(definitions.LEDGER_SECONDS, {(): answer.took_seconds})
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
    # A stopped campaign is named before a busy one: it is the one that somebody looks for.
    stopped: dict[tuple[str, ...], float] = {}
    for place, one in enumerate(one for one in busiest if one["state"] != "active"):
        name = one["id"] if place < settings.metrics_campaigns else OTHER
        key = (name, one["hold_kind"] or one["state"])
        stopped[key] = stopped.get(key, 0) + 1
    yield _gauge(definitions.CAMPAIGN_STOPPED, stopped)


def _unfinished(campaign: dict[str, Any]) -> int:
    return sum(n for state, n in campaign["leads"].items() if state not in _ENDED)


def _of_redis(shared: Shared, settings: Settings) -> Iterator[Any]:
    rate, accounts = settings.account_rate.per_second, shared.accounts
    yield _gauge(definitions.LIMITER_CONFIGURED, {(account,): rate for account in accounts})
    allowed = {account: 0 if stopped else rate * factor for account, (stopped, factor) in accounts.items()}
    yield _gauge(definitions.LIMITER_ALLOWED, {(account,): n for account, n in allowed.items()})
    yield _gauge(definitions.LIMITER_STOPPED, {(account,): stopped for account, (stopped, _) in accounts.items()})
    kinds = definitions.PROCESSES.values["kind"]
    yield _gauge(definitions.PROCESSES, {(kind,): len(shared.of_kind(kind)) for kind in kinds})
    yield _gauge(definitions.QUEUE_WORKERS, {(queue,): n for queue, n in shared.workers_by_queue.items()})
    ran: dict[tuple[str, ...], float] = {(task,): ago for task, ago in shared.last_runs.items() if ago is not None}
    yield _gauge(definitions.LAST_RUN, ran)


def _of_spool(spool: SpoolContent | None, settings: Settings) -> Iterator[Any]:
    if spool is not None:
        yield _gauge(definitions.SPOOL_FILES, {(): spool.files})
        yield _gauge(definitions.SPOOL_BYTES, {(): spool.bytes})
        yield _gauge(definitions.SPOOL_DAMAGED, {(): spool.damaged})
    yield _gauge(definitions.SPOOL_LIMIT, {(): settings.spool_max_bytes})


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
