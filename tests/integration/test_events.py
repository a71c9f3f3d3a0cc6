"""Events: kept as they came, merged in any order to the same call, and evidence for their lead; on both databases."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import combinations, permutations
from typing import Any

import orjson
import pytest
import sqlalchemy as sa

from pipeline.broker import WebEvent
from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import Claim, Outcome, Retry, settle
from pipeline.events import Events, Kept
from pipeline.ledger import Ledger, LedgerUnavailable, StoredEvent, digest_of
from pipeline.ledger.tables import attempts, call_events, calls, leads, quarantine
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead

MakeSettings = Callable[..., Settings]
RETRY = Retry(base=timedelta(seconds=10), cap=timedelta(minutes=10), max_attempts=8)
SECOND = timedelta(seconds=1)
FUTWORK_ID = "68ecc86fd9fbecbe9431a190"


def make_event(status: str = "completed", *, at: datetime = NOW, fault: str | None = None, **says: Any) -> WebEvent:
    """A post-call event of `call-1`."""
    body = {"callSid": "call-1", "campaignId": CAMPAIGN, "status": status} | says
    return WebEvent(json.dumps(body).encode(), at, fault)


def to(phone: str, **recipient_data: Any) -> dict[str, Any]:
    """The context of a call to this number."""
    return {"contextDetails": {"recipientPhoneNumber": phone, "recipientData": recipient_data}}


@pytest.fixture
def events(ledger: Ledger, make_settings: MakeSettings) -> Events:
    """The stage, over the test's ledger."""
    return Events(ledger, make_settings(reference_key="our_ref"))


def table(ledger: Ledger, of: sa.Table) -> list[Any]:
    with ledger.database.read() as connection:
        return list(connection.execute(sa.select(of).order_by(*of.primary_key.columns)))


def only(ledger: Ledger, of: sa.Table) -> Any:
    (row,) = table(ledger, of)
    return row


def empty(ledger: Ledger) -> None:
    with ledger.database.write() as connection:
        for one in (calls, call_events):
            connection.execute(sa.delete(one))


def raw_states(ledger: Ledger) -> dict[str, int]:
    with ledger.database.read() as connection:
        states = list(connection.scalars(sa.select(call_events.c.state)))
    return {state: states.count(state) for state in states}


def reasons(ledger: Ledger) -> list[str]:
    return [one.reason for one in ledger.quarantine.waiting(kind="event")]


def send(ledger: Ledger, *numbers: int, outcome: Outcome | None = Outcome.ACCEPTED, **answer: Any) -> list[Claim]:
    """Take leads in and claim them; record the outcome, if there is one yet."""
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    given = [make_lead(number) for number in numbers]
    ledger.leads.take_in(campaign, given, batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW)
    claims = ledger.leads.claim(CAMPAIGN, len(given), lease=timedelta(minutes=2), now=NOW)
    if outcome is not None:
        record(ledger, claims, outcome, **answer)
    return claims


def record(ledger: Ledger, claims: Sequence[Claim], outcome: Outcome, **answer: Any) -> None:
    settled = [settle(make_answer(one, outcome, **answer), RETRY, now=NOW, jitter=random.Random(1)) for one in claims]
    ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=30 * SECOND, now=NOW)


def state(ledger: Ledger, claim: Claim) -> str:
    return next(row.state for row in table(ledger, leads) if row.id == claim.lead_id)


# taking in


def test_an_event_is_kept_as_it_came_and_merged_into_its_call(ledger: Ledger, events: Events) -> None:
    event = make_event("call-disconnected", telephonyData={"duration": "31.0"}, disposition="Interested")
    assert events.take_in([event]) == Kept(events=1, calls=1, orphans=1, quarantined=0)
    stored = only(ledger, call_events)
    assert (bytes(stored.body), stored.received_at, stored.state) == (event.body, NOW, "merged")
    call = only(ledger, calls)
    assert (call.call_sid, call.status, call.is_final, call.duration_seconds) == (
        "call-1", "call-disconnected", True, 31.0,
    )  # fmt: skip
    assert orjson.loads(call.details)["disposition_raw"] == "Interested"


def test_a_repeated_batch_changes_nothing(ledger: Ledger, events: Events) -> None:
    batch = [make_event("ringing"), make_event("completed", at=NOW + SECOND), make_event("busy", callSid="call-2")]
    assert events.take_in(batch) == Kept(3, 2, 2, 0)
    before = [table(ledger, one) for one in (call_events, calls, quarantine)]
    assert events.take_in(batch) == Kept(0, 0, 0, 0)
    assert events.take_in([replace(one, received_at=NOW + 60 * SECOND) for one in batch]) == Kept(0, 0, 0, 0)
    assert [table(ledger, one) for one in (call_events, calls, quarantine)] == before


def test_an_empty_batch_is_nothing(ledger: Ledger, events: Events) -> None:
    assert events.take_in([]) == Kept(0, 0, 0, 0)
    assert table(ledger, call_events) == []


STORY = [
    make_event("initiated", at=NOW, **to("99997 89877", our_ref="first"), leadId=None),
    make_event("ringing", at=NOW + SECOND, leadId=FUTWORK_ID, agentId="a1"),
    make_event("call-disconnected", at=NOW + 2 * SECOND, transcript="assistant: Namaste\nuser: yes", disposition=""),
    make_event("completed", at=NOW + 2 * SECOND, transcript="", disposition="Callback", **to("+919999789877")),
]
TOGETHER = [cuts for n in range(4) for cuts in combinations(range(1, 4), n)]


@pytest.mark.parametrize("cuts", TOGETHER, ids=str)
def test_every_order_and_split_of_a_calls_events_gives_the_same_call(
    ledger: Ledger, events: Events, cuts: tuple[int, ...]
) -> None:
    """With repeats too, which come earlier than what they repeat, or later.

    Each order meets one of the splits on each database, and another on the other.
    """
    events.take_in(STORY)
    expected, kept = only(ledger, calls), table(ledger, call_events)
    assert (expected.status, expected.futwork_lead_id, expected.reference) == ("completed", FUTWORK_ID, "first")
    first = (TOGETHER.index(cuts) + 4 * ledger.database.is_sqlite) % 8
    for number, order in list(enumerate(permutations(STORY)))[first::8]:
        empty(ledger)
        repeats = [replace(one, received_at=one.received_at + (number % 2) * 5 * SECOND) for one in order[: number % 5]]
        parts = [order[start:end] for start, end in zip((0, *cuts), (*cuts, 4), strict=True)]
        for part in [repeats, *parts, repeats]:
            events.take_in(part)
        assert (only(ledger, calls), table(ledger, call_events)) == (expected, kept)


def test_a_late_ringing_after_completed_changes_nothing_but_the_time(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1)
    events.take_in([make_event("completed", **to(claim.phone), disposition="Interested")])
    before, lead = only(ledger, calls), only(ledger, leads)
    events.take_in([make_event("ringing", at=NOW + 9 * SECOND, **to(claim.phone))])
    assert only(ledger, calls)._asdict() == before._asdict() | {"last_event_at": NOW + 9 * SECOND}
    assert only(ledger, leads) == lead
    assert lead.state == "called"


# what cannot be read


def test_an_unreadable_event_is_quarantined_with_its_reason_and_the_others_are_merged(
    ledger: Ledger, events: Events
) -> None:
    bad = WebEvent(b'{"status": "completed"}', NOW)
    assert events.take_in([bad, make_event()]) == Kept(events=2, calls=1, orphans=1, quarantined=1)
    assert raw_states(ledger) == {"merged": 1, "quarantined": 1}
    (waiting,) = ledger.quarantine.waiting(kind="event")
    assert (waiting.body, waiting.reason) == (bad.body, "the event has no callSid, so it belongs to no call")
    assert events.take_in([bad]) == Kept(0, 0, 0, 0)
    assert len(table(ledger, quarantine)) == 1


def test_what_the_web_process_refused_is_kept_with_the_fault_that_it_found(ledger: Ledger, events: Events) -> None:
    refused = WebEvent(b"<xml/>\x00\xff", NOW, fault="the body is not JSON")
    assert events.take_in([refused, refused, make_event()]) == Kept(1, 1, 1, 0)
    (waiting,) = ledger.quarantine.waiting(kind="event")
    assert (waiting.body, waiting.reason, waiting.received_at) == (refused.body, "the body is not JSON", NOW)
    assert raw_states(ledger) == {"merged": 1}


def test_a_replay_without_a_fix_changes_nothing(ledger: Ledger, events: Events) -> None:
    events.take_in([WebEvent(b"[]", NOW), WebEvent(b"{}", NOW, fault="odd")])
    before = [table(ledger, one) for one in (call_events, calls, quarantine)]
    assert events.replay(now=NOW) == Kept(events=2, calls=0, orphans=0, quarantined=2)
    assert [table(ledger, one) for one in (call_events, calls, quarantine)] == before


def test_a_replay_after_a_fix_merges_and_releases(ledger: Ledger, events: Events) -> None:
    """An older release could not read it: so it stands in quarantine, although this one can."""
    (claim,) = send(ledger, 1)
    readable = make_event(**to(claim.phone))
    stored = StoredEvent(digest_of(readable.body), readable.body, NOW)
    ledger.calls.quarantine(stored, reason="an older release's reason")
    events.take_in([WebEvent(b"{}", NOW)])
    assert events.replay(now=NOW + SECOND) == Kept(events=2, calls=1, orphans=0, quarantined=1)
    assert raw_states(ledger) == {"merged": 1, "quarantined": 1}
    assert [one.body for one in ledger.quarantine.waiting()] == [b"{}"]
    assert state(ledger, claim) == "called"
    assert events.replay(now=NOW + SECOND) == Kept(1, 0, 0, 1)


def test_a_replay_keeps_what_only_the_web_process_had_refused(ledger: Ledger, events: Events) -> None:
    refused = make_event(fault="a web process of old refused it")
    events.take_in([refused])
    assert table(ledger, call_events) == []
    assert events.replay(now=NOW) == Kept(1, 1, 1, 0)
    assert (bytes(only(ledger, call_events).body), only(ledger, call_events).state) == (refused.body, "merged")
    assert ledger.quarantine.waiting() == []


def test_a_replay_that_is_cut_short_loses_nothing(postgres_ledger: Ledger, make_settings: MakeSettings) -> None:
    """A body that the web process refused is in quarantine alone, so it leaves it only when it is kept elsewhere."""
    events = Events(postgres_ledger, make_settings())
    events.take_in([make_event(fault="odd")])
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE call_events ADD CONSTRAINT full_disk CHECK (false) NOT VALID"))
    try:
        with pytest.raises(sa.exc.IntegrityError):
            events.replay(now=NOW)
    finally:
        with postgres_ledger.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE call_events DROP CONSTRAINT full_disk"))
    assert reasons(postgres_ledger) == ["odd"]
    assert events.replay(now=NOW) == Kept(1, 1, 1, 0)


def test_a_replay_of_more_than_a_page_reads_everything_once(ledger: Ledger, events: Events) -> None:
    events.take_in(
        [make_event(callSid=f"call-{n}", fault="odd") for n in range(450)]
        + [WebEvent(b"[%d]" % n, NOW) for n in range(5)]
    )
    assert events.replay(now=NOW) == Kept(events=455, calls=450, orphans=450, quarantined=5)
    assert len(ledger.quarantine.waiting(limit=1000)) == 5


# what breaks the merge


def test_an_event_that_the_database_refuses_is_quarantined_by_itself(
    postgres_ledger: Ledger, make_settings: MakeSettings
) -> None:
    """A database may know a rule that the code does not; here, that no call is called cursed."""
    events = Events(postgres_ledger, make_settings())
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE calls ADD CONSTRAINT curse CHECK (call_sid <> 'cursed')"))
    try:
        batch = [make_event(callSid=sid) for sid in ("a", "cursed", "b")] + [make_event("ringing", callSid="a")]
        assert events.take_in(batch) == Kept(events=4, calls=2, orphans=2, quarantined=1)
    finally:
        with postgres_ledger.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE calls DROP CONSTRAINT curse"))
    assert [(row.call_sid, row.status) for row in table(postgres_ledger, calls)] == [
        ("a", "completed"),
        ("b", "completed"),
    ]
    assert raw_states(postgres_ledger) == {"merged": 3, "quarantined": 1}
    (reason,) = reasons(postgres_ledger)
    assert reason.startswith("it could not be merged: IntegrityError: ")
    assert events.replay(now=NOW) == Kept(1, 1, 1, 0)
    assert raw_states(postgres_ledger) == {"merged": 4}


def test_an_event_that_cannot_be_folded_is_quarantined_by_itself(ledger: Ledger, make_settings: MakeSettings) -> None:
    """The raw event of its call was damaged: what was merged stays, and what is new waits with a reason."""
    settings = make_settings()
    events = Events(ledger, settings)
    events.take_in([make_event("ringing", callSid="a"), make_event("ringing", callSid="b")])
    with ledger.database.write() as connection:
        damaged = sa.update(call_events).where(call_events.c.call_sid == "b").values(body=b'{"callSid": "z"}')
        connection.execute(damaged)
    before = next(row for row in table(ledger, calls) if row.call_sid == "b")
    batch = [make_event(callSid=sid, at=NOW + SECOND) for sid in ("a", "b", "c")]
    assert events.take_in(batch) == Kept(events=3, calls=2, orphans=2, quarantined=1)
    assert {row.call_sid: row.status for row in table(ledger, calls)} == {
        "a": "completed",
        "b": "ringing",
        "c": "completed",
    }
    assert next(row for row in table(ledger, calls) if row.call_sid == "b") == before
    assert reasons(ledger) == ["it could not be merged: ValueError: the events to merge are of several calls"]


def test_events_stay_and_wait_while_the_ledger_is_at_fault(
    postgres_ledger: Ledger, make_settings: MakeSettings
) -> None:
    """A missing table is not the events' fault: nothing is quarantined, the message goes back to its queue."""
    events = Events(postgres_ledger, make_settings())
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE calls RENAME TO calls_away"))
    try:
        with pytest.raises(sa.exc.ProgrammingError):
            events.take_in([make_event()])
    finally:
        with postgres_ledger.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE calls_away RENAME TO calls"))
    assert (raw_states(postgres_ledger), reasons(postgres_ledger)) == ({"pending": 1}, [])
    assert events.merge_left_over(before=NOW + SECOND, now=NOW) == 1
    assert raw_states(postgres_ledger) == {"merged": 1}


def test_an_absent_ledger_says_so(make_settings: MakeSettings) -> None:
    absent = Ledger("postgresql://nobody@127.0.0.1:9/none")
    with pytest.raises(LedgerUnavailable):
        Events(absent, make_settings()).take_in([make_event()])


def test_a_worker_that_died_between_keeping_and_merging_loses_nothing(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1)
    batch = [make_event("ringing", **to(claim.phone)), make_event(**to(claim.phone)), WebEvent(b"{}", NOW)]
    ledger.calls.keep([StoredEvent(digest_of(one.body), one.body, one.received_at) for one in batch])
    assert (table(ledger, calls), state(ledger, claim)) == ([], "submitted")
    assert events.merge_left_over(before=NOW, now=NOW) == 0
    assert events.merge_left_over(before=NOW + SECOND, now=NOW) == 3
    assert (only(ledger, calls).status, state(ledger, claim)) == ("completed", "called")
    assert raw_states(ledger) == {"merged": 2, "quarantined": 1}
    assert events.merge_left_over(before=NOW + SECOND, now=NOW) == 0


def test_more_left_over_events_than_one_page_are_all_merged(ledger: Ledger, events: Events) -> None:
    left = [make_event(callSid=f"call-{n}") for n in range(1100)]
    ledger.calls.keep([StoredEvent(digest_of(one.body), one.body, one.received_at) for one in left])
    assert events.merge_left_over(before=NOW + SECOND, now=NOW) == 1100
    assert raw_states(ledger) == {"merged": 1100}
    assert len(table(ledger, calls)) == 1100


# finding the lead, and what that proves


@pytest.mark.parametrize("spelled", ["9800000001", "+919800000001", "098000 00001", "+91 98000-00001"])
def test_a_call_finds_its_lead_by_the_number_in_any_spelling(ledger: Ledger, events: Events, spelled: str) -> None:
    (claim,) = send(ledger, 1)
    assert events.take_in([make_event(**to(spelled))]).orphans == 0
    assert (only(ledger, calls).linked_by, state(ledger, claim)) == ("phone", "called")


def test_a_call_finds_its_lead_by_our_reference_in_the_data(ledger: Ledger, events: Events) -> None:
    claims = send(ledger, 1, 2)
    events.take_in([make_event(leadId="unheard of", **to(claims[1].phone, our_ref=str(claims[0].lead_id)))])
    assert (only(ledger, calls).lead_id, only(ledger, calls).linked_by) == (claims[0].lead_id, "reference")


def test_without_a_reference_key_the_data_is_not_searched_for_one(ledger: Ledger, make_settings: MakeSettings) -> None:
    (claim,) = send(ledger, 1)
    Events(ledger, make_settings()).take_in([make_event(**to("9800000002", our_ref=str(claim.lead_id)))])
    assert only(ledger, calls).lead_id is None


def test_a_key_named_lead_id_in_the_data_is_not_futworks(ledger: Ledger, events: Events) -> None:
    send(ledger, 1, futwork_lead_id=FUTWORK_ID)
    events.take_in([make_event(**to("9800000002", leadId=FUTWORK_ID))])
    assert only(ledger, calls).lead_id is None


def test_an_event_that_overtakes_its_own_response_makes_the_lead_called(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1, outcome=None)
    assert state(ledger, claim) == "sending"
    events.take_in([make_event(**to(claim.phone))])
    called = only(ledger, leads)
    assert (called.state, called.futwork_lead_id, called.claim_expires_at) == ("called", None, None)
    record(ledger, [claim], Outcome.ACCEPTED, futwork_lead_id=FUTWORK_ID)
    assert only(ledger, leads)._asdict() == called._asdict() | {"futwork_lead_id": FUTWORK_ID}
    assert [row.outcome for row in table(ledger, attempts)] == ["accepted"]
    assert ledger.leads.settle_lost_claims(now=NOW + timedelta(hours=1)) == 0


def test_an_event_makes_an_uncertain_lead_called_and_it_is_not_sent_again(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1, outcome=Outcome.UNCERTAIN)
    assert state(ledger, claim) == "uncertain"
    events.take_in([make_event("no-answer", **to(claim.phone))])
    assert state(ledger, claim) == "called"
    resent = {"default_policy": "resend", "default_after": timedelta(), "default_max_attempts": 8}
    assert ledger.leads.settle_old_uncertain(now=NOW + timedelta(days=1), **resent) == {"resend": 0, "drop": 0}
    assert ledger.leads.claim(CAMPAIGN, 9, lease=timedelta(minutes=2), now=NOW) == []
    assert len(table(ledger, attempts)) == 1


def test_an_event_that_is_not_final_proves_the_submission(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1, outcome=Outcome.UNCERTAIN)
    events.take_in([make_event("ringing", leadId=FUTWORK_ID, **to(claim.phone))])
    row = only(ledger, leads)
    assert (row.state, row.futwork_lead_id, row.called_at) == ("submitted", FUTWORK_ID, None)
    assert row.submitted_at is not None
    events.take_in([make_event("completed", at=NOW + SECOND, leadId=FUTWORK_ID)])
    assert state(ledger, claim) == "called"


def test_a_lead_that_waits_for_its_retry_is_not_sent_again_once_it_was_called(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1, outcome=Outcome.BUSY)
    assert state(ledger, claim) == "queued"
    events.take_in([make_event(**to(claim.phone))])
    assert state(ledger, claim) == "called"
    assert ledger.leads.claim(CAMPAIGN, 9, lease=timedelta(minutes=2), now=NOW + timedelta(hours=1)) == []


def test_two_workers_with_the_same_batches_lose_no_event(ledger: Ledger, make_settings: MakeSettings) -> None:
    """Redelivered messages: each batch goes to two of four workers, in another order."""
    claims = send(ledger, *range(30))
    batches = [
        [make_event(status, at=NOW + n * SECOND, callSid=f"call-{claim.phone}", **to(claim.phone)) for claim in some]
        for n, status in enumerate(("ringing", "in-progress", "completed"))
        for some in (claims[:20], claims[:9:-1])
    ]
    workers = [Events(ledger, make_settings()) for _ in range(4)]
    jobs = [(worker, batch) for number, worker in enumerate(workers) for batch in batches[number % 2 :: 2]]
    random.Random(5).shuffle(jobs)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: job[0].take_in(job[1]), jobs))
    assert raw_states(ledger) == {"merged": 90}
    assert {(row.status, row.first_event_at, row.last_event_at) for row in table(ledger, calls)} == {
        ("completed", NOW, NOW + 2 * SECOND)
    }
    assert {row.state for row in table(ledger, leads)} == {"called"}


@pytest.mark.parametrize(
    "says",
    [
        {"disposition": "d" * 5000, "status": "s" * 500, "campaignId": "c" * 120, "leadId": "l" * 120},
        {"disposition": "पता नहीं" * 60, "extractedData": {"callback_date_time": "9999-12-31T23:59:59"}},
        {"disposition": "a\x00b", "transcript": "half a pair \ud800", "telephonyData": {"duration": 1e308}},
        {"status": None, "leadId": ["x"], "contextDetails": "text", "telephonyData": 7, "extractedData": [1]},
        {"contextDetails": {"recipientData": {"our_ref": "r" * 900}, "recipientPhoneNumber": 9800000001.0}},
        {"callSid": "s" * 128, "extractedData": {"n": 2**70}},
    ],
)  # fmt: skip
def test_whatever_an_event_says_it_is_merged(ledger: Ledger, events: Events, says: dict[str, Any]) -> None:
    assert events.take_in([make_event(**says), make_event(callSid="call-2")]) == Kept(2, 2, 2, 0)
    assert len(table(ledger, calls)) == 2


def test_the_times_in_the_report_are_aware(ledger: Ledger, events: Events) -> None:
    (claim,) = send(ledger, 1)
    events.take_in([make_event(at=NOW.astimezone(), **to(claim.phone))])
    story = ledger.reports.story(claim.lead_id)
    assert story is not None
    assert story["calls"][0]["first_event_at"] == NOW
    assert story["calls"][0]["first_event_at"].tzinfo == UTC
