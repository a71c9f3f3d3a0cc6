"""Counts kept up to date: leads by state, calls by outcome, submissions by minute, without counting a million rows.

Triggers keep them in the transactions that change what is counted (the migration 0002 has them), so they are right at
every moment, whatever writes. On PostgreSQL each transaction adds rows of its own and waits for no other; `compact`
adds those up. They prove nothing by themselves: `verify` compares them with the rows, and `Reports.status` does not
use them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import sqlalchemy as sa

from pipeline.ledger.database import Database
from pipeline.ledger.tables import batches, leads, recounts, tallies

EVER = 0
"""The minute under which the totals are counted."""

KEPT = timedelta(days=8)
"""How long counts by minute are kept: a week to compare with, and a day to do it."""

_COMPACTED_AT_ONCE = 20_000  # rows; adding them up takes some fifty milliseconds
_LOCK = 727276  # PostgreSQL's advisory lock of `compact`: one at a time


@dataclass(frozen=True, slots=True)
class Recount:
    """What a recount found; `differences` has campaign, name and by how much the tally was wrong."""

    accepted: int
    leads: int
    differences: list[dict[str, Any]]


class Rollups:
    """The statements on the counts. Each method is one transaction, or several that are complete in themselves."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def compact(self, *, now: datetime) -> int:
        """Add up the rows that transactions left and drop minutes that are too old; return how many rows were added up.

        Safe at any time and from several hosts; without it the counts stay right and reading them grows slower.
        """
        added_up = 0
        if not self._db.is_sqlite:
            while (some := self._compact_some()) == _COMPACTED_AT_ONCE:
                added_up += some
            added_up += some
        oldest = minute_of(now - KEPT)
        with self._db.read() as connection:
            stale = sa.select(tallies.c.minute).where(tallies.c.minute > EVER, tallies.c.minute < oldest).limit(1)
            if connection.scalar(stale) is None:
                return added_up
        with self._db.write() as connection:
            connection.execute(sa.delete(tallies).where(tallies.c.minute > EVER, tallies.c.minute < oldest))
        return added_up

    def _compact_some(self) -> int:
        keys = [tallies.c.minute, tallies.c.campaign_id, tallies.c.name]
        some = sa.select(*tallies.primary_key.columns).where(tallies.c.part != 0).limit(_COMPACTED_AT_ONCE)
        taken = (
            sa.delete(tallies)
            .where(sa.tuple_(*tallies.primary_key.columns).in_(some))
            .returning(*keys, tallies.c.n)
            .cte("taken")
        )
        mine = [taken.c[key.name] for key in keys]
        added = sa.select(*mine, sa.literal(0), sa.func.sum(taken.c.n)).group_by(*mine)
        upsert = self._db.insert(tallies).from_select([*(key.name for key in keys), "part", "n"], added)
        upsert = upsert.on_conflict_do_update(
            index_elements=list(tallies.primary_key.columns), set_={"n": tallies.c.n + upsert.excluded.n}
        )
        counted = sa.select(sa.func.count()).select_from(some.subquery())
        with self._db.write() as connection:
            if not connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_LOCK))):
                return 0  # another host compacts
            found = connection.scalar(counted) or 0
            if found:
                connection.execute(upsert)
        return found

    def verified_at(self) -> datetime | None:
        """When the tallies were last compared with the leads."""
        with self._db.read() as connection:
            return connection.scalar(sa.select(recounts.c.at).order_by(recounts.c.at.desc()).limit(1))

    def verify(self, *, now: datetime) -> Recount:
        """Count every lead and batch, compare the tallies with them, and correct those that differ.

        Everything is read at one moment, and the difference is added, so that what happens meanwhile stays counted. A
        difference is a bug or a change by hand: it is kept in `recounts` for a person to see.
        """
        started = time.monotonic()
        with self._db.one_moment() as connection:
            counted = {
                (row.campaign_id, f"lead.{row.state}"): int(row.n)
                for row in connection.execute(
                    sa.select(leads.c.campaign_id, leads.c.state, sa.func.count().label("n")).group_by(
                        leads.c.campaign_id, leads.c.state
                    )
                )
            }
            in_all = sum(counted.values())
            taken_in = {
                (row.campaign_id, "accepted"): int(row.n)
                for row in connection.execute(
                    sa.select(batches.c.campaign_id, sa.func.sum(batches.c.accepted).label("n")).group_by(
                        batches.c.campaign_id
                    )
                )
            }
            counted |= taken_in
            believed = {
                (campaign, name): n
                for (campaign, name), n in read(connection).items()
                if name == "accepted" or name.startswith("lead.")
            }
        differences = [
            {"campaign_id": campaign, "name": name, "by": by}
            for campaign, name in sorted(counted.keys() | believed.keys())
            if (by := counted.get((campaign, name), 0) - believed.get((campaign, name), 0))
        ]
        accepted = sum(taken_in.values())
        with self._db.write() as connection:
            for one in differences:
                upsert = self._db.insert(tallies).values(
                    minute=EVER, campaign_id=one["campaign_id"], name=one["name"], part=0, n=one["by"]
                )
                connection.execute(
                    upsert.on_conflict_do_update(
                        index_elements=list(tallies.primary_key.columns), set_={"n": tallies.c.n + upsert.excluded.n}
                    )
                )
            connection.execute(
                self._db.insert(recounts)
                .values(
                    at=now,
                    took_ms=round((time.monotonic() - started) * 1000),
                    accepted=accepted,
                    leads=in_all,
                    differences=orjson.dumps(differences).decode(),
                )
                .on_conflict_do_nothing()
            )
            connection.execute(sa.delete(recounts).where(recounts.c.at < now - KEPT))
        return Recount(accepted, in_all, differences)


def read(connection: sa.Connection, *, campaign: str | None = None) -> dict[tuple[str, str], int]:
    """Every total count by campaign and name, without those that are zero."""
    query = sa.select(tallies.c.campaign_id, tallies.c.name, sa.func.sum(tallies.c.n).label("n"))
    query = query.where(tallies.c.minute == EVER).group_by(tallies.c.campaign_id, tallies.c.name)
    if campaign is not None:
        query = query.where(tallies.c.campaign_id == campaign)
    return {(row.campaign_id, row.name): int(row.n) for row in connection.execute(query) if row.n}


def by_minute(
    connection: sa.Connection, prefix: str, *, since: datetime, until: datetime, campaign: str | None = None
) -> dict[int, dict[str, int]]:
    """Counts by minute since 1970, then by what follows *prefix* in their names; minutes without any are left out."""
    query = sa.select(tallies.c.minute, tallies.c.name, sa.func.sum(tallies.c.n).label("n"))
    query = query.where(
        tallies.c.minute >= minute_of(since), tallies.c.minute <= minute_of(until), tallies.c.name.like(f"{prefix}%")
    ).group_by(tallies.c.minute, tallies.c.name)
    if campaign is not None:
        query = query.where(tallies.c.campaign_id == campaign)
    found: dict[int, dict[str, int]] = {}
    for row in connection.execute(query):
        if row.n:
            found.setdefault(row.minute, {})[row.name.removeprefix(prefix)] = int(row.n)
    return found


def minute_of(moment: datetime) -> int:
    """The minute of a time, counted from 1970."""
    return int(moment.timestamp() // 60)


def moment_of(minute: int) -> datetime:
    """The beginning of a minute counted from 1970."""
    return datetime.fromtimestamp(minute * 60, UTC)
