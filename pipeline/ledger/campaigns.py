"""Campaigns in the ledger: policies, holds with their probes, and the runs that lead to a hold."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from pipeline.domain.campaign import Campaign, CampaignState, Hold, HoldKind, Runs, probe_interval
from pipeline.ledger.audit import Actor, note
from pipeline.ledger.database import CLOCKS_APART, Database
from pipeline.ledger.tables import campaigns
from pipeline.settings import Rate, Settings

_POLICIES = frozenset(
    {"account", "rate", "on_uncertain", "uncertain_after_seconds", "on_server_error", "max_attempts"}
    | {"lead_max_age_seconds"}
)
_ACCOUNT_WIDE = (HoldKind.REFUSED_KEY.value, HoldKind.NO_KEY.value)


class Campaigns:
    """The statements on campaigns. Each method is one transaction and commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def get(self, campaign_id: str) -> Campaign | None:
        """The campaign as it stands, or None if the ledger has never heard of it."""
        with self._db.read() as connection:
            row = connection.execute(sa.select(campaigns).where(campaigns.c.id == campaign_id)).one_or_none()
        return None if row is None else _campaign(row)

    def ensure(self, campaign_id: str, *, now: datetime) -> Campaign:
        """The campaign, created with default policies at its first lead."""
        known = self.get(campaign_id)
        if known is not None:
            return known
        with self._db.write() as connection:
            connection.execute(
                self._db.insert(campaigns).values(id=campaign_id, created_at=now).on_conflict_do_nothing()
            )
        return self.get(campaign_id) or Campaign(campaign_id)

    def change(
        self, campaign_id: str, policies: Mapping[str, object], *, now: datetime, by: Actor | None = None
    ) -> Campaign:
        """Set policies of a campaign (creating it if need be); None sets one back to the setting's default."""
        unknown = set(policies) - _POLICIES
        if unknown:
            raise ValueError(f"no such policy: {', '.join(sorted(unknown))}")
        self.ensure(campaign_id, now=now)
        values = {name: str(value) if isinstance(value, Rate) else value for name, value in policies.items()}
        if "account" in values:
            values["account"] = values["account"] or Campaign(campaign_id).account
        if values:
            with self._db.write() as connection:
                connection.execute(sa.update(campaigns).where(campaigns.c.id == campaign_id).values(**values))
                note(connection, by, "campaign set", campaign_id=campaign_id, details=values, now=now)
        return self.get(campaign_id) or Campaign(campaign_id)

    def pause(self, campaign_id: str, *, reason: str, now: datetime, by: Actor | None = None) -> bool:
        """Stop a campaign until an operator resumes it; a hold that it was under is forgotten. False if unknown."""
        with self._db.write() as connection:
            changed = connection.execute(
                sa.update(campaigns)
                .where(campaigns.c.id == campaign_id, campaigns.c.state != CampaignState.PAUSED)
                .values(state=CampaignState.PAUSED, hold_kind=None, hold_reason=reason, stopped_at=now, probe_at=None)
            ).rowcount
            if changed:
                note(connection, by, "campaign pause", campaign_id=campaign_id, details={"reason": reason}, now=now)
        return bool(changed)

    def resume(self, campaign_id: str, *, by: Actor | None = None, now: datetime | None = None) -> bool:
        """Make a paused or held campaign active again, its runs forgotten. False if it was active or is unknown."""
        with self._db.write() as connection:
            row = lock(connection, campaign_id)
            changed = _make_active(connection, campaigns.c.id == campaign_id) > 0
            if changed:
                was = {"was": row.hold_kind or row.state, "reason": row.hold_reason}
                at = now or datetime.now(UTC)
                note(connection, by, "campaign resume", campaign_id=campaign_id, details=was, now=at)
        return changed

    def hold(self, campaign_id: str, reason: Hold, *, probe_at: datetime, now: datetime) -> None:
        """Hold a campaign (and, for a refused key, its account) outside a record, such as for a missing key."""
        with self._db.write() as connection:
            hold(connection, campaign_id, reason, probe_at=probe_at, now=now)

    def take_probe(self, campaign_id: str, settings: Settings, *, now: datetime) -> bool:
        """Take the probe that is due, if no other dispatcher took it first, and set the time of the next one.

        A probe of a refused key stands for the whole account: its other campaigns wait for what it finds.
        """
        with self._db.write() as connection:
            row = lock(connection, campaign_id, with_account=True)
            if row is None or row.state != CampaignState.HELD or row.probe_at is None or row.probe_at > now:
                return False
            due = now + probe_interval(row.probes, settings)
            where = campaigns.c.id == campaign_id
            if row.hold_kind in _ACCOUNT_WIDE:
                where = (campaigns.c.account == row.account) & campaigns.c.hold_kind.in_(_ACCOUNT_WIDE)
            connection.execute(
                sa.update(campaigns)
                .where(where, campaigns.c.state == CampaignState.HELD)
                .values(probe_at=due, probes=campaigns.c.probes + 1)
            )
        return True

    def take_back_the_future(self, *, longest: timedelta, now: datetime) -> int:
        """Let probes be due that are further ahead than the *longest* interval: the clock went back since."""
        with self._db.write() as connection:
            return connection.execute(
                sa.update(campaigns)
                .where(campaigns.c.state == CampaignState.HELD, campaigns.c.probe_at > now + longest + CLOCKS_APART)
                .values(probe_at=now)
            ).rowcount


# Parts of a larger transaction: `Leads.record` counts and holds in the transaction that writes the outcomes.


def lock(connection: sa.Connection, campaign_id: str, *, with_account: bool = False) -> Any:
    """The campaign's row, locked until the transaction ends (SQLite has one writer anyway).

    *with_account* locks every campaign on its account, in the order of their ids: whoever may change a whole account
    takes them in that order, before any other campaign's lock, so that two never wait for each other.
    """
    wanted = campaigns.c.id == campaign_id
    if with_account:
        wanted = campaigns.c.account.in_(sa.select(campaigns.c.account).where(campaigns.c.id == campaign_id))
    rows = connection.execute(
        sa.select(campaigns).where(wanted).order_by(campaigns.c.id).with_for_update(key_share=True)
    )
    return next((row for row in rows.all() if row.id == campaign_id), None)


def end_runs(connection: sa.Connection, campaign_id: str) -> None:
    """Set the runs back to none; touches no row, and takes no lock, where there is nothing to set back."""
    connection.execute(ending_runs(campaign_id, sa.true()))


def ending_runs(campaign_id: Any, condition: Any) -> sa.Update:
    """The statement of `end_runs`, under a condition."""
    return (
        sa.update(campaigns)
        .where(campaigns.c.id == campaign_id, condition)
        .where((campaigns.c.troubled_run > 0) | (campaigns.c.rejected_run > 0))
        .values(troubled_run=0, rejected_run=0)
    )


def set_runs(connection: sa.Connection, campaign_id: str, runs: Runs) -> None:
    """Keep the runs as counted."""
    connection.execute(
        sa.update(campaigns)
        .where(campaigns.c.id == campaign_id)
        .values(troubled_run=runs.troubled, rejected_run=runs.rejected)
    )


def hold(connection: sa.Connection, campaign_id: str, why: Hold, *, probe_at: datetime, now: datetime) -> None:
    """Hold a campaign, or all on its account, that is active; one that is held already learns the latest reason.

    The probe's time of a campaign that is held already stays as `take_probe` set it.
    """
    where = campaigns.c.id == campaign_id
    if why.spans_account:
        lock(connection, campaign_id, with_account=True)
        account = sa.select(campaigns.c.account).where(campaigns.c.id == campaign_id).scalar_subquery()
        where = campaigns.c.account == account
    connection.execute(
        sa.update(campaigns)
        .where(where, campaigns.c.state == CampaignState.ACTIVE)
        .values(
            state=CampaignState.HELD,
            hold_kind=why.kind,
            hold_reason=why.reason,
            stopped_at=now,
            probe_at=probe_at,
            probes=0,
        )
    )
    connection.execute(
        sa.update(campaigns)
        .where(campaigns.c.id == campaign_id, campaigns.c.state == CampaignState.HELD)
        .values(hold_kind=why.kind, hold_reason=why.reason)
    )


def release(connection: sa.Connection, campaign_id: str) -> bool:
    """End the hold of a campaign; one that was held for its key releases every campaign on that account."""
    row = lock(connection, campaign_id, with_account=True)
    if row is None or row.state != CampaignState.HELD:
        return False
    where = campaigns.c.id == campaign_id
    if row.hold_kind in _ACCOUNT_WIDE:
        where = where | ((campaigns.c.account == row.account) & campaigns.c.hold_kind.in_(_ACCOUNT_WIDE))
    return _make_active(connection, where & (campaigns.c.state == CampaignState.HELD)) > 0


def _make_active(connection: sa.Connection, where: sa.ColumnElement[bool]) -> int:
    return connection.execute(
        sa.update(campaigns)
        .where(where, campaigns.c.state != CampaignState.ACTIVE)
        .values(
            state=CampaignState.ACTIVE,
            hold_kind=None,
            hold_reason=None,
            stopped_at=None,
            probe_at=None,
            probes=0,
            troubled_run=0,
            rejected_run=0,
        )
    ).rowcount


def _campaign(row: Any) -> Campaign:
    return Campaign(
        id=row.id,
        account=row.account,
        state=CampaignState(row.state),
        hold_kind=HoldKind(row.hold_kind) if row.hold_kind else None,
        rate=Rate.parse(row.rate) if row.rate else None,
        on_uncertain=row.on_uncertain,
        uncertain_after_seconds=row.uncertain_after_seconds,
        on_server_error=row.on_server_error,
        max_attempts=row.max_attempts,
        lead_max_age_seconds=row.lead_max_age_seconds,
    )
