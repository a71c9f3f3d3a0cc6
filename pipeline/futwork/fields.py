"""What Futwork calls the fields of a lead, and which phone numbers it can call; pure.

Source: the vendor's Lead Integration Guide, which asks for a "10-digit phone number".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import phonenumbers

from pipeline.domain.lead import InvalidLead, Lead
from pipeline.domain.phone import InvalidPhone

PHONE = "recipientPhoneNumber"
DATA = "recipientData"

_NAMES = {PHONE: "phone", DATA: "data"}
_NATIONAL_DIGITS = 10


def read_lead(row: object, *, region: str) -> Lead:
    """Return the lead of a row if Futwork can call it, or raise `InvalidLead` with every reason.

    The fields of the row have our names or Futwork's; the reasons use the names of the row. *region* (`IN`) is where a
    phone number without a country code belongs.
    """
    if not isinstance(row, (dict, Mapping)) or (PHONE not in row and DATA not in row):  # of a dict Python knows at once
        return _read(row, region)
    ours = {name: our for name, our in _NAMES.items() if name in row and our not in row}
    try:
        return _read({ours.get(name, name): value for name, value in row.items()}, region)
    except InvalidLead as error:
        theirs = {our: name for name, our in ours.items()}
        raise InvalidLead(*((_renamed(place, theirs), reason) for place, reason in error.reasons)) from None


def national_digits(e164: str) -> str:
    """Return a number in E.164 without its country code: ten digits for India.

    Raises `InvalidPhone` if the country code does not exist.
    """
    if e164.startswith("+91"):
        return e164[3:]
    try:
        return phonenumbers.national_significant_number(phonenumbers.parse(e164, None))
    except phonenumbers.NumberParseException as error:
        raise InvalidPhone("the phone number is not in E.164, or its country code does not exist") from error


def _read(row: object, region: str) -> Lead:
    """Futwork gets the national digits alone, so they must be ten, and of its own country."""
    lead = Lead.read(row, region=region)
    country, length = _callable_form(region)
    if lead.phone.startswith(country) and len(lead.phone) == length:
        return lead
    if lead.phone.startswith(country):
        reason = f"the phone number has not the {_NATIONAL_DIGITS} national digits that Futwork takes"
    else:
        reason = f"the phone number is of another country than {region}: its last digits would call a stranger"
    raise InvalidLead(("phone", reason))


@cache
def _callable_form(region: str) -> tuple[str, int]:
    """How a number that Futwork can call begins in E.164, and how long it is."""
    country = f"+{phonenumbers.country_code_for_region(region)}"
    return country, len(country) + _NATIONAL_DIGITS


def _renamed(place: str, theirs: Mapping[str, str]) -> str:
    field, dot, rest = place.partition(".")
    return theirs.get(field, field) + dot + rest
