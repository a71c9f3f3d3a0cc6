"""A wall clock that an experiment can set, for one process of a rig.

What is stopped and started by time, such as claims, probes and beat's schedule, reads the wall clock of its machine,
and such clocks jump: by a correction, by a virtual machine that was asleep, by a wrong time zone. The process looks
into a file for how far its clock is off; nobody else on this machine notices.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import sys
import time
from pathlib import Path
from typing import Any

_LOOK_SECONDS = 0.05
_LATE = (
    "celery.beat", "celery.schedules", "celery.utils.time", "celery.worker.consumer", "celery.app.amqp",
    "pipeline.futwork.with_curl", "pipeline.futwork.with_requests",
)  # fmt: skip
"""What is imported only when it is needed, and would then find the clock of this machine."""
_PACKAGES = ("pipeline", "celery", "kombu")
_real_time, _real_datetime = time.time, dt.datetime


class _Offset:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds = 0.0
        self._look_again = 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        if now >= self._look_again:
            self._look_again = now + _LOOK_SECONDS
            with contextlib.suppress(OSError, ValueError):
                self._seconds = float(self._file.read_text())
        return self._seconds


def follow(file: Path) -> None:
    """Let this process's wall clock be off by the seconds in *file*, in every module that looks at it."""
    for name in _LATE:
        with contextlib.suppress(ImportError):  # an engine whose library is not installed
            importlib.import_module(name)
    off = _Offset(file)

    def jumping_time() -> float:
        return _real_time() + off()

    class _Anything(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _real_datetime)

    class JumpingDatetime(dt.datetime, metaclass=_Anything):
        """`datetime.datetime` with another now; whatever it makes is a plain datetime."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _real_datetime(*args, **kwargs)

        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return _real_datetime.fromtimestamp(jumping_time(), tz)

        fromisoformat = _real_datetime.fromisoformat
        fromtimestamp = _real_datetime.fromtimestamp
        strptime = _real_datetime.strptime
        combine = _real_datetime.combine

    time.time = jumping_time
    for name, module in list(sys.modules.items()):
        ours = name.partition(".")[0] in _PACKAGES
        for attribute, value in list(vars(module).items()) if module is not None else ():
            if value is _real_time and name != __name__:
                setattr(module, attribute, jumping_time)
            elif ours and value is _real_datetime:
                setattr(module, attribute, JumpingDatetime)
