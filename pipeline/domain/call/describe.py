"""A merged payload becomes a call in plain terms."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.domain.call.callback import read_callback
from pipeline.domain.call.disposition import normalise_disposition
from pipeline.domain.call.event import direction_in, id_in, recipient_data, recipient_phone, with_objects
from pipeline.domain.call.outcome import decide_outcome
from pipeline.domain.call.status import CallOutcome, normalise_status, standing
from pipeline.domain.call.transcript import AGENT, LEAD, Utterance, read_transcript, transcript_text
from pipeline.domain.call.values import first_text, is_blank, object_of, phone_of, slug, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What happened on one call, as far as its events say."""

    call_sid: str
    futwork_lead_id: str | None
    campaign_id: str | None
    agent_id: str | None
    status: str
    is_final: bool
    outcome: CallOutcome
    disposition_raw: str | None
    disposition: str | None
    duration_seconds: float | None
    direction: str | None
    from_number: str | None
    """E.164, like the two below; None also for what is no valid number, such as a masked one."""
    to_number: str | None
    recipient_phone: str | None
    recording_url: str | None
    """Only http and https, so that it can be shown as a link. How long a recording lives is unknown."""
    provider: str | None
    provider_call_id: str | None
    hangup_by: str | None
    hangup_reason: str | None
    transcript: str | None
    turns: tuple[Utterance, ...]
    word_count: int
    """Words in all utterances, separated by white space, without labels."""
    lead_word_count: int
    lead_talk_share: float | None
    """The lead's part of the words, 0 to 1; None if the transcript doesn't say who spoke."""
    summary: str | None
    callback_at: datetime | None
    """When the lead asked to be called, in UTC."""
    callback_raw: str | None
    """The same in the words of the extraction, also when they are no time (`tomorrow evening`)."""
    extracted: dict[str, Any] | None
    recipient_data: dict[str, Any]


def describe(merged: dict[str, Any], *, default_region: str = "IN") -> Call:
    """Return the call that a payload from `merge` describes.

    Values that can't be read are None here and stay in the payload; nothing is raised for them. *default_region* says
    what a phone number without a country code means, and on whose clock a callback time without a zone is.
    """
    merged = with_objects(merged)
    telephony = object_of(merged.get("telephonyData"))
    status = normalise_status(merged.get("status"))
    extracted = object_of(merged.get("extractedData"))
    named = {_field(key): value for key, value in extracted.items() if not is_blank(value)}
    disposition_raw = _named(merged.get("disposition")) or _named(named.get("disposition"))
    disposition = normalise_disposition(disposition_raw)
    duration_seconds = _seconds(_either(telephony, merged, "duration"))
    transcript = transcript_text(merged.get("transcript"))
    utterances = read_transcript(transcript) if transcript else ()
    word_count, lead_word_count, lead_talk_share = _words(utterances)
    callback_raw = _callback(named)
    return Call(
        call_sid=text_of(merged.get("callSid")) or "",
        futwork_lead_id=id_in(merged, "leadId"),
        campaign_id=id_in(merged, "campaignId"),
        agent_id=id_in(merged, "agentId"),
        status=status,
        is_final=standing(status).is_final,
        outcome=decide_outcome(
            status, disposition=disposition, duration_seconds=duration_seconds, utterances=utterances
        ),
        disposition_raw=disposition_raw,
        disposition=disposition,
        duration_seconds=duration_seconds,
        direction=direction_in(telephony),
        from_number=phone_of(telephony.get("fromNumber"), default_region),
        to_number=phone_of(telephony.get("toNumber"), default_region),
        recipient_phone=recipient_phone(merged, default_region),
        recording_url=_link(_either(telephony, merged, "recordingUrl")),
        provider=text_of(telephony.get("provider")),
        provider_call_id=text_of(telephony.get("providerCallId")),
        hangup_by=text_of(telephony.get("hangupBy")),
        hangup_reason=text_of(telephony.get("hangupReason")),
        transcript=transcript,
        turns=utterances,
        word_count=word_count,
        lead_word_count=lead_word_count,
        lead_talk_share=lead_talk_share,
        summary=first_text(*(named.get(name) for name in _SUMMARY), merged.get("summary")),
        callback_at=read_callback(callback_raw, region=default_region) if callback_raw else None,
        callback_raw=callback_raw,
        extracted=None if is_blank(extracted) else extracted,
        recipient_data=recipient_data(merged),
    )


# Field names of the extraction are the campaign's; the first of each is the one in Futwork's call report.
_SUMMARY = ("call_summary", "summary", "conversation_summary")
_CALLBACK = ("callback_date_time", "callback_datetime", "callback_at", "callback_scheduled_at", "callback_on")

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:s|secs?|seconds?)?", re.IGNORECASE)
_CLOCK = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,3}):([0-5][0-9](?:\.[0-9]+)?)")
_LONGEST_DURATION_TEXT = 32  # characters
_LONGEST_DURATION = 24 * 60 * 60  # seconds; what is longer is not a duration but, say, a time stamp


def _either(telephony: Mapping[str, Any], merged: Mapping[str, Any], name: str) -> Any:
    """Return a field from where the guide has it, else from the top level, where Futwork's call report has it."""
    value = telephony.get(name)
    return merged.get(name) if is_blank(value) else value


def _seconds(value: object) -> float | None:
    text = text_of(value)
    if text is None or len(text) > _LONGEST_DURATION_TEXT:
        return None
    if number := _NUMBER.fullmatch(text):
        seconds = float(number[1])
    elif clock := _CLOCK.fullmatch(text):
        seconds = int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    else:
        return None
    return seconds if math.isfinite(seconds) and seconds <= _LONGEST_DURATION else None


def _link(value: object) -> str | None:
    text = text_of(value)
    return text if text and text.lower().startswith(("https://", "http://")) else None


def _named(value: object) -> str | None:
    """Return a disposition, also one that came as an object with a name and an id."""
    known = object_of(value)
    return first_text(value, *(known.get(name) for name in ("name", "label", "value", "title", "disposition")))


def _field(key: str) -> str:
    return slug(key, "_").replace("call_back", "callback")


def _callback(named: Mapping[str, Any]) -> str | None:
    """Return when the lead asked to be called, in the extraction's words."""
    if whole := first_text(*(named.get(name) for name in _CALLBACK)):
        return whole
    parts = (text_of(named.get("callback_date")), text_of(named.get("callback_time")))
    return " ".join(filter(None, parts)) or text_of(named.get("callback"))


def _words(utterances: tuple[Utterance, ...]) -> tuple[int, int, float | None]:
    counts = [(one.speaker, len(one.text.split())) for one in utterances]
    total = sum(count for _, count in counts)
    lead = sum(count for speaker, count in counts if speaker == LEAD)
    has_sides = any(speaker in {AGENT, LEAD} for speaker, _ in counts)
    return total, lead, round(lead / total, 4) if has_sides and total else None
