"""Phone numbers as people, spreadsheets and JSON spell them, brought to one form.

Leads and post-call events both carry numbers, and they must agree to the digit: a lead's id is derived from its
number, and an event finds its lead by it. So both are read here.
"""

import re
import unicodedata
from functools import cache, lru_cache
from typing import Any

import phonenumbers
from phonenumbers import NumberParseException, PhoneMetadata, PhoneNumber, PhoneNumberFormat, ValidationResult


class InvalidPhone(ValueError):
    """The text is not a phone number that can be called.

    Its message is for a person and never repeats the number, so it may be logged.
    """


def to_e164(text: str | float, region: str) -> str:
    """Return the number in E.164 (`+919999789877`), however it is spelled.

    *text* may be an int, or a float without a fraction, because JSON and spreadsheets hold numbers as numbers.
    *region* (`IN`) is the country of a number without a country code. The number must be valid in its country, not only
    of a possible length: a wrong digit should be found here, and not by a call to a stranger. A number of another
    country is returned as such if it names its country code.

    Raises `InvalidPhone` with the reason, and `ValueError` for a *region* that does not exist.
    """
    if region == "IN" and type(text) is str and (plain := _indian_mobile().fullmatch(text)):
        return "+91" + plain[1]
    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError(f"{region!r} is not a region; use a two-letter code such as 'IN'")
    return _e164(_dialled(_as_text(text)), region)


def check_national(e164: str, region: str, *, digits: int) -> None:
    """Raise `InvalidPhone` unless the last *digits* digits of a number mean the same person in *region*."""
    country = _country_code(region)
    if not e164.startswith(country):
        raise InvalidPhone(
            f"the phone number is of another country than {region}: its last digits would call a stranger"
        )
    if len(e164) - len(country) != digits:
        raise InvalidPhone(f"the phone number has not the {digits} national digits that Futwork takes")


_LONGEST_TEXT = 64  # characters; E.164 has at most 15 digits, the rest leaves room for separators
_SEPARATORS = re.compile(r"[ \t()\[\]./~-]+")
_PREFIX = re.compile(r"\s*(?:tel|phone)\s*:", re.IGNORECASE)
_SCIENTIFIC = re.compile(r"[+-]?[0-9]+(?:[.,][0-9]*)?[eE][+-]?[0-9]+")
_DECIMAL_TAIL = re.compile(r"(\+?[0-9]{7,})\.0+")
_SEVERAL = re.compile(r"[0-9]{7,}[^0-9+]*[,;/|&\n]\s*\+?[0-9(][0-9 ()-]{6,}")
_LARGEST_EXACT_FLOAT = 2**53  # beyond it a float no longer holds every whole number

_TROUBLE = {
    ValidationResult.TOO_SHORT: "too few digits",
    ValidationResult.TOO_LONG: "too many digits",
    ValidationResult.INVALID_COUNTRY_CODE: "a country code that does not exist",
    ValidationResult.IS_POSSIBLE_LOCAL_ONLY: "no area code",
}


@cache
def _country_code(region: str) -> str:
    return f"+{phonenumbers.country_code_for_region(region)}"


@cache
def _indian_mobile() -> re.Pattern[str]:
    """What nearly every lead has: a valid mobile number of India in its plainest spelling.

    The pattern is the library's own, so it agrees with the parser. Parsing takes some 15 µs, a match takes one.
    """
    metadata: Any = PhoneMetadata.metadata_for_region("IN")
    return re.compile(
        rf"(?:\+91)?((?=(?:{metadata.general_desc.national_number_pattern})$)"
        rf"(?:{metadata.mobile.national_number_pattern}))"
    )


def _as_text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidPhone(f"the phone number is not text but {type(value).__name__}")
    # Also false for NaN. The bound comes first, so that `str` never gets an integer of thousands of digits.
    if not 0 <= value <= _LARGEST_EXACT_FLOAT or int(value) != value:
        raise InvalidPhone("the phone number is a number but not a whole one that can be dialled")
    return str(int(value))


def _dialled(text: str) -> str:
    """Reduce a spelling to its digits in ASCII, after a plus sign if it had one."""
    if len(text) > _LONGEST_TEXT:
        raise InvalidPhone(f"the phone number is too long ({len(text)} characters)")
    if not text.isascii():
        text = "".join(map(_ascii, text))
    text = _PREFIX.sub("", text, count=1).strip(" \t\r\n'\"")
    if not text:
        raise InvalidPhone("the phone number is empty")
    if _SCIENTIFIC.fullmatch(text):
        raise InvalidPhone(
            "the phone number is in scientific notation, which loses digits; format the column as text and export again"
        )
    if tail := _DECIMAL_TAIL.fullmatch(text):  # pandas writes a column of whole numbers like this if a cell is empty
        text = tail[1]
    if _SEVERAL.search(text):
        raise InvalidPhone("there is more than one phone number here; give one")
    if any(map(str.isalpha, text)):
        raise InvalidPhone("the phone number holds letters")
    digits = _SEPARATORS.sub("", text)
    if not digits.strip("+"):
        raise InvalidPhone("the phone number holds no digits")
    if not digits.removeprefix("+").isdecimal():
        raise InvalidPhone("the phone number holds a sign that does not belong in one")
    return digits


def _ascii(char: str) -> str:
    """Return what a character of another script stands for in a phone number."""
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    match unicodedata.category(char):
        case "Cf":  # a contact list's invisible direction marks, a byte-order mark
            return ""
        case "Zs":
            return " "
        case "Pd":
            return "-"
    return {"−": "-", "+": "+", "(": "(", ")": ")", "‘": "'", "’": "'", "“": '"', "”": '"'}.get(char, char)


@lru_cache(maxsize=4096)  # parsing takes some 15 µs, and the events of a call repeat its two numbers
def _e164(digits: str, region: str) -> str:
    number = _parse(digits, region)
    if not phonenumbers.is_valid_number(number):
        code = str(phonenumbers.country_code_for_region(region))
        bare = digits.lstrip("0")
        # People also dial "0", then the country code without a plus: 0 91 99997 89877.
        if not (digits.startswith("0") and bare.startswith(code)):
            raise InvalidPhone(_reason(number, digits, region))
        second_reading = _parse("+" + bare, region)
        if not phonenumbers.is_valid_number(second_reading):
            raise InvalidPhone(_reason(number, digits, region))
        number = second_reading
    return phonenumbers.format_number(number, PhoneNumberFormat.E164)


def _parse(digits: str, region: str) -> PhoneNumber:
    try:
        return phonenumbers.parse(digits, region)
    except NumberParseException as exc:
        match exc.error_type:
            case NumberParseException.INVALID_COUNTRY_CODE:
                trouble = _TROUBLE[ValidationResult.INVALID_COUNTRY_CODE]
            case NumberParseException.TOO_LONG:
                trouble = _TROUBLE[ValidationResult.TOO_LONG]
            case _:
                trouble = _TROUBLE[ValidationResult.TOO_SHORT]
        raise InvalidPhone(f"the phone number has {trouble}") from exc


def _reason(number: PhoneNumber, digits: str, region: str) -> str:
    place = phonenumbers.region_code_for_country_code(number.country_code or 0) if digits.startswith("+") else region
    if trouble := _TROUBLE.get(phonenumbers.is_possible_number_with_reason(number)):
        return f"the phone number has {trouble} for region {place}"
    length = len(phonenumbers.national_significant_number(number))
    return f"the phone number is not a valid one in region {place} (without prefixes it has {length} digits)"
