"""Which leads a form means: read from it, written back into it, and written as a command."""

from __future__ import annotations

import contextlib
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from werkzeug.datastructures import MultiDict

from pipeline.domain.lead import LeadState
from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.ledger import LeadFilter, Place

_MOST_MINUTES = 10 * 365 * 24 * 60


class WrongChoice(ValueError):
    """A field of the filter cannot be read; the message says which and how."""


def read_choice(form: MultiDict[str, str], *, region: str, now: datetime) -> LeadFilter:
    """The filter of a form's fields; raises `WrongChoice` for a field that cannot be read."""
    try:
        states = tuple(LeadState(state) for state in form.getlist("state") if state)
        ids = tuple(uuid.UUID(one) for one in form.getlist("id") if one)
    except ValueError:
        raise WrongChoice("a state or an id in the filter does not exist") from None
    phone = form.get("phone", "").strip()
    minutes = form.get("unchanged", "").strip()
    if minutes and not (minutes.isdecimal() and 0 < int(minutes) <= _MOST_MINUTES):
        raise WrongChoice("“unchanged for” must be a whole number of minutes")
    try:
        number = to_e164(phone, region) if phone else None
    except InvalidPhone as error:
        raise WrongChoice(str(error)) from None
    return LeadFilter(
        ids=ids,
        campaign=form.get("campaign", "").strip() or None,
        states=states,
        phone=number,
        key=form.get("key", "").strip() or None,
        accepted_after=_moment(form.get("from", ""), "from"),
        accepted_before=_moment(form.get("to", ""), "to"),
        changed_before=now - timedelta(minutes=int(minutes)) if minutes else None,
    )


def fields_of(form: MultiDict[str, str]) -> list[tuple[str, str]]:
    """The fields of the filter, for another form."""
    names = ("campaign", "state", "id", "phone", "key", "from", "to", "unchanged")
    return [(name, value.strip()) for name in names for value in form.getlist(name) if value.strip()]


def read_place(text: str) -> Place | None:
    """The place after which a page of the list begins."""
    moment, _, lead = text.partition("~")
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return Place(datetime.fromtimestamp(int(moment) / 1_000_000, UTC), uuid.UUID(lead))
    return None


def place_of(lead: Mapping[str, Any]) -> str:
    """The place of a lead in the list, for the address of the page after it."""
    at: datetime = lead["accepted_at"]
    return f"{int(at.timestamp()) * 1_000_000 + at.microsecond}~{lead['id']}"


def command_for(action: str, which: LeadFilter, *, now: datetime) -> str:
    """The command that does the same as a form."""
    verb, _, verdict = action.partition(":")
    parts = ["pipeline", verb, *([f"--{verdict}"] if verdict else [])]
    for one in which.ids:
        parts += ["--id", str(one)]
    for name, value in (("--campaign", which.campaign), ("--phone", which.phone), ("--key", which.key)):
        parts += [name, value] if value else []
    for state in which.states:
        parts += ["--state", state.value]
    for name, moment in (("--accepted-after", which.accepted_after), ("--accepted-before", which.accepted_before)):
        parts += [name, f"{moment:%Y-%m-%dT%H:%M:%S}"] if moment else []
    if which.changed_before:
        parts += ["--unchanged-for", f"{(now - which.changed_before).total_seconds():.0f}"]
    return shlex.join(parts)


def until(which: LeadFilter, moment: datetime) -> LeadFilter:
    """The same leads, without those that match only after *moment*: what was counted is what is changed."""
    latest = min(moment, which.changed_before) if which.changed_before else moment
    return replace(which, changed_before=latest)


def _moment(text: str, name: str) -> datetime | None:
    if not text.strip():
        return None
    try:
        return datetime.fromisoformat(text.strip()).replace(tzinfo=UTC)
    except ValueError:
        raise WrongChoice(f"“{name}” must be a date and a time") from None
