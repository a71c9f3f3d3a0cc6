"""Numbers and times as people read them."""

from __future__ import annotations

from typing import Any


def count(value: int, one: str, many: str | None = None) -> str:
    """A number with its noun: `1 lead`, `1,200 leads`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def span(seconds: float | None) -> str:
    """A span of time in its two largest units: `4.2 s`, `9 min 30 s`, `3 h`."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = int(seconds // size), int(seconds % size // smaller)
            return f"{whole:,} {unit} {rest} {name}" if rest and whole < 10 else f"{whole:,} {unit}"
    return f"{seconds:.0f} s"


def unclear(answers: dict[str, Any]) -> str:
    """What became of the POSTs with one unclear answer: `HTTP 500: 12 POSTs, 3 taken, 4 sent again`."""
    status = "no answer" if answers["http_status"] is None else f"HTTP {answers['http_status']}"
    again = f", {answers['sent_again']:,} sent again" if answers["sent_again"] else ""
    return f"{status}: {count(answers['posts'], 'POST')}, {answers['taken']:,} taken{again}"


def first_line(error: BaseException) -> str:
    """An error in a line, without the statement and the parameters that follow a database's error."""
    inner = getattr(error, "orig", None) or error
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0][:200]
