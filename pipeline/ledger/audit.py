"""The audit log: which person did what, written in the transaction of the deed, so that neither is there alone."""

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
        """Note a deed of several transactions before its first, and return the entry's number for `end`."""
        with self._db.write() as connection:
            return note(connection, by, action, details=details, now=now) or 0

    def end(self, number: int, *, changed: int) -> None:
        """Note how much the deed changed."""
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
        """What was done, newest first; *before* is the number of an entry to go on from."""
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.id < before)
        if campaign is not None:
            query = query.where(audit.c.campaign_id == campaign)
        if lead is not None:
            query = query.where(audit.c.lead_id == lead)
        with self._db.read() as connection:
            return [
                {
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
                for row in connection.execute(query)
            ]


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
    """Write an entry as a part of the caller's transaction, and return its number; nothing where nobody is named."""
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
