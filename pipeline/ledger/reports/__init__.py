"""What the ledger reports: totals, lists, and one lead's whole story. The commands and pages read only here."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta
from typing import Any

import orjson
import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger.audit import interventions
from pipeline.ledger.database import Database
from pipeline.ledger.filters import LeadFilter
from pipeline.ledger.reports.campaign import campaign_report
from pipeline.ledger.reports.listing import Place, list_leads
from pipeline.ledger.reports.overview import overview
from pipeline.ledger.reports.rows import (
    age,
    attempt_row,
    call_row,
    campaign_row,
    counts,
    event_row,
    every_state,
    lead_row,
    orphan_row,
)
from pipeline.ledger.reports.unclear import unclear_answers
from pipeline.ledger.tables import attempts, batches, call_events, calls, campaigns, leads, quarantine


class Reports:
    """Queries only. Everything comes back as plain values that JSON can hold, times as aware UTC."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def status(self, *, now: datetime) -> dict[str, Any]:
        """The whole pipeline in numbers, in the shape of `pipeline status --json`.

        `accepted` is what intake counted when it took the leads in; `leads` is counted from the leads as they are now.
        The two are kept apart on purpose: that they agree is the proof that none was lost.
        """
        with self._db.one_moment() as connection:
            accepted = connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(batches.c.accepted), 0)))
            by_campaign: dict[str, dict[str, int]] = {}
            for row in connection.execute(
                sa.select(leads.c.campaign_id, leads.c.state, sa.func.count().label("n")).group_by(
                    leads.c.campaign_id, leads.c.state
                )
            ):
                by_campaign.setdefault(row.campaign_id, {})[row.state] = row.n
            listed = [
                campaign_row(row) | {"leads": every_state(by_campaign.get(row.id, {}))}
                for row in connection.execute(sa.select(campaigns).order_by(campaigns.c.id))
            ]
            unclear = unclear_answers(connection)
            by_outcome: dict[str, int] = counts(
                connection.execute(
                    sa.select(calls.c.outcome, sa.func.count()).where(calls.c.is_final).group_by(calls.c.outcome)
                )
            )
            total = connection.scalar(sa.select(sa.func.count()).select_from(calls)) or 0
            open_calls = total - sum(by_outcome.values())
            oldest_due = connection.scalar(
                sa.select(sa.func.min(leads.c.due_at)).where(leads.c.state == LeadState.QUEUED, leads.c.due_at <= now)
            )
            oldest_uncertain = connection.scalar(
                sa.select(sa.func.min(leads.c.changed_at)).where(leads.c.state == LeadState.UNCERTAIN)
            )
            events = {
                "raw": connection.scalar(sa.select(sa.func.count()).select_from(call_events)) or 0,
                "quarantined": connection.scalar(
                    sa.select(sa.func.count()).select_from(quarantine).where(quarantine.c.released_at.is_(None))
                )
                or 0,
                "orphans": connection.scalar(
                    sa.select(sa.func.count()).select_from(calls).where(calls.c.lead_id.is_(None))
                )
                or 0,
            }
        totals: dict[str, int] = {}
        for by_state in by_campaign.values():
            for state, n in by_state.items():
                totals[state] = totals.get(state, 0) + n
        return {
            "accepted": int(accepted or 0),
            "leads": every_state(totals),
            "campaigns": listed,
            "calls": {"total": total, "open": open_calls, **by_outcome},
            "events": events,
            "unclear_answers": unclear,
            "oldest_due_seconds": age(oldest_due, now),
            "oldest_uncertain_seconds": age(oldest_uncertain, now),
        }

    def overview(self, *, now: datetime, within: timedelta | None = None) -> dict[str, Any]:
        """The state of everything, from counts that are kept up to date: milliseconds, however many leads there are.

        Its shape is in `pipeline.ledger.reports.overview`. With *within*, a statement that takes longer is
        given up (PostgreSQL), which raises one of `LedgerUnavailable`.
        """
        with self._db.one_moment(within=within) as connection:
            return overview(connection, now=now)

    def campaign(self, campaign_id: str, *, now: datetime) -> dict[str, Any] | None:
        """One campaign's figures, in the shape of `pipeline.ledger.reports.campaign`; None if it is unknown."""
        with self._db.one_moment() as connection:
            return campaign_report(connection, campaign_id, now=now)

    def page_of_leads(self, which: LeadFilter, *, limit: int, after: Place | None = None) -> list[dict[str, Any]]:
        """The leads that match, newest first, from *after* on, quickly also among millions."""
        with self._db.one_moment() as connection:
            return list_leads(connection, which, limit=limit, after=after)

    def unclear_answers(self) -> list[dict[str, Any]]:
        """By HTTP status: the POSTs whose answer proved nothing, and how many of them were taken."""
        with self._db.read() as connection:
            return unclear_answers(connection)

    def orphan(self, call_sid: str) -> dict[str, Any] | None:
        """One call without a lead, with its details, or None."""
        query = sa.select(calls).where(calls.c.call_sid == call_sid, calls.c.lead_id.is_(None))
        with self._db.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else call_row(row) | orphan_row(row)

    def campaigns(self) -> list[dict[str, Any]]:
        """Every campaign with its state, hold and policies."""
        with self._db.read() as connection:
            return [campaign_row(row) for row in connection.execute(sa.select(campaigns).order_by(campaigns.c.id))]

    def leads(self, which: LeadFilter, *, limit: int = 100) -> list[dict[str, Any]]:
        """The leads that match, newest first."""
        query = sa.select(leads).where(*which.where()).order_by(leads.c.accepted_at.desc(), leads.c.id).limit(limit)
        with self._db.read() as connection:
            return [lead_row(row) for row in connection.execute(query)]

    def attempts_by_outcome(self) -> dict[str, int]:
        """How many POSTs ended how."""
        with self._db.read() as connection:
            found = connection.execute(
                sa.select(attempts.c.outcome, sa.func.count()).group_by(attempts.c.outcome).order_by(attempts.c.outcome)
            )
            return counts(found)

    def troubles(self, *, limit: int = 5) -> list[dict[str, Any]]:
        """The latest attempts that were not accepted, newest first."""
        query = sa.select(attempts).where(attempts.c.outcome != "accepted").order_by(attempts.c.id.desc()).limit(limit)
        with self._db.read() as connection:
            return [attempt_row(row) | {"lead": str(row.lead_id)} for row in connection.execute(query)]

    def orphans(self, *, limit: int = 50) -> list[dict[str, Any]]:
        """The calls that no lead was found for, newest first, with what could lead to one."""
        query = sa.select(calls).where(calls.c.lead_id.is_(None))
        query = query.order_by(calls.c.last_event_at.desc(), calls.c.call_sid).limit(limit)
        with self._db.read() as connection:
            return [orphan_row(row) for row in connection.execute(query)]

    def story(self, id_: uuid.UUID) -> dict[str, Any] | None:
        """One lead's whole journey: the lead, its attempts, calls with what was said, events, and interventions."""
        with self._db.one_moment() as connection:
            row = connection.execute(sa.select(leads).where(leads.c.id == id_)).one_or_none()
            if row is None:
                return None
            tried = connection.execute(
                sa.select(attempts).where(attempts.c.lead_id == id_).order_by(attempts.c.started_at, attempts.c.id)
            )
            called = connection.execute(
                sa.select(calls).where(calls.c.lead_id == id_).order_by(calls.c.first_event_at, calls.c.call_sid)
            ).all()
            events = connection.execute(
                sa.select(call_events)
                .where(call_events.c.call_sid.in_([call.call_sid for call in called]))
                .order_by(call_events.c.received_at, call_events.c.digest)
            )
            lead = lead_row(row)
            return lead | {
                "data": orjson.loads(row.data),
                "attempts_made": [attempt_row(one) for one in tried],
                "calls": [call_row(one) for one in called],
                "events": [event_row(one) for one in events],
                "interventions": interventions(connection, lead),
            }

    def leads_of_futwork(self, text: str, *, limit: int) -> list[uuid.UUID]:
        """The ids of the leads that Futwork knows by this lead id, or by a call with this `callSid`."""
        own = sa.select(leads.c.id).where(leads.c.futwork_lead_id == text)
        by_call = sa.select(calls.c.lead_id).where(calls.c.call_sid == text, calls.c.lead_id.is_not(None))
        with self._db.read() as connection:
            return list(connection.scalars(sa.union(own, by_call).limit(limit)))
