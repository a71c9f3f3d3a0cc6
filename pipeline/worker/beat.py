"""Beat's schedule: when the periodic tasks are sent."""

from __future__ import annotations

import socket
import time
from typing import Any

from celery import Celery
from celery.beat import Scheduler, SchedulingError

from pipeline.coordination.heartbeats import HeartbeatSender
from pipeline.observability.logs import logger

log = logger(__name__)


class SteadyScheduler(Scheduler):
    """A schedule in memory that follows the steady clock, and sends beat's heartbeat at each round of its loop.

    Celery's own follows the wall clock: if that is set back by an hour, nothing is sent for an hour. Nothing needs to
    be remembered, because both periodic tasks may run at any time.
    """

    def __init__(self, app: Celery, *args: Any, **options: Any) -> None:
        super().__init__(app, *args, **options)
        self._heartbeat = HeartbeatSender(app.pipeline_settings.limiter_url, "beat", f"beat@{socket.gethostname()}")
        self._due: dict[str, float] = {}

    def tick(self, *_args: Any, **_options: Any) -> float:
        """Send what is due; return the seconds until the next round."""
        self._heartbeat.send()
        now = time.monotonic()
        for entry in self.schedule.values():
            if now >= self._due.setdefault(entry.name, now):
                self._due[entry.name] = now + entry.schedule.run_every.total_seconds()
                self._send(entry)
        wait = min(self._due.values(), default=self.max_interval) - time.monotonic()
        return float(min(max(0.0, wait), self.max_interval))

    def _send(self, entry: Any) -> None:
        """Send a task without a line in the log, which Celery's own `apply_entry` writes each time."""
        try:
            self.apply_async(entry, producer=self.producer, advance=False)
        except SchedulingError as error:
            log.warning("a periodic task could not be sent; the next one will be", task=entry.task, error=str(error))
