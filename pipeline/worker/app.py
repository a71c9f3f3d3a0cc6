"""Builds the Celery app of workers, beat and Flower from the settings."""

from __future__ import annotations

import logging
from typing import Any

import billiard.pool
from celery import Celery, signals

from pipeline.broker import ROUTES, celery_app
from pipeline.broker.redis_transport import quarantine_malformed
from pipeline.coordination.heartbeats import HEARTBEAT_SECONDS
from pipeline.observability.logs import configure_logs
from pipeline.settings import Settings
from pipeline.worker import guard, tasks
from pipeline.worker.dead_letters import quarantine_or_spool
from pipeline.worker.guard import guarded, plain
from pipeline.worker.heartbeat import HeartbeatStep
from pipeline.worker.request import RETRY_SECONDS

_EXPIRES_SECONDS = 6 * 3600.0  # of periodic tasks: two hosts' clocks differ by less, even with a wrong time zone
_LAST_RESULTS_SECONDS = 2.0  # that a child waits at its end for its parent to have read its results


def build_app(settings: Settings) -> Celery:
    """The Celery app of a worker, beat or Flower; raises `SettingsError` if a worker could not do its work."""
    app = celery_app(settings, works=True)
    _ = settings.limiter_url  # without the limiter's Redis a worker would take leads in and never send one
    app.pipeline_settings = settings
    quarantine_malformed(
        lambda item: quarantine_or_spool(settings, "message", item, reason="malformed envelope"),
    )
    app.conf.update(
        worker_consumer="pipeline.worker.consumer:QuarantiningConsumer",
        worker_lost_wait=3.0,  # a child's last result is in its pipe long before
        beat_scheduler="pipeline.worker.beat:SteadyScheduler",
        beat_max_loop_interval=HEARTBEAT_SECONDS,  # beat sends a heartbeat at each round, also with nothing to send
        beat_schedule={
            "sweep": _periodic("pipeline.sweep", settings.sweep_seconds),
            "tidy": _periodic("pipeline.tidy", tasks.TIDY_SECONDS),
        },
    )
    app.steps["consumer"].add(HeartbeatStep)
    _bound_the_wait_for_last_results()
    # `shared=False`: by default Celery registers each task with every other app of the process too, under one name.
    common: dict[str, Any] = {"bind": True, "shared": False, "Request": "pipeline.worker.request:DiscreetRequest"}
    # A message whose process crashed is retried; if it cannot be published now, it goes back to its queue.
    late = common | {"acks_late": True, "retry_on_worker_lost": True, "reject_on_worker_lost": True}
    late |= {"max_retries": guard.MOST_CRASHES, "default_retry_delay": RETRY_SECONDS}
    app.task(guarded(tasks.intake), name="pipeline.intake", **late)
    app.task(guarded(tasks.events), name="pipeline.events", **late)
    app.task(plain(tasks.dispatch), name="pipeline.dispatch", **common)
    app.task(plain(tasks.sweep), name="pipeline.sweep", **common)
    app.task(plain(tasks.tidy), name="pipeline.tidy", **common)
    signals.setup_logging.disconnect(dispatch_uid="pipeline")  # of an app that this process built before
    signals.setup_logging.connect(lambda **_: _configure_logs(settings), weak=False, dispatch_uid="pipeline")
    return app


def _periodic(task: str, seconds: float) -> dict[str, Any]:
    return {"task": task, "schedule": seconds, "options": {"expires": max(_EXPIRES_SECONDS, 5 * seconds)}}


def _bound_the_wait_for_last_results() -> None:
    """Let a child that ends wait two seconds for its parent to have counted its results, and not thirty.

    A parent that shuts down may count fewer results than the child sent.
    """
    rounds = _LAST_RESULTS_SECONDS / billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_INTERVAL
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = round(rounds)


def _configure_logs(settings: Settings) -> None:
    configure_logs(settings)
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """False for Celery's lines that a periodic task came and succeeded, unless everything is logged."""
    about = getattr(record, "data", None)
    task = about.get("name") if isinstance(about, dict) else None
    periodic = record.levelno <= logging.INFO and ROUTES.get(str(task)) == "upkeep"
    return not periodic or logging.getLogger().isEnabledFor(logging.DEBUG)
