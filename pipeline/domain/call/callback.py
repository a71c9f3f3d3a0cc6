"""The times at which leads ask to be called again, as extractions write them."""

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

# Regions with one clock all year. A time without a zone is read on that clock; elsewhere it is not a moment, and a call
# at a wrong hour is worse than a time left for a person to read.
_CLOCKS = {
    region: timezone(timedelta(minutes=minutes))
    for minutes, regions in {
        180: "BH KE KW QA SA TZ UG",
        240: "AE MU OM",
        300: "MV PK",
        330: "IN LK",
        345: "NP",
        360: "BD BT",
        420: "TH VN",
        480: "CN HK MY PH SG TW",
        540: "JP KR",
        60: "NG",
        0: "GH",
        120: "ZA",
    }.items()
    for region in regions.split()
}
_MONTH_FIRST = frozenset({"PH", "US"})

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_ZONES = {"z": UTC, "utc": UTC, "gmt": UTC, "ist": timezone(timedelta(hours=5, minutes=30))}

_WHEN = r"(?P<hour>\d{1,2})(?:[:.](?P<minute>\d{2})(?::(?P<second>\d{2})(?:\.\d+)?)?)?\s*(?P<half>[ap]m)?"
_ZONE = r"(?:\s*\(?(?P<zone>z|utc|gmt|ist|[+-]\d{2}:?\d{2})\)?)?"
_DATES = (
    r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",
    r"(?P<a>\d{1,2})[-/.](?P<b>\d{1,2})[-/.](?P<year>\d{4})",
    r"(?P<day>\d{1,2})[ -](?P<name>[a-z]{3,9})[ -](?P<year>\d{4})",
    r"(?P<name>[a-z]{3,9}) (?P<day>\d{1,2}) (?P<year>\d{4})",
)
_WEEKDAY = r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]* )?"
_FORMS = [
    re.compile(_WEEKDAY + form + _ZONE)
    for date in _DATES
    for form in (rf"{date}[t ]\s*{_WHEN}", rf"{_WHEN}\s+(?:on )?{date}")
]
_EPOCH = re.compile(r"[0-9]{10}|[0-9]{13}")  # seconds or milliseconds
_LONGEST = 64  # characters; what is longer is a sentence
_YEARS = range(2000, 2100)  # others are mistakes of the extraction, or a phone number read as a Unix time


def read_callback(text: str, *, region: str = "IN") -> datetime | None:
    """Return the moment that a text names, in UTC, or None if it names none.

    Read are ISO 8601, the date forms common in India (`08/05/2026 8:30 PM`, `8 May 2026, 20:30 IST`) and Unix times. A
    time without a zone is on the region's clock. A date without a time, a time without a date and free text (`tomorrow
    evening`) name no moment.
    """
    if len(text) > _LONGEST:
        return None
    moment = _epoch(text) or _iso(text) or _common(text, region)
    if moment is None or moment.year not in _YEARS:
        return None
    if moment.tzinfo is None:
        clock = _CLOCKS.get(region)
        if clock is None:
            return None
        moment = moment.replace(tzinfo=clock)
    return moment.astimezone(UTC)


def _epoch(text: str) -> datetime | None:
    if not _EPOCH.fullmatch(text):
        return None
    return datetime.fromtimestamp(int(text) / (1000 if len(text) == 13 else 1), UTC)


def _iso(text: str) -> datetime | None:
    if ":" not in text:  # a date alone would be read as midnight
        return None
    with suppress(ValueError):
        return datetime.fromisoformat(text)
    return None


def _common(text: str, region: str) -> datetime | None:
    text = text.lower().replace(",", " ").replace("a.m.", "am").replace("p.m.", "pm")
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\bat\b|\bof\b", " ", text)
    text = " ".join(text.split())
    for form in _FORMS:
        match = form.fullmatch(text)
        if match is not None:
            with suppress(ValueError):
                return _moment(match.groupdict(), region)
    return None


def _moment(parts: dict[str, str | None], region: str) -> datetime | None:
    """Put the parts of a time together; raises `ValueError` if they are none, such as a thirteenth month."""
    day, month = parts.get("day"), parts.get("month")
    if "a" in parts:
        month, day = (parts["a"], parts["b"]) if region in _MONTH_FIRST else (parts["b"], parts["a"])
    if name := parts.get("name"):
        month = str(_MONTHS.index(name[:3]) + 1)
    hour, half = int(parts["hour"] or 0), parts["half"]
    if half is None and parts["minute"] is None:
        return None  # "8 May 2026 9" may be an hour or anything else
    if half is not None:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half == "pm" else 0)
    return datetime(
        int(parts["year"] or 0),
        int(month or 0),
        int(day or 0),
        hour,
        int(parts["minute"] or 0),
        int(parts["second"] or 0),
        tzinfo=_zone(parts["zone"]),
    )


def _zone(text: str | None) -> timezone | None:
    if text is None or text in _ZONES:
        return _ZONES[text] if text else None
    sign = -1 if text.startswith("-") else 1
    return timezone(sign * timedelta(hours=int(text[1:3]), minutes=int(text[-2:])))
