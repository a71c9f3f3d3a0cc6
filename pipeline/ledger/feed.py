"""The feed of calls: every change of a call once, in an order that no reader can miss a part of.

A trigger marks a call in the transaction that changes it. The mark gets its number later, from a reader, when the
change is committed: numbers that the writers took themselves would become visible in another order than they were taken
in, and a reader would pass over the late ones for ever. Those who number hold the row of `feeds`, so one number is
committed before the next is given, and none is given twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa

from pipeline.ledger.database import Columns, Database
from pipeline.ledger.reports.rows import call_row
from pipeline.ledger.tables import call_changes, calls, feeds, leads

_FEED = "calls"
_OURS = feeds.c.name == _FEED
_NUMBERED_AT_ONCE = 10_000
_LOOKED_AT = 10_000  # changes that one page may pass over because a filter leaves them out
_NUMBERED: Columns = {"call_sid": sa.Text(), "number": sa.BigInteger()}
_CAMPAIGN = sa.func.coalesce(leads.c.campaign_id, calls.c.campaign_id)


class UnknownCursor(ValueError):
    """The cursor lies beyond the end of the feed: it is of another ledger, or of one that was set back since."""


@dataclass(frozen=True, slots=True)
class PageOfCalls:
    """A page of the feed."""

    calls: list[dict[str, Any]]
    """In the order of the feed; `details` is JSON that orjson writes as it is."""
    next: int
    """Where the next page begins."""
    more: bool
    """Whether the next page may be asked for at once."""


class Feed:
    """The statements on the feed. Each method commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def calls(self, *, after: int, limit: int, campaign: str | None = None, only_final: bool = False) -> PageOfCalls:
        """Up to *limit* calls that changed after the cursor, each as it is now, in the order of their numbers.

        A call that changed several times since comes once, at its last change. With a filter a page may be empty
        although there is `more`. Raises `UnknownCursor`.
        """
        numbered = self._number()
        place = sa.select(call_changes).where(call_changes.c.number > after).order_by(call_changes.c.number)
        most = limit if campaign is None and not only_final else _LOOKED_AT
        looked = place.limit(most).subquery()
        query = (
            sa.select(calls, looked.c.number, leads.c.key, _CAMPAIGN.label("campaign"))
            .select_from(looked)
            .join(calls, calls.c.call_sid == looked.c.call_sid)
            .outerjoin(leads, leads.c.id == calls.c.lead_id)
            .order_by(looked.c.number)
            .limit(limit)
        )
        if campaign is not None:
            query = query.where(sa.literal(campaign) == _CAMPAIGN)
        if only_final:
            query = query.where(calls.c.is_final)
        with self._db.one_moment() as connection:
            last = connection.scalar(sa.select(feeds.c.last).where(_OURS)) or 0
            if after > last:
                raise UnknownCursor(f"the cursor {after} lies beyond the end of this ledger's feed, {last}")
            seen, reached = connection.execute(sa.select(sa.func.count(), sa.func.max(looked.c.number))).one()
            rows = connection.execute(query).all()
        end: int = reached if seen == most else last
        if len(rows) == limit:
            end = rows[-1].number
        return PageOfCalls([_call(row) for row in rows], end, more=end < last or numbered == _NUMBERED_AT_ONCE)

    def _number(self) -> int:
        """Give the changes that are committed their numbers; return how many got one."""
        waiting = sa.select(call_changes.c.call_sid).where(call_changes.c.number.is_(None)).limit(_NUMBERED_AT_ONCE)
        with self._db.read() as connection:
            if connection.scalar(waiting.limit(1)) is None:
                return 0
        with self._db.write() as connection:
            connection.execute(self._db.insert(feeds).values(name=_FEED, last=0).on_conflict_do_nothing())
            mine = sa.select(feeds.c.last).where(_OURS).with_for_update()
            last: int = connection.execute(mine).scalar_one()
            # A statement after the lock: it sees what was numbered while the lock was waited for. A change whose
            # transaction is under way is locked or not visible; the next reader finds it.
            sids = connection.scalars(waiting.with_for_update(skip_locked=True)).all()
            if not sids:
                return 0
            given = self._db.rows("numbered", _NUMBERED)
            encoded = self._db.encode([{"call_sid": sid, "number": last + at} for at, sid in enumerate(sids, 1)])
            update = sa.update(call_changes).where(call_changes.c.call_sid == given.c.call_sid)
            connection.execute(update.values(number=given.c.number), {"numbered": encoded})
            connection.execute(sa.update(feeds).where(_OURS).values(last=last + len(sids)))
        return len(sids)


def _call(row: Any) -> dict[str, Any]:
    found = call_row(row) | {"details": orjson.Fragment(row.details)}
    told = {name: getattr(row, name) for name in ("phone", "futwork_lead_id", "reference")}
    lead = {"lead_id": str(row.lead_id) if row.lead_id else None, "key": row.key}
    return {"cursor": str(row.number), "campaign_id": row.campaign} | lead | told | found
