"""The audit log: which person did what, written in the transaction of the change, so that neither exists alone."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import orjson
import sqlalchemy as sa

from pipeline.ledger.database import Database, storable_text
from pipeline.ledger.tables import audit

_OF_MANY = ("retry", "cancel", "resolve: sent", "resolve: resend", "resolve: drop")
_MOST_LOOKED_AT = 500


@dataclass(frozen=True, slots=True)
class Actor:
    """A person who changes something, and the way it came: the status pages or a command."""

    name: str
    via: Literal["ops", "cli"]


class Audit:
    """The statements on the log. Each method is one transaction and commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def begin(self, by: Actor, action: str, *, details: Mapping[str, object] | None = None, now: datetime) -> int:
        """Record an action of several transactions before its first; return the entry's number for `end`."""
        with self._db.write() as connection:
            return note(connection, by, action, details=details, now=now) or 0

    def end(self, number: int, *, changed: int) -> None:
        """Record how much the action changed."""
        with self._db.write() as connection:
            connection.execute(sa.update(audit).where(audit.c.id == number).values(changed=changed))

    def entries(
        self,
        *,
        limit: int = 50,
        before: int | None = None,
        campaign: str | None = None,
        lead: uuid.UUID | None = None,
    ) -> list[dict[str, Any]]:
        """What was done, newest first; *before* is the number of the entry to continue after."""
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.id < before)
        if campaign is not None:
            query = query.where(audit.c.campaign_id == campaign)
        if lead is not None:
            query = query.where(audit.c.lead_id == lead)
        with self._db.read() as connection:
            return [_entry(row) for row in connection.execute(query)]


def interventions(connection: sa.Connection, lead: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What operators did to a lead, oldest first; *lead* is in the shape of `reports.rows.lead_row`.

    A change of many leads is recorded with its filter and not with each lead. One whose filter matches the lead is
    included; `is_certain` says whether the lead was changed at exactly that time, or only may have been.
    """
    id_ = uuid.UUID(lead["id"])
    owned = sa.or_(audit.c.campaign_id.is_(None), audit.c.campaign_id == lead["campaign_id"])
    of_many = sa.and_(audit.c.lead_id.is_(None), audit.c.action.in_(_OF_MANY), owned)
    query = sa.select(audit).where(audit.c.at >= lead["accepted_at"], audit.c.changed > 0)
    query = query.where(sa.or_(audit.c.lead_id == id_, of_many)).order_by(audit.c.id.desc()).limit(_MOST_LOOKED_AT)
    found = []
    for entry in map(_entry, connection.execute(query)):
        is_certain = entry["lead_id"] == lead["id"] or entry["at"] == lead["changed_at"]
        if entry["lead_id"] is not None or _fits(entry["details"], lead):
            found.append(entry | {"is_certain": is_certain})
    return found[::-1]


def _fits(named: Mapping[str, Any], lead: Mapping[str, Any]) -> bool:
    """Whether a recorded `LeadFilter` matches a lead, by the fields of a lead that never change."""
    after, before = named.get("accepted_after"), named.get("accepted_before")
    return (
        lead["id"] in named.get("ids", [lead["id"]])
        and named.get("campaign", lead["campaign_id"]) == lead["campaign_id"]
        and named.get("phone", lead["phone"]) == lead["phone"]
        and named.get("key", lead["key"]) == lead["key"]
        and (after is None or datetime.fromisoformat(after) <= lead["accepted_at"])
        and (before is None or lead["accepted_at"] < datetime.fromisoformat(before))
    )


def _entry(row: Any) -> dict[str, Any]:
    return {
        "number": row.id,
        "at": row.at,
        "who": row.who,
        "via": row.via,
        "action": row.action,
        "campaign_id": row.campaign_id,
        "lead_id": str(row.lead_id) if row.lead_id else None,
        "details": orjson.loads(row.details),
        "changed": row.changed,
    }


def note(
    connection: sa.Connection,
    by: Actor | None,
    action: str,
    *,
    now: datetime,
    campaign_id: str | None = None,
    lead_id: uuid.UUID | None = None,
    details: Mapping[str, object] | None = None,
    changed: int | None = None,
) -> int | None:
    """Write an entry as a part of the caller's transaction, and return its number; without an actor write nothing."""
    if by is None:
        return None
    row = connection.execute(
        sa.insert(audit)
        .values(
            at=now,
            who=storable_text(by.name)[:80],
            via=by.via,
            action=action,
            campaign_id=campaign_id,
            lead_id=lead_id,
            details=orjson.dumps(details or {}, default=str, option=orjson.OPT_UTC_Z).decode(),
            changed=changed,
        )
        .returning(audit.c.id)
    )
    return int(row.scalar_one())
