"""One table of what is masked and what stays, held by every place that shows texts of others."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from pipeline.futwork import excerpt_of
from pipeline.observability.logs import configure_logs
from pipeline.observability.redaction import mask_numbers, mask_values, redactor
from pipeline.settings import Settings

NUMBERS = [
    "9999789877", "+919999789877", "919999789877", "09999789877", "99997 89877", "+91 99997 89877", "99997-89877",
    "(0)99997 89877", "(99997)\u00a089877", "+91 (99997) 89-877", "99997.89877", "99997\u200b89877", "999/978/9877",
    "9-9-9-9-7-8-9-8-7-7", "crm9999789877", "९९९९७८९८७७", "1234567", "123456789 bytes",
    "nine nine nine nine seven eight nine eight seven seven", "double nine double nine seven eight nine eight",
]  # fmt: skip
KEPT = [
    "HTTP 422", "31.5 s", "in 0.1234567890123s", "12:30", "123456", "2026-05-08", "2026-05-08 12:00:00.123456",
    "2026-05-08T20:25:23.674Z", "1c1d3a36-0a2f-5c0e-9b0e-6f6a3d9b1c11", "68ecc86fd9fbecbe9431a18e",
    "10.20.30.40:5432", "d41d8cd98f00b204e9800998ecf8427e",
]  # fmt: skip


def logged(text: str, make_settings: Callable[..., Settings], capfd: pytest.CaptureFixture[str]) -> str:
    """The text as a library's line in our log."""
    root = logging.getLogger()
    before = root.handlers, root.level
    configure_logs(make_settings(log_format="json"))
    try:
        logging.getLogger("some.library").warning("%s", text)
    finally:
        root.handlers, root.level = before[0], before[1]
    return capfd.readouterr().err


@pytest.fixture(params=["log", "excerpt", "page", "error"])
def shown(
    request: pytest.FixtureRequest, make_settings: Callable[..., Settings], capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """How a text is shown in each of the places."""
    return {
        "log": lambda text: logged(text, make_settings, capfd),
        "excerpt": lambda text: excerpt_of(text.encode()),
        "page": lambda text: str(mask_values({"data": [text]})["data"][0]),
        "error": redactor(()),
    }[request.param]


@pytest.mark.parametrize("number", NUMBERS)
def test_what_may_be_a_number_is_masked_everywhere(shown: Callable[[str], str], number: str) -> None:
    text = shown(f"call {number} now")

    assert "•••••••" in text
    assert mask_numbers(number) in text


@pytest.mark.parametrize("number", NUMBERS)
def test_a_masked_number_shows_two_digits_at_most(number: str) -> None:
    assert sum(letter.isdigit() for letter in mask_numbers(number)) <= 2


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_number_stays_everywhere(shown: Callable[[str], str], text: str) -> None:
    assert f"before {text} after" in shown(f"before {text} after")


def test_secrets_tokens_in_paths_and_quoted_rows_leave_nothing() -> None:
    redact = redactor(["key", "key-of-the-account", ""])

    assert redact("POST with key-of-the-account") == "POST with ***"
    for path in ("/webhooks/futwork/t0ken", "//webhooks//futwork/t0ken?a=t0ken", "/webhooks/futwork?t=t0ken"):
        assert "t0ken" not in redact(f'"POST {path} HTTP/1.1" 200')
    assert redact("refused\nDETAIL:  Failing row contains (1, Asha).\nnext") == "refused\nDETAIL: …\nnext"


def test_values_are_masked_whatever_their_names() -> None:
    assert mask_values({"+919999789877": {"id": [9999789877, 31.5, True, None]}}) == {
        "+••••••••77": {"id": ["••••••••77", 31.5, True, None]}
    }
