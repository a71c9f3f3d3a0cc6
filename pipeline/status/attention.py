"""What needs attention, as one list: read by `/ops`, `pipeline top`, `pipeline status` and `pipeline doctor`.

Each item has a code that stays, a level, words for a person, and where to go on: a command, and on the pages the leads
or the campaign that it is about. Items are worked out from a snapshot alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pipeline.domain.campaign import ADVICE, HoldKind
from pipeline.domain.lead import LeadState
from pipeline.settings import Settings
from pipeline.status.snapshot import Shared, Snapshot
from pipeline.status.text import count, span

Level = Literal["stopped", "check", "info"]
Part = Literal["broker", "limiter", "ledger", "workers", "beat", "web", "spool"]

_LEVELS: tuple[Level, ...] = ("stopped", "check", "info")
_DUE_SECONDS = 120.0  # that a due lead of an active campaign may wait before it is reported
_SWEEP_SECONDS = 60.0  # without a sweep that finished

_ENDED = {
    LeadState.EXHAUSTED: "Every allowed attempt was used.",
    LeadState.REJECTED: "Futwork refused these leads themselves.",
    LeadState.EXPIRED: "They grew older than the campaign allows.",
}


@dataclass(frozen=True, slots=True)
class Attention:
    """One thing that needs attention."""

    code: str
    """What it is, for programs: it does not change with the words."""
    level: Level
    """`stopped`: something does not work. `check`: a person must look at it. `info`: good to know."""
    title: str
    text: str
    command: str
    """The command that shows more, or does what is advised."""
    advice: str = ""
    part: Part | None = None
    """The part of the pipeline, if it is about one."""
    campaign: str | None = None
    state: LeadState | None = None
    """The state of the leads that it is about, if it is about leads."""
    quote: str = ""
    """The reason as Futwork or an operator gave it."""
    since: datetime | None = None
    age_seconds: float | None = None
    probe_at: datetime | None = None
    can_resume: bool = False

    @property
    def line(self) -> str:
        """The title in one line, with the reason if there is one."""
        return f"{self.title}: {self.quote}" if self.quote else self.title

    @property
    def sentence(self) -> str:
        """Everything in one line."""
        parts = (f"{self.line}.", self.text, self.advice)
        return " ".join(part for part in parts if part)


def attention(seen: Snapshot, settings: Settings) -> list[Attention]:
    """Everything that needs attention, the most urgent first."""
    found = [*of_parts(seen, settings)]
    if seen.ledger.value is not None:
        found += of_ledger(seen.ledger.value)
    return sorted(found, key=lambda one: _LEVELS.index(one.level))


def headline(items: Sequence[Attention]) -> tuple[Level, str]:
    """The state of the pipeline in a few words, and its level."""
    stopped = [one for one in items if one.level == "stopped"]
    if stopped:
        campaigns = len({one.campaign for one in stopped if one.campaign})
        others = sum(one.campaign is None for one in stopped)
        said = [count(others, "fault")] if others else []
        said += [count(campaigns, "campaign is stopped", "campaigns are stopped")] if campaigns else []
        return "stopped", ", ".join(said)
    checks = sum(one.level == "check" for one in items)
    return ("check", f"Running; {count(checks, 'item')} to check") if checks else ("info", "Running")


def of_parts(seen: Snapshot, settings: Settings) -> Iterator[Attention]:
    """The parts that are away, do not run, or hold something back."""
    if seen.broker.value is None:
        yield _part(
            "broker_away", "stopped", "broker", "The broker does not answer", seen.broker.why,
            "The webhook stores events on disk meanwhile. Check BROKER_URL, and that Redis, Valkey or RabbitMQ runs.",
        )  # fmt: skip
    if seen.ledger.value is None:
        advice = "Check DATABASE_URL and that the database runs. Leads and events wait in the broker."
        yield _part("ledger_away", "stopped", "ledger", "The ledger does not answer", seen.ledger.why, advice)
    if seen.shared.value is None:
        advice = "Nothing is sent without the Redis of the rate limiter. Check REDIS_URL."
        title = "The rate limiter's Redis does not answer"
        yield _part("limiter_away", "stopped", "limiter", title, seen.shared.why, advice)
    else:
        yield from of_processes(seen.shared.value, settings)
    if seen.spool is not None and seen.spool.files:
        title = f"{count(seen.spool.files, 'file')} in the spool"
        text = f"Events wait on this host's disk until the broker takes them ({seen.spool.bytes / 1024:,.0f} kB)."
        advice = "When the broker answers, they are sent by themselves."
        yield _part("spool_waiting", "check", "spool", title, text, advice)
    if seen.spool is not None and seen.spool.damaged:
        title = f"{count(seen.spool.damaged, 'damaged file')} in the spool"
        text = "Their checksum is wrong, so they were not sent."
        yield _part("spool_damaged", "check", "spool", title, text, "See docs/operations.md.")


def of_processes(shared: Shared, settings: Settings) -> Iterator[Attention]:
    """Workers, beat and web processes that do not run, and sweeps that do not finish."""
    if shared.unserved:
        queues = ",".join(shared.unserved)
        title = (
            f"No worker serves the {'queue' if len(shared.unserved) == 1 else 'queues'} {', '.join(shared.unserved)}"
        )
        advice = f"Start one: celery -A worker worker -Q {queues}"
        yield _part("queue_unserved", "stopped", "workers", title, "Their messages wait.", advice)
    swept = shared.last_runs.get("sweep")
    if not shared.of_kind("beat"):
        text = "Retries, probes and lost claims wait for it."
        yield _part("no_beat", "stopped", "beat", "Beat is not running", text, "Start it: celery -A worker beat")
    elif swept is None or swept > max(_SWEEP_SECONDS, 10 * settings.sweep_seconds):
        text = "None has finished yet." if swept is None else f"The last one finished {span(swept)} ago."
        advice = "Check the worker that serves the queue upkeep, and its log."
        yield _part("sweep_late", "check", "beat", "Beat runs, but no sweep finishes", text, advice)
    if not shared.of_kind("web"):
        text = "Futwork's events cannot be received."
        yield _part("no_web", "check", "web", "No web process is running", text, "Start one: python -m pipeline.web")


def of_ledger(overview: Mapping[str, Any]) -> Iterator[Attention]:
    """What the ledger's overview shows of leads, campaigns, quarantine and calls."""
    if not overview["adds_up"]:
        total = sum(overview["leads"].values())
        text = f"{overview['accepted']:,} leads were accepted, but the states contain {total:,}."
        advice = "Run `pipeline status`, which counts every lead again."
        yield Attention("totals_differ", "stopped", "The totals do not match", text, "pipeline status", advice)
    for campaign in overview["campaigns"]:
        yield from _of_campaign(campaign)
    if n := overview["quarantined"]:
        title = f"{count(n, 'message is', 'messages are')} in quarantine"
        text = "Not readable; the original is stored. Replay after a fix."
        yield Attention("quarantine", "check", title, text, "pipeline events list")
    if n := overview["orphans"]:
        title = f"{count(n, 'call has', 'calls have')} no lead"
        yield Attention("orphans", "info", title, "Checked again every 15 seconds.", "pipeline events orphans")


def _of_campaign(one: Mapping[str, Any]) -> Iterator[Attention]:
    name, leads, unsure = one["id"], one["leads"], one["uncertain"]
    waiting = count(leads["queued"], "lead waits", "leads wait")
    stop: dict[str, Any] = {
        "campaign": name, "quote": one["reason"] or "", "since": one["stopped_at"], "can_resume": True,
        "command": f"pipeline campaign resume {name}",
    }  # fmt: skip
    if one["state"] == "held":
        what, advice = ADVICE[HoldKind(one["hold_kind"])]
        title, text = f"Campaign {name} is held: {what}", f"{waiting}; none is lost."
        code = f"held_{one['hold_kind']}"
        yield Attention(code, "stopped", title, text, advice=advice, probe_at=one["probe_at"], **stop)
    elif one["state"] == "paused":
        yield Attention("paused", "info", f"Campaign {name} is paused by an operator", f"{waiting}.", **stop)
    elif (one["oldest_due_seconds"] or 0) > _DUE_SECONDS and not one["posts_last_minutes"]:
        age = one["oldest_due_seconds"]
        yield Attention(
            "campaign_idle", "stopped", f"Campaign {name} is active, but nothing is sent",
            f"Its oldest lead has been due for {span(age)}; nothing was sent in the last ten minutes.",
            "pipeline doctor", "Check that a worker serves the queue dispatch, and its log.", campaign=name,
            age_seconds=age,
        )  # fmt: skip
    if unsure["total"]:
        older = unsure["older_than"]
        ages = ", ".join(f"{older[key]:,} for more than {text}" for key, text in (("hour", "an hour"), ("day", "a day"))
                         if older[key])  # fmt: skip
        yield Attention(
            "uncertain", "check" if older["hour"] else "info",
            f"{count(unsure['total'], 'lead is', 'leads are')} uncertain in {name}",
            f"The oldest has been uncertain for {span(unsure['oldest_seconds'])}{f'; {ages}' if ages else ''}.",
            f"pipeline leads --state uncertain --campaign {name}",
            "Their POST may or may not have reached Futwork. Most are settled when the call comes back; look for the"
            " others in Futwork's console, then resolve them as sent, resend or drop.",
            campaign=name, state=LeadState.UNCERTAIN, age_seconds=unsure["oldest_seconds"],
        )  # fmt: skip
    for state, why in _ENDED.items():
        if n := leads[state]:
            title = f"{count(n, 'lead is', 'leads are')} {state} in {name}"
            command = f"pipeline leads --state {state} --campaign {name}"
            yield Attention(state, "info", title, why, command, campaign=name, state=state)


def _part(code: str, level: Level, part: Part, title: str, text: str, advice: str) -> Attention:
    return Attention(code, level, title, text, "pipeline doctor", advice, part=part)
