"""What an operator does to many leads at once, and to no others; on both databases."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger import EmptyFilter, LeadFilter, Ledger
from pipeline.ledger.tables import leads
from tests.conftest import CAMPAIGN, NOW, make_lead

DAY = timedelta(days=1)
LATER = NOW + timedelta(hours=1)
OTHER = "another-campaign"
MINE = LeadFilter(campaign=CAMPAIGN)
Change = Callable[..., int]


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """Two campaigns with a lead in every state."""
    for campaign in (CAMPAIGN, OTHER):
        known = ledger.campaigns.ensure(campaign, now=NOW)
        given = [make_lead(number, key=state.value) for number, state in enumerate(LeadState)]
        ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=DAY, now=NOW)
    with ledger.database.write() as connection:
        for state in LeadState:
            values: dict[str, Any] = {"state": state, "submitted_at": NOW, "called_at": NOW, "attempts": 5}
            values |= {"claim": uuid.uuid4(), "claim_expires_at": LATER if state is LeadState.SENDING else None}
            connection.execute(sa.update(leads).where(leads.c.key == state.value).values(**values))
    return ledger


def rows(ledger: Ledger) -> dict[tuple[str, str], Any]:
    """Every lead, by its campaign and the state that it was in at first."""
    with ledger.database.read() as connection:
        return {(row.campaign_id, row.key): row for row in connection.execute(sa.select(leads))}


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    """Which leads changed."""
    return {name for name in before if before[name] != after[name]}


CHANGES: dict[str, tuple[Callable[[Ledger], Change], set[str]]] = {
    "retry": (
        lambda ledger: lambda which, **how: ledger.interventions.retry(which, max_age=3 * DAY, now=LATER, **how),
        {"rejected", "exhausted", "expired", "cancelled", "suppressed"},
    ),
    "cancel": (lambda ledger: lambda which, **how: ledger.interventions.cancel(which, now=LATER, **how), {"queued"}),
    **{
        verdict: (
            lambda ledger, verdict=verdict: (
                lambda which, **how: ledger.interventions.resolve(which, verdict, max_age=3 * DAY, now=LATER, **how)
            ),
            {"uncertain"},
        )
        for verdict in ("sent", "resend", "drop")
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_touches_the_states_that_it_may_leave_and_no_others(filled: Ledger, name: str) -> None:
    change, states = CHANGES[name][0](filled), CHANGES[name][1]
    before = rows(filled)
    assert change(MINE, dry_run=True) == len(states)
    assert rows(filled) == before
    assert change(MINE) == len(states)
    assert changed(before, rows(filled)) == {(CAMPAIGN, state) for state in states}


@pytest.mark.parametrize("name", CHANGES)
def test_an_empty_filter_is_refused_and_nothing_changes(filled: Ledger, name: str) -> None:
    change, before = CHANGES[name][0](filled), rows(filled)
    for nothing in (LeadFilter(), LeadFilter(campaign="", phone="", ids=(), states=())):
        for dry_run in (True, False):
            with pytest.raises(EmptyFilter, match="needs a filter"):
                change(nothing, dry_run=dry_run)
    assert rows(filled) == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_filter_that_fits_nothing_changes_nothing(filled: Ledger, name: str) -> None:
    change, before = CHANGES[name][0](filled), rows(filled)
    assert change(LeadFilter(campaign="nobody")) == 0
    assert change(LeadFilter(states=(LeadState.CALLED, LeadState.SENDING, LeadState.SUBMITTED))) == 0
    assert rows(filled) == before


def test_a_retry_gives_fresh_attempts_and_a_fresh_age(filled: Ledger) -> None:
    token = rows(filled)[CAMPAIGN, "expired"].claim
    filled.interventions.retry(MINE, max_age=3 * DAY, now=LATER)
    row = rows(filled)[CAMPAIGN, "expired"]
    assert (row.state, row.attempts, row.claim, row.reason) == ("queued", 0, token, "retried by an operator")
    assert (row.due_at, row.changed_at, row.expires_at) == (LATER, LATER, LATER + 3 * DAY)


def test_a_retry_ages_leads_by_their_own_campaign(filled: Ledger) -> None:
    filled.campaigns.change(OTHER, {"lead_max_age_seconds": 60}, now=NOW)
    assert filled.interventions.retry(LeadFilter(states=(LeadState.REJECTED,)), max_age=3 * DAY, now=LATER) == 2
    ages = {name[0]: row.expires_at - LATER for name, row in rows(filled).items() if row.changed_at == LATER}
    assert ages == {CAMPAIGN: 3 * DAY, OTHER: timedelta(minutes=1)}


def test_a_cancelled_lead_is_not_claimed(filled: Ledger) -> None:
    assert filled.interventions.cancel(MINE, now=LATER) == 1
    row = rows(filled)[CAMPAIGN, "queued"]
    assert (row.state, row.reason, row.attempts) == ("cancelled", "cancelled by an operator", 5)
    assert filled.leads.claim(CAMPAIGN, 10, lease=DAY, now=LATER) == []


@pytest.mark.parametrize(("verdict", "state"), [("sent", "submitted"), ("resend", "queued"), ("drop", "cancelled")])
def test_a_verdict_settles_an_uncertain_lead(filled: Ledger, verdict: str, state: str) -> None:
    before = rows(filled)[CAMPAIGN, "uncertain"]
    filled.interventions.resolve(MINE, verdict, max_age=3 * DAY, now=LATER)
    row = rows(filled)[CAMPAIGN, "uncertain"]
    assert (row.state, row.attempts, row.reason) == (state, 5, f"resolved by an operator: {verdict}")
    assert row.submitted_at == (LATER if verdict == "sent" else NOW)
    assert row.claim == before.claim
    assert row.expires_at == (LATER + 3 * DAY if verdict == "resend" else NOW + DAY)


def test_an_unknown_verdict_is_refused_and_nothing_changes(filled: Ledger) -> None:
    before = rows(filled)
    with pytest.raises(ValueError, match="sent, resend or drop, not 'maybe'"):
        filled.interventions.resolve(MINE, "maybe", max_age=DAY, now=LATER)
    assert rows(filled) == before


def test_every_part_of_a_filter_narrows_it(filled: Ledger) -> None:
    one = rows(filled)[CAMPAIGN, "queued"]
    fits = LeadFilter(
        ids=(one.id,), campaign=CAMPAIGN, states=(LeadState.QUEUED,), phone=one.phone, key="queued",
        accepted_after=NOW, accepted_before=NOW + DAY, changed_before=NOW + DAY,
    )  # fmt: skip
    assert filled.interventions.cancel(fits, now=LATER, dry_run=True) == 1
    misses: list[dict[str, Any]] = [
        {"ids": (uuid.uuid4(),)}, {"campaign": OTHER}, {"states": (LeadState.SENDING,)}, {"phone": "+910000000000"},
        {"key": "x"}, {"accepted_after": NOW + DAY}, {"accepted_before": NOW}, {"changed_before": NOW},
    ]  # fmt: skip
    for miss in misses:
        assert filled.interventions.cancel(replace(fits, **miss), now=LATER, dry_run=True) == 0
