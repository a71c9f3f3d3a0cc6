"""Everything that is measured: each metric's name, meaning, labels and source, in the order of a lead's journey.

`/metrics` exposes what stands here and nothing else, and `python -m pipeline.observability.metrics` prints it as
`docs/metrics.md`. Names follow Prometheus: base units, `_total` on what only grows. Labels are few and bounded; none
holds personal data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.domain.lead import LeadState, Outcome

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["ledger", "workers", "limiter", "heartbeats", "broker", "web", "spool", "process"]

SOURCES: dict[Source, str] = {
    "ledger": "read from the ledger at the scrape; the same from every web process",
    "workers": "counted by the workers, added up in Redis; the same from every web process",
    "limiter": "read from Redis at the scrape; the same from every web process",
    "heartbeats": "heartbeats of processes in Redis; the same from every web process",
    "broker": "read from the broker at the scrape; the same from every web process",
    "web": "counted by the web processes of one host",
    "spool": "read from the disk of one web host at the scrape",
    "process": "told by the web process that answers",
}

OTHER = "other"
"""The label of all campaigns beyond `METRICS_CAMPAIGNS`, together."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_POST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
_TASK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)

TASKS = ("intake", "dispatch", "events", "sweep", "tidy")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. A counter's `name` stands without the `_total` that it is exposed with."""

    name: str
    kind: Kind
    text: str
    source: Source
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a label may hold, where that is known; a counter begins at nought for each of them."""
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """The name as it stands in a scrape; a histogram's has `_bucket`, `_sum` and `_count` behind it there."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    @property
    def series(self) -> tuple[str, ...]:
        """Every name that a query may hold for it."""
        if self.kind != "histogram":
            return (self.exposed,)
        return (self.name, *(f"{self.name}_{part}" for part in ("bucket", "count", "sum")))

    def known_labels(self) -> Iterator[tuple[str, ...]]:
        """Every combination of labels that is known before anything was counted."""
        if not all(label in self.values for label in self.labels):
            return
        combined: list[tuple[str, ...]] = [()]
        for label in self.labels:
            combined = [(*one, value) for one in combined for value in self.values[label]]
        yield from combined


_STATES = tuple(state.value for state in LeadState)
_OUTCOMES = tuple(outcome.value for outcome in Outcome)

# Leads come in

INTAKE_ROWS = Metric(
    "pipeline_intake_rows", "counter", "Rows that the HTTP intake was sent", "web",
    ("result",), {"result": ("accepted", "refused")},
)  # fmt: skip
INTAKE_LEADS = Metric(
    "pipeline_intake_leads", "counter",
    "Leads in the batches that workers took in: new ones, ones that the ledger knew, and rows that are no leads",
    "workers", ("result",), {"result": ("accepted", "known", "refused")},
)  # fmt: skip
LEADS_ACCEPTED = Metric(
    "pipeline_leads_accepted", "counter", "Leads that were ever accepted, by intake's own count", "ledger"
)
LEADS = Metric(
    "pipeline_leads", "gauge", "Leads by campaign and state", "ledger", ("campaign", "state"), {"state": _STATES}
)
LEADS_UNACCOUNTED = Metric(
    "pipeline_leads_unaccounted", "gauge",
    "Accepted leads less the sum over all states; anything but 0 is a lead lost or invented", "ledger",
)  # fmt: skip
DUE_OLDEST = Metric(
    "pipeline_due_oldest_age_seconds", "gauge",
    "How long the longest waiting due lead of an active campaign has been due", "ledger", ("campaign",),
)  # fmt: skip

# The campaigns

CAMPAIGNS = Metric(
    "pipeline_campaigns", "gauge", "Campaigns by state", "ledger",
    ("state",), {"state": ("active", "paused", "held")},
)  # fmt: skip
CAMPAIGN_STOPPED = Metric(
    "pipeline_campaign_stopped", "gauge",
    "Campaigns that are not active, with the kind of hold, or `paused`", "ledger", ("campaign", "why"),
)  # fmt: skip
CAMPAIGN_POSTS = Metric(
    "pipeline_campaign_recent_submissions", "gauge", "POSTs of the last ten whole minutes by campaign", "ledger",
    ("campaign",),
)  # fmt: skip

# Sending

LIMITER_UP = Metric("pipeline_limiter_up", "gauge", "Whether the Redis of the rate limit answers", "limiter")
LIMITER_CONFIGURED = Metric(
    "pipeline_limiter_configured_per_second", "gauge", "Submissions a second that the settings allow an account",
    "limiter", ("account",),
)  # fmt: skip
LIMITER_ALLOWED = Metric(
    "pipeline_limiter_allowed_per_second", "gauge",
    "Submissions a second that an account may make now: slower after a 429, 0 while Futwork asked for a pause",
    "limiter", ("account",),
)  # fmt: skip
LIMITER_STOPPED = Metric(
    "pipeline_limiter_stopped_seconds", "gauge", "How long the pause that Futwork asked for still lasts",
    "limiter", ("account",),
)  # fmt: skip
LIMITER_SLOTS = Metric(
    "pipeline_limiter_slots", "counter", "Slots that dispatchers were granted, and those they gave back unused",
    "workers", ("account", "result"), {"result": ("granted", "returned")},
)  # fmt: skip
LIMITER_ASKS = Metric(
    "pipeline_limiter_asks", "counter",
    "Times that a dispatcher asked for slots: it got some, none yet, or none because Futwork asked for a pause",
    "workers", ("answer",), {"answer": ("granted", "full", "stopped")},
)  # fmt: skip
LIMITER_WAIT = Metric(
    "pipeline_limiter_wait_seconds", "histogram",
    "How long a dispatcher with room for more waited until it was granted a slot", "workers", buckets=_FAST,
)  # fmt: skip
SUBMISSIONS = Metric(
    "pipeline_submissions", "counter", "POSTs to Futwork by outcome", "workers", ("outcome",), {"outcome": _OUTCOMES}
)
SUBMISSION_SECONDS = Metric(
    "pipeline_submission_duration_seconds", "histogram", "How long a POST took, by outcome", "workers",
    ("outcome",), {"outcome": _OUTCOMES}, _POST,
)  # fmt: skip
LOST_CLAIMS = Metric(
    "pipeline_lost_claims", "counter", "Claims whose worker died or lost the ledger: their leads are uncertain",
    "workers",
)  # fmt: skip
UNCERTAIN_OLDEST = Metric(
    "pipeline_uncertain_oldest_age_seconds", "gauge", "How long the oldest uncertain lead has been so", "ledger"
)
UNCERTAIN_OVERDUE = Metric(
    "pipeline_uncertain_overdue_seconds", "gauge",
    "How far the oldest uncertain lead is past the time after which its campaign's policy decides", "ledger",
    ("campaign",),
)  # fmt: skip

# Calls come back

WEBHOOK_ANSWERS = Metric(
    "pipeline_webhook_answers", "counter",
    "Answers to Futwork's webhook by HTTP status; behind 401, 413 and 503 an event was not kept", "web",
    ("status",), {"status": ("200", "400", "401", "413", "415", "503")},
)  # fmt: skip
HANDOFF_SECONDS = Metric(
    "pipeline_webhook_handoff_seconds", "histogram", "How long it took until an event was in the broker or the spool",
    "web", buckets=_FAST,
)  # fmt: skip
SPOOL_FILES = Metric(
    "pipeline_spool_files", "gauge", "Groups of events on this host's disk that wait for the broker", "spool"
)
SPOOL_BYTES = Metric("pipeline_spool_bytes", "gauge", "Their size", "spool")
SPOOL_LIMIT = Metric(
    "pipeline_spool_limit_bytes", "gauge", "The size at which the spool takes no more (`SPOOL_MAX_BYTES`)", "spool"
)
SPOOL_DAMAGED = Metric(
    "pipeline_spool_damaged_files", "gauge", "Spooled files that did not match their checksum, kept for a person",
    "spool",
)  # fmt: skip
EVENTS = Metric(
    "pipeline_events", "counter", "Events that workers took in: merged into a call, seen before, or quarantined",
    "workers", ("result",), {"result": ("merged", "known", "quarantined")},
)  # fmt: skip
EVENT_LAG = Metric(
    "pipeline_event_lag_seconds", "histogram", "How long it took from the webhook to the merged call", "workers",
    buckets=_LAG,
)  # fmt: skip
CALLS = Metric("pipeline_calls", "gauge", "Calls by outcome, and those that are still open", "ledger", ("outcome",))
ORPHANS = Metric("pipeline_orphan_calls", "gauge", "Calls that no lead was found for", "ledger")
QUARANTINED = Metric("pipeline_quarantined", "gauge", "Things in quarantine that wait for a person or a fix", "ledger")

# The machinery

BROKER_UP = Metric("pipeline_broker_up", "gauge", "Whether the broker answers", "broker")
QUEUE_MESSAGES = Metric("pipeline_queue_messages", "gauge", "Messages that wait in a queue", "broker", ("queue",))
QUEUE_WORKERS = Metric(
    "pipeline_queue_workers", "gauge", "Workers that live and take messages from a queue", "heartbeats", ("queue",)
)
PROCESSES = Metric(
    "pipeline_processes", "gauge", "Workers and beats that live, and hosts that serve the web", "heartbeats",
    ("kind",), {"kind": ("worker", "beat", "web")},
)  # fmt: skip
LAST_RUN = Metric(
    "pipeline_last_run_age_seconds", "gauge", "How long ago a periodic task last came to its end", "heartbeats",
    ("task",), {"task": ("sweep", "tidy")},
)  # fmt: skip
TASKS_DONE = Metric(
    "pipeline_tasks", "counter",
    "Tasks by how they ended: done, failed, put back because the ledger was away, or quarantined",
    "workers", ("task", "result"), {"task": TASKS, "result": ("done", "failed", "put_back", "quarantined")},
)  # fmt: skip
TASK_SECONDS = Metric(
    "pipeline_task_duration_seconds", "histogram", "How long a task ran; a slice of dispatch takes seconds by design",
    "workers", ("task",), {"task": TASKS}, _TASK,
)  # fmt: skip
TIDIED = Metric(
    "pipeline_tidied", "counter", "What tidy settled", "workers",
    ("what",), {"what": ("expired", "resent", "dropped", "merged", "linked", "spooled")},
)  # fmt: skip
LEDGER_UP = Metric("pipeline_ledger_up", "gauge", "Whether the ledger answers", "ledger")
LEDGER_AGE = Metric(
    "pipeline_ledger_read_age_seconds", "gauge",
    "How old the ledger's numbers in this scrape are: more than a few seconds if it answers slowly", "ledger",
)  # fmt: skip
LEDGER_SECONDS = Metric("pipeline_ledger_read_seconds", "gauge", "How long the ledger took to answer", "ledger")
BUILD = Metric("pipeline_build_info", "gauge", "The release that answers; always 1", "process", ("version",))

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Leads come in": (INTAKE_ROWS, INTAKE_LEADS, LEADS_ACCEPTED, LEADS, LEADS_UNACCOUNTED, DUE_OLDEST),
    "Campaigns": (CAMPAIGNS, CAMPAIGN_STOPPED, CAMPAIGN_POSTS),
    "Sending": (
        LIMITER_UP, LIMITER_CONFIGURED, LIMITER_ALLOWED, LIMITER_STOPPED, LIMITER_SLOTS, LIMITER_ASKS, LIMITER_WAIT,
        SUBMISSIONS, SUBMISSION_SECONDS, LOST_CLAIMS, UNCERTAIN_OLDEST, UNCERTAIN_OVERDUE,
    ),
    "Calls come back": (
        WEBHOOK_ANSWERS, HANDOFF_SECONDS, SPOOL_FILES, SPOOL_BYTES, SPOOL_LIMIT, SPOOL_DAMAGED, EVENTS, EVENT_LAG,
        CALLS, ORPHANS, QUARANTINED,
    ),
    "Processes and services": (
        BROKER_UP, QUEUE_MESSAGES, QUEUE_WORKERS, PROCESSES, LAST_RUN, TASKS_DONE, TASK_SECONDS, TIDIED,
        LEDGER_UP, LEDGER_AGE, LEDGER_SECONDS, BUILD,
    ),
}  # fmt: skip

METRICS: tuple[Metric, ...] = tuple(metric for section in SECTIONS.values() for metric in section)

_INTRODUCTION = """\
# Metrics

`GET /metrics` of any web process, in Prometheus' text form. It asks for no token, so publish it on an internal address
only; it holds no personal data. This page is printed by `make metrics`, and a test compares the two.

A metric's source says how to add it up. What is read from the ledger, the broker and Redis, and what the workers
count, is the same whichever web process answers: with several web hosts take `max without (instance)`. What a web host
counts or has on its disk is its own: take `sum`.

A scrape answers within five seconds. If the ledger, the broker or Redis takes longer, the numbers are the last ones
that were read, and `pipeline_ledger_read_age_seconds` says how old; after half a minute without an answer the matching
`_up` is 0 and its numbers are left out.

The label `campaign` names the `METRICS_CAMPAIGNS` campaigns with the most leads that are not at an end (50 by default),
and `other` for all the rest together.
"""


def as_markdown() -> str:
    """The text of `docs/metrics.md`."""
    parts = [_INTRODUCTION]
    for title, measures in SECTIONS.items():
        rows = [f"| `{one.exposed}` | {one.kind} | {_labels(one)} | {one.text} | {one.source} |" for one in measures]
        parts.append("\n".join((f"## {title}\n", "| metric | kind | labels | meaning | source |", _RULE, *rows, "")))
    sources = [f"| {name} | {text} |" for name, text in SOURCES.items()]
    parts.append("\n".join(("## Sources\n", "| source | is |", "|---|---|", *sources, "")))
    return "\n".join(parts)


_RULE = "|---|---|---|---|---|"


def _labels(metric: Metric) -> str:
    told = []
    for label in metric.labels:
        values = metric.values.get(label)
        told.append(f"`{label}` ({', '.join(values)})" if values else f"`{label}`")
    return "; ".join(told)


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
