"""The state of the whole pipeline, in the shape that the status pages and `pipeline top` show.

```
{"now": datetime,
 "accepted": 1000,                          # by intake's own count
 "leads": {"queued": 10, …every state…},    # by the states; accepted is their sum
 "adds_up": true,
 "campaigns": [{…as in `Reports.campaigns`…, "accepted": 1000, "leads": {…every state…},
                "calls": {"connected": 3, …}, "oldest_due_seconds": 1.5 | None,
                "uncertain": {"total": 2, "oldest_seconds": 61.0 | None,
                              "older_than": {"hour": 1, "day": 0}},
                "posts_last_minutes": {"accepted": 40, …}}],   # the last ten whole minutes
 "calls": {"total": 9, "open": 1, "connected": 3, …},
 "minutes": [{"at": datetime, "posts": {"accepted": 20, …}, "calls": {"connected": 4, …}}, …],
                                            # the last sixty, oldest first, the minute under way last
 "uncertain": {"total": 2, "oldest_seconds": 61.0 | None, "older_than": {"hour": 1, "day": 0}},
 "quarantined": 0, "orphans": 0,
 "oldest_due_seconds": 1.5 | None,          # over campaigns that are active
 "recount": {"at": datetime, "accepted": 1000, "leads": 1000, "differences": []} | None}
```

Counts are of tallies, which triggers keep; ages are the first entries of partial indexes. The limit is a setting, and
so is not in here: see `Settings.account_rate` and each campaign's `rate`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import orjson
import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger import rollups
from pipeline.ledger.reports.rows import age, campaign_row, every_state, state_is
from pipeline.ledger.tables import campaigns, leads, quarantine, recounts
from pipeline.ledger.tables import tallies as table

MINUTES = 60
RECENT = 10  # whole minutes whose average is the rate "now"
_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)


def overview(connection: sa.Connection, *, now: datetime) -> dict[str, Any]:
    """Read it at one moment."""
    counts = rollups.read(connection)
    since = now - timedelta(minutes=MINUTES - 1)
    posts = rollups.by_minute(connection, "post.", since=since, until=now)
    ended = rollups.by_minute(connection, "ended.", since=since, until=now)
    recent = _recent_by_campaign(connection, now)
    unsure = uncertain_by_campaign(connection, now)
    waiting = _oldest_due(connection, now)
    listed = [
        campaign_row(row)
        | {
            "accepted": counts.get((row.id, "accepted"), 0),
            "leads": every_state({state: counts.get((row.id, f"lead.{state}"), 0) for state in LeadState}),
            "calls": _named(counts, "call.", row.id),
            "oldest_due_seconds": age(waiting.get(row.id), now),
            "uncertain": unsure.get(row.id, no_uncertain()),
            "posts_last_minutes": recent.get(row.id, {}),
        }
        for row in connection.execute(sa.select(campaigns).order_by(campaigns.c.id))
    ]
    calls = _named(counts, "call.")
    orphans = calls.pop("orphan", 0)
    states = every_state(_named(counts, "lead."))
    accepted = sum(n for (_, name), n in counts.items() if name == "accepted")
    first = rollups.minute_of(since)
    return {
        "now": now,
        "accepted": accepted,
        "leads": states,
        "adds_up": accepted == sum(states.values()),
        "campaigns": listed,
        "calls": {"total": sum(calls.values()), "open": calls.pop("open", 0), **calls},
        "minutes": [
            {"at": rollups.moment_of(minute), "posts": posts.get(minute, {}), "calls": ended.get(minute, {})}
            for minute in range(first, first + MINUTES)
        ],
        "uncertain": _in_all(unsure),
        "quarantined": connection.scalar(
            sa.select(sa.func.count()).select_from(quarantine).where(quarantine.c.released_at.is_(None))
        )
        or 0,
        "orphans": orphans,
        "oldest_due_seconds": max(
            (one["oldest_due_seconds"] for one in listed if one["oldest_due_seconds"] and one["state"] == "active"),
            default=None,
        ),
        "recount": _last_recount(connection),
    }


def uncertain_by_campaign(connection: sa.Connection, now: datetime) -> dict[str, dict[str, Any]]:
    """How many leads are uncertain, how old the oldest is, and how many are older than an hour and a day."""

    def older(than: timedelta) -> Any:
        return sa.func.sum(sa.case((leads.c.changed_at < now - than, 1), else_=0))

    query = sa.select(
        leads.c.campaign_id,
        sa.func.count().label("n"),
        sa.func.min(leads.c.changed_at).label("oldest"),
        older(_HOUR).label("hour"),
        older(_DAY).label("day"),
    )
    found = connection.execute(query.where(state_is(LeadState.UNCERTAIN)).group_by(leads.c.campaign_id))
    return {
        row.campaign_id: {
            "total": row.n,
            "oldest_seconds": age(row.oldest, now),
            "older_than": {"hour": int(row.hour), "day": int(row.day)},
        }
        for row in found
    }


def no_uncertain() -> dict[str, Any]:
    """Of a campaign none of whose leads are uncertain."""
    return {"total": 0, "oldest_seconds": None, "older_than": {"hour": 0, "day": 0}}


def _in_all(by_campaign: dict[str, dict[str, Any]]) -> dict[str, Any]:
    parts = list(by_campaign.values())
    return {
        "total": sum(one["total"] for one in parts),
        "oldest_seconds": max((one["oldest_seconds"] for one in parts), default=None),
        "older_than": {name: sum(one["older_than"][name] for one in parts) for name in ("hour", "day")},
    }


def _oldest_due(connection: sa.Connection, now: datetime) -> dict[str, Any]:
    """Since when each campaign's longest waiting lead is due: one index lookup for each campaign."""
    first = (
        sa.select(sa.func.min(leads.c.due_at))
        .where(leads.c.campaign_id == campaigns.c.id, state_is(LeadState.QUEUED), leads.c.due_at <= now)
        .correlate(campaigns)
        .scalar_subquery()
    )
    return {row.id: row.due for row in connection.execute(sa.select(campaigns.c.id, first.label("due"))) if row.due}


def _recent_by_campaign(connection: sa.Connection, now: datetime) -> dict[str, dict[str, int]]:
    this = rollups.minute_of(now)
    query = (
        sa.select(table.c.campaign_id, table.c.name, sa.func.sum(table.c.n).label("n"))
        .where(table.c.minute >= this - RECENT, table.c.minute < this, table.c.name.like("post.%"))
        .group_by(table.c.campaign_id, table.c.name)
    )
    found: dict[str, dict[str, int]] = {}
    for row in connection.execute(query):
        found.setdefault(row.campaign_id, {})[row.name.removeprefix("post.")] = int(row.n)
    return found


def _named(counts: dict[tuple[str, str], int], prefix: str, campaign: str | None = None) -> dict[str, int]:
    found: dict[str, int] = {}
    for (owner, name), n in sorted(counts.items()):
        if name.startswith(prefix) and campaign in (None, owner):
            found[name.removeprefix(prefix)] = found.get(name.removeprefix(prefix), 0) + n
    return found


def _last_recount(connection: sa.Connection) -> dict[str, Any] | None:
    row = connection.execute(sa.select(recounts).order_by(recounts.c.at.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    return {
        "at": row.at,
        "accepted": row.accepted,
        "leads": row.leads,
        "differences": orjson.loads(row.differences),
    }
