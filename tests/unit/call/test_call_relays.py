"""Events as relays rewrite them: objects as text, raw control characters, long ids, transcripts in other shapes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline.domain.call import Call, describe, names_in, read_event

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)


def told(body: bytes | dict[str, Any]) -> Call:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return describe(read_event(raw, received_at=NOW).payload)


def with_transcript(transcript: object) -> dict[str, Any]:
    return {"callSid": "c1", "status": "completed", "telephonyData": {"duration": "12"}, "transcript": transcript}


MESSAGES = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "haan boliye"}]


@pytest.mark.parametrize(
    "transcript",
    [
        "[00:01] assistant: Hello\n[00:04] user: haan boliye",
        "(00:00:01.250) assistant: Hello\n(00:00:04.000) user: haan boliye",
        "00:01 - assistant: Hello\n00:04 - user: haan boliye",
        "- assistant: Hello\n- user: haan boliye",
        "• assistant: Hello\n• user: haan boliye",
        r"assistant: Hello\nuser: haan boliye",
        r"assistant: Hello\r\nuser: haan boliye",
        "assistant: Hello<br>user: haan boliye",
        "<p>assistant: Hello</p><p>user: haan&nbsp;boliye</p>",
        "assistant: <b>Hello</b><br/>user: haan boliye",
        "**Agent:** Hello\n**User:** haan boliye",
        "__Agent__: Hello\n__User__: haan boliye",
        json.dumps(MESSAGES),
        json.dumps({"messages": MESSAGES}),
        MESSAGES,
        {"messages": MESSAGES},
        [{"speaker": "agent", "text": "Hello"}, {"sender": "customer", "message": "haan boliye"}],
        [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES],
    ],
)
def test_a_transcript_of_any_shape_has_both_speakers(transcript: object) -> None:
    call = told(with_transcript(transcript))
    assert [(one.speaker, " ".join(one.text.split())) for one in call.turns] == [
        ("agent", "Hello"),
        ("lead", "haan boliye"),
    ]
    assert call.outcome == "connected"


@pytest.mark.parametrize("text", ["at 10:30 suits me", "10:30 suits you?", "a\tb", "a < b and c > d"])
def test_what_only_looks_like_a_time_or_a_tag_stays_in_its_utterance(text: str) -> None:
    call = told(with_transcript(f"assistant: Hi\n{text}\nuser: yes"))
    assert call.turns[0].text == f"Hi\n{text}"


TELEPHONY = {"duration": "12", "toNumber": "+919812300009"}
CONTEXT = {"recipientPhoneNumber": "9812300009", "recipientData": {"customer_name": "Asha"}}


@pytest.mark.parametrize(
    "wrap",
    [json.dumps, lambda value: f"```json\n{json.dumps(value)}\n```", lambda value: f"```\n{json.dumps(value)}```"],
)
def test_an_object_that_came_as_text_is_read_like_the_object(wrap: Any) -> None:
    plain = {
        "callSid": "c1", "status": "completed", "telephonyData": TELEPHONY, "contextDetails": CONTEXT,
        "extractedData": {"disposition": "callback", "call_summary": "Call later"},
    }  # fmt: skip
    names = ("telephonyData", "contextDetails", "extractedData")
    assert told(plain | {name: wrap(plain[name]) for name in names}) == told(plain)
    inner = CONTEXT | {"recipientData": wrap(CONTEXT["recipientData"])}
    assert told(plain | {"contextDetails": wrap(inner)}) == told(plain)
    assert told(plain).recipient_phone == "+919812300009"


@pytest.mark.parametrize("text", ["", "-", "no object", "[1]", "{", "```json\n```", '{"a": "\ud800"}'])
def test_a_text_that_holds_no_object_does_no_harm(text: str) -> None:
    call = told({"callSid": "c1", "telephonyData": text, "contextDetails": text, "extractedData": text})
    assert (call.call_sid, call.recipient_phone) == ("c1", None)


@pytest.mark.parametrize(
    "disposition", ["Interested", {"name": "Interested", "id": 4}, {"label": "Interested"}, {"value": "Interested"}]
)
def test_a_disposition_may_be_an_object_with_a_name(disposition: object) -> None:
    assert told({"callSid": "c1", "disposition": disposition}).disposition == "interested"
    assert told({"callSid": "c1", "extractedData": {"disposition": disposition}}).disposition == "interested"


def test_raw_control_characters_in_a_text_are_read() -> None:
    body = b'{"callSid": "c1", "status": "completed", "transcript": "assistant: Hello\nuser:\thaan\r\n"}'
    assert [one.speaker for one in told(body).turns] == ["agent", "lead"]


@pytest.mark.parametrize("digits", ["1234567890123456789", "9223372036854775807", "18446744073709551616", "1" * 40])
def test_an_id_of_any_size_keeps_its_digits(digits: str) -> None:
    """A reader that rounds it would take two calls for one."""
    event = read_event(f'{{"callSid": {digits}, "leadId":{digits}}}'.encode(), received_at=NOW)
    assert (event.call_sid, event.futwork_lead_id) == (digits, digits)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"campaignId": "c", "contextDetails": {"recipientPhoneNumber": "9812300009"}}', [("c", "+919812300009")]),
        (b'{"campaignId": "c"}', [("c", None)]),
        (b"[]", [(None, None)]),
        (b"no JSON", [(None, None)]),
        (b'[{"campaignId": "a"}, {"campaignId": "b"}, 3]', [("a", None), ("b", None)]),
    ],
)
def test_what_a_body_may_be_about_is_read_as_far_as_it_can_be(body: bytes, names: list[Any]) -> None:
    assert names_in(body) == names
