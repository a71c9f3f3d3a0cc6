"""A lead: what a producer hands in, the states it passes through, and what each outcome of a POST makes of it; pure.

`settle` is the one place that turns an outcome into a state. `TRANSITIONS` is the one place that says which state may
follow which; `docs/state-machine.md` shows the same as a table and a picture, and a test compares the two.
"""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha1
from types import MappingProxyType
from typing import Any, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from pipeline.domain.phone import check_national, to_e164

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "platform.futwork.ai")
"""The namespace of every lead id. It is part of the wire contract: with another one, known leads would be new leads."""

DATA_MAX_BYTES = 32 * 1024
"""The largest `data` that is accepted, as JSON. Futwork states no limit; data of this size is a mistake."""

_DATA_MAX_DEPTH = 16
_NAMESPACE_BYTES = NAMESPACE.bytes
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class LeadState(StrEnum):
    """Where a lead stands. Every lead is in exactly one state, so the states add up to the accepted leads."""

    QUEUED = "queued"
    """In the ledger and waiting for `due_at`, a free slot and an active campaign; a claim moves it on."""
    SENDING = "sending"
    """Claimed by a dispatcher that may be sending it now; the recorded outcome, or the claim's end, moves it on."""
    SUBMITTED = "submitted"
    """Futwork accepted it; a final post-call event moves it on."""
    CALLED = "called"
    """A final post-call event came back. An end, although a later event can still enrich the call."""
    UNCERTAIN = "uncertain"
    """The request may or may not have reached Futwork; evidence, a policy or an operator moves it on."""
    REJECTED = "rejected"
    """Futwork refused this very lead; `retry` by an operator, or the hold that its run leads to, moves it on."""
    EXHAUSTED = "exhausted"
    """Every allowed attempt was used up; `retry` by an operator is the only way on."""
    EXPIRED = "expired"
    """It became older than the campaign allows before it could be sent."""
    CANCELLED = "cancelled"
    """An operator cancelled it, or the policy `drop` for uncertain leads did."""
    SUPPRESSED = "suppressed"
    """The number is on the do-not-call list; after its removal, `retry` by an operator moves the lead on."""


TRANSITIONS: dict[LeadState, frozenset[LeadState]] = {
    LeadState.QUEUED: frozenset(
        {LeadState.SENDING, LeadState.EXPIRED, LeadState.CANCELLED, LeadState.SUPPRESSED}
        | {LeadState.SUBMITTED, LeadState.CALLED}  # evidence: an earlier attempt had arrived
    ),
    LeadState.SENDING: frozenset(
        {LeadState.SUBMITTED, LeadState.QUEUED, LeadState.UNCERTAIN, LeadState.REJECTED, LeadState.EXHAUSTED}
        | {LeadState.EXPIRED, LeadState.CALLED}  # the post-call event can overtake the POST's own answer
    ),
    LeadState.SUBMITTED: frozenset({LeadState.CALLED}),
    LeadState.CALLED: frozenset(),
    LeadState.UNCERTAIN: frozenset(
        {LeadState.SUBMITTED, LeadState.CALLED, LeadState.QUEUED, LeadState.CANCELLED}
        | {LeadState.REJECTED, LeadState.EXHAUSTED, LeadState.EXPIRED}  # the late answer of a worker that seemed dead
    ),
    LeadState.REJECTED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.EXHAUSTED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.EXPIRED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.CANCELLED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.SUPPRESSED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
}
"""Which states may follow which. The ledger's guarded updates make no other change of state."""


class Outcome(StrEnum):
    """How one POST ended, decided by how far the request got (`pipeline.futwork`)."""

    ACCEPTED = "accepted"
    """2xx, or a 409 that names the lead: Futwork has it."""
    REJECTED = "rejected"
    """Futwork refused this lead: 400, 409, 413, 422, another 4xx, or a 2xx whose JSON says so."""
    NOT_SENT = "not_sent"
    """No byte of the request left this machine: DNS, connect, TLS or proxy failure."""
    THROTTLED = "throttled"
    """429: too fast. It costs no attempt, and the limiter stops all workers."""
    BUSY = "busy"
    """421, 425 or 503: Futwork did not take it now."""
    FAILED = "failed"
    """500 or another 5xx that says nothing of load: the lead may have been taken before Futwork failed."""
    UNCERTAIN = "uncertain"
    """The request, or a part of it, was sent and no verdict came back: 502, 504, 408, timeout, reset, bad bytes."""
    REFUSED_KEY = "refused_key"
    """401 or 403: nothing is wrong with the lead; costs no attempt."""
    REFUSED_CAMPAIGN = "refused_campaign"
    """404 or a redirect: nothing is wrong with the lead; costs no attempt."""


_FREE = frozenset({Outcome.THROTTLED, Outcome.REFUSED_KEY, Outcome.REFUSED_CAMPAIGN})
_AGAIN = frozenset({Outcome.NOT_SENT, Outcome.BUSY}) | _FREE


class InvalidLead(ValueError):
    """A row cannot become a lead; the message holds every reason, for the person who sent the row."""


class Lead(BaseModel):
    """One person to be called: a phone number, the data for the agent, and the producer's idempotency key.

    `read` takes any spelling of the phone number and keeps E.164. `data` becomes Futwork's `recipientData`. `key`
    defaults to the phone number, so the same person is called once a campaign unless another key is passed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    phone: str
    data: dict[str, Any]
    key: str = Field(default="", max_length=200, validate_default=True)

    @classmethod
    def read(
        cls,
        row: object,
        *,
        region: str,
        national_digits: int | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> Self:
        """Make a lead of a row (a mapping or a `Lead`), or raise `InvalidLead` with every reason in one line.

        *region* (`IN`) is where a phone number without a country code belongs. With *national_digits* the number must
        be of that region and have so many digits there. The reasons call our fields by their *names* in the row.
        """
        if not isinstance(row, dict):
            if not isinstance(row, Mapping | cls):
                raise InvalidLead(f"a lead must be an object, not {_kind_of(row)}")
            row = dict(row)
        try:
            return cls.model_validate(row, context=(region, national_digits))
        except ValidationError as error:
            reasons = (_explain(part, names) for part in error.errors(include_url=False, include_input=False))
            raise InvalidLead("; ".join(reasons)) from None

    @field_validator("phone", mode="before")
    @classmethod
    def _phone_is_e164(cls, value: Any, info: ValidationInfo) -> Any:
        if not info.context:
            return value
        region, national_digits = info.context
        e164 = to_e164(value, region)
        if national_digits:
            check_national(e164, region, digits=national_digits)
        return e164

    @field_validator("data")
    @classmethod
    def _data_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            text = orjson.dumps(value)
        except TypeError as error:
            raise ValueError(f"cannot be written as JSON ({error})") from None
        if len(text) > DATA_MAX_BYTES:
            raise ValueError(f"{len(text):,} bytes of JSON are more than the {DATA_MAX_BYTES:,} allowed")
        # NaN and infinities become null, and each level needs a bracket: without them there is nothing to find.
        if b"null" in text or text.count(b"{") + text.count(b"[") > _DATA_MAX_DEPTH:
            _check_value(value, "", 0)
        return value

    @field_validator("key", mode="before")
    @classmethod
    def _key_is_text(cls, value: object, info: ValidationInfo) -> str:
        if not isinstance(value, str):
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise ValueError("must be text")  # noqa: TRY004 - pydantic reports ValueError
            value = "" if value is None else str(value)
        key = value.strip()
        if not key and info.context:  # not without `read`: every spelling of a number must have the same key
            key = info.data.get("phone", "")
        elif _CONTROL.search(key):
            raise ValueError("must not hold control characters")  # PostgreSQL refuses a NUL, and with it the batch
        return key


def lead_id(campaign_id: str, key: str) -> uuid.UUID:
    """The id of the lead with this idempotency key, known to the producer before anything is stored.

    It is `uuid.uuid5(NAMESPACE, f"{campaign_id}:{key}")`, also on a system in FIPS mode, in two thirds of the time.
    """
    digest = sha1(_NAMESPACE_BYTES + f"{campaign_id}:{key}".encode(), usedforsecurity=False).digest()
    return uuid.UUID(bytes=digest[:16], version=5)


@dataclass(frozen=True, slots=True)
class Claim:
    """A lead leased to one dispatcher: what to send, and the token that fences its record."""

    lead_id: uuid.UUID
    campaign_id: str
    token: uuid.UUID
    expires_at: datetime
    """When the lease ends, by the clock of the process that holds it."""
    phone: str
    """E.164."""
    data: str
    """`recipientData` as JSON text."""
    attempts: int
    """How many attempts were charged before this one."""
    lead_expires_at: datetime
    """When the lead grows too old to be sent."""
    traceparent: str | None = None
    """The trace of the request that brought the lead (`pipeline.observability.tracing`)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one POST, as `pipeline.futwork` judged it."""

    claim: Claim
    outcome: Outcome
    started_at: datetime
    duration: timedelta
    http_status: int | None = None
    futwork_lead_id: str | None = None
    excerpt: str = ""
    """The first part of the body, or the failure in a few words; it never holds our key or a phone number of ours."""
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """When, how often and after what a lead is tried again."""

    base: timedelta
    cap: timedelta
    max_attempts: int
    after_server_error: bool = False
    """Whether `failed` means that Futwork did not take the lead; otherwise it proves nothing."""

    def delay(self, attempts: int, *, jitter: random.Random) -> timedelta:
        """A random wait before the next attempt; its bound doubles with each charged attempt (full jitter)."""
        doubled = self.base.total_seconds() * 2.0 ** min(attempts, 100)  # as a float: a timedelta would overflow
        return timedelta(seconds=min(self.cap.total_seconds(), doubled) * jitter.random())


@dataclass(frozen=True, slots=True)
class Settlement:
    """The next state of a lead, decided from its answer."""

    answer: Answer
    state: LeadState
    due_at: datetime
    attempts: int


def settle(answer: Answer, retry: Retry, *, now: datetime, jitter: random.Random, probe: bool = False) -> Settlement:
    """Decide the next state of a lead from the answer to its POST; the only place that does.

    An outcome that proves nothing against the lead costs no attempt. For a *probe*, which only finds out whether an
    outage is over, that is every outcome after which the lead may be sent again. Such a lead waits for the longer of
    Futwork's `Retry-After` and our backoff. One that has no attempt left is `exhausted`.
    """
    claim = answer.claim
    goes_again = answer.outcome in _AGAIN or (answer.outcome is Outcome.FAILED and retry.after_server_error)
    is_free = answer.outcome in _FREE or (probe and goes_again)
    attempts = claim.attempts if is_free else claim.attempts + 1
    if not goes_again:
        state = {
            Outcome.ACCEPTED: LeadState.SUBMITTED,
            Outcome.REJECTED: LeadState.REJECTED,
            Outcome.UNCERTAIN: LeadState.UNCERTAIN,
            Outcome.FAILED: LeadState.UNCERTAIN,
        }[answer.outcome]
        return Settlement(answer, state, now, attempts)
    if attempts >= retry.max_attempts and not is_free:
        return Settlement(answer, LeadState.EXHAUSTED, now, attempts)
    wait = max(answer.retry_after or timedelta(), retry.delay(attempts, jitter=jitter))
    due_at = now + wait
    if due_at >= claim.lead_expires_at:
        return Settlement(answer, LeadState.EXPIRED, now, attempts)
    return Settlement(answer, LeadState.QUEUED, due_at, attempts)


def _check_value(value: object, path: str, depth: int) -> None:
    """Refuse what is nested too deep, and what orjson would silently write as null: NaN and infinities."""
    if depth > _DATA_MAX_DEPTH:
        raise ValueError(f"nested more than {_DATA_MAX_DEPTH} levels deep")
    if isinstance(value, float) and not math.isfinite(value):
        about = {"value": value, "path": path}
        raise PydanticCustomError("not_finite", "{value} is not a number that JSON can hold", about)
    if isinstance(value, dict):
        for name, child in value.items():
            _check_value(child, f"{path}.{name}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _check_value(child, f"{path}[{index}]", depth + 1)


def _explain(error: ErrorDetails, names: Mapping[str, str]) -> str:
    """The place of an error in the row, and the reason in words for a person."""
    about = error.get("ctx", {})
    field, *inner = map(str, error["loc"] or ["the name of a field"])
    place = ".".join([names.get(field, field), *inner]) + about.get("path", "")
    match error["type"]:
        case "missing":
            return f"{place}: missing"
        case "extra_forbidden":
            return f"{place}: unknown field (put it into data)"
        case "value_error":
            return f"{place}: {about['error']}"
    return f"{place}: {error['msg']}"


def _kind_of(value: object) -> str:
    names = {str: "text", list: "a list", type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
