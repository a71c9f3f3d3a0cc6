"""A worker whose processes die on messages of certain campaigns, as a crash in a C library would have it.

`celery -A tests.journey.deadly_worker worker` runs the real worker's app; only the stage behind the task differs.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from pipeline.broker import publisher
from pipeline.settings import load_settings
from pipeline.wiring import Services
from pipeline.worker import guard, tasks
from pipeline.worker.app import build_app
from tests.journey.deadly_worker_names import KILLS_ITS_PROCESS, KILLS_THE_WORKER

_intake = tasks.intake


def intake(mine: Services, message: Any, *, again: bool) -> None:
    """Die, or take the batch in."""
    campaign = message.get("campaign_id")
    if campaign in (KILLS_ITS_PROCESS, KILLS_THE_WORKER):
        with (mine.settings.spool_dir.parent / "deaths").open("a") as file:
            file.write(f"{campaign}\n")
        if campaign == KILLS_THE_WORKER:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    _intake(mine, message, again=again)


tasks.intake = intake
publisher.VISIBILITY_SECONDS = int(os.environ.get("DEADLY_VISIBILITY_SECONDS", publisher.VISIBILITY_SECONDS))
guard.MOST_CRASHES = int(os.environ.get("DEADLY_MOST_DEATHS", guard.MOST_CRASHES))
app = build_app(load_settings())
if app.conf.broker_url.startswith("redis"):
    app.conf.broker_transport_options["unacked_restore_interval"] = 1
