"""How values look on a page: times, spans, numbers, and for viewers everything that may be a phone number masked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.status.text import count, span

_DIGITS_OF_A_NUMBER = 7  # from here on a run of digits may be a phone number
_LARGE = 10 ** (_DIGITS_OF_A_NUMBER - 1)
_BETWEEN = r"[\s().,/\\_\-\u00a0\u200b-\u200f\u2010-\u2015\u202f\u2060\ufeff]"
_KEPT = (
    r"(?:19|20)\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?:[T ][0-2]\d:[0-5]\d(?::[0-5]\d(?:\.\d{1,9})?)?"
    r"(?:Z|[+-]\d\d:?\d\d)?)?(?![\d-])"  # a date or a time
    r"|(?<![0-9a-f-])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f-])"  # a UUID
    r"|(?<![0-9a-z])(?=[0-9]*[a-f])(?:[0-9a-f]{24}|[0-9a-f]{32}|[0-9a-f]{64})(?![0-9a-z])"  # Futwork's ids, digests
)
_RUN = rf"\+?\d(?:{_BETWEEN}{{0,3}}\d){{{_DIGITS_OF_A_NUMBER - 1},}}"
_NUMBER = re.compile(f"(?P<kept>{_KEPT})|(?P<number>{_RUN})", re.IGNORECASE)

_WORDS = (
    "zero|oh|nought|one|two|three|four|five|six|seven|eight|nine|double|triple|"
    "shunya|ek|do|teen|char|chaar|paanch|panch|chhe|chah|saat|aath|nau|"
    "शून्य|एक|दो|तीन|चार|पांच|पाँच|छह|छः|सात|आठ|नौ|डबल|ट्रिपल"
)
_SPOKEN = re.compile(
    rf"(?<!\w)(?:(?:{_WORDS}|\d{{1,4}})[\s,.\-]+){{{_DIGITS_OF_A_NUMBER - 2},}}(?:{_WORDS}|\d{{1,4}})(?!\w)",
    re.IGNORECASE,
)


def masked(value: Any) -> Any:
    """The value with every run of digits, spoken or written, that may be a phone number masked but for its end.

    Whatever the structure and the names in it: a lead's data may call a number `id`. Times, dates, UUIDs and ids in
    hexadecimal stay.
    """
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, Mapping):
        return {masked_text(name) if isinstance(name, str) else name: masked(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= _LARGE:
        return masked_text(str(int(value)))
    return value


def masked_text(text: str) -> str:
    """The text with what may be a phone number masked but for its last two digits."""
    return _SPOKEN.sub("•••••••", _NUMBER.sub(_mask, text))


def _mask(found: re.Match[str]) -> str:
    if found["kept"] is not None:
        return found["kept"]
    number = found["number"]
    return ("+" if number.startswith("+") else "") + "•" * 8 + number[-2:]


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
    "number": number,
    "share": share,
    "words": words,
    "count": count,
}
"""What templates may use, each under its name with `ops_` before it."""
