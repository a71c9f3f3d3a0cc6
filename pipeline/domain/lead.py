"""A lead: what a producer hands in, the states it passes through, and what each outcome of a POST makes of it; pure.

The one place that decides outcomes into states is `settle`; the one place that says which state may follow which is
`TRANSITIONS`. `docs/state-machine.md` tells the same in pictures, and a test compares the two.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cache
from hashlib import sha1
from typing import Any, Self

import orjson
import phonenumbers
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.domain.phone import InvalidPhone, to_e164

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "platform.futwork.ai")
"""The namespace of every lead id. It is part of the wire contract: a new one would make every known lead a new one."""

DATA_MAX_BYTES = 32 * 1024
"""The largest `recipientData` that is taken, as JSON. Futwork states no limit; prompts of this size are a mistake."""

_DATA_MAX_DEPTH = 16
_KEY_LENGTH = 200

_NAMESPACE_BYTES = NAMESPACE.bytes
_UUID_MASK = ~(0xF000 << 64 | 0xC000 << 48)  # RFC 9562: all but the version and the variant
_UUID_5 = 5 << 76 | 0x8000 << 48

_set = object.__setattr__
_NATIONAL_DIGITS = 10  # the vendor's guide: "10-digit phone number"


class LeadState(StrEnum):
    """Where a lead stands. Every lead is in exactly one state, so the accepted leads are the sum over all."""

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
    """It grew older than the campaign allows before it could be sent."""
    CANCELLED = "cancelled"
    """An operator, or the policy `drop` for uncertain leads, took it out."""
    SUPPRESSED = "suppressed"
    """The person must not be called: the number is on the do-not-call list; `retry` after its removal is a way on."""


TRANSITIONS: dict[LeadState, frozenset[LeadState]] = {
    LeadState.QUEUED: frozenset(
        {LeadState.SENDING, LeadState.EXPIRED, LeadState.CANCELLED, LeadState.SUPPRESSED}
        | {LeadState.SUBMITTED, LeadState.CALLED}  # evidence: an earlier attempt had arrived after all
    ),
    LeadState.SENDING: frozenset(
        {LeadState.SUBMITTED, LeadState.QUEUED, LeadState.UNCERTAIN, LeadState.REJECTED, LeadState.EXHAUSTED}
        | {LeadState.EXPIRED, LeadState.CALLED}  # the post-call event can overtake the POST's own answer
    ),
    LeadState.SUBMITTED: frozenset({LeadState.CALLED}),
    LeadState.CALLED: frozenset(),
    LeadState.UNCERTAIN: frozenset(
        {LeadState.SUBMITTED, LeadState.CALLED, LeadState.QUEUED, LeadState.CANCELLED}
        | {LeadState.REJECTED, LeadState.EXHAUSTED, LeadState.EXPIRED}  # the late answer of a worker given up for lost
    ),
    LeadState.REJECTED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.EXHAUSTED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.EXPIRED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.CANCELLED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
    LeadState.SUPPRESSED: frozenset({LeadState.QUEUED, LeadState.SUBMITTED, LeadState.CALLED}),
}
"""Which states may follow which. What is not here never happens; the ledger's guarded updates hold to it."""


class Outcome(StrEnum):
    """How one POST ended, decided by how far the request got (`pipeline.futwork`)."""

    ACCEPTED = "accepted"
    """2xx: Futwork has the lead."""
    REJECTED = "rejected"
    """Futwork refused this lead: 400, 409, 413, 422, another 4xx, or a 2xx whose JSON says so."""
    NOT_SENT = "not_sent"
    """No byte of the request left this machine: DNS, connect, TLS or proxy failure."""
    THROTTLED = "throttled"
    """429: too fast; costs no attempt and stops the limiter for all workers."""
    BUSY = "busy"
    """503: Futwork did not take it now."""
    FAILED = "failed"
    """500 or another 5xx that says the lead was not taken."""
    UNCERTAIN = "uncertain"
    """The request, or a part of it, left and no verdict came back: 502, 504, 408, timeout, reset, bad bytes."""
    REFUSED_KEY = "refused_key"
    """401 or 403: nothing is wrong with the lead; costs no attempt."""
    REFUSED_CAMPAIGN = "refused_campaign"
    """404 or a redirect: nothing is wrong with the lead; costs no attempt."""


_FREE = frozenset({Outcome.THROTTLED, Outcome.REFUSED_KEY, Outcome.REFUSED_CAMPAIGN})
_AGAIN = frozenset({Outcome.NOT_SENT, Outcome.BUSY, Outcome.FAILED}) | _FREE


class InvalidLead(ValueError):
    """A row cannot become a lead; the message is the reason for the person who sent it."""


class Lead(BaseModel):
    """One person to be called: a phone number, the data for the agent, and the producer's idempotency key.

    `phone` takes any spelling and is kept in E.164. `data` becomes Futwork's `recipientData`. `key` defaults to the
    phone number, so the same person is called once a campaign unless another key is passed. Futwork's own names
    (`recipientPhoneNumber`, `recipientData`) are understood as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True)

    phone: str = Field(validation_alias=AliasChoices("phone", "recipientPhoneNumber"))
    data: dict[str, Any] = Field(validation_alias=AliasChoices("data", "recipientData"))
    key: str = Field(default="", max_length=_KEY_LENGTH)

    @field_validator("key", mode="before")
    @classmethod
    def _key_is_text(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError("must be text")  # noqa: TRY004 - pydantic reports ValueError
        return "" if value is None else str(value).strip()

    @field_validator("key")
    @classmethod
    def _key_is_storable(cls, value: str) -> str:
        if any(letter < " " or letter == "\x7f" for letter in value):
            raise ValueError("must not hold control characters")  # PostgreSQL refuses a NUL, and with it the batch
        return value

    @classmethod
    def read(cls, row: object, *, region: str) -> Self:
        """Make a lead of a row (a mapping or a `Lead`), or raise `InvalidLead` with every reason in one line."""
        if type(row) is dict and (plain := cls._read_plain(row, region)) is not None:
            return plain
        if isinstance(row, cls):
            row = {"phone": row.phone, "data": row.data, "key": row.key}
        if not isinstance(row, Mapping):
            raise InvalidLead(f"a lead must be an object, not {_kind_of(row)}")
        fields = dict(row)
        phone_name = "recipientPhoneNumber" if "recipientPhoneNumber" in fields else "phone"
        try:
            if phone_name in fields:
                fields[phone_name] = _callable_number(fields[phone_name], region)
            lead = cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidLead("; ".join(_explain(part) for part in error.errors(include_url=False))) from None
        except ValueError as error:
            raise InvalidLead(f"{phone_name}: {error}") from None
        _check_data(lead.data)
        return lead if lead.key else lead.model_copy(update={"key": lead.phone})

    @classmethod
    def _read_plain(cls, row: dict[Any, Any], region: str) -> Self | None:
        """The lead of a row in the usual form, or None where `read` must look closer, or find the words for a refusal.

        It accepts nothing that the model would refuse, and makes the same lead of it in a fifth of the time.
        """
        phone, data, key = row.get("phone"), row.get("data"), row.get("key", "")
        if type(data) is not dict or type(key) is not str or len(row) != ("key" in row) + 2:
            return None
        if key and (len(key) > _KEY_LENGTH or not key.isprintable() or key != key.strip()):
            return None
        try:
            number = _callable_number(phone, region)
            _check_data(data)
        except ValueError:
            return None
        lead = cls.__new__(cls)  # what `model_construct` does, without its search for aliases and defaults
        _set(lead, "__dict__", {"phone": number, "data": data.copy(), "key": key or number})
        _set(lead, "__pydantic_fields_set__", {"phone", "data", "key"})
        _set(lead, "__pydantic_extra__", None)
        _set(lead, "__pydantic_private__", None)
        return lead


def lead_id(campaign_id: str, key: str) -> uuid.UUID:
    """The id of the lead with this idempotency key, known to the producer before anything is stored.

    It is `uuid.uuid5(NAMESPACE, f"{campaign_id}:{key}")`, written out for the sake of a million leads.
    """
    digest = sha1(_NAMESPACE_BYTES + f"{campaign_id}:{key}".encode(), usedforsecurity=False).digest()
    number = int.from_bytes(digest[:16], "big")
    return uuid.UUID(int=number & _UUID_MASK | _UUID_5)


@dataclass(frozen=True, slots=True)
class Claim:
    """A lead leased to one dispatcher: what to send, and the token that fences its record."""

    lead_id: uuid.UUID
    campaign_id: str
    token: uuid.UUID
    expires_at: datetime
    """When it ends, by the clock of the process that holds it."""
    phone: str
    """E.164."""
    data: str
    """`recipientData` as JSON text."""
    attempts: int
    """How many attempts were charged before this one."""
    lead_expires_at: datetime
    """When the lead grows too old to be sent."""
    traceparent: str | None = None
    """The trace of the request that handed it in (`pipeline.observability.tracing`)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one POST, as `pipeline.futwork` judged it."""

    claim: Claim
    outcome: Outcome
    started_at: datetime
    duration: timedelta
    http_status: int | None = None
    futwork_lead_id: str | None = None
    excerpt: str = ""
    """The first part of the body, or the failure in a few words; never a key or a phone number of ours."""
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """When and how often a lead is tried again."""

    base: timedelta
    cap: timedelta
    max_attempts: int

    def delay(self, attempts: int, *, jitter: random.Random) -> timedelta:
        """A random wait before the next try, up to twice as long after each charged attempt (full jitter)."""
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
    """Decide what an answer makes of its lead; the only place that does.

    Outcomes that prove nothing against the lead cost no attempt, and never its last: of a *probe* whatever lets it try
    again, for it was sent to learn whether an outage is over. A lead that may try again waits for the longer of
    Futwork's `Retry-After` and our backoff; one that has no attempt left is `exhausted`.
    """
    claim = answer.claim
    is_free = answer.outcome in _FREE or (probe and answer.outcome in _AGAIN)
    attempts = claim.attempts if is_free else claim.attempts + 1
    if answer.outcome not in _AGAIN:
        state = {
            Outcome.ACCEPTED: LeadState.SUBMITTED,
            Outcome.REJECTED: LeadState.REJECTED,
            Outcome.UNCERTAIN: LeadState.UNCERTAIN,
        }[answer.outcome]
        return Settlement(answer, state, now, attempts)
    if attempts >= retry.max_attempts and not is_free:
        return Settlement(answer, LeadState.EXHAUSTED, now, attempts)
    wait = max(answer.retry_after or timedelta(), retry.delay(attempts, jitter=jitter))
    due_at = now + wait
    if due_at >= claim.lead_expires_at:
        return Settlement(answer, LeadState.EXPIRED, now, attempts)
    return Settlement(answer, LeadState.QUEUED, due_at, attempts)


@cache
def _country_prefix(region: str) -> str:
    return f"+{phonenumbers.country_code_for_region(region)}"


def _callable_number(text: Any, region: str) -> str:
    """The number in E.164, if its ten national digits, which are all that Futwork gets, still mean the same person."""
    e164 = to_e164(text, region)
    country = _country_prefix(region)
    if not e164.startswith(country):
        raise InvalidPhone(
            f"the phone number is of another country than {region}: its last digits would call a stranger"
        )
    if len(e164) - len(country) != _NATIONAL_DIGITS:
        raise InvalidPhone(f"the phone number has not the {_NATIONAL_DIGITS} national digits that Futwork takes")
    return e164


def _check_data(data: dict[str, Any]) -> None:
    try:
        text = orjson.dumps(data)
    except (orjson.JSONEncodeError, TypeError) as error:
        raise InvalidLead(f"data: cannot be written as JSON ({error})") from None
    if len(text) > DATA_MAX_BYTES:
        raise InvalidLead(f"data: {len(text):,} bytes of JSON are more than the {DATA_MAX_BYTES:,} allowed")
    # NaN and infinities become null, and each level of depth needs a bracket: without them there is nothing to find.
    if b"null" in text or text.count(b"{") + text.count(b"[") > _DATA_MAX_DEPTH:
        _check_value(data, "data", 0)


def _check_value(value: object, path: str, depth: int) -> None:
    """Refuse what JSON would silently change: NaN and infinities, which orjson writes as null."""
    if depth > _DATA_MAX_DEPTH:
        raise InvalidLead(f"data: nested more than {_DATA_MAX_DEPTH} levels deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidLead(f"{path}: {value} is not a number that JSON can hold")
    if isinstance(value, dict):
        for name, child in value.items():
            _check_value(child, f"{path}.{name}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _check_value(child, f"{path}[{index}]", depth + 1)


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{name}: missing"
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown field (put it into data)"
    return f"{name}: {str(error['msg']).removeprefix('Value error, ')}"


def _kind_of(value: object) -> str:
    names = {str: "text", list: "a list", type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
