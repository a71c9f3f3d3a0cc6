"""One lead's journey with what operators did, and finding a lead by whatever a person has in hand."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta

import pytest

from pipeline.broker import WebEvent
from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import LeadState, Outcome, Settlement, lead_id
from pipeline.events import Events
from pipeline.ledger import Actor, LeadFilter, Ledger
from pipeline.settings import Settings
from pipeline.status.actions import ACTIONS, change_leads, changed_text
from pipeline.status.attention import Attention, headline
from pipeline.status.journey import journey
from pipeline.status.search import find_lead, find_leads, read_id
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
ASHA = Actor("asha", "cli")


@pytest.fixture
def settings(make_settings) -> Settings:
    return make_settings()


def take_in(ledger: Ledger, number: int, campaign: str = CAMPAIGN) -> uuid.UUID:
    known = ledger.campaigns.ensure(campaign, now=NOW)
    ledger.leads.take_in(known, [make_lead(number)], batch_id=uuid.uuid4(), max_age=DAY, now=NOW)
    return lead_id(campaign, make_lead(number).key)


def submit(ledger: Ledger, futwork_lead_id: str) -> None:
    """POST the one due lead of the campaign; Futwork takes it under this id."""
    (claim,) = ledger.leads.claim(CAMPAIGN, 1, lease=MINUTE, now=NOW)
    answer = make_answer(claim, Outcome.ACCEPTED, started_at=NOW + MINUTE, futwork_lead_id=futwork_lead_id)
    settled = [Settlement(answer, LeadState.SUBMITTED, NOW, 1)]
    ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=MINUTE, now=NOW + MINUTE)


def hear(ledger: Ledger, settings: Settings, call: str, futwork_lead_id: str) -> None:
    body = {"callSid": call, "leadId": futwork_lead_id, "campaignId": CAMPAIGN, "status": "in-progress"}
    Events(ledger, settings).take_in([WebEvent(json.dumps(body).encode(), NOW + 2 * MINUTE, None)])


def titles(ledger: Ledger, id_: uuid.UUID) -> list[str]:
    story = ledger.reports.story(id_)
    assert story is not None
    return [step.title for step in journey(story)]


def test_a_journey_has_posts_events_and_interventions_in_order(ledger: Ledger, settings: Settings) -> None:
    id_ = take_in(ledger, 1)
    only = LeadFilter(ids=(id_,))
    assert change_leads(ledger, settings, "cancel", only, now=NOW + timedelta(seconds=1), by=ASHA) == 1
    assert change_leads(ledger, settings, "cancel", only, now=NOW + timedelta(seconds=2), by=ASHA) == 0
    assert change_leads(ledger, settings, "retry", only, now=NOW + timedelta(seconds=3), by=ASHA) == 1
    (claim,) = ledger.leads.claim(CAMPAIGN, 1, lease=MINUTE, now=NOW + timedelta(seconds=4))
    answer = make_answer(claim, Outcome.ACCEPTED, started_at=NOW + MINUTE, futwork_lead_id="f1")
    settled = [Settlement(answer, LeadState.SUBMITTED, NOW, 1)]
    ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=MINUTE, now=NOW + MINUTE)
    hear(ledger, settings, "call-1", "f1")

    assert titles(ledger, id_) == [
        "Accepted", "Cancel", "Retry", "Sent to Futwork: accepted", "Futwork reports: in progress",
    ]  # fmt: skip


def test_a_change_of_many_leads_is_in_the_journey_of_those_that_its_filter_fits(
    ledger: Ledger, settings: Settings
) -> None:
    mine, other, elsewhere = take_in(ledger, 1), take_in(ledger, 2), take_in(ledger, 3, "elsewhere")
    everyone = LeadFilter(campaign=CAMPAIGN)
    assert change_leads(ledger, settings, "cancel", everyone, now=NOW + MINUTE, by=ASHA) == 2

    assert titles(ledger, mine) == titles(ledger, other) == ["Accepted", "Cancel"]
    assert titles(ledger, elsewhere) == ["Accepted"]

    by_phone = LeadFilter(phone=make_lead(1).phone)
    assert change_leads(ledger, settings, "retry", by_phone, now=NOW + 2 * MINUTE, by=ASHA) == 1
    assert titles(ledger, mine) == ["Accepted", "Cancel of 2 leads, possibly of this one", "Retry"]
    assert titles(ledger, other) == ["Accepted", "Cancel"]
    until_before = LeadFilter(campaign=CAMPAIGN, accepted_before=NOW)
    since = LeadFilter(campaign=CAMPAIGN, accepted_after=NOW)
    assert change_leads(ledger, settings, "cancel", until_before, now=NOW + 3 * MINUTE, by=ASHA) == 0
    assert change_leads(ledger, settings, "cancel", since, now=NOW + 4 * MINUTE, by=ASHA) == 1
    assert titles(ledger, mine)[-1] == "Cancel"
    assert titles(ledger, other)[-1] == "Cancel of 1 lead, possibly of this one"


def test_a_lead_is_found_by_whatever_a_person_has_in_hand(ledger: Ledger, settings: Settings) -> None:
    id_ = take_in(ledger, 1)
    submit(ledger, "6a0000000000000000000001")
    hear(ledger, settings, "call-1", "6a0000000000000000000001")
    take_in(ledger, 2)
    phone = make_lead(1).phone
    spellings = [
        str(id_), str(id_).upper(), id_.hex, f"{{{id_}}}", id_.urn, f" {id_} ", phone, phone[3:], f"0{phone[3:]}",
        f"{phone[:3]} {phone[3:8]}-{phone[8:]}", make_lead(1).key, "6a0000000000000000000001", "call-1",
    ]  # fmt: skip

    for text in spellings:
        found = find_leads(ledger, text, region="IN")
        assert [one["id"] for one in found] == [str(id_)], text
        assert find_lead(ledger, text, region="IN") == id_

    for text in ("", " ", "nothing", "9", "call-2", "\0", "\ud800", str(uuid.uuid4())):
        assert find_leads(ledger, text, region="IN") == [], text
        assert find_lead(ledger, text, region="IN") is None
    assert find_leads(ledger, "call-1", region="IN", campaign="elsewhere") == []
    assert read_id("call-1") is None


def test_a_text_that_means_several_leads_means_no_single_one(ledger: Ledger) -> None:
    take_in(ledger, 1)
    take_in(ledger, 1, "elsewhere")

    assert len(find_leads(ledger, make_lead(1).phone, region="IN")) == 2
    assert len(find_leads(ledger, make_lead(1).phone, region="IN", limit=1)) == 1
    assert find_lead(ledger, make_lead(1).phone, region="IN") is None


def test_the_headline_counts_each_stopped_campaign_once() -> None:
    def item(level, campaign=None):
        return Attention("a code", level, "title", "text", "command", campaign=campaign)

    assert headline([]) == ("info", "Running")
    assert headline([item("info", "a")]) == ("info", "Running")
    assert headline([item("check"), item("info")]) == ("check", "Running; 1 item to check")
    assert headline([item("stopped", "a"), item("check", "b")]) == ("stopped", "1 campaign is stopped")
    two = [item("stopped", "a"), item("stopped", "a"), item("stopped", "b"), item("stopped")]
    assert headline(two) == ("stopped", "1 fault, 2 campaigns are stopped")


def test_the_words_of_an_action_name_its_states_and_what_becomes_of_the_leads() -> None:
    assert ACTIONS["retry"].changes == "rejected, exhausted, expired, cancelled and suppressed leads"
    assert ACTIONS["cancel"].changes == "queued leads"
    assert changed_text("retry", 1) == "1 lead was queued again, with fresh attempts"
    assert changed_text("cancel", 2, dry_run=True) == "2 leads would be cancelled, and not sent"
