"""What must not be seen is masked here, for logs, error texts, excerpts of answers and pages alike.

A phone number is what may be one: a run of seven digits or more in any spelling, or its digits as words. Dates, times,
addresses of machines, UUIDs and ids in hexadecimal stay. A masked number keeps its last two digits, so that two of them
can be told apart. Of a secret nothing stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_DIGITS_OF_A_NUMBER = 7  # from here on a run of digits may be a phone number
_LARGE = 10 ** (_DIGITS_OF_A_NUMBER - 1)
_BETWEEN = r"[\s().,/\\_\-\u00a0\u200b-\u200f\u2010-\u2015\u202f\u2060\ufeff]"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_KEPT = (
    r"(?:19|20)\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?:[T ][0-2]\d:[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?"
    r"(?:Z|[+-]\d\d:?\d\d)?)?(?![\d-])"  # a date or a time
    r"|(?<![0-9a-f-])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f-])"  # a UUID
    r"|(?<![0-9a-z])(?=[0-9]*[a-f])(?:[0-9a-f]{24}|[0-9a-f]{32}|[0-9a-f]{64})(?![0-9a-z])"  # Futwork's ids, digests
    rf"|(?<![\d.]){_OCTET}(?:\.{_OCTET}){{3}}(?=[:/])"  # the address of a machine, before its port or its network
    r"|(?<![\d.,])\d{1,4}\.\d+(?=\s?m?s\b)"  # a time in seconds
)
_RUN = rf"\+?\d(?:{_BETWEEN}{{0,3}}\d){{{_DIGITS_OF_A_NUMBER - 1},}}"
_NUMBER = re.compile(f"(?P<kept>{_KEPT})|(?P<number>{_RUN})", re.IGNORECASE)
_ANY_RUN = re.compile(_RUN)  # finds in a tenth of the time that there is nothing to mask

_WORDS = (
    "zero|oh|nought|one|two|three|four|five|six|seven|eight|nine|double|triple|"
    "shunya|ek|do|teen|char|chaar|paanch|panch|chhe|chah|saat|aath|nau|"
    "शून्य|एक|दो|तीन|चार|पांच|पाँच|छह|छः|सात|आठ|नौ|डबल|ट्रिपल"
)
_SPOKEN = re.compile(
    r"(?<!\w)(?=[\dacdefnopstz\u0900-\u097f])"  # no word or number begins otherwise; it spares nine tenths of the time
    rf"(?:(?:{_WORDS}|\d{{1,4}})[\s,.\-]+){{{_DIGITS_OF_A_NUMBER - 2},}}(?:{_WORDS}|\d{{1,4}})(?!\w)",
    re.IGNORECASE,
)
_APART = re.compile(r"[\s,.\-]+")
_QUOTED_ROW = re.compile(r"^(.*\b(?:DETAIL|CONTEXT):).*$", re.MULTILINE)  # PostgreSQL's `Failing row contains (…)`
_TOKEN_IN_PATH = re.compile(r"(/webhooks/+futwork)[/?][^\s\"']*", re.IGNORECASE)


def mask_numbers(text: str) -> str:
    """The text with what may be a phone number masked but for its last two digits."""
    if _ANY_RUN.search(text):
        text = _NUMBER.sub(_mask, text)
    if len(_APART.findall(text)) >= _DIGITS_OF_A_NUMBER - 2:
        text = _SPOKEN.sub("•••••••", text)
    return text


def mask_values(value: Any) -> Any:
    """The value with `mask_numbers` on every text, name and large number in it, whatever its structure.

    Names do not matter: a lead's data may call a number `id`.
    """
    if isinstance(value, str):
        return mask_numbers(value)
    if isinstance(value, Mapping):
        return {
            mask_numbers(name) if isinstance(name, str) else name: mask_values(item) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_values(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= _LARGE:
        return mask_numbers(str(int(value)))
    return value


def redactor(secrets: Iterable[str]) -> Callable[[str], str]:
    """A function that masks numbers, these secrets, a token in the webhook's path, and rows that a database quotes."""
    known = sorted(filter(None, secrets), key=len, reverse=True)
    secret = re.compile("|".join(map(re.escape, known))) if known else None

    def redact(text: str) -> str:
        text = _TOKEN_IN_PATH.sub(r"\1/***", text)
        if secret:
            text = secret.sub("***", text)
        return mask_numbers(_QUOTED_ROW.sub(r"\1 …", text))

    return redact


def _mask(found: re.Match[str]) -> str:
    if found["kept"] is not None:
        return found["kept"]
    number = found["number"]
    return ("+" if number.startswith("+") else "") + "•" * 8 + number[-2:]
