"""`worker.py` as the experiments need it: `celery -A tests.chaos.quick_worker worker|beat`.

A shorter visibility timeout and less time between two times of tidying, so that a round need not wait half a minute for
a dead worker's messages; a clock that can be set; and what `CHAOS_…` in the environment asks for: a pause between a
task's work and its acknowledgement, the message version of another release, mechanisms switched off. Nothing else
differs.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.broker import messages, publisher
from pipeline.worker import guard, tasks
from tests.chaos import clock, mechanisms

publisher.VISIBILITY_SECONDS = 8
tasks.TIDY_SECONDS = 5.0


def _lingering(stage: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Work, then wait: a kill then hits the time between the work and the acknowledgement."""

    @functools.wraps(stage)
    def work_and_wait(*args: Any, **options: Any) -> Any:
        done = stage(*args, **options)
        time.sleep(seconds)
        return done

    return work_and_wait


if _seconds := float(os.environ.get("CHAOS_LINGER_SECONDS", "0")):
    tasks.intake, tasks.events = _lingering(tasks.intake, _seconds), _lingering(tasks.events, _seconds)
if _version := os.environ.get("CHAOS_MESSAGE_VERSION"):
    messages.MESSAGE_VERSION = guard.MESSAGE_VERSION = int(_version)
mechanisms.switch_off(mechanisms.named_in_environment())

from worker import app  # noqa: E402 - the app reads all of the above when it is built

clock.follow(Path(os.environ["CHAOS_CLOCK"]))

__all__ = ["app"]
