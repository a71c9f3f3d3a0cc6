"""An accepted lead becomes a call, and the call becomes webhook events.

Everything about a call is drawn from the lead's own seed, so the same POST of the same run brings the same call.
Only dates follow the day on which the lead was accepted.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import blake2b
from random import Random
from typing import Any, Literal, NamedTuple
from uuid import UUID

import orjson

from pipeline.sandbox.options import Options
from pipeline.sandbox.transcripts import Conversation, converse, disposition

Result = Literal["connected", "no answer", "busy", "failed"]

_RINGING = ("initiated", "ringing")
_ANSWERED = ("initiated", "ringing", "in-progress")
_LIFE_CYCLES: dict[Result, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "connected": (
        _ANSWERED,
        (
            ("call-disconnected", "completed"),
            ("call-disconnected", "completed"),
            ("call-disconnected",),
            ("completed",),
        ),
    ),
    "no answer": (_RINGING, (("no-answer",), ("no-answer",), ("no_answer",), ("completed",))),
    "busy": (_RINGING, (("busy",), ("busy",), ("completed",))),
    "failed": (("initiated",), (("failed",), ("call-failed",))),
}
"""For each result: how the call begins, and how it may end. `completed` alone does not mean that somebody spoke."""

_HANGUP_REASONS = {"no answer": "no-answer", "busy": "user-busy", "failed": "network-error"}


class Lead(NamedTuple):
    """A lead that was accepted."""

    lead_id: str
    campaign_id: str
    phone: str
    data: dict[str, Any]
    seed: bytes


class Call:
    """One call: its result, its statuses in order, and the seed of everything else about it."""

    __slots__ = ("agent_id", "drift", "lead", "number_from", "result", "sid", "started", "statuses")

    def __init__(self, lead: Lead, result: Result, statuses: tuple[str, ...], options: Options, now: datetime) -> None:
        draw = Random(lead.seed)
        self.lead = lead
        self.result = result
        self.statuses = statuses
        self.started = now
        self.drift = options.drift
        self.sid = str(UUID(int=draw.getrandbits(128), version=4))
        self.agent_id = blake2b(f"{options.seed}\n{lead.campaign_id}".encode(), digest_size=12).hexdigest()
        self.number_from = f"+9180{draw.randrange(35_000_000, 36_000_000)}"


class Event:
    """A webhook event on its way: one status of a call, or a copy of one, and what became of it."""

    __slots__ = ("attempts", "call", "created", "kind", "outcome", "number", "response", "stage")  # noqa: RUF023 (the story's order)

    def __init__(self, call: Call, stage: int, kind: Literal["event", "duplicate", "malformed"]) -> None:
        self.call = call
        self.stage = stage
        self.kind = kind
        self.number = 0
        self.created = 0.0
        self.attempts = 0
        self.response: int | None = None
        self.outcome: Literal["pending", "delivered", "refused", "failed", "lost"] = "pending"

    def body(self) -> bytes:
        """What is posted for this event; the same bytes each time."""
        body = orjson.dumps(payload(self.call, self.stage))
        return _broken(body, Random(self.call.lead.seed + b"b%d" % self.stage)) if self.kind == "malformed" else body

    def as_json(self) -> dict[str, Any]:
        """This event as a line of `GET /_webhooks`."""
        return {
            "event": self.number,
            "time": self.created,
            "call_sid": self.call.sid,
            "lead_id": self.call.lead.lead_id,
            "campaign_id": self.call.lead.campaign_id,
            "phone": self.call.lead.phone,
            "status": self.call.statuses[self.stage],
            "last": self.stage == len(self.call.statuses) - 1,
            "result": self.call.result,
            "kind": self.kind,
            "outcome": self.outcome,
            "delivered": None if self.outcome == "pending" else self.outcome == "delivered",
            "attempts": self.attempts,
            "response": self.response,
        }


def plan(lead: Lead, options: Options, now: datetime) -> list[tuple[float, Event]]:
    """The events of the call that *lead* gets, each with the seconds from *now* at which it is due."""
    draw = Random(lead.seed + b"p")
    result = _result(draw.random(), options)
    call = Call(lead, result, _statuses(draw, result, options.lifecycle), options, now)
    length = options.call_seconds * (0.5 + draw.random())
    times = [length * (stage + 1) / len(call.statuses) for stage in range(len(call.statuses))]
    if len(times) > 1 and draw.random() < options.faults.get("reorder", 0.0):
        times = _other_order(times, draw)

    events: list[tuple[float, Event]] = []
    for stage, due in enumerate(times):
        late, duplicate, broken, lost = (draw.random() for _ in range(4))
        after = due + (options.late_seconds if late < options.faults.get("late", 0.0) else 0.0)
        event = Event(call, stage, "event")
        if lost < options.faults.get("lost", 0.0):
            event.outcome = "lost"
        events.append((after, event))
        gap = length * 0.1 * draw.random()
        if duplicate < options.faults.get("dup", 0.0):
            events.append((after + gap, Event(call, stage, "duplicate")))
        if broken < options.faults.get("malformed_webhook", 0.0):
            events.append((max(0.0, after + draw.choice((-gap, gap))), Event(call, stage, "malformed")))
    events.sort(key=lambda timed: timed[0])
    return events


def payload(call: Call, stage: int) -> dict[str, Any]:
    """The payload of a call's *stage*-th event, in the shape of the integration guide, drifted if the call drifts."""
    lead, status = call.lead, call.statuses[stage]
    draw = Random(lead.seed + b"c")
    talk_seconds = draw.randrange(12, 240) + draw.randrange(10) / 10
    talk = converse(draw, _name(lead.data))
    provider_id = str(UUID(int=draw.getrandbits(128), version=4))
    over = status not in _ANSWERED
    spoke = over and call.result == "connected"
    settled = over and stage == len(call.statuses) - 1
    content: dict[str, Any] = {
        "callSid": call.sid,
        "leadId": lead.lead_id,
        "campaignId": lead.campaign_id,
        "agentId": call.agent_id,
        "status": status,
        "telephonyData": {
            "direction": "outbound",
            "duration": str(talk_seconds) if spoke else "0.0",
            "toNumber": f"+91{lead.phone}",
            "fromNumber": call.number_from,
            "recordingUrl": f"https://recordings.futwork.com/{call.sid}.mp3" if spoke and settled else "",
            "hostedTelephony": True,
            "providerCallId": provider_id,
            "provider": "exotel",
            "hangupBy": draw.choice(("user", "agent", None)) if spoke else None,
            "hangupReason": _HANGUP_REASONS.get(call.result) if over else None,
            "hangupProviderCode": None,
        },
        "contextDetails": {
            "recipientPhoneNumber": f"+91{lead.phone}",
            "recipientData": lead.data,
            "leadId": lead.lead_id,
            "agentId": call.agent_id,
            "campaignId": lead.campaign_id,
        },
        "transcript": talk.transcript if spoke else "",
        "disposition": "",
        "extractedData": None,
    }
    if settled:
        _settle(content, call, talk, draw)
    if call.drift:
        _drift(content, Random(lead.seed + b"d%d" % stage), talk_seconds if spoke else 0)
    return content


def _result(draw: float, options: Options) -> Result:
    shares: tuple[tuple[Result, float], ...] = (
        ("no answer", options.no_answer),
        ("busy", options.busy),
        ("failed", options.failed),
    )
    for result, share in shares:
        draw -= share
        if draw < 0:
            return result
    return "connected"


def _statuses(draw: Random, result: Result, lifecycle: Literal["mixed", "full", "final"]) -> tuple[str, ...]:
    start, ends = _LIFE_CYCLES[result]
    end = draw.choice(ends)
    how = draw.random()
    if lifecycle == "final" or (lifecycle == "mixed" and how < 0.2):
        return end[-1:]
    if lifecycle == "mixed" and how < 0.35:
        return tuple(status for status in start if draw.random() < 0.5) + end
    return start + end


def _other_order(times: list[float], draw: Random) -> list[float]:
    other = list(times)
    while other == times and len(set(times)) > 1:
        draw.shuffle(other)
    return other


def _name(data: dict[str, Any]) -> str:
    return next((data[key] for key in ("customer_name", "name") if isinstance(data.get(key), str)), "") or "there"


def _settle(content: dict[str, Any], call: Call, talk: Conversation, draw: Random) -> None:
    """What only the last event of a call knows: its disposition and what was extracted from the talk."""
    if call.result != "connected":
        content["disposition"] = disposition(draw, call.result)
        return
    callback = None
    if talk.callback:
        day = (call.started + timedelta(days=1)).date().isoformat()
        callback = draw.choice(
            (f"{day}T15:00:00+05:30", f"{day} 15:00", f"{day}T09:30:00.000Z", "tomorrow after lunch")
        )
    content["disposition"] = talk.disposition
    content["extractedData"] = {
        "call_summary": talk.summary,
        "disposition": talk.disposition,
        "callback_date_time": callback,
    }


def _drift(content: dict[str, Any], draw: Random, seconds: float) -> None:
    """Vary types, missing keys and unknown keys in place; a lead id and a phone number always remain somewhere."""
    telephony, context = content["telephonyData"], content["contextDetails"]
    digits = content["contextDetails"]["recipientPhoneNumber"].removeprefix("+91")
    telephony["duration"] = draw.choice(
        (str(float(seconds)), str(float(seconds)), seconds, int(seconds), str(int(seconds)))
    )
    context["recipientPhoneNumber"] = draw.choice((f"+91{digits}", f"+91{digits}", digits, digits, f"0{digits}"))
    variations: tuple[tuple[float, Callable[[], Any]], ...] = (
        (0.10, lambda: telephony.update(recordingUrl=telephony["recordingUrl"] or None)),
        (0.05, lambda: telephony.pop("hangupProviderCode")),
        (0.05, lambda: telephony.pop("hostedTelephony")),
        (0.05, lambda: content.update(disposition=content["disposition"] or None)),
        (0.05, lambda: content.update(transcript=content["transcript"] or None)),
        (0.05, lambda: content["extractedData"] or content.pop("extractedData")),
        (0.05, lambda: content["transcript"] or content.pop("transcript")),
        (0.05, lambda: content.pop("agentId")),
        (0.10, lambda: content.update(attemptNumber=1, workspaceId=content["campaignId"])),
        (0.10, lambda: telephony.update(cost={"amount": 1.2, "currency": "INR"})),
    )
    for share, vary in variations:
        if draw.random() < share:
            vary()
    if draw.random() < 0.05:
        draw.choice((content, context)).pop("leadId")


def _broken(body: bytes, draw: Random) -> bytes:
    variants = (body[: len(body) // 2], body[:-1], b"callSid=" + body[12:48] + b"&status=completed", b"null\x00", b"")
    return draw.choice(variants)
