"""What Futwork's call statuses mean: their order, which are final, and what they prove."""

from dataclasses import dataclass
from enum import StrEnum

from pipeline.domain.call.values import slug, text_of


class CallOutcome(StrEnum):
    """What became of a call, as far as its events prove it."""

    CONNECTED = "connected"
    """Somebody answered."""
    NO_ANSWER = "no_answer"
    """It rang out, a machine answered, or the phone could not be reached."""
    BUSY = "busy"
    """The line was engaged."""
    FAILED = "failed"
    """The call could not be made: a telephony error, a number that does not exist."""
    CANCELLED = "cancelled"
    """The call was stopped before it could be made."""
    UNKNOWN = "unknown"
    """The call is not over, or its events do not say."""


@dataclass(frozen=True, slots=True)
class CallStatus:
    """What a status means for the events around it."""

    rank: int
    """Its place in a call's course: an event never overrules one of a higher rank."""
    is_final: bool
    """The call is over."""
    outcome: CallOutcome | None
    """What the status proves alone; None if disposition, transcript and duration must decide."""


UNKNOWN_STATUS = "unknown"
"""Stands for a status that is missing."""

CALL_STATUSES: dict[str, CallStatus] = {
    # Before the call. Documented by a sibling platform whose payload has the same shape.
    "queued": CallStatus(10, is_final=False, outcome=None),
    "scheduled": CallStatus(10, is_final=False, outcome=None),
    "rescheduled": CallStatus(10, is_final=False, outcome=None),
    # During the call. Seen in public client code.
    "initiated": CallStatus(20, is_final=False, outcome=None),
    "ringing": CallStatus(30, is_final=False, outcome=None),
    "in-progress": CallStatus(40, is_final=False, outcome=None),
    # The line dropped: the one status in Futwork's guide. Final, because nothing may follow; below `completed`,
    # because on the sibling that follows seconds to minutes later, with recording and extraction.
    "call-disconnected": CallStatus(50, is_final=True, outcome=None),
    # After the call. Seen in public client code; `completed` does not prove that somebody spoke.
    "completed": CallStatus(60, is_final=True, outcome=None),
    "no-answer": CallStatus(60, is_final=True, outcome=CallOutcome.NO_ANSWER),
    "busy": CallStatus(60, is_final=True, outcome=CallOutcome.BUSY),
    "failed": CallStatus(60, is_final=True, outcome=CallOutcome.FAILED),
    # After the call. Documented by the sibling.
    "cancelled": CallStatus(60, is_final=True, outcome=CallOutcome.CANCELLED),
    "stopped": CallStatus(60, is_final=True, outcome=CallOutcome.CANCELLED),
    "error": CallStatus(60, is_final=True, outcome=CallOutcome.FAILED),
    "balance-low": CallStatus(60, is_final=True, outcome=CallOutcome.FAILED),
}

# A status that we don't know may mean anything. It never overrules one that we do know, and never ends a call.
_UNRECOGNISED = CallStatus(0, is_final=False, outcome=None)

_SPELLINGS = {
    "canceled": "cancelled",
    "disconnected": "call-disconnected",
    "inprogress": "in-progress",
    "noanswer": "no-answer",
}


def normalise_status(value: object) -> str:
    """Return a status in lower kebab case under its usual name, `unknown` if there is none.

    `no_answer` and `No Answer` become `no-answer`, `call-failed` becomes `failed`, `canceled` becomes `cancelled`. A
    status that is not in `CALL_STATUSES` keeps its own name.
    """
    if isinstance(value, str) and value in CALL_STATUSES:
        return value
    status = slug(text_of(value) or UNKNOWN_STATUS, "-") or UNKNOWN_STATUS
    names = (_SPELLINGS.get(name, name) for name in (status, status.removeprefix("call-")))
    return next((name for name in names if name in CALL_STATUSES), status)


def standing(status: str) -> CallStatus:
    """Return what a normalised status means; one that we don't know ranks below all others and is not final."""
    return CALL_STATUSES.get(status, _UNRECOGNISED)
