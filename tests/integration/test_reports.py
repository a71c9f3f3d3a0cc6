"""What the ledger tells: the status that adds up, the lists, and one lead's story; on both databases."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from pipeline.domain.campaign import Campaign, Hold, HoldKind
from pipeline.domain.lead import LeadState, Outcome, Settlement
from pipeline.ledger import CallRow, LeadFilter, Ledger, StoredEvent
from pipeline.ledger.tables import leads
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead, merge_call

DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
EMPTY_STATES = {state.value: 0 for state in LeadState}


def take_in(ledger: Ledger, *numbers: int, campaign: str = CAMPAIGN, now: Any = NOW) -> None:
    """Take leads in."""
    known = ledger.campaigns.ensure(campaign, now=now)
    given = [make_lead(number) for number in numbers]
    ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=DAY, now=now)


def post(ledger: Ledger, outcome: Outcome, state: LeadState, *, now: Any = NOW) -> uuid.UUID:
    """Claim one lead and record what came of it."""
    (claim,) = ledger.leads.claim(CAMPAIGN, 1, lease=MINUTE, now=now)
    answer = make_answer(claim, outcome, started_at=now, http_status=200)
    settlement = Settlement(answer, state, now, claim.attempts + 1)
    ledger.leads.record(Campaign(CAMPAIGN), [settlement], probe_after=MINUTE, now=now)
    return claim.lead_id


def call_back(
    ledger: Ledger, sid: str, lead: uuid.UUID | None, *, is_final: bool = True, now: Any = NOW, body: bytes = b"{}"
) -> None:
    """A post-call event comes in."""
    call = CallRow(
        call_sid=sid, campaign_id=CAMPAIGN, futwork_lead_id=None, reference=str(lead) if lead else None,
        phone=None, status="completed" if is_final else "ringing", is_final=is_final,
        outcome="connected" if is_final else "unknown", disposition="interested", duration_seconds=31.0,
        callback_at=None, recording_url=None, details='{"turns":[]}', first_event_at=now, last_event_at=now,
    )  # fmt: skip
    merge_call(ledger, StoredEvent(uuid.uuid4().hex, body, now), call, now=now)


def test_the_status_of_an_empty_ledger_has_every_number_at_nought(ledger: Ledger) -> None:
    assert ledger.reports.status(now=NOW) == {
        "accepted": 0,
        "leads": EMPTY_STATES,
        "campaigns": [],
        "calls": {"total": 0, "open": 0},
        "events": {"raw": 0, "quarantined": 0, "orphans": 0},
        "unclear_answers": [],
        "oldest_due_seconds": None,
        "oldest_uncertain_seconds": None,
    }


def test_the_status_counts_every_state_and_adds_up(ledger: Ledger) -> None:
    take_in(ledger, *range(12))
    take_in(ledger, *range(10, 15), now=NOW + MINUTE)
    found = [row for row in ledger.reports.leads(LeadFilter(campaign=CAMPAIGN)) if row["accepted_at"] == NOW]
    states = [*LeadState, LeadState.QUEUED, LeadState.UNCERTAIN]
    with ledger.database.write() as connection:
        for row, state in zip(found, states, strict=True):
            values: dict[str, Any] = {"state": state, "submitted_at": NOW, "called_at": NOW}
            if state is LeadState.SENDING:
                values |= {"claim": uuid.uuid4(), "claim_expires_at": NOW + MINUTE}
            connection.execute(sa.update(leads).where(leads.c.id == uuid.UUID(row["id"])).values(**values))
    counts = dict.fromkeys(EMPTY_STATES, 1) | {"queued": 5, "uncertain": 2}
    status = ledger.reports.status(now=NOW + 2 * MINUTE)
    assert status["leads"] == counts
    assert list(status["leads"]) == [state.value for state in LeadState]
    assert status["accepted"] == sum(counts.values()) == 15
    assert [one["leads"] for one in status["campaigns"]] == [counts]
    assert (status["oldest_due_seconds"], status["oldest_uncertain_seconds"]) == (120.0, 120.0)


def test_the_status_lists_each_campaign_with_its_hold_and_policies(ledger: Ledger) -> None:
    take_in(ledger, 1)
    take_in(ledger, 1, 2, campaign="a-second")
    ledger.campaigns.change("a-second", {"max_attempts": 3, "on_uncertain": "drop"}, now=NOW)
    ledger.campaigns.hold("a-second", Hold(HoldKind.OUTAGE, "down"), probe_at=NOW + MINUTE, now=NOW)
    first, second = ledger.reports.status(now=NOW)["campaigns"]
    assert first == {
        "id": CAMPAIGN, "account": "default", "state": "active", "hold_kind": None, "reason": None, "stopped_at": None,
        "probe_at": None, "rate": None, "on_uncertain": None, "uncertain_after_seconds": None,
        "on_server_error": None, "max_attempts": None, "lead_max_age_seconds": None,
        "leads": EMPTY_STATES | {"queued": 1},
    }  # fmt: skip
    assert (second["id"], second["state"], second["hold_kind"], second["reason"]) == (
        "a-second", "held", "outage", "down",
    )  # fmt: skip
    assert (second["stopped_at"], second["probe_at"], second["max_attempts"]) == (NOW, NOW + MINUTE, 3)
    assert second["leads"] == EMPTY_STATES | {"queued": 2}


def test_the_status_counts_what_unclear_answers_meant(ledger: Ledger) -> None:
    """Taken: a call came, and the lead was not sent again. After a second POST nobody knows which of them it was."""
    take_in(ledger, *range(6))
    take_in(ledger, 7, campaign="another")

    def answered(
        outcome: Outcome, status: int | None, state: LeadState, *, campaign: str = CAMPAIGN, now: Any = NOW
    ) -> uuid.UUID:
        (claim,) = ledger.leads.claim(campaign, 1, lease=MINUTE, now=now)
        settlement = Settlement(make_answer(claim, outcome, http_status=status), state, now + MINUTE, 1)
        ledger.leads.record(Campaign(campaign), [settlement], probe_after=MINUTE, now=now)
        return claim.lead_id

    taken = answered(Outcome.FAILED, 500, LeadState.UNCERTAIN)
    answered(Outcome.FAILED, 500, LeadState.UNCERTAIN)
    silent = answered(Outcome.UNCERTAIN, None, LeadState.UNCERTAIN)
    accepted = answered(Outcome.ACCEPTED, 200, LeadState.SUBMITTED)
    answered(Outcome.REJECTED, 422, LeadState.REJECTED)
    answered(Outcome.FAILED, 500, LeadState.UNCERTAIN, campaign="another")
    again = answered(Outcome.BUSY, 503, LeadState.QUEUED)
    assert answered(Outcome.ACCEPTED, 201, LeadState.SUBMITTED, now=NOW + 2 * MINUTE) == again
    for number, lead in enumerate((taken, silent, accepted, again)):
        call_back(ledger, f"sid-{number}", lead)
    expected = [
        {"http_status": None, "posts": 1, "taken": 1, "sent_again": 0},
        {"http_status": 500, "posts": 2, "taken": 1, "sent_again": 0},
        {"http_status": 503, "posts": 1, "taken": 0, "sent_again": 1},
    ]

    def found(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(answers, key=lambda one: one["http_status"] or 0)

    assert found(ledger.reports.campaign(CAMPAIGN, now=NOW)["unclear_answers"]) == expected
    expected[1]["posts"] += 1
    assert found(ledger.reports.unclear_answers()) == expected
    assert found(ledger.reports.status(now=NOW)["unclear_answers"]) == expected


def test_the_status_counts_calls_and_events(ledger: Ledger) -> None:
    take_in(ledger, 1, 2)
    ids = [post(ledger, Outcome.ACCEPTED, LeadState.SUBMITTED) for _ in range(2)]
    call_back(ledger, "a", ids[0], is_final=False)
    call_back(ledger, "a", ids[0])
    call_back(ledger, "b", ids[1], is_final=False)
    call_back(ledger, "stranger", None)
    ledger.quarantine.put("event", b"[", reason="no object", now=NOW)
    status = ledger.reports.status(now=NOW)
    assert status["calls"] == {"total": 3, "open": 1, "connected": 2}
    assert status["events"] == {"raw": 4, "quarantined": 1, "orphans": 1}
    assert status["leads"] == EMPTY_STATES | {"called": 1, "submitted": 1}


def test_the_status_adds_up_while_leads_come_in(ledger: Ledger) -> None:
    """Every query of a status sees the same moment, else accepted would differ from the sum under load."""
    take_in(ledger, *range(5))
    other = Ledger(ledger.database.url.render_as_string(hide_password=False))
    asked: list[str] = []

    def meanwhile(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "batches" in statement:
            asked.append(statement)
            take_in(other, *range(5, 9), now=NOW)

    sa.event.listen(ledger.database.engine, "after_cursor_execute", meanwhile)
    status = ledger.reports.status(now=NOW)
    sa.event.remove(ledger.database.engine, "after_cursor_execute", meanwhile)
    other.close()
    assert len(asked) == 1
    assert (status["accepted"], sum(status["leads"].values())) == (5, 5)
    after = ledger.reports.status(now=NOW)
    assert (after["accepted"], sum(after["leads"].values())) == (9, 9)


def test_leads_are_listed_newest_first_and_no_more_than_asked_for(ledger: Ledger) -> None:
    for number in range(4):
        take_in(ledger, number, now=NOW + number * MINUTE)
    listed = ledger.reports.leads(LeadFilter(campaign=CAMPAIGN), limit=3)
    assert [one["phone"] for one in listed] == [make_lead(number).phone for number in (3, 2, 1)]
    assert [one["phone"] for one in ledger.reports.leads(LeadFilter(phone=make_lead(0).phone))] == [make_lead(0).phone]
    assert ledger.reports.leads(LeadFilter(states=(LeadState.CALLED,))) == []


def test_a_story_tells_attempts_calls_and_events_in_their_order(ledger: Ledger) -> None:
    take_in(ledger, 1)
    post(ledger, Outcome.FAILED, LeadState.QUEUED, now=NOW + MINUTE)
    id_ = post(ledger, Outcome.ACCEPTED, LeadState.SUBMITTED, now=NOW + 2 * MINUTE)
    call_back(ledger, "b-first", id_, is_final=False, now=NOW + 3 * MINUTE, body=b'{"status":"ringing"}')
    call_back(ledger, "a-second", id_, now=NOW + 4 * MINUTE, body=b'{"status":"completed"}')
    call_back(ledger, "b-first", id_, now=NOW + 5 * MINUTE, body=b"[1]")
    story = ledger.reports.story(id_)
    assert story is not None
    assert (story["id"], story["state"], story["attempts"]) == (str(id_), "called", 2)
    assert story["data"] == make_lead(1).data
    assert [(one["outcome"], one["started_at"]) for one in story["attempts_made"]] == [
        ("failed", NOW + MINUTE),
        ("accepted", NOW + 2 * MINUTE),
    ]
    assert [one["call_sid"] for one in story["calls"]] == ["b-first", "a-second"]
    assert [(one["call_sid"], one["status"], one["payload"]) for one in story["events"]] == [
        ("b-first", "ringing", {"status": "ringing"}),
        ("a-second", "completed", {"status": "completed"}),
        ("b-first", None, [1]),
    ]


def test_a_lead_that_nobody_knows_has_no_story(ledger: Ledger) -> None:
    assert ledger.reports.story(uuid.uuid4()) is None


def test_attempts_are_counted_by_outcome_and_troubles_told_newest_first(ledger: Ledger) -> None:
    take_in(ledger, *range(4))
    post(ledger, Outcome.REJECTED, LeadState.REJECTED)
    post(ledger, Outcome.ACCEPTED, LeadState.SUBMITTED)
    last = post(ledger, Outcome.BUSY, LeadState.EXHAUSTED, now=NOW + MINUTE)
    assert ledger.reports.attempts_by_outcome() == {"accepted": 1, "busy": 1, "rejected": 1}
    assert [one["outcome"] for one in ledger.reports.troubles()] == ["busy", "rejected"]
    assert [one["lead"] for one in ledger.reports.troubles(limit=1)] == [str(last)]
