"""How the tests wait: for what they need, and never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(condition: Callable[[], Found], seconds: float = 60, *, what: Callable[[], str] = lambda: "") -> Found:
    """Wait until the condition is true and return what it was; fail with *what* after so many *seconds*.

    It asks every few milliseconds at first; what takes long may be seen a little later.
    """
    deadline, pause = time.monotonic() + seconds, 0.005
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not come about in {seconds:g} seconds\n{what()}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.25)
    return found
