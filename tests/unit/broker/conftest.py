"""Events, messages and brokers, for the tests of what carries them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.broker import WebEvent, decode_events
from pipeline.broker.spool import Spool

RECEIVED = datetime(2026, 5, 8, 12, 0, 0, 123456, tzinfo=UTC)


def make_event(number: int = 0, **overrides: Any) -> WebEvent:
    values: dict[str, Any] = {"body": b'{"callSid":"CA%d"}' % number, "received_at": RECEIVED}
    return WebEvent(**(values | overrides))


def bodies(message: Any) -> list[bytes]:
    return [event.body for event in decode_events(message)]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


# The spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "var" / "spool", max_bytes=1_000_000)


def files_of(spool: Spool) -> list[Path]:
    return sorted(spool._directory.iterdir()) if spool._directory.exists() else []
