"""Where evidence about a lead of unknown fate may still lie unread: in quarantine, or in a call without a lead.

While it may, no policy decides about the lead: it waits, and its reason says for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from pipeline.ledger.database import CLOCKS_APART, Columns, Database, UtcDateTime
from pipeline.ledger.tables import calls, leads, quarantine

_MOST_READ = 1000  # bodies of one round; of more, the rest counts as one that may be about any lead
_EARLIER = CLOCKS_APART  # an event may be older than its lead by as much as the clocks of two hosts differ
_UNREAD: Columns = {"campaign_id": sa.Text(), "phone": sa.Text(), "received_at": UtcDateTime()}
_KINDS = ("event", "batch", "message")  # of what is quarantined: a row of kind `lead` is no evidence


@dataclass(frozen=True, slots=True)
class Unread:
    """Something in quarantine that may be about a lead; None where it cannot be read, which may be any."""

    campaign_id: str | None
    phone: str | None
    received_at: datetime


class Evidence:
    """Which leads evidence may still be about."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def quarantined(self) -> tuple[list[tuple[bytes, datetime]], datetime | None]:
        """The newest bodies that wait in quarantine and may be events, each with the time of its receipt.

        With it the newest time of those that were left out because there are too many, or None.
        """
        waiting = (quarantine.c.released_at.is_(None), quarantine.c.kind.in_(_KINDS))
        query = sa.select(quarantine.c.body, quarantine.c.received_at).where(*waiting)
        with self._db.read() as connection:
            found = connection.execute(query.order_by(quarantine.c.received_at.desc()).limit(_MOST_READ + 1)).all()
        rest = found[_MOST_READ].received_at if len(found) > _MOST_READ else None
        return [(bytes(row.body), row.received_at) for row in found[:_MOST_READ]], rest

    def parameter(self, unread: Sequence[Unread]) -> dict[str, str]:
        """The parameter that `may_exist` needs."""
        return {"unread": self._db.encode([asdict(one) for one in unread])}

    def may_exist(self) -> sa.ColumnElement[bool]:
        """Whether unread evidence may be about the lead of the statement's row; pass `parameter` with it."""
        orphan = sa.exists().where(
            calls.c.lead_id.is_(None),
            _later_than_its_lead(self._db, calls.c.last_event_at),
            _of_its_lead(calls.c.campaign_id, calls.c.phone),
        )
        unread = self._db.rows("unread", _UNREAD)
        quarantined = sa.exists().where(
            _later_than_its_lead(self._db, unread.c.received_at),
            _of_its_lead(unread.c.campaign_id, unread.c.phone),
        )
        return sa.or_(orphan.correlate(leads), quarantined.correlate(leads))


def _of_its_lead(campaign_id: Any, phone: Any) -> sa.ColumnElement[bool]:
    return sa.and_(
        sa.or_(campaign_id.is_(None), campaign_id == leads.c.campaign_id),
        sa.or_(phone.is_(None), phone == leads.c.phone),
    )


def _later_than_its_lead(database: Database, moment: Any) -> sa.ColumnElement[bool]:
    """Whether something came after the lead did: an event of an earlier call is not about its POST."""
    if database.is_sqlite:
        seconds = f"-{_EARLIER / timedelta(seconds=1):.0f} seconds"
        return moment >= sa.func.strftime("%Y-%m-%dT%H:%M:%fZ", leads.c.accepted_at, seconds)  # type: ignore[no-any-return]
    return moment >= leads.c.accepted_at - sa.literal(_EARLIER)  # type: ignore[no-any-return]
