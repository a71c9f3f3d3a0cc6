"""What Futwork asks of a lead: its names for the fields, and ten national digits of its own country."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from pipeline.domain.lead import InvalidLead, Lead
from pipeline.domain.phone import InvalidPhone
from pipeline.futwork.fields import national_digits, read_lead
from tests.conftest import make_lead

PHONE = "9999789877"
E164 = "+919999789877"
ABROAD = "the phone number is of another country than IN: its last digits would call a stranger"


def refusal(row: object, region: str = "IN") -> str:
    """Why a row is refused."""
    with pytest.raises(InvalidLead) as refused:
        read_lead(row, region=region)
    return str(refused.value)


@pytest.mark.parametrize("row", [None, "recipientData", ["recipientData"], 7])
def test_what_is_no_object_is_refused(row: object) -> None:
    assert refusal(row).startswith("a lead must be an object, not ")


@pytest.mark.parametrize(
    "row",
    [
        {"phone": PHONE, "data": {"a": 1}},
        {"recipientPhoneNumber": PHONE, "recipientData": {"a": 1}},
        {"recipientPhoneNumber": PHONE, "data": {"a": 1}},
        {"phone": PHONE, "recipientData": {"a": 1}},
        MappingProxyType({"recipientPhoneNumber": PHONE, "recipientData": {"a": 1}}),
        Lead(phone=PHONE, data={"a": 1}),
    ],
)
def test_our_names_and_futworks_make_the_same_lead(row: object) -> None:
    assert read_lead(row, region="IN") == Lead(phone=E164, data={"a": 1}, key=E164)


def test_a_lead_is_read_again_as_it_is() -> None:
    lead = make_lead(3, key="K-1")
    assert read_lead(lead, region="IN") == lead


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"recipientPhoneNumber": "12"}, "recipientPhoneNumber: the phone number has too few digits for region IN"),
        ({"recipientPhoneNumber": "+1 415 555 2671", "data": {}}, f"recipientPhoneNumber: {ABROAD}"),
        ({"phone": PHONE, "recipientData": []}, "recipientData: Input should be a valid dictionary"),
        ({"phone": PHONE, "recipientData": {"a": float("nan")}}, "recipientData.a: nan is not a number"),
        ({"recipientPhoneNumber": PHONE}, "data: missing"),
        ({"recipientPhoneNumber": "+14155552671"}, f"recipientPhoneNumber: {ABROAD}; data: missing"),
        ({"recipientData": {}}, "phone: missing"),
        (
            {"phone": PHONE, "recipientPhoneNumber": PHONE, "data": {}},
            "recipientPhoneNumber: unknown field (put it into data)",
        ),
    ],
)
def test_a_refusal_uses_the_names_of_the_row(row: dict[str, Any], reason: str) -> None:
    assert refusal(row).startswith(reason)


def test_a_number_whose_last_digits_would_call_a_stranger_is_refused() -> None:
    assert refusal({"phone": "+14155552671", "data": {}}) == f"phone: {ABROAD}"
    assert read_lead({"phone": "+14155552671", "data": {}}, region="US").phone == "+14155552671"


@pytest.mark.parametrize(("phone", "region"), [("+390612345", "IT"), ("+44 1204 12345", "GB"), ("080 12345", "IN")])
def test_a_number_that_has_not_ten_national_digits_is_refused(phone: str, region: str) -> None:
    assert refusal({"phone": phone, "data": {}}, region).startswith("phone: the phone number ")


@pytest.mark.parametrize(
    ("e164", "digits"), [(E164, PHONE), ("+14155552671", "4155552671"), ("+390612345678", "0612345678")]
)
def test_national_digits_drop_the_country_code_alone(e164: str, digits: str) -> None:
    assert national_digits(e164) == digits


@pytest.mark.parametrize("text", [PHONE, "", "+0123456789", "+9999789877123"])
def test_national_digits_refuse_what_is_not_e164(text: str) -> None:
    with pytest.raises(InvalidPhone):
        national_digits(text)
