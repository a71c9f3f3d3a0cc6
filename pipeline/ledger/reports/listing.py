"""Lists of leads, newest first, quick however many leads there are.

The index on campaign, state and time gives the newest of one campaign in one state. The tallies say which of those
pairs have leads at all, so the newest of several are the newest among the first few of each.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pipeline.domain.lead import LeadState, lead_id
from pipeline.ledger import rollups
from pipeline.ledger.database import UtcDateTime
from pipeline.ledger.filters import LeadFilter
from pipeline.ledger.reports.rows import lead_row
from pipeline.ledger.tables import campaigns, leads

_PAIRS_AT_ONCE = 100  # in one statement; SQLite takes no more than 500

_SHOWN = [column for column in leads.columns if column.name != "data"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page of the list ended: the time and the id of its last lead."""

    accepted_at: datetime
    id: uuid.UUID


def list_leads(
    connection: sa.Connection, which: LeadFilter, *, limit: int, after: Place | None = None
) -> list[dict[str, Any]]:
    """The leads that match, newest first, from *after* on."""
    which = _by_id(connection, which)
    where = which.where()
    if after is not None:
        place = sa.tuple_(sa.literal(after.accepted_at, UtcDateTime()), sa.literal(after.id, sa.Uuid()))
        where.append(sa.tuple_(leads.c.accepted_at, leads.c.id) < place)
    if which.ids or which.phone:
        query = sa.select(*_SHOWN).where(*where)
        rows = connection.execute(query.order_by(leads.c.accepted_at.desc(), leads.c.id.desc()).limit(limit)).all()
        return [lead_row(row) for row in rows]
    newest: list[Any] = []
    for pairs in _chunks(_pairs(connection, which)):
        parts = []
        for campaign, state in pairs:  # two columns alone: a statement of a hundred parts is also work to compile
            first = sa.select(leads.c.id, leads.c.accepted_at)
            first = first.where(*where, leads.c.campaign_id == campaign, leads.c.state == state)
            first = first.order_by(leads.c.accepted_at.desc(), leads.c.id.desc()).limit(limit)
            parts.append(sa.select(first.subquery()))
        newest += connection.execute(sa.union_all(*parts)).all()
    newest.sort(key=lambda row: (row.accepted_at, row.id.hex), reverse=True)
    ids = [row.id for row in newest[:limit]]
    found = {row.id: row for row in connection.execute(sa.select(*_SHOWN).where(leads.c.id.in_(ids)))}
    return [lead_row(found[id_]) for id_ in ids]


def _by_id(connection: sa.Connection, which: LeadFilter) -> LeadFilter:
    """The same filter by ids if it names a key: an id is derived from campaign and key, and a key has no index."""
    if not which.key or which.ids:
        return which
    owners = [which.campaign] if which.campaign else list(connection.scalars(sa.select(campaigns.c.id)))
    no_lead = uuid.UUID(int=0)  # of a ledger without campaigns
    return replace(which, ids=tuple(lead_id(owner, which.key) for owner in owners) or (no_lead,))


def _pairs(connection: sa.Connection, which: LeadFilter) -> list[tuple[str, str]]:
    states = {state.value for state in which.states or LeadState}
    return [
        (campaign, name.removeprefix("lead."))
        for campaign, name in sorted(rollups.read(connection, campaign=which.campaign))
        if name.startswith("lead.") and name.removeprefix("lead.") in states
    ]


def _chunks(pairs: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    return (pairs[start : start + _PAIRS_AT_ONCE] for start in range(0, len(pairs), _PAIRS_AT_ONCE))
