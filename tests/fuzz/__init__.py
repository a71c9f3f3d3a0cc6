"""Readers of what strangers send, each as a function of bytes that may refuse and never breaks."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from pipeline.cli.rows import open_rows
from pipeline.cli.session import Refused
from pipeline.domain.call import UnreadableEvent, describe, merge, read_event
from pipeline.domain.call.transcript import read_transcript
from pipeline.domain.lead import InvalidLead
from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.futwork import parse_retry_after
from pipeline.futwork.fields import read_lead
from pipeline.web.webhook import _fault_of
from tests.corpus.vendor_answers import ANSWERS
from tests.fuzz.vendor import raw_answer, vendor_answer

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)


def webhook(data: bytes) -> None:
    """What the web process looks at before it hands a body over."""
    _fault_of(data)


def event(data: bytes) -> None:
    """A post-call event, read, merged and enriched."""
    try:
        read = read_event(data, received_at=NOW, default_region="IN")
        describe(merge([read]), default_region="IN")
    except UnreadableEvent:
        pass


def transcript(data: bytes) -> None:
    """A transcript in whatever form."""
    read_transcript(data.decode("utf-8", "surrogateescape"))


def file_of_leads(data: bytes) -> None:
    """A file for `pipeline enqueue`, CSV or JSON lines."""
    try:
        options = {"form": None, "encoding": None, "phone_column": None, "key_column": None}
        for row in open_rows(io.BytesIO(data), "a file", **options).rows:
            if not row.fault:
                read_lead(row.lead, region="IN")
    except (Refused, InvalidLead):
        pass


def phone(data: bytes) -> None:
    """A phone number in any spelling."""
    with contextlib.suppress(InvalidPhone):
        assert to_e164(data.decode("utf-8", "surrogateescape"), "IN").startswith("+")


def retry_after(data: bytes) -> None:
    """A `Retry-After` header."""
    found = parse_retry_after(data.decode("latin-1"), now=NOW)
    assert found is None or found >= timedelta()


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (webhook, event, transcript, file_of_leads, phone, retry_after, vendor_answer)
}

GRAMMARS: dict[str, Callable[[random.Random], bytes]] = {"vendor_answer": raw_answer}
"""Targets whose inputs are made by a grammar, and mutated only now and then."""

SEEDS: dict[str, list[bytes]] = {
    "webhook": [b'{"callSid": "a"}', b"[" * 50, b"NaN"],
    "event": [
        (
            b'{"callSid": "a", "status": "completed", "transcript": "agent: hi\\nuser: yes", "telephonyData": '
            b'{"duration": "1.5", "toNumber": "+919999789877"}, '
            b'"contextDetails": {"recipientPhoneNumber": "9999789877"},'
            b' "extractedData": {"callback_date_time": "tomorrow at 5 pm"}, "disposition": "Busy"}'
        )
    ],
    "transcript": [
        b"assistant: hello\nuser: yes\nmore",
        "एजेंट: नमस्ते\nuser: हाँ".encode(),
        b'[{"role": "user", "content": "a"}]',
    ],
    "file_of_leads": [b"phone,name\n9999789877,a\n", b'{"phone": "9999789877", "data": {}}\n', b'phone;"a\n;b"\n1;"2'],
    "vendor_answer": [answer.raw for answer in ANSWERS],
    "retry_after": [b"120", b"Fri, 08 May 2026 12:00:10 GMT", b"-1", b"1e9"],
    "phone": [b"+91 99997 89877", b"0091-9999789877", b"9.99979E+09", "९९९९७८९८७७".encode()],
}
