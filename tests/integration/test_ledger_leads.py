"""Leads in the ledger: taken in once, claimed by one dispatcher, recorded behind a fence; on both databases."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from pipeline.domain.campaign import Campaign, Hold, HoldKind
from pipeline.domain.lead import Claim, Lead, Outcome, Retry, lead_id, settle
from pipeline.ledger import LeadFilter, Ledger
from pipeline.ledger.calls import CallRow, StoredEvent
from pipeline.ledger.leads import Recorded
from pipeline.ledger.tables import attempts, batches, leads
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead, merge_call, story_of
from tests.waiting import patience, until

DAY = timedelta(days=1)
LEASE = timedelta(minutes=2)
RETRY = Retry(base=timedelta(seconds=10), cap=timedelta(minutes=10), max_attempts=8)
OTHER = "68ecc86fd9fbecbe9431a18f"


def take_in(
    ledger: Ledger, rows: Sequence[Lead], *, campaign: str = CAMPAIGN, batch: uuid.UUID | None = None, **when: Any
) -> tuple[int, int]:
    """Take a batch in; return its leads and how many were new."""
    now = when.get("now", NOW)
    known = ledger.campaigns.ensure(campaign, now=now)
    done = ledger.leads.take_in(known, rows, batch_id=batch or uuid.uuid4(), max_age=when.get("max_age", DAY), now=now)
    return done.leads, done.accepted


def claim(ledger: Ledger, limit: int = 100, **overrides: Any) -> list[Claim]:
    """Claim leads of the campaign."""
    values: dict[str, Any] = {"campaign_id": CAMPAIGN, "limit": limit, "lease": LEASE, "now": NOW}
    return ledger.leads.claim(**(values | overrides))


def record(ledger: Ledger, claims: Sequence[Claim], outcome: Outcome, **overrides: Any) -> Recorded:
    """Record the same outcome for every claim."""
    now = overrides.pop("now", NOW)
    settlements = [
        settle(make_answer(one, outcome, **overrides), RETRY, now=now, jitter=random.Random(7)) for one in claims
    ]
    return ledger.leads.record(Campaign(CAMPAIGN), settlements, probe_after=timedelta(seconds=30), now=now)


def rows(ledger: Ledger) -> list[Any]:
    """Every lead, by its phone number."""
    with ledger.database.read() as connection:
        return list(connection.execute(sa.select(leads).order_by(leads.c.phone, leads.c.id)))


def only(ledger: Ledger) -> Any:
    """The one lead there is."""
    (row,) = rows(ledger)
    return row


def tried(ledger: Ledger) -> list[tuple[str, uuid.UUID]]:
    """The attempts: outcome and token."""
    with ledger.database.read() as connection:
        return [(row.outcome, row.claim) for row in connection.execute(sa.select(attempts).order_by(attempts.c.id))]


def kept_batches(ledger: Ledger) -> list[tuple[int, int]]:
    """The batches: leads and accepted."""
    with ledger.database.read() as connection:
        return sorted((row.leads, row.accepted) for row in connection.execute(sa.select(batches)))


def call_back(ledger: Ledger, lead: uuid.UUID, *, is_final: bool = True) -> None:
    """A post-call event comes in that names the lead."""
    call = CallRow(
        call_sid="call-1", campaign_id=CAMPAIGN, futwork_lead_id=None, reference=str(lead), phone=None,
        status="completed" if is_final else "ringing", is_final=is_final, outcome="connected", disposition=None,
        duration_seconds=31.0, callback_at=None, recording_url=None, details="{}", first_event_at=NOW,
        last_event_at=NOW,
    )  # fmt: skip
    merge_call(ledger, StoredEvent(uuid.uuid4().hex, b"{}", NOW), call)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs at the same time, each in a thread of its own, and return what they return."""
    ready = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        ready.wait(timeout=patience())
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [one.result(timeout=patience()) for one in [pool.submit(run, job) for job in jobs]]


def _scalar(ledger: Ledger, query: sa.TextClause) -> Any:
    with ledger.database.read() as connection:
        return connection.scalar(query)


def postgres_url(ledger: Ledger) -> str:
    """The address of the ledger, for a second connection of its own."""
    return ledger.database.url.render_as_string(hide_password=False)


# taking in


def test_a_batch_is_stored_as_it_was_given(ledger: Ledger) -> None:
    given = make_lead(1, data={"customer_name": "Ášá \U0001f600", "odd": "a\u0000b", "n": 1.5, "none": None}, key="K-1")
    assert take_in(ledger, [given]) == (1, 1)
    row = only(ledger)
    assert row.id == lead_id(CAMPAIGN, "K-1")
    assert (row.campaign_id, row.key, row.phone, row.state, row.attempts) == (CAMPAIGN, "K-1", given.phone, "queued", 0)
    assert (row.due_at, row.accepted_at, row.changed_at, row.expires_at) == (NOW, NOW, NOW, NOW + DAY)
    story = story_of(ledger, LeadFilter(campaign=CAMPAIGN))
    assert story["data"] == given.data


def test_a_repeated_batch_adds_nothing_and_counts_nothing_twice(ledger: Ledger) -> None:
    batch = uuid.uuid4()
    given = [make_lead(n) for n in range(5)]
    assert [take_in(ledger, given, batch=batch) for _ in range(3)] == [(5, 5), (5, 0), (5, 0)]
    assert len(rows(ledger)) == 5
    assert kept_batches(ledger) == [(5, 5)]


def test_a_batch_that_overlaps_adds_only_what_is_new(ledger: Ledger) -> None:
    assert take_in(ledger, [make_lead(n) for n in range(5)]) == (5, 5)
    assert take_in(ledger, [make_lead(n) for n in range(3, 9)]) == (6, 4)
    assert len(rows(ledger)) == 9
    assert kept_batches(ledger) == [(5, 5), (6, 4)]


def test_a_batch_that_was_half_written_is_completed_under_its_own_count(ledger: Ledger) -> None:
    batch = uuid.uuid4()
    assert take_in(ledger, [make_lead(n) for n in range(2)], batch=batch) == (2, 2)
    assert take_in(ledger, [make_lead(n) for n in range(5)], batch=batch) == (5, 3)
    assert [accepted for _, accepted in kept_batches(ledger)] == [5]


def test_a_key_twice_in_a_batch_is_one_lead_and_the_first_counts(ledger: Ledger) -> None:
    assert take_in(ledger, [make_lead(1, key="k"), make_lead(2, key="k"), make_lead(3)]) == (3, 2)
    assert [row.phone for row in rows(ledger)] == [make_lead(1).phone, make_lead(3).phone]
    assert kept_batches(ledger) == [(3, 2)]


def test_a_known_lead_keeps_its_state_and_data(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1, key="k", data={"name": "first"})])
    record(ledger, claim(ledger), Outcome.ACCEPTED)
    before = only(ledger)
    assert take_in(ledger, [make_lead(2, key="k", data={"name": "second"})], now=NOW + DAY) == (1, 0)
    assert only(ledger) == before


def test_the_same_key_in_two_campaigns_is_two_leads(ledger: Ledger) -> None:
    assert take_in(ledger, [make_lead(1)]) == (1, 1)
    assert take_in(ledger, [make_lead(1)], campaign=OTHER) == (1, 1)
    assert len(rows(ledger)) == 2


def test_an_empty_batch_is_counted_as_such(ledger: Ledger) -> None:
    assert take_in(ledger, []) == (0, 0)
    assert kept_batches(ledger) == [(0, 0)]


def test_batches_with_the_same_leads_in_other_orders_do_not_block_each_other(postgres_ledger: Ledger) -> None:
    """Each insert waits for the other's uncommitted rows, so they have to be taken in one order."""
    postgres_ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    forwards = [make_lead(n) for n in range(4000)]
    others = [Ledger(postgres_url(postgres_ledger)) for _ in range(2)]
    for other in others:
        other.ping()
    first, second = others
    done = at_once(lambda: take_in(first, forwards), lambda: take_in(second, forwards[::-1]))
    for other in others:
        other.close()
    assert sum(accepted for _, accepted in done) == 4000
    assert len(rows(postgres_ledger)) == 4000
    assert sum(accepted for _, accepted in kept_batches(postgres_ledger)) == 4000


# claiming


def test_a_claim_leases_due_leads_and_no_more_than_asked_for(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(n) for n in range(5)])
    assert len(claim(ledger, 3)) == 3
    assert [row.state for row in rows(ledger)].count("sending") == 3
    assert len(claim(ledger, 3)) == 2
    assert claim(ledger, 3) == []


def test_a_claim_says_what_to_send_and_until_when(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1, data={"a": "ä"})], max_age=timedelta(hours=6))
    begun = datetime.now(UTC)
    (one,) = claim(ledger)
    row = only(ledger)
    assert begun + LEASE <= one.expires_at <= datetime.now(UTC) + LEASE  # by this process's clock, not the ledger's
    ours = one.expires_at
    assert one == Claim(row.id, CAMPAIGN, row.claim, ours, make_lead(1).phone, '{"a":"ä"}', 0, row.expires_at)
    assert (row.state, row.claim_expires_at, row.expires_at) == ("sending", NOW + LEASE, NOW + timedelta(hours=6))


def test_the_longest_due_lead_is_claimed_first(ledger: Ledger) -> None:
    for n in (3, 1, 4, 0, 2):
        take_in(ledger, [make_lead(n)], now=NOW - timedelta(minutes=n))
    assert [one.phone for one in claim(ledger, 2)] == [make_lead(4).phone, make_lead(3).phone]
    assert [one.phone for one in claim(ledger)] == [make_lead(2).phone, make_lead(1).phone, make_lead(0).phone]


def test_a_lead_that_is_not_due_yet_or_too_old_is_not_claimed(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)], now=NOW + timedelta(seconds=1))
    take_in(ledger, [make_lead(2)], now=NOW - DAY)
    assert claim(ledger) == []
    assert not ledger.leads.has_due(CAMPAIGN, now=NOW)
    assert ledger.leads.campaigns_with_due(now=NOW) == []
    assert [row.state for row in rows(ledger)] == ["queued", "queued"]
    assert len(claim(ledger, now=NOW + timedelta(seconds=1))) == 1


def test_a_claim_takes_the_leads_of_its_campaign_alone(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)])
    take_in(ledger, [make_lead(2)], campaign=OTHER)
    assert ledger.leads.campaigns_with_due(now=NOW) == [CAMPAIGN, OTHER]
    assert [one.phone for one in claim(ledger)] == [make_lead(1).phone]
    assert ledger.leads.campaigns_with_due(now=NOW) == [OTHER]
    assert (ledger.leads.has_due(CAMPAIGN, now=NOW), ledger.leads.has_due(OTHER, now=NOW)) == (False, True)


def test_an_unknown_campaign_gives_no_lead(ledger: Ledger) -> None:
    assert claim(ledger, campaign_id="nobody") == []


def test_a_held_campaign_gives_its_probe_one_lead_and_others_none(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(n) for n in range(3)])
    ledger.campaigns.hold(CAMPAIGN, Hold(HoldKind.OUTAGE, "down"), probe_at=NOW + LEASE, now=NOW)
    assert claim(ledger) == []
    assert ledger.leads.campaigns_with_due(now=NOW) == []
    assert ledger.leads.campaigns_with_due(now=NOW + LEASE) == [CAMPAIGN]
    assert len(claim(ledger, 1, probe=True)) == 1
    assert sorted(row.state for row in rows(ledger)) == ["queued", "queued", "sending"]


def test_a_paused_campaign_gives_nothing_not_even_a_probe(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)])
    assert ledger.campaigns.pause(CAMPAIGN, reason="operator", now=NOW)
    assert claim(ledger) == []
    assert claim(ledger, 1, probe=True) == []
    assert ledger.leads.campaigns_with_due(now=NOW + LEASE) == []
    assert only(ledger).state == "queued"


def test_many_dispatchers_claim_each_lead_exactly_once(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(n) for n in range(500)])
    others = [Ledger(postgres_url(ledger)) for _ in range(8)]

    def drain(one: Ledger) -> list[uuid.UUID]:
        mine: list[uuid.UUID] = []
        while one.leads.has_due(CAMPAIGN, now=NOW):  # a round may find every due row locked by the others
            mine += [found.lead_id for found in claim(one, 7)]
        return mine

    claimed = [id_ for mine in at_once(*(partial(drain, one) for one in others)) for id_ in mine]
    for one in others:
        one.close()
    assert len(claimed) == 500
    assert set(claimed) == {row.id for row in rows(ledger)}
    assert {row.state for row in rows(ledger)} == {"sending"}


# recording


@pytest.mark.parametrize(
    ("outcome", "state", "charged"),
    [
        (Outcome.ACCEPTED, "submitted", 1),
        (Outcome.REJECTED, "rejected", 1),
        (Outcome.NOT_SENT, "queued", 1),
        (Outcome.THROTTLED, "queued", 0),
        (Outcome.BUSY, "queued", 1),
        (Outcome.FAILED, "uncertain", 1),
        (Outcome.UNCERTAIN, "uncertain", 1),
        (Outcome.REFUSED_KEY, "queued", 0),
        (Outcome.REFUSED_CAMPAIGN, "queued", 0),
    ],
)
def test_every_outcome_is_written_with_its_attempt(ledger: Ledger, outcome: Outcome, state: str, charged: int) -> None:
    take_in(ledger, [make_lead(1)])
    (one,) = claim(ledger)
    done = record(ledger, [one], outcome, http_status=418, excerpt="because")
    assert (done.settled, done.late) == (1, 0)
    row = only(ledger)
    assert (row.state, row.attempts, row.claim_expires_at, row.claim) == (state, charged, None, one.token)
    assert row.reason == (None if outcome is Outcome.ACCEPTED else f"{outcome.value}: because")
    assert row.submitted_at == (NOW if outcome is Outcome.ACCEPTED else None)
    with ledger.database.read() as connection:
        (attempt,) = connection.execute(sa.select(attempts)).all()
    assert attempt[1:] == (row.id, one.token, NOW, 12, outcome.value, 418, "because")


def test_a_record_without_answers_changes_nothing(ledger: Ledger) -> None:
    assert record(ledger, [], Outcome.ACCEPTED) == Recorded(0, 0, None, released=False)


def test_a_record_of_many_settles_each_by_its_own_answer(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(n) for n in range(300)])
    claims = claim(ledger, 300)
    wanted = {one.lead_id: [Outcome.ACCEPTED, Outcome.REJECTED, Outcome.BUSY][n % 3] for n, one in enumerate(claims)}
    settlements = [
        settle(make_answer(one, wanted[one.lead_id], futwork_lead_id=None), RETRY, now=NOW, jitter=random.Random(7))
        for one in claims
    ]
    done = ledger.leads.record(Campaign(CAMPAIGN), settlements, probe_after=LEASE, now=NOW)
    assert (done.settled, done.late) == (300, 0)
    states = {Outcome.ACCEPTED: "submitted", Outcome.REJECTED: "rejected", Outcome.BUSY: "queued"}
    assert {row.id: row.state for row in rows(ledger)} == {id_: states[outcome] for id_, outcome in wanted.items()}
    assert len(tried(ledger)) == 300


def test_a_record_with_a_wrong_token_leaves_the_lead_and_keeps_the_attempt(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)])
    (one,) = claim(ledger)
    before = only(ledger)
    stranger = replace(one, token=uuid.uuid4())
    done = record(ledger, [stranger], Outcome.REJECTED)
    assert (done.settled, done.late) == (0, 1)
    assert only(ledger) == before
    assert tried(ledger) == [("rejected", stranger.token)]


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_repeated_record_is_harmless(ledger: Ledger, outcome: Outcome) -> None:
    take_in(ledger, [make_lead(1)])
    claims = claim(ledger)
    record(ledger, claims, outcome)
    before = only(ledger)
    record(ledger, claims, outcome)
    assert only(ledger) == before
    assert len(tried(ledger)) == 1


def test_futworks_id_is_kept_with_the_lead_and_never_erased(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)])
    claims = claim(ledger)
    record(ledger, claims, Outcome.ACCEPTED, futwork_lead_id="fw-1")
    record(ledger, claims, Outcome.ACCEPTED)
    assert only(ledger).futwork_lead_id == "fw-1"


def test_a_lead_that_was_called_while_it_was_sent_stays_called(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)])
    (one,) = claim(ledger)
    call_back(ledger, one.lead_id)
    called = only(ledger)
    assert (called.state, called.called_at, called.claim_expires_at) == ("called", NOW, None)
    for outcome in (Outcome.ACCEPTED, Outcome.UNCERTAIN, Outcome.FAILED):
        done = record(ledger, [one], outcome)
        assert (done.settled, done.late) == (0, 1)
        assert only(ledger) == called
    assert tried(ledger) == [("accepted", one.token)]


def test_a_lead_that_is_called_while_its_record_waits_stays_called(postgres_ledger: Ledger) -> None:
    """The record meets the row's lock, and looks at the row anew once it has it; the other lead is settled."""
    take_in(postgres_ledger, [make_lead(1), make_lead(2)])
    first, second = claim(postgres_ledger)
    waits = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with ThreadPoolExecutor(1) as pool:
        with postgres_ledger.database.write() as connection:
            event = sa.update(leads).where(leads.c.id == first.lead_id)
            connection.execute(event.values(state="called", called_at=NOW, claim_expires_at=None))
            recorded = pool.submit(record, postgres_ledger, [first, second], Outcome.ACCEPTED)
            until(lambda: _scalar(postgres_ledger, waits))
        done = recorded.result(timeout=patience())
    assert (done.settled, done.late) == (1, 1)
    assert {row.id: row.state for row in rows(postgres_ledger)} == {
        first.lead_id: "called",
        second.lead_id: "submitted",
    }
    assert sorted(tried(postgres_ledger)) == sorted([("accepted", first.token), ("accepted", second.token)])


# answers that come late


def lost(ledger: Ledger) -> Claim:
    """A claim whose worker was given up: the lead is uncertain."""
    take_in(ledger, [make_lead(1)])
    (one,) = claim(ledger)
    assert ledger.leads.settle_lost_claims(now=NOW + LEASE) == 1
    return one


def test_a_lost_claim_makes_its_lead_uncertain_and_keeps_the_token(ledger: Ledger) -> None:
    one = lost(ledger)
    row = only(ledger)
    assert (row.state, row.claim, row.claim_expires_at, row.attempts) == ("uncertain", one.token, None, 1)
    assert "dispatcher stopped" in row.reason
    assert ledger.leads.settle_lost_claims(now=NOW + LEASE) == 0
    assert claim(ledger, now=NOW + LEASE) == []


def test_a_claim_that_is_not_over_is_left_alone(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1)])
    claim(ledger)
    before = only(ledger)
    assert ledger.leads.settle_lost_claims(now=NOW + LEASE - timedelta(microseconds=1)) == 0
    assert only(ledger) == before


def test_a_lost_claim_that_is_being_recorded_is_left_to_its_record(postgres_ledger: Ledger) -> None:
    """The sweep does not wait for it, nor for an operator's long change."""
    take_in(postgres_ledger, [make_lead(1), make_lead(2)])
    first, second = claim(postgres_ledger)
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.select(leads.c.id).where(leads.c.id == first.lead_id).with_for_update())
        assert postgres_ledger.leads.settle_lost_claims(now=NOW + DAY) == 1
    assert {row.id: row.state for row in rows(postgres_ledger)} == {
        first.lead_id: "sending",
        second.lead_id: "uncertain",
    }


def test_lost_claims_are_settled_in_portions(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(n) for n in range(5)])
    claim(ledger)
    assert [ledger.leads.settle_lost_claims(now=NOW + LEASE, limit=2) for _ in range(4)] == [2, 2, 1, 0]
    assert [row.state for row in rows(ledger)] == ["uncertain"] * 5


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome.ACCEPTED, "submitted"),
        (Outcome.REJECTED, "rejected"),
        (Outcome.BUSY, "queued"),
        (Outcome.FAILED, "uncertain"),
        (Outcome.UNCERTAIN, "uncertain"),
    ],
)
def test_a_late_answer_with_the_same_token_settles_an_uncertain_lead(
    ledger: Ledger, outcome: Outcome, state: str
) -> None:
    one = lost(ledger)
    done = record(ledger, [one], outcome, now=NOW + 2 * LEASE)
    assert (done.settled, done.late) == (1, 0)
    row = only(ledger)
    assert (row.state, row.attempts) == (state, 1)
    assert tried(ledger) == [(outcome.value, one.token)]


def test_a_late_acceptance_takes_a_lead_back_that_waits_to_be_sent_again(ledger: Ledger) -> None:
    one = lost(ledger)
    mine = LeadFilter(campaign=CAMPAIGN)
    assert ledger.interventions.resolve(mine, "resend", max_age=DAY, now=NOW + LEASE) == 1
    done = record(ledger, [one], Outcome.ACCEPTED, futwork_lead_id="fw-1", now=NOW + 2 * LEASE)
    assert (done.settled, done.late) == (0, 1)
    row = only(ledger)
    assert (row.state, row.submitted_at, row.futwork_lead_id) == ("submitted", NOW + 2 * LEASE, "fw-1")
    assert row.reason == "accepted by a late answer"
    assert claim(ledger, now=NOW + 2 * LEASE) == []


@pytest.mark.parametrize("outcome", [one for one in Outcome if one is not Outcome.ACCEPTED])
def test_a_late_answer_that_proves_nothing_leaves_a_lead_that_moved_on(ledger: Ledger, outcome: Outcome) -> None:
    one = lost(ledger)
    ledger.interventions.resolve(LeadFilter(campaign=CAMPAIGN), "resend", max_age=DAY, now=NOW + LEASE)
    before = only(ledger)
    done = record(ledger, [one], outcome, now=NOW + 2 * LEASE)
    assert (done.settled, done.late) == (0, 1)
    assert only(ledger) == before


def test_a_late_acceptance_counts_although_a_successor_sends_the_lead_and_fails(ledger: Ledger) -> None:
    """Futwork has the lead from the first POST: the successor's failure must not have it sent a third time."""
    first = lost(ledger)
    ledger.interventions.resolve(LeadFilter(campaign=CAMPAIGN), "resend", max_age=DAY, now=NOW + LEASE)
    (second,) = claim(ledger, now=NOW + LEASE)
    assert record(ledger, [first], Outcome.ACCEPTED, futwork_lead_id="fw-1", now=NOW + 2 * LEASE).late == 1
    assert record(ledger, [second], Outcome.FAILED, now=NOW + 2 * LEASE).late == 1
    row = only(ledger)
    assert (row.state, row.claim_expires_at, row.futwork_lead_id) == ("submitted", None, "fw-1")
    assert claim(ledger, now=NOW + DAY / 2) == []
    assert tried(ledger) == [("accepted", first.token), ("failed", second.token)]


def test_a_late_acceptance_brings_a_dropped_lead_back(ledger: Ledger) -> None:
    one = lost(ledger)
    ledger.interventions.resolve(LeadFilter(campaign=CAMPAIGN), "drop", max_age=DAY, now=NOW + LEASE)
    record(ledger, [one], Outcome.ACCEPTED, now=NOW + 2 * LEASE)
    assert only(ledger).state == "submitted"


def test_a_record_and_a_merge_of_the_same_leads_do_not_block_each_other(postgres_ledger: Ledger) -> None:
    """A written call refers to its lead, and the record locks many: neither may wait for the other in a circle."""
    take_in(postgres_ledger, [make_lead(n) for n in range(2)])
    low, high = sorted(claim(postgres_ledger), key=lambda one: one.lead_id)
    with postgres_ledger.database.write() as connection:
        # What a merge has done halfway: it wrote the call of the higher lead, which refers to that lead.
        connection.execute(
            sa.select(leads.c.id).where(leads.c.id == high.lead_id).with_for_update(key_share=True, read=True)
        )
        other = Ledger(postgres_url(postgres_ledger))
        done = at_once(lambda: record(other, [low, high], Outcome.ACCEPTED))
        other.close()
    assert done[0].settled == 2


# what time decides


def test_old_queued_leads_expire_and_no_others(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(1), make_lead(2)], now=NOW - DAY)
    (sending,) = claim(ledger, 1, now=NOW - timedelta(hours=1))
    take_in(ledger, [make_lead(3)])
    assert ledger.leads.expire(now=NOW) == 1
    states = {row.id: (row.state, row.reason) for row in rows(ledger)}
    assert states.pop(sending.lead_id) == ("sending", None)
    assert sorted(states.values(), key=str) == [("expired", "older than the campaign allows"), ("queued", None)]
    assert ledger.leads.expire(now=NOW) == 0


def test_more_old_leads_than_one_portion_expire_at_once(ledger: Ledger) -> None:
    take_in(ledger, [make_lead(n) for n in range(2001)], now=NOW - DAY)
    assert ledger.leads.expire(now=NOW) == 2001
    assert {row.state for row in rows(ledger)} == {"expired"}


def decide(ledger: Ledger, policy: str = "hold", now: Any = NOW + LEASE + timedelta(hours=1)) -> dict[str, int]:
    """Let time decide about uncertain leads, an hour after they became so."""
    return ledger.leads.settle_old_uncertain(
        default_policy=policy, default_after=timedelta(hours=1), default_max_attempts=8, now=now
    )


@pytest.mark.parametrize(
    ("policy", "state", "counts"),
    [
        ("hold", "uncertain", {"resend": 0, "drop": 0}),
        ("resend", "queued", {"resend": 1, "drop": 0}),
        ("drop", "cancelled", {"resend": 0, "drop": 1}),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["the campaign's own policy", "the default policy"])
def test_on_uncertain_decides_once_a_lead_stayed_uncertain_long_enough(
    ledger: Ledger, own: bool, policy: str, state: str, counts: dict[str, int]
) -> None:
    one = lost(ledger)
    other_policy = {"hold": "drop", "resend": "hold", "drop": "hold"}[policy]
    if own:
        ledger.campaigns.change(CAMPAIGN, {"on_uncertain": policy}, now=NOW)
    asked = other_policy if own else policy
    before = only(ledger)
    early = NOW + LEASE + timedelta(minutes=59)
    assert decide(ledger, asked, early) == {"resend": 0, "drop": 0}
    assert only(ledger) == before
    assert decide(ledger, asked) == counts
    row = only(ledger)
    assert (row.state, row.attempts) == (state, 1)
    assert row.claim == one.token  # it may have been sent, so a call may yet be its own


def test_a_campaigns_own_time_decides_when_its_leads_are_given_up(ledger: Ledger) -> None:
    lost(ledger)
    ledger.campaigns.change(CAMPAIGN, {"uncertain_after_seconds": 7200.0}, now=NOW)
    assert decide(ledger, "drop") == {"resend": 0, "drop": 0}
    assert decide(ledger, "drop", NOW + LEASE + timedelta(hours=2)) == {"resend": 0, "drop": 1}


def test_resend_ends_with_the_attempts(ledger: Ledger) -> None:
    """A lead whose every POST stays without an answer may have called the person each time."""
    take_in(ledger, [make_lead(1)], max_age=30 * DAY)
    ledger.campaigns.change(CAMPAIGN, {"max_attempts": 2}, now=NOW)
    now, seen = NOW, []
    for _ in range(3):
        record(ledger, claim(ledger, now=now), Outcome.UNCERTAIN, now=now)
        now += timedelta(hours=1)
        decide(ledger, "resend", now)
        seen.append(only(ledger).state)
    assert seen == ["queued", "exhausted", "exhausted"]
    assert len(tried(ledger)) == 2


def test_a_lead_that_is_resent_can_be_claimed_again(ledger: Ledger) -> None:
    first = lost(ledger)
    decide(ledger, "resend")
    (second,) = claim(ledger, now=NOW + LEASE + timedelta(hours=1))
    assert second.lead_id == first.lead_id
    assert second.token != first.token
    assert second.attempts == 1
