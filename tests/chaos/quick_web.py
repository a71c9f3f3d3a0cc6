"""The app as the experiments need it: `python -m pipeline.web tests.chaos.quick_web:app`. See `quick_worker`."""

import os
from pathlib import Path

from pipeline.broker import messages
from tests.chaos import clock, disk, mechanisms

if _version := os.environ.get("CHAOS_MESSAGE_VERSION"):
    messages.MESSAGE_VERSION = int(_version)
mechanisms.switch_off(mechanisms.named_in_environment())
if _limit := os.environ.get(disk.LIMIT):
    disk.pretend(Path(os.environ["SPOOL_DIR"]), int(_limit))

from pipeline.web.wsgi import app  # noqa: E402 - what is switched off is off from the start

clock.follow(Path(os.environ["CHAOS_CLOCK"]))

__all__ = ["app"]
