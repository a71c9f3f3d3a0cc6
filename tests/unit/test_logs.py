"""What libraries and exceptions say reaches the log without numbers and secrets; what we say is left as it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.observability.logs import configure_logs, logger
from pipeline.settings import Settings

ID = "c0e85864-37bc-5fdf-b8e6-9048c71b6b34"


@pytest.fixture
def logged(make_settings: Callable[..., Settings], capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Sets the logs up as a process does, runs something, and tells the line that came of it."""
    root = logging.getLogger()
    before = root.handlers, root.level

    def run(act: Callable[[], object]) -> Any:
        configure_logs(
            make_settings(
                futwork_api_key="key-of-the-account",
                webhook_token="hook-token,second-hook",
                intake_tokens="intake-token:campaign",
                database_url="postgresql://me:p4ssword@db/ledger",
                log_format="json",
            )
        )
        act()
        (line,) = capfd.readouterr().err.splitlines()
        return json.loads(line)

    yield run
    root.handlers = before[0]
    root.setLevel(before[1])


@pytest.mark.parametrize(
    ("said", "masked"),
    [
        ("called +919999789877 and 09999 789877", "called +••••••••77 and ••••••••77"),
        ("{'phone': '9999789877'}", "{'phone': '••••••••77'}"),
        ("phone=91-99997-89877,", "phone=••••••••77,"),
        ("POST with key-of-the-account to /webhooks/futwork/second-hook", "POST with *** to /webhooks/futwork/***"),
        ("Bearer intake-token at postgresql://me:p4ssword@db", "Bearer *** at postgresql://me:***@db"),
        (f"lead {ID} at 2026-05-08 12:00:00.123456 in 0.1234567890123 s", None),
        ("campaign 68ecc86fd9fbecbe9431a18e, 123456 bytes, 10.20.30.40:5432", None),
        ("refused\nDETAIL:  Failing row contains (1, Asha says yes).\nnext", "refused\nDETAIL: …\nnext"),
    ],
)
def test_what_a_library_says_is_masked(logged: Callable[..., Any], said: str, masked: str | None) -> None:
    line = logged(lambda: logging.getLogger("some.library").warning("%s", said))
    assert line["event"] == (said if masked is None else masked)


def test_what_an_exception_says_is_masked_and_where_it_was_is_not(logged: Callable[..., Any]) -> None:
    def fail() -> None:
        try:
            raise ValueError("no such number: 99997 89877, asked with hook-token")
        except ValueError:
            logger("ours").exception("it failed", lead=ID, digits="9999789877")

    line = logged(fail)
    assert "ValueError: no such number: ••••••••77, asked with ***" in line["exception"]
    assert "test_logs.py" in line["exception"]
    assert (line["lead"], line["digits"]) == (ID, "9999789877")
