"""One line of the doctor's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, with what to do where that is something."""

    check: str
    verdict: Verdict
    text: str


def one_line(error: BaseException) -> str:
    """An error in a line, without the statement and parameters that a database's error has after it."""
    inner = getattr(error, "orig", None) or error
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0][:200]
