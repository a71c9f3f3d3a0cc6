"""One campaign's figures: its funnel, its rate, what became of its calls, how long its leads wait."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger import rollups
from pipeline.ledger.reports.overview import MINUTES, RECENT, no_uncertain, uncertain_by_campaign
from pipeline.ledger.reports.rows import age, campaign_row, every_state, state_is
from pipeline.ledger.reports.unclear import unclear_answers
from pipeline.ledger.tables import calls, campaigns, leads

_SAMPLE = 300  # leads whose waits are measured: the newest, so that the figure is current
_DISPOSITIONS = 12


def campaign_report(connection: sa.Connection, campaign_id: str, *, now: datetime) -> dict[str, Any] | None:
    """What the campaign's page shows, or None if there is no such campaign.

    Beside what `overview` has of it: `minutes` as there, `dispositions` by number, `rest` (how many did not fit in),
    `unclear_answers` as `pipeline.ledger.reports.unclear` has them,
    `waits` with the median and the 95th percentile in seconds until submission and until the first event of a call, and
    `left` with the leads that still go out and how many seconds they take at the rate of the last ten minutes.
    """
    row = connection.execute(sa.select(campaigns).where(campaigns.c.id == campaign_id)).one_or_none()
    if row is None:
        return None
    counts = {name: n for (_, name), n in rollups.read(connection, campaign=campaign_id).items()}
    since = now - timedelta(minutes=MINUTES - 1)
    posts = rollups.by_minute(connection, "post.", since=since, until=now, campaign=campaign_id)
    ended = rollups.by_minute(connection, "ended.", since=since, until=now, campaign=campaign_id)
    states = every_state({state: counts.get(f"lead.{state}", 0) for state in LeadState})
    outcomes = {name.removeprefix("call."): n for name, n in sorted(counts.items()) if name.startswith("call.")}
    outcomes.pop("orphan", None)
    said = sorted(
        ((name.removeprefix("disposition."), n) for name, n in counts.items() if name.startswith("disposition.")),
        key=lambda one: (-one[1], one[0]),
    )
    first, this = rollups.minute_of(since), rollups.minute_of(now)
    recent = sum(posts.get(minute, {}).get("accepted", 0) for minute in range(this - RECENT, this))
    waiting = states["queued"] + states["sending"]
    oldest = sa.select(sa.func.min(leads.c.due_at)).where(
        leads.c.campaign_id == campaign_id, state_is(LeadState.QUEUED), leads.c.due_at <= now
    )
    return campaign_row(row) | {
        "accepted": counts.get("accepted", 0),
        "leads": states,
        "calls": outcomes,
        "dispositions": dict(said[:_DISPOSITIONS]),
        "rest": sum(n for _, n in said[_DISPOSITIONS:]),
        "minutes": [
            {"at": rollups.moment_of(minute), "posts": posts.get(minute, {}), "calls": ended.get(minute, {})}
            for minute in range(first, first + MINUTES)
        ],
        "uncertain": uncertain_by_campaign(connection, now).get(campaign_id, no_uncertain()),
        "unclear_answers": unclear_answers(connection, campaign=campaign_id),
        "oldest_due_seconds": age(connection.scalar(oldest), now),
        "waits": _waits(connection, campaign_id),
        "per_minute": recent / RECENT,
        "left": {
            "leads": waiting,
            "seconds": waiting / recent * RECENT * 60 if recent and row.state == "active" else None,
        },
    }


def _waits(connection: sa.Connection, campaign_id: str) -> dict[str, Any]:
    sent = _newest(connection, campaign_id, LeadState.SUBMITTED) + _newest(connection, campaign_id, LeadState.CALLED)
    sent = sorted(sent, key=lambda row: row.accepted_at, reverse=True)[:_SAMPLE]
    to_submit = [(row.submitted_at - row.accepted_at).total_seconds() for row in sent if row.submitted_at]
    accepted_at = {row.id: row.accepted_at for row in _newest(connection, campaign_id, LeadState.CALLED)}
    first = sa.select(calls.c.lead_id, calls.c.first_event_at).where(calls.c.lead_id.in_(accepted_at))
    to_call: dict[Any, float] = {}
    for row in connection.execute(first) if accepted_at else ():
        wait = (row.first_event_at - accepted_at[row.lead_id]).total_seconds()
        to_call[row.lead_id] = min(wait, to_call.get(row.lead_id, wait))
    return {"submitted": _middle(to_submit), "called": _middle(list(to_call.values()))}


def _newest(connection: sa.Connection, campaign_id: str, state: LeadState) -> list[Any]:
    query = sa.select(leads.c.id, leads.c.accepted_at, leads.c.submitted_at).where(
        leads.c.campaign_id == campaign_id, leads.c.state == state
    )
    return list(connection.execute(query.order_by(leads.c.accepted_at.desc()).limit(_SAMPLE)))


def _middle(waits: list[float]) -> dict[str, Any]:
    ordered = sorted(max(0.0, wait) for wait in waits)
    if not ordered:
        return {"leads": 0, "median_seconds": None, "p95_seconds": None}
    return {
        "leads": len(ordered),
        "median_seconds": ordered[len(ordered) // 2],
        "p95_seconds": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
    }
