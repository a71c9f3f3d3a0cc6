"""How the tests wait: for what they need, and never for a time.

Each deadline of the tests comes from here. A deadline ends a hang; it says nothing about speed, so it is generous. It
is given for an idle machine, and grows with what this machine does: that is measured once, at the start of a session,
and the load of the machine is read again at each wait.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

Found = TypeVar("Found")

DEADLINE_SECONDS = 60.0
"""What no step of a test takes on an idle machine unless it hangs."""

_REFERENCE_SECONDS = 0.1  # what the measurement takes on one idle core of two
_MEASURED = "TESTS_MEASURED_SLOWNESS"  # in the environment: the processes of pytest-xdist inherit it


def patience(seconds: float = DEADLINE_SECONDS) -> float:
    """*seconds* of an idle machine, in seconds of this machine as busy as it is now."""
    return seconds * max(1.0, measured_slowness(), os.getloadavg()[0] / (os.cpu_count() or 1))


@cache
def measured_slowness() -> float:
    """How many times longer than on an idle machine it takes to start a process and to count to a million."""
    if _MEASURED not in os.environ:
        program = [sys.executable, "-I", "-S", "-c", "for _ in range(1_000_000): pass"]
        os.environ[_MEASURED] = str(statistics.median(_seconds_of(program) for _ in range(3)) / _REFERENCE_SECONDS)
    return float(os.environ[_MEASURED])


def _seconds_of(program: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(program, check=True)
    return time.monotonic() - started


def until(
    condition: Callable[[], Found], seconds: float = DEADLINE_SECONDS, *, what: Callable[[], str] = lambda: ""
) -> Found:
    """Wait until the condition is true and return what it was; fail with *what* if that does not come.

    It asks every few milliseconds at first; what takes long may be seen a little later.
    """
    started, pause = time.monotonic(), 0.005
    while not (found := condition()):
        waited = time.monotonic() - started
        assert waited < patience(seconds), f"it did not come about in {waited:.0f} seconds\n{what()}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.25)
    return found
