"""The five tasks, a few lines each: each calls the stage that it is named after.

| task | acknowledged | why |
|---|---|---|
| `pipeline.intake`, `pipeline.events` | after it ran | safe to repeat; the broker holds the only copy until it ran |
| `pipeline.dispatch`, `pipeline.sweep`, `pipeline.tidy` | before it runs | the ledger starts them again |
"""

from __future__ import annotations

import contextlib
from typing import Any

from pipeline.broker import decode_events
from pipeline.coordination.connection import RedisUnavailable
from pipeline.intake import UnreadableBatch
from pipeline.wiring import Services

TIDY_SECONDS = 15.0
_RECENTLY = 0.5  # of the time between two runs; a run that comes sooner after the last one waited in the queue


def intake(services: Services, message: Any, *, again: bool) -> None:  # noqa: ARG001 - every guarded stage has it
    """Take a batch of leads into the ledger."""
    services.intake.take_in(message)


def events(services: Services, message: Any, *, again: bool) -> None:
    """Take a batch of post-call events into the ledger; *again*, if a process died over it before."""
    try:
        decoded = decode_events(message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableBatch(f"not a batch of events: {type(error).__name__}: {error}") from None
    services.events.take_in(decoded, again=again)


def dispatch(services: Services, campaign_id: str) -> None:
    """Dispatch a campaign for one slice, and wake the next dispatcher if due work is left."""
    if services.dispatcher.run(campaign_id).more:
        services.wake(campaign_id)


def sweep(services: Services) -> None:
    """Wake dispatchers for due work, and settle lost claims; does nothing if it ran a moment ago."""
    if not _ran_recently(services, "sweep", services.settings.sweep_seconds):
        services.sweep.sweep()
        _note_run(services, "sweep")


def tidy(services: Services) -> None:
    """Settle what time decides, link orphans, drain the spool; does nothing if it ran a moment ago."""
    if not _ran_recently(services, "tidy", TIDY_SECONDS):
        services.sweep.tidy()
        _note_run(services, "tidy")


def _ran_recently(services: Services, task: str, interval_seconds: float) -> bool:
    """Whether another of the runs that piled up while no worker took them has just done the work."""
    try:
        seconds = services.heartbeats.last_run(task)
    except RedisUnavailable:
        return False
    return seconds is not None and 0 <= seconds < _RECENTLY * interval_seconds  # negative: the clock was set back


def _note_run(services: Services, task: str) -> None:
    with contextlib.suppress(RedisUnavailable):  # then the last run looks old, and the absent limiter says why
        services.heartbeats.ran(task)
