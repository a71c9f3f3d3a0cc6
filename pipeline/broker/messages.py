"""What travels through the broker: batches of leads and batches of events, as `docs/wire-contract.md` has them."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

MESSAGE_VERSION = 1
"""The version of the messages that this release writes; a worker leaves a newer one to newer workers."""
EVENTS_A_MESSAGE = 200
MESSAGE_BYTES = 4 * 1024 * 1024  # RabbitMQ 4 takes 16 MiB by default, and base64 adds a third
_ESCAPE = "body64"
_SWELLING = bytes(set(range(32)) - set(b"\b\t\n\f\r"))  # control characters that JSON has no short escape for


# Leads


def lead_batch(
    campaign_id: str, leads: Sequence[object], *, batch_id: uuid.UUID, traces: list[list[object]] | None = None
) -> dict[str, object]:
    """The message of the task `pipeline.intake`; `docs/wire-contract.md` describes it for foreign producers."""
    batch = {"v": MESSAGE_VERSION, "batch": str(batch_id), "campaign_id": campaign_id, "leads": list(leads)}
    return batch | ({"traces": traces} if traces else {})


# Events


@dataclass(frozen=True, slots=True)
class WebEvent:
    """The body of one webhook request as it came; `fault` says why the web process refused it."""

    body: bytes
    received_at: datetime
    fault: str | None = None


Kind = Literal["batch", "message"]


def refused(kind: Kind, body: bytes, *, reason: str, now: datetime) -> WebEvent:
    """What is no event, for its way into quarantine through the spool, whose files hold nothing but events."""
    return WebEvent(body, now, fault=f"{kind}: {reason}")


def kind_of(fault: str) -> tuple[str, str]:
    """The kind under which a body with this fault is quarantined, and the reason."""
    kind, found, reason = fault.partition(": ")
    return (kind, reason) if found and kind in get_args(Kind) else ("event", fault)


def encode_events(events: Sequence[WebEvent]) -> dict[str, object]:
    """The message of the task `pipeline.events`; a body that is not UTF-8, or no plain text, travels as base64."""
    return {"v": MESSAGE_VERSION, "events": [_encode_event(event) for event in events]}


def decode_events(message: dict[str, Any]) -> list[WebEvent]:
    """The events of a message; raises `ValueError`, `KeyError` or `TypeError` if it is malformed."""
    return [_decode_event(one) for one in message["events"]]


def _encode_event(event: WebEvent) -> dict[str, object]:
    encoded: dict[str, object] = {"received_at": event.received_at.isoformat()}
    try:
        if event.body.translate(None, _SWELLING) != event.body:
            raise UnicodeError  # six bytes each as JSON text: the message would outgrow what a broker takes
        encoded["body"] = event.body.decode()
    except UnicodeError:
        encoded[_ESCAPE] = base64.b64encode(event.body).decode()
    if event.fault:
        encoded["fault"] = event.fault.encode("utf-8", "replace").decode()
    return encoded


def _decode_event(one: dict[str, Any]) -> WebEvent:
    body = (
        base64.b64decode(one[_ESCAPE], validate=True)
        if _ESCAPE in one
        else one["body"].encode("utf-8", "surrogatepass")
    )
    try:
        received_at = datetime.fromisoformat(one["received_at"])
    except (TypeError, ValueError):
        raise ValueError("received_at is no time") from None  # the library's own message would quote it
    if received_at.tzinfo is None:
        raise ValueError("received_at must name its time zone")
    fault = one.get("fault")
    if fault is not None and not isinstance(fault, str):
        raise TypeError("fault must be text")
    return WebEvent(body, received_at.astimezone(UTC), fault)
