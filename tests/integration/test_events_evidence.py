"""Events as evidence about leads, and events that are trouble: long, odd, refused, orphaned; on both databases."""

from __future__ import annotations

import itertools
import json
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from pipeline.broker import WebEvent
from pipeline.cli.actions import events as events_group
from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import Claim, Outcome, Retry, settle
from pipeline.events import Events, Kept
from pipeline.ledger import LeadFilter, Ledger, StoredEvent, digest_of
from pipeline.ledger.tables import attempts, call_events, calls, leads
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead
from tests.waiting import patience

DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
RETRY = Retry(base=timedelta(seconds=10), cap=timedelta(minutes=10), max_attempts=8)
JITTER = random.Random(7)
FUTWORK_ID = "6a0000000000000000000001"
JOURNEY: list[dict[str, Any]] = [
    {"status": "ringing", "transcript": "", "disposition": None},
    {"status": "in-progress", "telephonyData": {"provider": "exotel", "duration": "0.0"}},
    {
        "status": "call-disconnected",
        "transcript": "assistant: Hello\nuser: Yes, tell me",
        "telephonyData": {"duration": "31.5", "toNumber": "+919800000001"},
    },
    {
        "status": "completed",
        "disposition": "Interested",
        "telephonyData": {"duration": 31.5, "recordingUrl": "https://recordings.futwork.com/1.mp3"},
        "extractedData": {"callback_date_time": "2026-05-09T10:00:00+05:30"},
    },
]


@pytest.fixture
def events(ledger: Ledger, make_settings: Callable[..., Settings]) -> Events:
    """The stage over the ledger on each database, with our reference switched on."""
    return Events(ledger, make_settings(reference_key="our_ref"))


def told(call_sid: str = "call-1", *, at: float = 0, number: int = 1, **said: Any) -> WebEvent:
    """An event of a call with the lead of *number*, received *at* seconds after noon."""
    said = {"status": "completed"} | said
    context = {"recipientPhoneNumber": make_lead(number).phone[3:]} | said.pop("contextDetails", {})
    body = {"callSid": call_sid, "campaignId": CAMPAIGN, "contextDetails": context} | said
    return WebEvent(json.dumps(body).encode(), NOW + at * SECOND)


def rows(ledger: Ledger, which: sa.Table, *order: Any) -> list[Any]:
    """All rows of a table."""
    with ledger.database.read() as connection:
        return list(connection.execute(sa.select(which).order_by(*order)))


def only(ledger: Ledger, which: sa.Table) -> Any:
    """The one row there is."""
    (row,) = rows(ledger, which)
    return row


def content(row: Any) -> dict[str, Any]:
    """A call as the ledger has it, without its name, so that calls can be compared."""
    details = json.loads(row.details)
    del details["call_sid"]
    return {**row._mapping, "call_sid": "", "details": details}


def states(ledger: Ledger) -> dict[str, int]:
    """How many events are in which state."""
    found = [row.state for row in rows(ledger, call_events)]
    return {state: found.count(state) for state in sorted(set(found))}


def take_in(ledger: Ledger, *numbers: int) -> None:
    """Take leads in."""
    ledger.leads.take_in(
        ledger.campaigns.ensure(CAMPAIGN, now=NOW),
        [make_lead(number) for number in numbers],
        batch_id=uuid.uuid4(), max_age=DAY, now=NOW,
    )  # fmt: skip


def claim(ledger: Ledger, *, now: datetime = NOW) -> list[Claim]:
    """Claim all that is due."""
    return ledger.leads.claim(CAMPAIGN, 1000, lease=timedelta(minutes=2), now=now)


def record(ledger: Ledger, claims: Sequence[Claim], outcome: Outcome, **overrides: Any) -> None:
    """Record the same outcome for every claim."""
    settlements = [settle(make_answer(one, outcome, **overrides), RETRY, now=NOW, jitter=JITTER) for one in claims]
    ledger.leads.record(Campaign(CAMPAIGN), settlements, probe_after=timedelta(seconds=30), now=NOW)


def sent(ledger: Ledger, *numbers: int, outcome: Outcome = Outcome.ACCEPTED, **overrides: Any) -> None:
    """Take leads in and send them."""
    take_in(ledger, *numbers)
    record(ledger, claim(ledger), outcome, **overrides)


# one call


def test_an_event_becomes_a_call_with_what_enrichment_finds(events: Events, ledger: Ledger) -> None:
    sent(ledger, 1)
    assert events.take_in([told(**JOURNEY[3], transcript="assistant: Hello\nuser: Yes", leadId=FUTWORK_ID)]) == Kept(
        1, 1, 0, 0
    )
    call, lead = only(ledger, calls), only(ledger, leads)
    assert (call.call_sid, call.lead_id, call.linked_by) == ("call-1", lead.id, "phone")
    assert (call.campaign_id, call.futwork_lead_id, call.reference) == (CAMPAIGN, FUTWORK_ID, None)
    assert (call.phone, call.status, call.is_final, call.outcome) == (lead.phone, "completed", True, "connected")
    assert (call.disposition, call.duration_seconds) == ("interested", 31.5)
    assert call.callback_at == datetime(2026, 5, 9, 4, 30, tzinfo=UTC)
    assert call.recording_url == "https://recordings.futwork.com/1.mp3"
    assert (call.first_event_at, call.last_event_at) == (NOW, NOW)
    assert [turn["text"] for turn in json.loads(call.details)["turns"]] == ["Hello", "Yes"]
    assert (lead.state, lead.futwork_lead_id, lead.reason) == ("called", FUTWORK_ID, None)
    assert states(ledger) == {"merged": 1}


def test_events_that_arrive_in_another_order_than_they_were_sent_tell_the_same(events: Events, ledger: Ledger) -> None:
    for which, order in enumerate(itertools.permutations(range(4))):
        events.take_in([told(f"call-{which}", at=at, **JOURNEY[n]) for at, n in enumerate(order)])
    found = [content(row) for row in rows(ledger, calls)]
    assert len(found) == 24
    assert all(one == found[0] for one in found)


def test_a_batch_of_many_calls_counts_calls_and_orphans(events: Events, ledger: Ledger) -> None:
    sent(ledger, 1, 2, 3)
    batch = [told(f"call-{n}", number=n, status=status) for n in range(5) for status in ("ringing", "busy")]
    assert events.take_in(batch) == Kept(10, 5, 2, 0)
    assert events.take_in(batch) == Kept(0, 0, 0, 0)
    assert [row.state for row in rows(ledger, leads)] == ["called", "called", "called"]
    assert ledger.reports.status(now=NOW)["events"] == {"raw": 10, "quarantined": 0, "orphans": 2}


# what a call proves


@pytest.mark.parametrize("by", ["phone", "reference"])
def test_an_event_that_overtakes_the_answer_to_its_post_counts_and_the_answer_adds_the_id(
    events: Events, ledger: Ledger, by: str
) -> None:
    take_in(ledger, 1)
    claims = claim(ledger)
    found_by = {"recipientData": {"our_ref": str(claims[0].lead_id)}} if by == "reference" else {}
    events.take_in([told(contextDetails=found_by)])
    assert only(ledger, calls).linked_by == by
    assert (only(ledger, leads).state, only(ledger, leads).futwork_lead_id) == ("called", None)
    record(ledger, claims, Outcome.ACCEPTED, futwork_lead_id=FUTWORK_ID)
    lead = only(ledger, leads)
    assert (lead.state, lead.futwork_lead_id, lead.claim_expires_at) == ("called", FUTWORK_ID, None)
    assert [row.outcome for row in rows(ledger, attempts)] == ["accepted"]
    assert claim(ledger, now=NOW + timedelta(hours=1)) == []


@pytest.mark.parametrize("outcome", [Outcome.UNCERTAIN, Outcome.FAILED])
def test_an_event_that_overtakes_a_bad_answer_keeps_the_lead_from_being_sent_again(
    events: Events, ledger: Ledger, outcome: Outcome
) -> None:
    take_in(ledger, 1)
    claims = claim(ledger)
    events.take_in([told(status="ringing")])
    assert only(ledger, leads).state == "submitted"
    record(ledger, claims, outcome)
    assert only(ledger, leads).state == "submitted"
    assert claim(ledger, now=NOW + timedelta(hours=1)) == []


@pytest.mark.parametrize(
    ("status", "state"), [("completed", "called"), ("no-answer", "called"), ("ringing", "submitted")]
)
def test_an_event_ends_uncertainty_without_a_second_post(
    events: Events, ledger: Ledger, status: str, state: str
) -> None:
    sent(ledger, 1, outcome=Outcome.UNCERTAIN)
    assert only(ledger, leads).state == "uncertain"
    events.take_in([told(status=status, leadId=FUTWORK_ID)])
    settled = ledger.leads.settle_old_uncertain(
        default_policy="resend", default_after=SECOND, default_max_attempts=8, now=NOW + timedelta(hours=1)
    )
    lead = only(ledger, leads)
    assert settled == {"resend": 0, "drop": 0}
    assert (lead.state, lead.futwork_lead_id, lead.reason) == (state, FUTWORK_ID, None)
    assert claim(ledger, now=NOW + timedelta(hours=1)) == []
    assert len(rows(ledger, attempts)) == 1


def test_evidence_wins_over_every_end_without_a_call(events: Events, ledger: Ledger) -> None:
    take_in(ledger, 1, 2, 3, 4)
    rejected, exhausted, expired, cancelled = sorted(claim(ledger), key=lambda one: one.phone)
    record(ledger, [rejected], Outcome.REJECTED)
    once = Retry(base=SECOND, cap=SECOND, max_attempts=1)
    spent = settle(make_answer(exhausted, Outcome.BUSY), once, now=NOW, jitter=JITTER)
    ledger.leads.record(Campaign(CAMPAIGN), [spent], probe_after=SECOND, now=NOW)
    record(ledger, [expired, cancelled], Outcome.BUSY)
    assert ledger.interventions.cancel(LeadFilter(phone=cancelled.phone), now=NOW) == 1
    assert ledger.leads.expire(now=NOW + 2 * DAY) == 1
    before = [row.state for row in rows(ledger, leads, leads.c.phone)]
    assert before == ["rejected", "exhausted", "expired", "cancelled"]
    assert events.take_in([told(f"call-{n}", number=n) for n in (1, 2, 3, 4)]) == Kept(4, 4, 0, 0)
    assert [row.state for row in rows(ledger, leads, leads.c.phone)] == ["called"] * 4
    assert [row.reason for row in rows(ledger, leads)] == [None] * 4


def test_an_orphan_is_linked_when_the_answer_brings_its_id(events: Events, ledger: Ledger) -> None:
    nobody = told(leadId=FUTWORK_ID, contextDetails={"recipientPhoneNumber": ""})
    assert events.take_in([nobody]) == Kept(1, 1, 1, 0)
    sent(ledger, 1, futwork_lead_id=FUTWORK_ID)
    assert only(ledger, leads).state == "submitted"
    assert ledger.calls.link_orphans(now=NOW) == 1
    assert (only(ledger, calls).lead_id, only(ledger, calls).linked_by) == (only(ledger, leads).id, "futwork_lead_id")
    assert only(ledger, leads).state == "called"
    assert ledger.calls.link_orphans(now=NOW) == 0


def test_thousands_of_orphans_neither_starve_a_newer_one_nor_cost_much(events: Events, ledger: Ledger) -> None:
    for start in range(0, 2000, 200):
        events.take_in([told(f"nobody-{n}", at=n, number=n + 10, leadId=f"x{n}") for n in range(start, start + 200)])
    nobody = told(at=3000, leadId=FUTWORK_ID, contextDetails={"recipientPhoneNumber": ""})
    events.take_in([nobody])
    sent(ledger, 1, futwork_lead_id=FUTWORK_ID)
    statements: list[str] = []
    sa.event.listen(ledger.database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    assert ledger.calls.link_orphans(limit=500, now=NOW) == 1
    assert ledger.calls.link_orphans(now=NOW) == 0
    assert len(statements) <= 50
    assert ledger.reports.status(now=NOW)["events"]["orphans"] == 2000


# what cannot be read


@pytest.mark.parametrize("where", ["by the stage", "by the web process"])
def test_a_replay_reads_what_can_be_read_now_and_releases_it(events: Events, ledger: Ledger, where: str) -> None:
    sent(ledger, 1)
    one = told(leadId=FUTWORK_ID)
    if where == "by the stage":
        kept = StoredEvent(digest_of(one.body), one.body, one.received_at)
        ledger.calls.quarantine(kept, reason="an older release could not read it")
    else:
        events.take_in([WebEvent(one.body, one.received_at, fault="an older release could not read it")])
    events.take_in([WebEvent(b"{}", NOW)])
    assert (rows(ledger, calls), only(ledger, leads).state) == ([], "submitted")
    assert events.replay(now=NOW) == Kept(2, 1, 0, 1)
    assert (only(ledger, calls).linked_by, only(ledger, calls).first_event_at) == ("phone", NOW)
    assert only(ledger, leads).state == "called"
    assert [bytes(left.body) for left in ledger.quarantine.waiting()] == [b"{}"]
    assert events.replay(now=NOW) == Kept(1, 0, 0, 1)
    assert states(ledger) == {"merged": 1, "quarantined": 1}


def test_a_call_finds_its_lead_with_its_next_event_once_the_region_is_set_right(
    ledger: Ledger, make_settings: Callable[..., Settings]
) -> None:
    abroad = Events(ledger, make_settings(default_region="AE"))
    sent(ledger, 1)
    assert abroad.take_in([told()]) == Kept(1, 1, 1, 0)
    at_home = Events(ledger, make_settings())
    assert at_home.take_in([told(status="ringing", at=1)]) == Kept(1, 1, 0, 0)
    assert only(ledger, leads).state == "called"


# when something fails


@contextmanager
def refusing(ledger: Ledger, disposition: str) -> Iterator[None]:
    """A database that refuses calls of this disposition, as it would a value that it cannot hold."""
    if ledger.database.is_sqlite:
        begin = (
            f"CREATE TRIGGER refused BEFORE INSERT ON calls WHEN NEW.disposition = '{disposition}'"
            " BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
        end = "DROP TRIGGER refused"
    else:
        begin = f"ALTER TABLE calls ADD CONSTRAINT refused CHECK (disposition <> '{disposition}')"
        end = "ALTER TABLE calls DROP CONSTRAINT refused"
    run(ledger, begin)
    try:
        yield
    finally:
        run(ledger, end)


def run(ledger: Ledger, statement: str) -> None:
    """Run a statement."""
    with ledger.database.write() as connection:
        connection.execute(sa.text(statement))


def test_of_one_call_only_the_event_that_breaks_the_merge_is_quarantined(events: Events, ledger: Ledger) -> None:
    batch = [
        told(at=0, status="ringing"),
        told(at=1, disposition="Poison"),
        told(at=2, status="call-disconnected", disposition="Interested"),
    ]
    with refusing(ledger, "poison"):
        assert events.take_in(batch[1:] + batch[:1]).quarantined == 1
    assert (only(ledger, calls).status, only(ledger, calls).disposition) == ("call-disconnected", "interested")
    assert states(ledger) == {"merged": 2, "quarantined": 1}
    assert [one.body for one in ledger.quarantine.waiting()] == [batch[1].body]


def test_left_over_events_that_break_the_merge_do_not_keep_later_ones_from_it(events: Events, ledger: Ledger) -> None:
    left = [told(f"call-{n}", at=n, disposition="Poison" if n < 12 else "Interested") for n in range(620)]
    ledger.calls.keep([StoredEvent(digest_of(one.body), one.body, one.received_at) for one in left])
    with refusing(ledger, "poison"):
        assert events.merge_left_over(before=NOW + DAY, now=NOW + DAY) == 620
    assert states(ledger) == {"merged": 608, "quarantined": 12}


def test_a_call_goes_on_although_an_event_that_it_has_can_no_longer_be_read(events: Events, ledger: Ledger) -> None:
    """A release may read less than the one before; the call is told by the events that it can read."""
    events.take_in([told(at=0, status="ringing"), told("call-2", status="ringing")])
    with ledger.database.write() as connection:
        junk = call_events.c.digest == digest_of(told(at=0, status="ringing").body)
        connection.execute(sa.update(call_events).where(junk).values(body=b"once it was read"))
    assert events.take_in([told(at=1), told("call-2", at=1)]) == Kept(2, 2, 2, 0)
    assert [(row.call_sid, row.status) for row in rows(ledger, calls, calls.c.call_sid)] == [
        ("call-1", "completed"), ("call-2", "completed"),
    ]  # fmt: skip
    assert ledger.quarantine.waiting() == []


def test_workers_that_put_times_right_while_others_merge_neither_deadlock_nor_lose_an_event(
    postgres_ledger: Ledger, make_settings: Callable[..., Settings]
) -> None:
    url = postgres_ledger.database.url.render_as_string(hide_password=False)
    ledgers = [Ledger(url) for _ in range(4)]
    ready = threading.Barrier(4)
    journey = [told(f"call-{n}", number=n, **said) for n in range(60) for said in JOURNEY]

    def work(which: int) -> None:
        mine = Events(ledgers[which], make_settings())
        order = journey[:]
        random.Random(which).shuffle(order)
        ready.wait(timeout=patience())
        for turn in range(3):
            for start in range(0, len(order), 60):
                earlier = (3 * which + turn) * SECOND
                mine.take_in([WebEvent(one.body, NOW - earlier) for one in order[start : start + 60]])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, which) for which in range(4)]:
            done.result(timeout=patience())
    for one in ledgers:
        one.close()
    assert states(postgres_ledger) == {"merged": 240}
    assert {row.received_at for row in rows(postgres_ledger, call_events)} == {NOW - 11 * SECOND}
    found = [content(row) for row in rows(postgres_ledger, calls)]
    assert len(found) == 60
    assert {one["status"] for one in found} == {"completed"}
    assert {(one["first_event_at"], one["last_event_at"]) for one in found} == {(NOW - 11 * SECOND, NOW - 11 * SECOND)}
    assert postgres_ledger.quarantine.waiting() == []


# values that a database does not take


def test_values_of_any_length_are_taken_and_do_not_keep_others_from_it(events: Events, ledger: Ledger) -> None:
    long = told(
        "c" * 128, status="s" * 5000, disposition="Interested" * 1000, leadId="f" * 100, campaignId="c" * 100,
        contextDetails={"recipientPhoneNumber": "9" * 5000, "recipientData": {"our_ref": "r" * 5000}},
        telephonyData={"recordingUrl": "https://example.com/" + "r" * 100_000, "duration": "9" * 400},
        transcript="user: " + "word " * 50_000, agentId="a" * 5000,
    )  # fmt: skip
    assert events.take_in([told("call-1"), long, told("call-2")]) == Kept(3, 3, 3, 0)
    call = next(row for row in rows(ledger, calls) if row.call_sid == "c" * 128)
    assert (call.campaign_id, call.futwork_lead_id, call.reference, call.phone) == (None, None, None, None)
    assert (len(call.status), len(call.disposition), len(call.recording_url)) == (40, 64, 100_020)
    assert call.duration_seconds is None
    assert json.loads(call.details)["word_count"] == 50_000


def test_an_id_that_only_begins_like_a_known_one_links_nothing(events: Events, ledger: Ledger) -> None:
    sent(ledger, 1, futwork_lead_id="f" * 64)
    stranger = told("call-1", leadId="f" * 65, contextDetails={"recipientPhoneNumber": None})
    assert events.take_in([stranger]) == Kept(1, 1, 1, 0)
    known = told("call-2", leadId="f" * 64, contextDetails={"recipientPhoneNumber": None})
    assert events.take_in([known]) == Kept(1, 1, 0, 0)
    assert [row.linked_by for row in rows(ledger, calls, calls.c.call_sid)] == [None, "futwork_lead_id"]


def test_nul_characters_and_half_surrogate_pairs_are_taken(events: Events, ledger: Ledger) -> None:
    odd = "a\0b\ud83d"
    said = dict.fromkeys(("leadId", "campaignId", "agentId", "status", "disposition", "transcript", "sum\x00mary"), odd)
    one = told(
        "call\0-1", **said, extractedData={odd: odd, "call_summary": odd}, telephonyData={"recordingUrl": f"http://{odd}"},
        contextDetails={"recipientPhoneNumber": odd, "recipientData": {"our_ref": odd}},
    )  # fmt: skip
    raw = WebEvent(
        json.dumps({"callSid": "call-2", "status": odd}, ensure_ascii=False).encode("utf-8", "surrogatepass"), NOW
    )
    assert events.take_in([one, raw, told("call-3")]) in (Kept(3, 3, 3, 0), Kept(3, 2, 2, 1))
    found = rows(ledger, calls, calls.c.call_sid)
    assert [row.call_sid for row in found if row.call_sid != "call-2"] == ["call-1", "call-3"]
    assert (found[0].futwork_lead_id, found[0].reference) == ("ab\ufffd", "ab\ufffd")
    assert {bytes(row.body) for row in rows(ledger, call_events)} == {one.body, raw.body, told("call-3").body}


# orphans shown


def test_orphans_are_listed_newest_first_with_what_could_lead_to_their_lead(
    events: Events, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent(ledger, 1)
    stranger = {"leadId": FUTWORK_ID, "contextDetails": {"recipientPhoneNumber": "", "recipientData": {"our_ref": "x"}}}
    batch = [told("linked"), told("a", at=1, number=2), told("b\n\x1b[31m", at=2, status="ringing", **stranger)]
    assert events.take_in(batch) == Kept(3, 3, 2, 0)
    monkeypatch.setenv("DATABASE_URL", ledger.database.url.render_as_string(hide_password=False))
    shown = CliRunner().invoke(events_group, ["orphans", "--json"])
    assert shown.exit_code == 0, shown.output
    newest, older = [json.loads(line) for line in shown.stdout.splitlines()]
    assert newest == {
        "call_sid": "b\n\x1b[31m", "campaign_id": CAMPAIGN, "phone": None, "futwork_lead_id": FUTWORK_ID,
        "reference": "x", "status": "ringing", "is_final": False, "outcome": "unknown",
        "first_event_at": "2026-05-08T12:00:02Z", "last_event_at": "2026-05-08T12:00:02Z",
    }  # fmt: skip
    assert (older["call_sid"], older["phone"], older["is_final"]) == ("a", make_lead(2).phone, True)
    lines = CliRunner().invoke(events_group, ["orphans", "--limit", "1"]).stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"2026-05-08 12:00:02Z  no number  {CAMPAIGN}  ringing  b ")
    assert "\x1b" not in lines[0]


def test_no_orphans_say_so_beside_the_data(events: Events, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(ledger, 1)
    events.take_in([told()])
    monkeypatch.setenv("DATABASE_URL", ledger.database.url.render_as_string(hide_password=False))
    shown = CliRunner().invoke(events_group, ["orphans"])
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "", "every call has a lead\n")
