"""Which leads a command selects, and what an operator may do to all of them at once.

A bulk change takes a filter and refuses an empty one, so that a forgotten word cancels no million leads.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger.audit import Actor, note
from pipeline.ledger.database import Database
from pipeline.ledger.suppressions import why_suppressed
from pipeline.ledger.tables import campaigns, leads


class EmptyFilter(ValueError):
    """A change of many leads needs a filter: name a campaign, a state, an id, a phone or a time."""


@dataclass(frozen=True, slots=True)
class LeadFilter:
    """Leads that match every part that is given."""

    ids: tuple[uuid.UUID, ...] = ()
    campaign: str | None = None
    states: tuple[LeadState, ...] = ()
    phone: str | None = None
    """E.164."""
    key: str | None = None
    accepted_after: datetime | None = None
    accepted_before: datetime | None = None
    changed_before: datetime | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the filter would match every lead."""
        return not any(getattr(self, field.name) for field in fields(self))

    def named(self) -> dict[str, object]:
        """The parts that are given, by name, as the audit log keeps them."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    def where(self) -> list[sa.ColumnElement[bool]]:
        """The conditions, to be joined by AND."""
        conditions: list[sa.ColumnElement[bool]] = []
        if self.ids:
            conditions.append(leads.c.id.in_(self.ids))
        if self.states:
            conditions.append(leads.c.state.in_(self.states))
        for column, value in (
            (leads.c.campaign_id, self.campaign),
            (leads.c.phone, self.phone),
            (leads.c.key, self.key),
        ):
            if value:
                conditions.append(column == value)
        if self.accepted_after:
            conditions.append(leads.c.accepted_at >= self.accepted_after)
        if self.accepted_before:
            conditions.append(leads.c.accepted_at < self.accepted_before)
        if self.changed_before:
            conditions.append(leads.c.changed_at < self.changed_before)
        return conditions


RETRYABLE = (
    *(LeadState.REJECTED, LeadState.EXHAUSTED, LeadState.EXPIRED, LeadState.CANCELLED),
    LeadState.SUPPRESSED,  # once its number is off the do-not-call list
)
"""States that `retry` leaves. Uncertain leads are not among them: sending those again is `resolve`, on purpose."""


class Interventions:
    """What an operator does to many leads at once. Each method is one transaction; `dry_run` only counts."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def retry(
        self, which: LeadFilter, *, max_age: timedelta, now: datetime, dry_run: bool = False, by: Actor | None = None
    ) -> int:
        """Queue leads again that ended without a call, with no attempts and a new age.

        They keep the token of their last claim: it says that they may have been sent, and so may yet be called for it.
        """
        values = {
            "state": LeadState.QUEUED,
            "attempts": 0,
            "due_at": now,
            "reason": "retried by an operator",
        }
        return self._change("retry", which, RETRYABLE, values, now=now, dry_run=dry_run, by=by, fresh_age=max_age)

    def cancel(self, which: LeadFilter, *, now: datetime, dry_run: bool = False, by: Actor | None = None) -> int:
        """Take queued leads out; one that a dispatcher holds at this moment is not touched."""
        values = {"state": LeadState.CANCELLED, "reason": "cancelled by an operator"}
        return self._change("cancel", which, (LeadState.QUEUED,), values, now=now, dry_run=dry_run, by=by)

    def resolve(
        self,
        which: LeadFilter,
        verdict: str,
        *,
        max_age: timedelta,
        now: datetime,
        dry_run: bool = False,
        by: Actor | None = None,
    ) -> int:
        """Settle uncertain leads by hand: `sent` (Futwork has them), `resend` or `drop`."""
        values: dict[str, Any]
        if verdict == "sent":
            values = {"state": LeadState.SUBMITTED, "submitted_at": now}
        elif verdict == "resend":
            values = {"state": LeadState.QUEUED, "due_at": now}
        elif verdict == "drop":
            values = {"state": LeadState.CANCELLED}
        else:
            raise ValueError(f"a verdict is sent, resend or drop, not {verdict!r}")
        values["reason"] = f"resolved by an operator: {verdict}"
        fresh_age = max_age if verdict == "resend" else None
        return self._change(
            f"resolve: {verdict}",
            which,
            (LeadState.UNCERTAIN,),
            values,
            now=now,
            dry_run=dry_run,
            by=by,
            fresh_age=fresh_age,
        )

    def _change(
        self,
        action: str,
        which: LeadFilter,
        states: tuple[LeadState, ...],
        values: dict[str, Any],
        *,
        now: datetime,
        dry_run: bool,
        by: Actor | None,
        fresh_age: timedelta | None = None,
    ) -> int:
        """Apply *values*; *fresh_age* starts the age of leads anew, by their campaign's own limit if it has one."""
        if which.is_empty:
            raise EmptyFilter(EmptyFilter.__doc__)
        where = [*which.where(), leads.c.state.in_(states)]
        if values["state"] is LeadState.QUEUED:  # a lead on the do-not-call list is left as it is, and not counted
            where.append(why_suppressed(leads.c.phone, leads.c.campaign_id).is_(None))
        if dry_run:
            with self._db.read() as connection:
                return connection.scalar(sa.select(sa.func.count()).select_from(leads).where(*where)) or 0
        with self._db.write() as connection:
            if not self._db.is_sqlite:
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))  # a million leads take minutes
                # Locked in the order of their ids, as a record and a merge do, so that there is no deadlock.
                ordered = sa.select(leads.c.id).where(*where).order_by(leads.c.id).with_for_update(key_share=True)
                connection.execute(sa.select(sa.func.count()).select_from(ordered.subquery()))
            if fresh_age is None:
                changed = connection.execute(sa.update(leads).where(*where).values(changed_at=now, **values)).rowcount
            else:
                changed = _renew(connection, where, values, now=now, fresh_age=fresh_age)
            note(
                connection,
                by,
                action,
                campaign_id=which.campaign,
                lead_id=which.ids[0] if len(which.ids) == 1 else None,
                details=which.named(),
                changed=changed,
                now=now,
            )
        return changed


def _renew(
    connection: sa.Connection, where: list[Any], values: dict[str, Any], *, now: datetime, fresh_age: timedelta
) -> int:
    changed = 0
    ages = connection.execute(
        sa.select(campaigns.c.id, campaigns.c.lead_max_age_seconds).where(
            campaigns.c.id.in_(sa.select(leads.c.campaign_id).where(*where))
        )
    ).all()
    for campaign_id, seconds in ages:
        age = fresh_age if seconds is None else timedelta(seconds=seconds)
        statement = sa.update(leads).where(*where, leads.c.campaign_id == campaign_id)
        changed += connection.execute(statement.values(changed_at=now, expires_at=now + age, **values)).rowcount
    return changed
