"""A post-call event as it came from Futwork, read as far as the pipeline needs to route it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal

import orjson

from pipeline.domain.call.status import normalise_status, standing
from pipeline.domain.call.values import first_text, object_of, phone_of, slug, text_of

UnreadableKind = Literal[
    "not_json", "not_an_object", "too_deep", "older_product", "no_call_sid", "call_sid_too_long", "unreadable"
]


class UnreadableEvent(Exception):
    """The body is not a post-call event that we can read; keep it, say why, replay it after a fix.

    Its message is one line for a person and repeats nothing of the body; `kind` is for metrics and filters.
    """

    def __init__(self, reason: str, kind: UnreadableKind = "unreadable") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind: UnreadableKind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One post-call event: what it belongs to, where the call stood, and all that it said."""

    digest: str
    """SHA-256 (hex) of the content, so that the same event posted twice is one, whatever its spacing and key order."""
    call_sid: str
    status: str
    """Normalised: see `normalise_status`."""
    is_final: bool
    futwork_lead_id: str | None
    campaign_id: str | None
    phone: str | None
    """The lead's number in E.164."""
    received_at: datetime
    payload: dict[str, Any]
    """The whole body, unknown keys too, safe to store as JSON."""


def read_event(body: bytes, *, received_at: datetime, default_region: str = "IN") -> Event:
    """Read a request body as a post-call event, or raise `UnreadableEvent` with the reason.

    Whatever the body holds, nothing else is raised. *received_at* must be aware; *default_region* says what a phone
    number without a country code means. Ids may stand at the top level, which counts first, or in `contextDetails`.

    What cannot be stored is left out of the payload: NUL characters (PostgreSQL refuses them), halves of surrogate
    pairs (they become U+FFFD), NaN and infinities (they become null).
    """
    if received_at.tzinfo is None:
        raise ValueError("received_at must be an aware datetime, or events of a call cannot be put in order")
    payload = _parse(body)
    if not isinstance(payload, dict):
        raise UnreadableEvent(f"the body is not a JSON object but {_JSON_NAMES[type(payload)]}", "not_an_object")
    payload = with_objects(payload)
    if marks := _marks_of_older_product(payload):
        raise UnreadableEvent(
            f"an event of Futwork's older tele-calling product (it has {', '.join(marks)}), not of the AI Platform",
            "older_product",
        )
    call_sid = text_of(payload.get("callSid"))
    if call_sid is None:
        raise UnreadableEvent("the event has no callSid, so it belongs to no call", "no_call_sid")
    if len(call_sid) > _LONGEST_ID:
        raise UnreadableEvent(
            f"the callSid has {len(call_sid)} characters, more than {_LONGEST_ID}", "call_sid_too_long"
        )
    status = normalise_status(payload.get("status"))
    return Event(
        digest=sha256(orjson.dumps(payload, option=orjson.OPT_SORT_KEYS)).hexdigest(),
        call_sid=call_sid,
        status=status,
        is_final=standing(status).is_final,
        futwork_lead_id=id_in(payload, "leadId"),
        campaign_id=id_in(payload, "campaignId"),
        phone=recipient_phone(payload, default_region),
        received_at=received_at,
        payload=payload,
    )


def names_in(body: bytes, *, default_region: str = "IN") -> list[tuple[str | None, str | None]]:
    """Each campaign and number (E.164) that a body may be about, also one that is no readable event.

    None stands for what cannot be read, so that a caller takes it for any. A body of several events, as a message has
    them, names several.
    """
    try:
        value = _parse(body)
    except UnreadableEvent:
        return [(None, None)]
    found = [
        (id_in(one, "campaignId"), recipient_phone(one, default_region))
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, dict)
    ]
    return found or [(None, None)]


def reference(event: Event, key: str) -> str | None:
    """Return our own reference, which Futwork hands back under *key* of `recipientData`, or None if it did not."""
    return text_of(recipient_data(event.payload).get(key))


def with_objects(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the payload with its objects as objects, also those that came as JSON in a text or in a fence."""
    unwrapped = {name: _unwrapped(payload[name]) for name in _OBJECTS if isinstance(payload.get(name), str)}
    context = unwrapped.get("contextDetails", payload.get("contextDetails"))
    if isinstance(context, dict) and isinstance(context.get("recipientData"), str):
        unwrapped["contextDetails"] = context | {"recipientData": _unwrapped(context["recipientData"])}
    return payload | unwrapped if unwrapped else payload


def storable(value: Any) -> Any:
    """Return a JSON value without what a database refuses; raises `UnreadableEvent` if it is nested too deeply."""
    return _storable(value, 1)


def id_in(payload: Mapping[str, Any], name: str) -> str | None:
    """Return an id from the top level or, if it is blank there, from `contextDetails`.

    `recipientData` is not searched: a `leadId` in there is the client's own as often as Futwork's.
    """
    found = first_text(payload.get(name), object_of(payload.get("contextDetails")).get(name))
    return found if found and len(found) <= _LONGEST_ID else None


def recipient_data(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the lead's data as it was submitted."""
    return object_of(object_of(payload.get("contextDetails")).get("recipientData"))


def recipient_phone(payload: Mapping[str, Any], region: str) -> str | None:
    """Return the lead's number in E.164: `recipientPhoneNumber`, else the end of the line that is not ours."""
    phone = phone_of(object_of(payload.get("contextDetails")).get("recipientPhoneNumber"), region)
    if phone is None:
        telephony = object_of(payload.get("telephonyData"))
        lead_end = "fromNumber" if direction_in(telephony) == "inbound" else "toNumber"
        phone = phone_of(telephony.get(lead_end), region)
    return phone


def direction_in(telephony: Mapping[str, Any]) -> str | None:
    """Return `outbound` or `inbound`, also for `Outgoing` or `outbound-api`, or the word as it is."""
    direction = slug(text_of(telephony.get("direction")) or "", "-")
    for known, beginnings in (("outbound", ("outbound", "outgoing")), ("inbound", ("inbound", "incoming"))):
        if direction.startswith(beginnings):
            return known
    return direction or None


_OBJECTS = ("telephonyData", "contextDetails", "extractedData")

_LONGEST_ID = 128  # characters; Futwork's ids have 24 or 36, and a longer one would not fit an index
_LONG_NUMBER = re.compile(rb"[\[:,]\s*-?[0-9]{19}")
_FENCED = re.compile(r"\s*```[a-zA-Z]*\s*(.*?)\s*```\s*", re.DOTALL)
_DEEPEST = 64  # levels; Futwork's events have 3, and a bound keeps every later walk over the payload safe

# Futwork's older tele-calling product, as its public client code shows it.
_OLDER_PRODUCT = ("callstatus", "attempts", "isTerminal", "outcome", "teleproject", "urid")
_THIS_PRODUCT = ("callSid", "telephonyData", "contextDetails")

_JSON_NAMES: dict[type, str] = {
    bool: "a boolean",
    float: "a number",
    int: "a number",
    list: "an array",
    str: "a string",
    type(None): "null",
}


def _parse(body: bytes) -> object:
    """Return the JSON value of a body, as a database takes it.

    orjson lets through no half of a surrogate pair, no NaN and no infinity, so of what it reads only an escaped NUL or
    deep nesting can be in the way; where the bytes show neither, the walk over the value is spared.

    What orjson refuses or rounds gets a second reading by the standard library, because a sender may write NaN, half a
    surrogate pair, a byte-order mark, a line end inside a text or an id of twenty digits, and the call is worth more
    than the strictness.
    """
    strict_reason = ""
    if not _LONG_NUMBER.search(body):  # orjson would round it, and an id would be another call's
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as exc:
            strict_reason = exc.msg
        else:
            is_plain = b"\\u0000" not in body and body.count(b"{") + body.count(b"[") <= _DEEPEST
            return value if is_plain else storable(value)
    try:
        return storable(json.loads(body, strict=False, parse_constant=lambda _: None, parse_int=_parse_int))
    except RecursionError as exc:
        raise UnreadableEvent("the JSON is nested too deeply to be read", "too_deep") from exc
    except ValueError as exc:
        trouble = strict_reason or str(exc) if body.strip() else "it is empty"
        raise UnreadableEvent(f"the body is not JSON: {trouble}", "not_json") from exc


def _parse_int(digits: str) -> int | str:
    """Return a number, or its digits where readers of JSON would round it."""
    return int(digits) if len(digits) < 19 else digits


def _unwrapped(text: str) -> Any:
    """Return the object that a text holds as JSON, perhaps in a fence, or the text if it holds none."""
    match = _FENCED.fullmatch(text)
    inner = (match[1] if match else text).strip()
    if not inner.startswith("{"):
        return text
    try:
        found = _parse(inner.encode("utf-8", "surrogatepass"))
    except UnreadableEvent:
        return text
    return found if isinstance(found, dict) else text


def _storable(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _storable_text(value)
    if isinstance(value, dict):
        _check_depth(depth)
        return {_storable_text(key): _storable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        _check_depth(depth)
        return [_storable(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _storable_text(text: str) -> str:
    if text.isascii():
        return text.replace("\0", "") if "\0" in text else text
    # A pair written as two escapes joins into its character here; half a pair becomes U+FFFD.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "")


def _check_depth(depth: int) -> None:
    if depth > _DEEPEST:
        raise UnreadableEvent(f"the JSON is nested more than {_DEEPEST} levels deep", "too_deep")


def _marks_of_older_product(payload: Mapping[str, Any]) -> list[str]:
    if any(name in payload for name in _THIS_PRODUCT):
        return []
    marks = [name for name in _OLDER_PRODUCT if name in payload]
    return marks if len(marks) > 1 else []
