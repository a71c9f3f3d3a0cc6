"""Events as Futwork posts them, for the tests of a call."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline.domain.call import (
    Call,
    Event,
    UnreadableEvent,
    Utterance,
    describe,
    merge,
    read_event,
)

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)


TRANSCRIPT = (
    "assistant: Hello bani bani is testing the call \nThank you very much\nuser: hello\n"
    "assistant: Hello! How can I assist you today?\nuser: thank you thank you\n"
    "assistant: You're very welcome! If you need any further assistance, feel free to ask. Have a great day!\n"
)


# The sample of Futwork's Lead Integration Guide.
SAMPLE: dict[str, Any] = {
    "callSid": "3f19eab8-c425-495f-a343-268c44d5631a",
    "leadId": "68ecc93cd9fbecbe9431a2a1",
    "campaignId": "68ecc86fd9fbecbe9431a18e",
    "agentId": "68ecc7a3d9fbecbe9431a0a7",
    "status": "call-disconnected",
    "telephonyData": {
        "direction": "outbound",
        "duration": "0.0",
        "toNumber": "+918076405599",
        "fromNumber": "+918035735856",
        "recordingUrl": "",
        "hostedTelephony": True,
        "providerCallId": "7f209cdb-be57-4314-b6ba-3c00eb4bb650",
        "provider": "exotel",
        "hangupBy": None,
        "hangupReason": None,
        "hangupProviderCode": None,
    },
    "contextDetails": {
        "recipientPhoneNumber": "+918076405599",
        "recipientData": {"customer_name": "abcd xyz", "place": "ABC"},
        "leadId": "68ecc93cd9fbecbe9431a2a1",
        "agentId": "68ecc7a3d9fbecbe9431a0a7",
        "campaignId": "68ecc86fd9fbecbe9431a18e",
    },
    "transcript": TRANSCRIPT,
    "disposition": "",
    "extractedData": None,
}


def read(payload: Any, *, minute: int = 0, region: str = "IN") -> Event:
    body = json.dumps(payload, ensure_ascii=False).encode()
    return read_event(body, received_at=NOW + timedelta(minutes=minute), default_region=region)


def make_event(*, minute: int = 0, **fields: Any) -> Event:
    return read({"callSid": "call-1", **fields}, minute=minute)


def make_call(**fields: Any) -> Call:
    return describe(merge([make_event(**fields)]))


def refusal(body: bytes) -> UnreadableEvent:
    with pytest.raises(UnreadableEvent) as caught:
        read_event(body, received_at=NOW)
    return caught.value


SPOKE = [Utterance("agent", "hello"), Utterance("lead", "yes")]


SILENT = [Utterance("agent", "hello"), Utterance("agent", "are you there?")]
