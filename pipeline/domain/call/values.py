"""How single values of a post-call event are read, given that any of them may be of any type.

Types drift in Futwork's events (a duration is `"0.0"` here and `109` there), and its exports write `-` and `nan` for
nothing.
"""

import re
import unicodedata
from typing import Any

from pipeline.domain.phone import InvalidPhone, to_e164

_BLANK_WORDS = frozenset({"", "-", "nan"})  # the last two are how Futwork's call report writes "nothing"
_LONGEST_SLUG = 64  # characters; no status or disposition seen comes near it
_LARGEST_NUMBER = 10**18  # beyond it a float is no longer the number that was sent; an integer always is
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NOT_SLUG = re.compile(r"[^a-z0-9]+")


def is_blank(value: object) -> bool:
    """Return whether a value says nothing: null, no text, `-`, `nan`, or a list or object of only such.

    Zero and false say something.
    """
    if isinstance(value, str):
        return text_of(value) is None
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None


def text_of(value: object) -> str | None:
    """Return a string or a number as stripped text, and None for a blank or anything else."""
    if isinstance(value, str):
        text = value.strip()
        return None if len(text) < 4 and text.lower() in _BLANK_WORDS else text  # a transcript is long: don't lower it
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not abs(value) < _LARGEST_NUMBER:
        return None
    return str(int(value)) if value == int(value) else str(value)


def object_of(value: object) -> dict[str, Any]:
    """Return an object as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def phone_of(value: object, region: str) -> str | None:
    """Return a number in E.164, or None if the value is not a valid phone number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        return to_e164(value, region)
    except InvalidPhone:
        return None


def first_text(*values: object) -> str | None:
    """Return the first of the values that says something, as text."""
    for value in values:
        if text := text_of(value):
            return text
    return None


def slug(text: str, joint: str) -> str:
    """Return the words of a text in lower case with *joint* between them; letters of every script are kept."""
    text = _HUMP.sub(" ", text[: 4 * _LONGEST_SLUG]).casefold()
    if not text.isascii():
        text = "".join(map(_slug_char, unicodedata.normalize("NFKC", text)))
        return joint.join(text.split())[:_LONGEST_SLUG].rstrip(joint)
    return _NOT_SLUG.sub(joint, text.replace("'", "")).strip(joint)[:_LONGEST_SLUG].rstrip(joint)


def _slug_char(char: str) -> str:
    # Vowel signs of Indian scripts are marks, not letters: dropping them would leave other words.
    if unicodedata.category(char)[0] in "LMN":
        return char
    # Joiners shape letters and part nothing; an apostrophe belongs to its word.
    return "" if char in "'’\u200c\u200d" else " "
