"""The do-not-call list: numbers that must not be called, in every campaign or in one.

Three places read it. Intake takes in a lead whose number is on it as `suppressed`. `add` moves the leads that are
queued already. The claim reads it again, in its own statement: what puts a lead into `queued` while its number is
being added (a batch, an answer after which it is tried again, an operator's retry) need not know the list, because
nothing is posted that was not claimed. A claim that began before `add` committed counts as sent already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger.database import Columns, Database, UtcDateTime, storable_text
from pipeline.ledger.tables import leads, suppressions
from pipeline.observability.logs import logger

log = logger(__name__)

EVERYWHERE = ""
"""In the place of a campaign: the number is suppressed in all of them. A key cannot hold a null."""

_PORTION = 500  # numbers in one transaction; each may move a few leads
_ENTRY: Columns = {
    "phone": sa.Text(),
    "campaign_id": sa.Text(),
    "reason": sa.Text(),
    "source": sa.Text(),
    "since": UtcDateTime(),
}


@dataclass(frozen=True, slots=True)
class Suppressed:
    """What an addition or a removal changed: entries of the list, and leads that were taken out."""

    entries: int
    leads: int


def why_suppressed(phone: sa.ColumnElement[str], campaign_id: Any) -> sa.ScalarSelect[str]:
    """The reason of the entry that a number has for a campaign, or null: one lookup in the list's key for each row.

    As a value and with a limit, not as EXISTS: PostgreSQL would turn that into a join, and might read the whole list
    for a claim of a hundred leads.
    """
    mine: sa.Select[tuple[str]] = sa.select(sa.literal_column("'suppressed: '") + suppressions.c.reason).where(
        suppressions.c.phone == phone, suppressions.c.campaign_id.in_([sa.literal_column("''"), campaign_id])
    )
    return mine.order_by(suppressions.c.campaign_id).limit(1).correlate_except(suppressions).scalar_subquery()


class Suppressions:
    """The statements on the do-not-call list."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._upsert = self._build_upsert()

    def add(
        self,
        phones: Sequence[str],
        *,
        campaign: str | None,
        reason: str,
        source: str,
        now: datetime,
        dry_run: bool = False,
    ) -> Suppressed:
        """Put numbers in E.164 on the list, and take their queued leads out. Safe to repeat: what is listed stays.

        A portion is one transaction. When this returns, none of the numbers is claimed any more; a lead that a
        dispatcher holds at this moment is out already, and is not sent a second time should it come back.
        """
        entries = moved = 0
        where = campaign or EVERYWHERE
        unique = sorted(set(phones))
        for start in range(0, len(unique), _PORTION):
            some = unique[start : start + _PORTION]
            if dry_run:
                counted = self._count(some, where)
                entries, moved = entries + counted.entries, moved + counted.leads
                continue
            rows = [
                {"phone": one, "campaign_id": where, "reason": storable_text(reason)}
                | {"source": storable_text(source), "since": now}
                for one in some
            ]
            with self._db.write() as connection:
                entries += len(connection.execute(self._upsert, {"entries": self._db.encode(rows)}).all())
                moved += self._take_out(connection, some, where, now)
        if entries and not dry_run:
            self._refresh_plans()
        return Suppressed(entries, moved)

    def remove(self, phones: Sequence[str], *, campaign: str | None, dry_run: bool = False) -> int:
        """Take numbers off the list; their leads stay as they are until `retry` queues them again."""
        removed = 0
        unique = sorted(set(phones))
        for start in range(0, len(unique), _PORTION):
            some = unique[start : start + _PORTION]
            mine = (suppressions.c.phone.in_(some), suppressions.c.campaign_id == (campaign or EVERYWHERE))
            if dry_run:
                with self._db.read() as connection:
                    query = sa.select(sa.func.count()).select_from(suppressions).where(*mine)
                    removed += connection.scalar(query) or 0
                continue
            with self._db.write() as connection:
                removed += connection.execute(sa.delete(suppressions).where(*mine)).rowcount
        return removed

    def listed(self, *, phone: str | None = None, campaign: str | None = None, limit: int) -> list[dict[str, Any]]:
        """The entries, newest first; *campaign* asks for those that hold in it, so also for those of all campaigns."""
        query = sa.select(suppressions)
        if phone:
            query = query.where(suppressions.c.phone == phone)
        if campaign:
            query = query.where(suppressions.c.campaign_id.in_([EVERYWHERE, campaign]))
        query = query.order_by(suppressions.c.since.desc(), suppressions.c.phone, suppressions.c.campaign_id)
        with self._db.read() as connection:
            return [_entry(row) for row in connection.execute(query.limit(limit))]

    def _build_upsert(self) -> Any:
        given = self._db.rows("entries", _ENTRY)
        chosen = sa.select(*(given.c[name] for name in _ENTRY)).where(sa.true())
        insert = self._db.insert(suppressions).from_select(list(_ENTRY), chosen).on_conflict_do_nothing()
        return insert.returning(suppressions.c.phone)

    def _take_out(self, connection: sa.Connection, phones: Sequence[str], campaign: str, now: datetime) -> int:
        """Move the queued leads of these numbers, locked in the order of ids as a record and a merge do."""
        mine = sa.select(leads.c.id).where(*_queued(phones, campaign)).order_by(leads.c.id)
        ids = connection.scalars(mine.with_for_update(key_share=True)).all()
        for some in _chunks(ids):
            connection.execute(
                sa.update(leads)
                .where(leads.c.id.in_(some))
                .values(
                    state=LeadState.SUPPRESSED,
                    changed_at=now,
                    reason=why_suppressed(leads.c.phone, leads.c.campaign_id),
                )
            )
        if ids:
            log.info("leads suppressed", leads=ids)
        return len(ids)

    def _count(self, phones: Sequence[str], campaign: str) -> Suppressed:
        known = sa.select(sa.func.count()).select_from(suppressions)
        known = known.where(suppressions.c.phone.in_(phones), suppressions.c.campaign_id == campaign)
        queued = sa.select(sa.func.count()).select_from(leads).where(*_queued(phones, campaign))
        with self._db.read() as connection:
            return Suppressed(len(phones) - (connection.scalar(known) or 0), connection.scalar(queued) or 0)

    def _refresh_plans(self) -> None:
        """Let the planner know how long the list is now: a plan made for an empty one would read all of it."""
        if not self._db.is_sqlite:
            with self._db.write() as connection:
                connection.execute(sa.text("ANALYZE suppressions"))


def _queued(phones: Sequence[str], campaign: str) -> list[sa.ColumnElement[bool]]:
    where: list[sa.ColumnElement[bool]] = [leads.c.phone.in_(phones), leads.c.state == LeadState.QUEUED]
    return where if campaign == EVERYWHERE else [*where, leads.c.campaign_id == campaign]


def _chunks(ids: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (ids[start : start + _PORTION] for start in range(0, len(ids), _PORTION))


def _entry(row: Any) -> dict[str, Any]:
    return {
        "phone": row.phone,
        "campaign_id": row.campaign_id or None,
        "reason": row.reason,
        "source": row.source,
        "since": row.since,
    }
