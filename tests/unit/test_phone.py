"""Phone numbers: every spelling of a number is one number, and what is none is refused with a reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.domain.phone import InvalidPhone, to_e164

NUMBER = "+919999789877"

SPELLINGS = [
    "9999789877",
    "+91 99997-89877",
    "+919999789877",
    "09999789877",
    "919999789877",
    "0919999789877",
    "00919999789877",
    "0091 99997 89877",
    "+91 (0) 99997 89877",
    "+91-(99997)-89877",
    "(+91) 99997 89877",
    "  99997 89877\t",
    "99997.89877",
    "99997\u00a089877",
    "\u202a+91 99997 89877\u202c",
    "\ufeff9999789877",
    "99997–89877",
    "९९९९७८९८७७",
    "+९१ ९९९९७ ८९८७७",
    "+91 9999789877",
    "tel:+919999789877",
    "TEL: 99997 89877",
    "'9999789877",
    "9999789877.0",
    9999789877,
    919999789877,
    9999789877.0,
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_number_gives_the_same_e164(spelling: str | float) -> None:
    assert to_e164(spelling, "IN") == NUMBER


def test_a_ten_digit_number_that_begins_like_the_country_code_keeps_its_digits() -> None:
    assert to_e164("9199997898", "IN") == "+919199997898"


@pytest.mark.parametrize(
    ("text", "e164"),
    [("08035735856", "+918035735856"), ("08695551234", "+918695551234"), ("+1 415 555 2671", "+14155552671")],
)
def test_landlines_with_a_trunk_zero_and_foreign_numbers_are_read(text: str, e164: str) -> None:
    assert to_e164(text, "IN") == e164


def test_the_region_decides_what_a_bare_number_means() -> None:
    assert to_e164("415 555 2671", "US") == "+14155552671"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the phone number is empty"),
        (" \u00a0\u200b ", "the phone number is empty"),
        ("tel:", "the phone number is empty"),
        ("-", "the phone number holds no digits"),
        ("+", "the phone number holds no digits"),
        ("nan", "the phone number holds letters"),
        ("99997O9877", "the phone number holds letters"),
        ("99997 89877 ext 4", "the phone number holds letters"),
        ("99997*9877", "the phone number holds a sign that does not belong in one"),
        ("99997+89877", "the phone number holds a sign that does not belong in one"),
        ("9" * 65, "the phone number is too long (65 characters)"),
        ("9", "the phone number has too few digits"),
        ("999978987", "the phone number is not a valid one in region IN (without prefixes it has 9 digits)"),
        ("99997898770", "the phone number is not a valid one in region IN (without prefixes it has 11 digits)"),
        ("9" * 20, "the phone number has too many digits"),
        ("+999 9999789877", "the phone number has a country code that does not exist"),
        ("+1 415 555 26", "the phone number has too few digits for region US"),
        ("5555555555", "the phone number is not a valid one in region IN (without prefixes it has 10 digits)"),
        ("0915555555555", "the phone number is not a valid one in region IN (without prefixes it has 12 digits)"),
        ("9999789877, 9876543210", "there is more than one phone number here; give one"),
        ("9999789877/9876543210", "there is more than one phone number here; give one"),
        ("9999789877\n+91 98765 43210", "there is more than one phone number here; give one"),
        (True, "the phone number is not text but bool"),
        (None, "the phone number is not text but NoneType"),
        ([9999789877], "the phone number is not text but list"),
        (-9999789877, "the phone number is a number but not a whole one that can be dialled"),
        (10**400, "the phone number is a number but not a whole one that can be dialled"),
        (9999789877.5, "the phone number is a number but not a whole one that can be dialled"),
        (float("nan"), "the phone number is a number but not a whole one that can be dialled"),
        (float("inf"), "the phone number is a number but not a whole one that can be dialled"),
    ],
)
def test_what_is_no_phone_number_is_refused_with_its_reason(text: str | float, reason: str) -> None:
    with pytest.raises(InvalidPhone) as refusal:
        to_e164(text, "IN")
    assert str(refusal.value) == reason


@pytest.mark.parametrize("text", ["9.999789877e9", "9.99979E+09", "9,99979E+09", "1e10"])
def test_a_number_in_scientific_notation_is_refused_because_digits_are_lost(text: str) -> None:
    with pytest.raises(InvalidPhone, match="scientific notation, which loses digits; format the column as text"):
        to_e164(text, "IN")


def test_a_region_that_does_not_exist_is_the_callers_mistake_not_the_numbers() -> None:
    with pytest.raises(ValueError, match="'India' is not a region") as refusal:
        to_e164("9999789877", "India")
    assert not isinstance(refusal.value, InvalidPhone)


def _is_number(digits: str) -> bool:
    try:
        return bool(to_e164("+91" + digits, "IN"))
    except InvalidPhone:
        return False


indian_mobiles = st.from_regex(r"[6-9][0-9]{9}", fullmatch=True).filter(_is_number)
separators = st.sampled_from(["", " ", "-", " - ", ".", "\u00a0", "\u2011", "\u200b", "("])
scripts = st.sampled_from([0x30, 0x966, 0x9E6, 0xFF10])  # ASCII, Devanagari, Bengali and full-width zero


@settings(max_examples=150, deadline=None)
@given(
    digits=indian_mobiles,
    prefix=st.sampled_from(["", "0", "91", "+91", "+91 ", "0091", "091", "tel:", "tel:+91-"]),
    gaps=st.lists(separators, min_size=9, max_size=9),
    zero=scripts,
)
def test_all_spellings_of_a_number_give_one_e164(digits: str, prefix: str, gaps: list[str], zero: int) -> None:
    body = "".join(digit + gap for digit, gap in zip(digits, [*gaps, ""], strict=True))
    written = prefix + "".join(chr(zero + int(char)) if char in "0123456789" else char for char in body)
    assert to_e164(written, "IN") == "+91" + digits


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text("0123456789+-() .e/,", max_size=20), st.integers(), st.floats()))
def test_anything_else_is_refused_and_what_is_accepted_reads_back_as_itself(text: str | float) -> None:
    try:
        e164 = to_e164(text, "IN")
    except InvalidPhone as refusal:
        assert "\n" not in str(refusal)
    else:
        assert to_e164(e164, "IN") == e164


@settings(max_examples=500, deadline=None)
@given(digits=st.from_regex(r"[0-9]{8,12}", fullmatch=True), prefix=st.sampled_from(["", "+91", "91", "0"]))
def test_the_short_way_for_plain_numbers_agrees_with_the_long_way(digits: str, prefix: str) -> None:
    def read(text: str) -> str | None:
        try:
            return to_e164(text, "IN")
        except InvalidPhone:
            return None

    assert read(prefix + digits) == read(f" {prefix}{digits}")  # a space is enough to take the long way
