"""How values look on a page: times, spans of time and numbers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from pipeline.status.text import count, span, unclear


def time_of(moment: datetime | None) -> str:
    """A time in UTC, to the second."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%d %b %Y, %H:%M:%S UTC")


def short_time(moment: datetime | None) -> str:
    """A time of these days in UTC, to the minute."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%d %b, %H:%M UTC")


def iso(moment: datetime) -> str:
    """A time for machines."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def number(value: float | None) -> str:
    """A number with its thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) and value < 10 and value % 1 else f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent."""
    return f"{100 * part / whole:.0f} %" if whole else "–"


def words(name: str | None) -> str:
    """A name of ours for people: `no_answer` becomes `no answer`."""
    return (name or "").replace("_", " ")


FILTERS: dict[str, Callable[..., str]] = {
    "time": time_of,
    "short_time": short_time,
    "iso": iso,
    "span": span,
    "unclear": unclear,
    "number": number,
    "share": share,
    "words": words,
    "count": count,
}
"""What templates may use, each under its name with `ops_` before it."""
