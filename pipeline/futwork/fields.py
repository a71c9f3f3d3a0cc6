"""What Futwork calls the fields of a lead, and which phone numbers it can call; pure.

Source: the vendor's Lead Integration Guide, which asks for a "10-digit phone number".
"""

from __future__ import annotations

from collections.abc import Mapping

import phonenumbers

from pipeline.domain.lead import Lead
from pipeline.domain.phone import InvalidPhone

PHONE = "recipientPhoneNumber"
DATA = "recipientData"

NATIONAL_DIGITS = 10
"""Futwork gets the number without its country code, so these digits must still mean the same person."""

_OURS = {PHONE: "phone", DATA: "data"}


def read_lead(row: object, *, region: str) -> Lead:
    """Return the lead of a row if Futwork can call it, or raise `InvalidLead` with every reason in one line.

    The fields of the row have our names or Futwork's; the reasons use the names of the row. *region* (`IN`) is where a
    phone number without a country code belongs.
    """
    if not isinstance(row, (dict, Mapping)) or (PHONE not in row and DATA not in row):  # of a dict Python knows at once
        return Lead.read(row, region=region, national_digits=NATIONAL_DIGITS)
    ours = {name: our for name, our in _OURS.items() if name in row and our not in row}
    renamed = {ours.get(name, name): value for name, value in row.items()}
    theirs = {our: name for name, our in ours.items()}
    return Lead.read(renamed, region=region, national_digits=NATIONAL_DIGITS, names=theirs)


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
