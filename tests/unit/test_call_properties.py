"""What must hold for every set of post-call events, whatever they contain."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.domain.call import (
    CALL_STATUSES,
    Call,
    Event,
    UnreadableEvent,
    describe,
    merge,
    normalise_status,
    read_event,
    read_transcript,
    standing,
)

START = datetime(2026, 5, 8, tzinfo=UTC)

BLANK: list[Any] = [None, "", " ", "-", "nan", [], {}]

quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

blanks: st.SearchStrategy[Any] = st.sampled_from(BLANK)
scalars = st.one_of(
    blanks,
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None), max_size=12),
    st.sampled_from(["9999789877", "+918076405599", "completed", "Busy", "Interested", "2026-05-08T20:25:00Z", "0.0"]),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
statuses = st.sampled_from([*CALL_STATUSES, "No_Answer", "call-failed", "wrapping-up", "", None])
lines = st.builds(
    "{}{}".format,
    st.sampled_from(["", "user: ", "assistant: ", "Priya: ", "Note: ", "ग्राहक: ", "10:30 "]),
    st.text(st.characters(categories=["L", "M", "N", "P", "Z"]), max_size=15),
)
transcripts = st.lists(lines, max_size=6).map("\n".join)

fields = st.fixed_dictionaries(
    {"status": statuses},
    optional={
        "disposition": json_values,
        "transcript": transcripts | json_values,
        "extractedData": json_values,
        "telephonyData": json_values | st.dictionaries(st.sampled_from(["duration", "direction"]), json_values),
        "contextDetails": json_values | st.dictionaries(st.sampled_from(["leadId", "recipientData"]), json_values),
        "leadId": json_values,
        "other": json_values,
    },
)


def read(payload: Any, minute: int) -> Event:
    return read_event(json.dumps(payload).encode(), received_at=START + timedelta(minutes=minute))


events = st.builds(lambda content, minute: read({"callSid": "c", **content}, minute), fields, st.integers(0, 5))
calls = st.lists(events, min_size=1, max_size=5)


def says(value: Any) -> bool:
    """Return whether a value says something, by a definition of this test's own."""
    if isinstance(value, (dict, list)):
        return any(says(item) for item in (value.values() if isinstance(value, dict) else value))
    return str(value).strip().casefold() not in {"none", "", "-", "nan"}


def said(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Return what stands at each place of an object, without what says nothing."""
    if isinstance(value, dict) and value:
        return {at: text for key, item in value.items() for at, text in said(item, (*place, key)).items()}
    return {place: repr(value)} if says(value) else {}


@quick
@given(calls, st.data())
def test_order_and_repeats_of_its_events_do_not_change_a_call(call: list[Event], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(call), max_size=3))
    shuffled = data.draw(st.permutations(call + again))
    expected, actual = merge(call), merge(shuffled)
    assert orjson.dumps(expected) == orjson.dumps(actual)
    assert describe(expected) == describe(actual)


@quick
@given(calls, st.dictionaries(st.sampled_from(["disposition", "leadId", "other", "telephonyData"]), blanks), statuses)
def test_a_blank_never_erases_a_value(call: list[Event], silence: dict[str, Any], status: str | None) -> None:
    before = {key: value for key, value in merge(call).items() if key != "status"}
    after = merge([*call, read({"callSid": "c", "status": status, **silence}, 9)])
    assert said(before).items() <= said(after).items()


@quick
@given(calls, statuses)
def test_a_status_that_is_not_final_never_follows_a_final_one(call: list[Event], late: str | None) -> None:
    merged = merge([*call, read({"callSid": "c", "status": late}, 9)])
    final_reached = any(event.is_final for event in call) or standing(normalise_status(late)).is_final
    assert describe(merged).is_final == final_reached
    best = max(standing(event.status).rank for event in call)
    assert standing(normalise_status(merged.get("status"))).rank >= best


def read_or_refuse(body: bytes) -> Event | None:
    try:
        event = read_event(body, received_at=START)
    except UnreadableEvent as refusal:
        assert "\n" not in refusal.reason
        return None
    assert orjson.loads(orjson.dumps(event.payload)) == event.payload
    assert b"\\u0000" not in orjson.dumps(event.payload)
    call = describe(merge([event]))
    assert isinstance(call, Call)
    return event


@quick
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(body: bytes) -> None:
    read_or_refuse(body)


@quick
@given(json_values, st.booleans())
def test_arbitrary_json_is_read_or_refused(value: Any, as_field: bool) -> None:
    body = json.dumps({"callSid": "c", "contextDetails": value, "a": value} if as_field else value).encode()
    assert read_or_refuse(body) is not None or not as_field


@quick
@given(fields)
def test_reading_what_was_read_changes_nothing(content: dict[str, Any]) -> None:
    event = read({"callSid": "c", **content}, 0)
    assert read_event(orjson.dumps(event.payload), received_at=START) == event


LABEL = re.compile(r"(?:[-•·>]\s+)?(?:[\[(]?[0-9]{1,2}:[0-9]{2}[^a-zA-Z]*)?[^:：]{1,40}[:：][\s*_]*")


@quick
@given(transcripts | st.text(max_size=60))
def test_a_transcript_loses_nothing_but_labels_and_white_space(text: str) -> None:
    assume("\\n" not in text and "<" not in text)  # stand for line ends
    said = [line for turn in read_transcript(text) for line in turn.text.split("\n")]
    for line in filter(None, map(str.strip, text.splitlines())):
        if said and (line == said[0] or (line.endswith(said[0]) and LABEL.fullmatch(line.removesuffix(said[0])))):
            said.pop(0)
        else:
            assert LABEL.fullmatch(line), "only a label without words may vanish"
    assert said == []
