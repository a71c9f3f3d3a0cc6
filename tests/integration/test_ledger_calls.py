"""Calls in the ledger: events kept once, each call merged by one worker at a time, linked to the lead it proves."""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import Claim, LeadState, Outcome, Retry, settle
from pipeline.ledger import CallRow, LeadFilter, Ledger, StoredEvent, digest_of
from pipeline.ledger.calls import EVENTS_A_CALL
from pipeline.ledger.tables import call_events, calls, leads, quarantine
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead
from tests.waiting import patience, until

RETRY = Retry(base=timedelta(seconds=10), cap=timedelta(minutes=10), max_attempts=8)
SECOND = timedelta(seconds=1)
FINAL = {"completed", "busy"}


def make_event(number: int = 0, *, at: datetime = NOW, **says: Any) -> StoredEvent:
    """An event of `call-1` as it was stored; what it says can be overridden."""
    body = json.dumps({"sid": "call-1", "number": number, "status": "ringing"} | says).encode()
    return StoredEvent(digest_of(body), body, at)


def fold(events: Sequence[StoredEvent]) -> CallRow:
    """A call of its events: final once one of them is; the details list every event in the order it was given."""
    said = [json.loads(event.body) for event in events]
    last: dict[str, Any] = {name: value for one in said for name, value in one.items()}
    ended = [one["status"] for one in said if one["status"] in FINAL]
    return CallRow(
        call_sid=last["sid"],
        campaign_id=last.get("campaign"),
        futwork_lead_id=last.get("lead"),
        reference=last.get("reference"),
        phone=last.get("phone"),
        status=(ended or [last["status"]])[-1],
        is_final=bool(ended),
        outcome="unknown",
        disposition=None,
        duration_seconds=None,
        callback_at=None,
        recording_url=None,
        details=json.dumps([one["number"] for one in said]),
        first_event_at=min(event.received_at for event in events),
        last_event_at=max(event.received_at for event in events),
    )


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    calls: int
    orphans: int
    fresh: int


def merge(ledger: Ledger, *events: StoredEvent, by: Callable[[Sequence[StoredEvent]], CallRow] = fold) -> Merged:
    """Merge events into their calls, as the stage does."""
    with ledger.calls.merging(events, {one.digest: json.loads(one.body)["sid"] for one in events}) as merging:
        rows = [by(some) for some in merging.events_of.values()]
        leads = merging.write(rows, now=NOW)
    return Merged(len(rows), len(rows) - len(leads), len(merging.fresh))


def call_rows(ledger: Ledger) -> list[Any]:
    with ledger.database.read() as connection:
        return list(connection.execute(sa.select(calls).order_by(calls.c.call_sid)))


def only_call(ledger: Ledger) -> Any:
    (row,) = call_rows(ledger)
    return row


def raw(ledger: Ledger) -> list[Any]:
    with ledger.database.read() as connection:
        return list(connection.execute(sa.select(call_events).order_by(call_events.c.received_at)))


def lead_row(ledger: Ledger, claim: Claim) -> Any:
    with ledger.database.read() as connection:
        return connection.execute(sa.select(leads).where(leads.c.id == claim.lead_id)).one()


def send(ledger: Ledger, *given: Any, outcome: Outcome | None = Outcome.ACCEPTED, **answer: Any) -> list[Claim]:
    """Take leads in, claim them, and record the outcome, if there is one yet."""
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    ledger.leads.take_in(campaign, given, batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW)
    claims = ledger.leads.claim(CAMPAIGN, len(given), lease=timedelta(minutes=2), now=NOW)
    assert len(claims) == len(given)
    if outcome is not None:
        record(ledger, claims, outcome, **answer)
    return claims


def record(ledger: Ledger, claims: Sequence[Claim], outcome: Outcome, **answer: Any) -> None:
    settled = [settle(make_answer(one, outcome, **answer), RETRY, now=NOW, jitter=random.Random(1)) for one in claims]
    ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=30 * SECOND, now=NOW)


def somebody_waits_for_a_lock(ledger: Ledger) -> bool:
    with ledger.database.read() as connection:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        return bool(connection.scalar(sa.text(waiting)))


# keeping


def test_an_event_is_kept_once_with_its_first_time(ledger: Ledger) -> None:
    event = make_event()
    ledger.calls.keep([replace(event, received_at=NOW + SECOND), event])
    ledger.calls.keep([replace(event, received_at=NOW + 5 * SECOND)])
    assert ledger.calls.pending() == [event]
    (row,) = raw(ledger)
    assert (row.digest, bytes(row.body), row.received_at, row.state) == (event.digest, event.body, NOW, "pending")


def test_a_repeat_of_a_merged_event_does_not_wait_again(ledger: Ledger) -> None:
    event = make_event()
    merge(ledger, event)
    ledger.calls.keep([event])
    assert merge(ledger, event, replace(event, received_at=NOW + SECOND)) == Merged(0, 0, 0)
    assert [(row.state, row.received_at) for row in raw(ledger)] == [("merged", NOW)]


def test_a_repeat_that_came_earlier_puts_the_time_right_and_waits(ledger: Ledger) -> None:
    later = make_event(at=NOW + 9 * SECOND)
    merge(ledger, later)
    ledger.calls.keep([replace(later, received_at=NOW)])
    assert ledger.calls.pending() == [replace(later, received_at=NOW)]
    assert [(row.received_at, row.state, row.call_sid) for row in raw(ledger)] == [(NOW, "pending", "call-1")]
    merge(ledger, replace(later, received_at=NOW))
    assert only_call(ledger).first_event_at == NOW


def test_a_call_keeps_what_an_event_said_that_waits_to_be_merged_anew(ledger: Ledger) -> None:
    merge(ledger, make_event(1, at=NOW + 9 * SECOND, status="completed"))
    ledger.calls.keep([make_event(1, at=NOW, status="completed")])
    merge(ledger, make_event(2, at=NOW + SECOND))
    assert (only_call(ledger).status, json.loads(only_call(ledger).details)) == ("completed", [1, 2])


def test_a_quarantined_event_does_not_wait(ledger: Ledger) -> None:
    event = make_event()
    ledger.calls.keep([event])
    assert ledger.calls.quarantine(event, reason="it is odd")
    ledger.calls.keep([event, make_event(1)])
    ledger.calls.keep([replace(event, received_at=NOW - SECOND)])
    assert ledger.calls.pending(before=NOW + SECOND) == [make_event(1)]
    assert merge(ledger, event).fresh == 0
    assert [row.state for row in raw(ledger)] == ["quarantined", "pending"]


def test_nothing_to_keep_or_merge_changes_nothing(ledger: Ledger) -> None:
    ledger.calls.keep([])
    assert merge(ledger) == Merged(0, 0, 0)
    assert (raw(ledger), call_rows(ledger)) == ([], [])


def test_pending_events_are_those_of_before_oldest_first(ledger: Ledger) -> None:
    three = [make_event(n, at=NOW + n * SECOND) for n in range(3)]
    ledger.calls.keep(three[::-1])
    assert ledger.calls.pending(before=NOW + 2 * SECOND) == three[:2]
    assert ledger.calls.pending(before=NOW + 9 * SECOND, limit=1) == three[:1]


@pytest.mark.parametrize("body", [b"\xff\x00\xfe{", b"", b'{"a": "\\u0000"}', bytes(range(256)) * 4000])
def test_any_bytes_are_kept_as_they_came(ledger: Ledger, body: bytes) -> None:
    event = StoredEvent(digest_of(body), body, NOW)
    ledger.calls.keep([event])
    assert ledger.calls.pending() == [event]
    assert [bytes(row.body) for row in raw(ledger)] == [body]


# merging


def test_events_are_folded_oldest_first_whatever_their_order(ledger: Ledger) -> None:
    events = [make_event(n, at=NOW + n * SECOND) for n in range(6)]
    for event in random.Random(3).sample(events, 6):
        merge(ledger, event)
    assert json.loads(only_call(ledger).details) == [0, 1, 2, 3, 4, 5]
    assert (only_call(ledger).first_event_at, only_call(ledger).last_event_at) == (NOW, NOW + 5 * SECOND)


def test_events_of_one_moment_are_folded_in_one_order(ledger: Ledger) -> None:
    events = [make_event(n) for n in range(6)]
    merge(ledger, *events)
    together = only_call(ledger).details
    with ledger.database.write() as connection:
        connection.execute(sa.delete(calls))
        connection.execute(sa.delete(call_events))
    for event in reversed(events):
        merge(ledger, event)
    assert only_call(ledger).details == together


def test_merged_counts_calls_and_orphans(ledger: Ledger) -> None:
    (claim,) = send(ledger, make_lead(1))
    events = [make_event(1, reference=str(claim.lead_id)), make_event(2, sid="call-2"), make_event(3, sid="call-2")]
    merged = merge(ledger, *events)
    assert merged == Merged(calls=2, orphans=1, fresh=3)


def test_a_merge_that_fails_changes_nothing(ledger: Ledger) -> None:
    merge(ledger, make_event(1))
    before = only_call(ledger)

    def fails(_: Sequence[StoredEvent]) -> CallRow:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merge(ledger, make_event(2, status="completed"), by=fails)
    assert only_call(ledger) == before
    assert [row.state for row in raw(ledger)] == ["merged"]


def test_two_workers_with_events_of_one_call_wait_for_each_other_and_lose_none(postgres_ledger: Ledger) -> None:
    """The first is inside its merge while the second arrives: the second must see what the first stored."""
    first, second = make_event(1), make_event(2, at=NOW + SECOND, status="completed")
    inside = threading.Event()

    def slow(events: Sequence[StoredEvent]) -> CallRow:
        inside.set()
        until(lambda: somebody_waits_for_a_lock(postgres_ledger))
        return fold(events)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(merge, postgres_ledger, first, by=slow)
        until(inside.is_set)
        two = pool.submit(merge, postgres_ledger, second)
        assert (one.result(patience()).calls, two.result(patience()).calls) == (1, 1)
    assert json.loads(only_call(postgres_ledger).details) == [1, 2]
    assert only_call(postgres_ledger).status == "completed"


def test_two_workers_with_two_calls_of_one_lead_do_not_wait_for_each_other(postgres_ledger: Ledger) -> None:
    """Writing a call that names a lead locks the lead a little; moving the lead on must get along with that."""
    claims = send(postgres_ledger, *(make_lead(n) for n in range(20)))
    both_inside = threading.Barrier(2)

    def meet(events: Sequence[StoredEvent]) -> CallRow:
        row = fold(events)
        if row.call_sid.endswith("-0"):  # once a batch
            both_inside.wait(patience())
        return row

    def calls_of(name: str, order: Sequence[Claim]) -> list[StoredEvent]:
        return [
            make_event(n, sid=f"{name}-{n}", reference=str(claim.lead_id), status="completed")
            for n, claim in enumerate(order)
        ]

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(merge, postgres_ledger, *calls_of("a", claims), by=meet)
        two = pool.submit(merge, postgres_ledger, *calls_of("b", claims[::-1]), by=meet)
        assert [one.result(patience()).orphans, two.result(patience()).orphans] == [0, 0]
    assert {lead_row(postgres_ledger, claim).state for claim in claims} == {LeadState.CALLED}
    assert len(call_rows(postgres_ledger)) == 40


def test_many_threads_merge_events_of_the_same_calls(ledger: Ledger) -> None:
    """Ten calls of ten events each, spread over five workers that meet at each of them."""
    spread = [
        [make_event(n, sid=f"call-{n % 10}", at=NOW + n * SECOND) for n in range(worker, 100, 5)] for worker in range(5)
    ]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda some: merge(ledger, *some), spread))
    told = {row.call_sid: json.loads(row.details) for row in call_rows(ledger)}
    assert told == {f"call-{n}": list(range(n, 100, 10)) for n in range(10)}


def test_a_call_with_more_events_than_are_read_never_seems_open_again(ledger: Ledger) -> None:
    merge(ledger, make_event(0, status="completed"))
    flood = [make_event(n, at=NOW + n * SECOND) for n in range(1, EVENTS_A_CALL + 10)]
    for start in range(0, len(flood), 200):
        merge(ledger, *flood[start : start + 200])
    assert (only_call(ledger).status, only_call(ledger).is_final) == ("completed", True)
    assert len(raw(ledger)) == EVENTS_A_CALL + 10


# finding the lead


def test_a_call_finds_its_lead_by_our_reference_before_all_else(ledger: Ledger) -> None:
    named, other = send(ledger, make_lead(1), make_lead(2))
    record_id(ledger, other, "f2")
    merge(ledger, make_event(reference=str(named.lead_id), lead="f2", campaign=CAMPAIGN, phone=other.phone))
    assert (only_call(ledger).lead_id, only_call(ledger).linked_by) == (named.lead_id, "reference")


def record_id(ledger: Ledger, claim: Claim, found: str) -> None:
    with ledger.database.write() as connection:
        connection.execute(sa.update(leads).where(leads.c.id == claim.lead_id).values(futwork_lead_id=found))


def test_a_call_finds_its_lead_by_futworks_id_before_the_phone(ledger: Ledger) -> None:
    (named,) = send(ledger, make_lead(1), futwork_lead_id="f1")
    (other,) = send(ledger, make_lead(2))
    merge(ledger, make_event(reference="not one of ours", lead="f1", campaign=CAMPAIGN, phone=other.phone))
    assert (only_call(ledger).lead_id, only_call(ledger).linked_by) == (named.lead_id, "futwork_lead_id")


def test_an_id_that_two_leads_show_tells_nothing(ledger: Ledger) -> None:
    send(ledger, make_lead(1), make_lead(2), futwork_lead_id="f1")
    merge(ledger, make_event(lead="f1"))
    assert (only_call(ledger).lead_id, only_call(ledger).linked_by) == (None, None)


def test_a_call_finds_its_lead_by_campaign_and_phone_when_one_fits(ledger: Ledger) -> None:
    claim, _ = send(ledger, make_lead(1), make_lead(2))
    merge(ledger, make_event(campaign=CAMPAIGN, phone=claim.phone, status="completed", lead="f1"))
    assert (only_call(ledger).lead_id, only_call(ledger).linked_by) == (claim.lead_id, "phone")
    assert (lead_row(ledger, claim).state, lead_row(ledger, claim).futwork_lead_id) == ("called", "f1")


def test_a_phone_that_fits_two_leads_tells_nothing(ledger: Ledger) -> None:
    claims = send(ledger, make_lead(1, key="a"), make_lead(1, key="b"))
    merge(ledger, make_event(campaign=CAMPAIGN, phone=make_lead(1).phone, status="completed"))
    assert only_call(ledger).lead_id is None
    assert [lead_row(ledger, claim).state for claim in claims] == ["submitted", "submitted"]


@pytest.mark.parametrize(
    "says",
    [
        {"campaign": "another", "phone": make_lead(1).phone},
        {"campaign": CAMPAIGN, "phone": make_lead(2).phone},
        {"campaign": None, "phone": make_lead(1).phone},
        {"campaign": CAMPAIGN, "phone": None},
        {"reference": str(uuid.uuid4())},
        {"lead": "f9"},
        {},
    ],
)
def test_a_call_that_fits_no_lead_is_an_orphan_and_moves_none(ledger: Ledger, says: dict[str, Any]) -> None:
    (claim,) = send(ledger, make_lead(1), futwork_lead_id="f1")
    before = lead_row(ledger, claim)
    assert merge(ledger, make_event(status="completed", **says)).orphans == 1
    assert only_call(ledger).lead_id is None
    assert lead_row(ledger, claim) == before


def test_a_lead_that_was_never_sent_does_not_fit_by_phone(ledger: Ledger) -> None:
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    ledger.leads.take_in(campaign, [make_lead(1)], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW)
    assert merge(ledger, make_event(campaign=CAMPAIGN, phone=make_lead(1).phone, status="completed")).orphans == 1
    assert ledger.reports.leads(LeadFilter(campaign=CAMPAIGN))[0]["state"] == "queued"


def test_a_lead_that_was_never_sent_does_not_make_the_phone_ambiguous(ledger: Ledger) -> None:
    (claim,) = send(ledger, make_lead(1, key="a"))
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    ledger.leads.take_in(campaign, [make_lead(1, key="b")], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW)
    merge(ledger, make_event(campaign=CAMPAIGN, phone=claim.phone))
    assert only_call(ledger).lead_id == claim.lead_id


def test_a_lead_that_was_sent_and_then_retried_still_fits_by_phone(ledger: Ledger) -> None:
    """Its dispatcher died, it was dropped, an operator retried it: the call of the first POST must stop the second."""
    (claim,) = send(ledger, make_lead(1), outcome=None)
    assert ledger.leads.settle_lost_claims(now=NOW + timedelta(hours=1)) == 1
    which = LeadFilter(campaign=CAMPAIGN)
    assert ledger.interventions.resolve(which, "drop", max_age=timedelta(days=1), now=NOW) == 1
    assert ledger.interventions.retry(which, max_age=timedelta(days=1), now=NOW) == 1
    assert (lead_row(ledger, claim).state, lead_row(ledger, claim).attempts) == ("queued", 0)
    assert merge(ledger, make_event(campaign=CAMPAIGN, phone=claim.phone, status="completed")).orphans == 0
    assert lead_row(ledger, claim).state == "called"
    assert ledger.leads.claim(CAMPAIGN, 9, lease=timedelta(minutes=2), now=NOW) == []


def test_a_link_stays_whatever_the_call_says_later(ledger: Ledger) -> None:
    first, second = send(ledger, make_lead(1), make_lead(2))
    merge(ledger, make_event(1, reference=str(first.lead_id)))
    merge(ledger, make_event(2, at=NOW + SECOND, reference=str(second.lead_id), status="completed"))
    assert (only_call(ledger).lead_id, only_call(ledger).linked_by) == (first.lead_id, "reference")
    assert [lead_row(ledger, claim).state for claim in (first, second)] == ["called", "submitted"]


# what a call proves


@pytest.mark.parametrize("state", list(LeadState))
@pytest.mark.parametrize("status", ["ringing", "completed"])
def test_evidence_moves_a_lead_on_from_any_state_but_its_ends(ledger: Ledger, state: LeadState, status: str) -> None:
    (claim,) = send(ledger, make_lead(1), outcome=None)
    times = {"claim_expires_at": NOW if state is LeadState.SENDING else None}
    if state in (LeadState.SUBMITTED, LeadState.CALLED):
        times |= {"submitted_at": NOW, "called_at": NOW if state is LeadState.CALLED else None}
    with ledger.database.write() as connection:
        connection.execute(sa.update(leads).values(state=state, **times))
    merge(ledger, make_event(reference=str(claim.lead_id), status=status))
    proven = LeadState.CALLED if status == "completed" else LeadState.SUBMITTED
    stays = state is LeadState.CALLED
    row = lead_row(ledger, claim)
    assert row.state == (state if stays else proven)
    assert (row.called_at is not None) == (row.state == "called")
    assert row.claim_expires_at is None


def test_a_lead_with_a_final_and_an_open_call_is_called(ledger: Ledger) -> None:
    (claim,) = send(ledger, make_lead(1))
    says = {"reference": str(claim.lead_id)}
    merge(ledger, make_event(1, sid="a", status="completed", **says), make_event(2, sid="b", lead="f1", **says))
    assert (lead_row(ledger, claim).state, lead_row(ledger, claim).futwork_lead_id) == ("called", "f1")


def test_an_event_never_replaces_a_known_futwork_id(ledger: Ledger) -> None:
    (claim,) = send(ledger, make_lead(1), futwork_lead_id="f1")
    merge(ledger, make_event(reference=str(claim.lead_id), lead="f2", status="completed"))
    assert lead_row(ledger, claim).futwork_lead_id == "f1"


# orphans


def test_an_orphan_is_linked_once_the_id_arrives(ledger: Ledger) -> None:
    merge(ledger, make_event(1, sid="a", lead="f1", status="completed"), make_event(2, sid="b", lead="f9"))
    assert ledger.calls.link_orphans(now=NOW) == 0
    (claim,) = send(ledger, make_lead(1), futwork_lead_id="f1")
    assert lead_row(ledger, claim).state == "submitted"
    assert ledger.calls.link_orphans(now=NOW + SECOND) == 1
    assert [(row.lead_id, row.linked_by) for row in call_rows(ledger)] == [
        (claim.lead_id, "futwork_lead_id"),
        (None, None),
    ]
    assert (lead_row(ledger, claim).state, lead_row(ledger, claim).called_at) == ("called", NOW + SECOND)
    assert ledger.calls.link_orphans(now=NOW) == 0


def test_linking_looks_at_the_newest_orphans_first(ledger: Ledger) -> None:
    merge(ledger, *(make_event(n, sid=f"call-{n}", lead=f"f{n}", at=NOW + n * SECOND) for n in range(3)))
    for number in range(3):
        send(ledger, make_lead(number), futwork_lead_id=f"f{number}")
    assert ledger.calls.link_orphans(2, now=NOW) == 2
    assert [row.lead_id is None for row in call_rows(ledger)] == [True, False, False]


def test_more_orphans_than_fit_a_transaction_are_all_linked(ledger: Ledger) -> None:
    numbers = range(450)
    for start in range(0, 450, 150):
        merge(ledger, *(make_event(n, sid=f"call-{n}", lead=f"f{n}") for n in range(start, start + 150)))
    claims = send(ledger, *(make_lead(n) for n in numbers), outcome=None)
    with ledger.database.write() as connection:
        connection.execute(
            sa.update(leads).where(leads.c.id == sa.bindparam("of")).values(futwork_lead_id=sa.bindparam("found")),
            [{"of": claim.lead_id, "found": f"f{int(claim.phone[-8:])}"} for claim in claims],
        )
    assert ledger.calls.link_orphans(now=NOW) == 450
    assert {row.linked_by for row in call_rows(ledger)} == {"futwork_lead_id"}


def test_linking_does_not_overwrite_what_a_merge_writes_meanwhile(postgres_ledger: Ledger) -> None:
    merge(postgres_ledger, make_event(1, lead="f1"))
    (claim,) = send(postgres_ledger, make_lead(1), futwork_lead_id="f1")
    inside = threading.Event()

    def slow(events: Sequence[StoredEvent]) -> CallRow:
        inside.set()
        until(lambda: somebody_waits_for_a_lock(postgres_ledger))  # the one that links has read the call by now
        return fold(events)

    with ThreadPoolExecutor(2) as pool:
        merging = pool.submit(
            merge, postgres_ledger, make_event(2, at=NOW + SECOND, lead="f1", status="completed"), by=slow
        )
        until(inside.is_set)
        linking = pool.submit(postgres_ledger.calls.link_orphans, now=NOW)
        assert (merging.result(patience()).orphans, linking.result(patience())) == (0, 0)
    assert (only_call(postgres_ledger).status, json.loads(only_call(postgres_ledger).details)) == ("completed", [1, 2])
    assert lead_row(postgres_ledger, claim).state == "called"


# quarantine


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_event_in_quarantine_stays_whole_until_it_is_released(ledger: Ledger, is_stored: bool) -> None:
    event = make_event()
    if is_stored:
        ledger.calls.keep([event])
    assert ledger.calls.quarantine(event, reason="the first reason")
    assert not ledger.calls.quarantine(event, reason="the second reason")
    (waiting,) = ledger.quarantine.waiting(kind="event")
    assert (waiting.digest, waiting.body, waiting.reason) == (event.digest, event.body, "the first reason")
    assert [(bytes(row.body), row.state) for row in raw(ledger)] == [(event.body, "quarantined")]
    ledger.quarantine.release([event.digest], now=NOW)
    assert ledger.quarantine.waiting() == []
    assert ledger.calls.pending(before=NOW + SECOND) == [event]
    assert ledger.calls.quarantine(event, reason="the third reason")
    assert [one.reason for one in ledger.quarantine.waiting()] == ["the third reason"]


def test_a_merged_event_is_not_unmerged_by_quarantine(ledger: Ledger) -> None:
    event = make_event()
    merge(ledger, event)
    assert not ledger.calls.quarantine(event, reason="too late")
    assert [row.state for row in raw(ledger)] == ["merged"]
    assert ledger.quarantine.waiting() == []


def test_the_same_body_is_in_quarantine_once_for_each_kind(ledger: Ledger) -> None:
    digests = [ledger.quarantine.put(kind, b"\x00\xff", reason="why", now=NOW) for kind in ("lead", "lead", "event")]
    assert (digests[0] == digests[1], digests[0] == digests[2]) == (True, False)
    assert len(ledger.quarantine.waiting()) == 2
    assert [(one.kind, one.body) for one in ledger.quarantine.waiting(kind="lead")] == [("lead", b"\x00\xff")]


@pytest.mark.parametrize("reason", ["a\x00b: unknown field", "half a pair \ud800", "पता नहीं"])
def test_any_reason_can_be_kept(ledger: Ledger, reason: str) -> None:
    event = make_event()
    ledger.calls.quarantine(event, reason=reason)
    ledger.quarantine.put("lead", b"{}", reason=reason, now=NOW)
    assert [one.reason for one in ledger.quarantine.waiting()] == [
        reason.replace("\x00", "?").replace("\ud800", "?")
    ] * 2


def test_quarantine_is_read_in_pages_each_thing_once_while_some_is_released(ledger: Ledger) -> None:
    for number in range(7):
        ledger.quarantine.put("event", b"%d" % number, reason="why", now=NOW + (number // 3) * SECOND)
    ledger.quarantine.put("lead", b"x", reason="why", now=NOW)
    seen = []
    for page in ledger.quarantine.pages(kind="event", size=2):
        seen += [one.body for one in page]
        ledger.quarantine.release([page[0].digest], now=NOW)
    assert sorted(seen) == [b"%d" % number for number in range(7)]
    with ledger.database.read() as connection:
        released = sa.select(sa.func.count()).select_from(quarantine).where(quarantine.c.released_at.is_not(None))
        assert connection.scalar(released) == 4
