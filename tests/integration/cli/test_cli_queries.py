"""The commands that look: `status`, `leads`, `show`."""

from __future__ import annotations

import re
import uuid
from datetime import timedelta

import pytest

from pipeline.domain.lead import LeadState
from tests.conftest import CAMPAIGN, NOW, make_lead
from tests.integration.cli.conftest import OTHER


def test_status_as_json_has_every_part_and_adds_up(run, story):
    report = run("status", "--json").json

    assert report["accepted"] == 6
    assert report["leads"] == dict.fromkeys(LeadState, 0) | {"called": 1, "rejected": 1, "uncertain": 1, "queued": 3}
    assert sum(report["leads"].values()) == report["accepted"]
    assert [(one["id"], one["state"]) for one in report["campaigns"]] == [(CAMPAIGN, "active"), (OTHER, "active")]
    assert report["calls"] == {"total": 1, "open": 0, "connected": 1}
    assert report["events"] == {"raw": 2, "quarantined": 1, "orphans": 0}


def test_status_for_a_person_has_the_same_numbers(run, story):
    out = run("status").out

    assert out.startswith("6 leads accepted (matches the states below)\n")
    assert re.search(r"^ +uncertain +1$", out, re.MULTILINE)
    assert f"campaign {OTHER}: active (queued 1)\n" in out
    assert "calls: 1 (connected 1)\nevents: 2 stored, 1 in quarantine; calls without a lead: 0\n" in out


def test_leads_are_listed_by_filter_as_json_lines(run, story):
    everything = run("leads", "--json").lines
    rejected = run("leads", "--state", "rejected", "--campaign", CAMPAIGN, "--json").lines

    assert len(everything) == 6
    assert [(one["id"], one["reason"]) for one in rejected] == [(story.rejected, "rejected: it was rejected")]
    assert len(run("leads", "--limit", "2", "--json").lines) == 2
    assert [one["id"] for one in run("leads", "--phone", "098000-00000", "--json").lines] == [story.called]
    assert [one["key"] for one in run("leads", "--key", "crm-9", "--json").lines] == ["crm-9"]
    assert run("leads", "--unchanged-for", "300000000", "--json").out == ""


def test_leads_for_a_person_stay_one_line_each_where_no_terminal_wraps_them(run, story):
    out = run("leads").out

    assert len(out.splitlines()) == 7
    assert all(line == line.rstrip() for line in out.splitlines())
    assert re.search(
        rf"^ {story.rejected} +rejected +\+919800000001 +{CAMPAIGN} +1 .* it was rejected$", out, re.MULTILINE
    )


def test_an_empty_list_says_so_beside_the_data(run, story):
    done = run("leads", "--state", "expired")

    assert (done.code, done.out, done.err) == (0, "", "no lead matches\n")


@pytest.mark.parametrize("how", ["id", "98000 00000", "+919800000000", "crm-0", "sid-1"])
def test_show_tells_a_leads_journey_in_order(run, story, how):
    out = run("show", story.called if how == "id" else how).out

    lines = [line.strip() for line in out.splitlines()]
    assert lines == [
        f"lead {story.called}",
        f"+919800000000, campaign {CAMPAIGN}, key crm-0",
        '{"customer_name":"Lead 0"}',
        f"{_at(0)}  Accepted",
        f"{_at(1)}  Sent to Futwork: busy (12 ms): it was busy",
        f"{_at(2)}  Sent to Futwork: accepted (12 ms)",
        f"{_at(3)}  Futwork reports: ringing",
        f"{_at(4)}  Futwork reports: completed",
        "call sid-1: connected, 42 s (matched by phone)",
        "agent  Hello Asha",
        "lead  \N{REPLACEMENT CHARACTER}[31mhello",
        "agent  Bye",
        lines[-1],
    ]
    assert lines[-1].startswith("now called (since ")


def _at(minute: int) -> str:
    return (NOW + timedelta(minutes=minute)).strftime("%Y-%m-%d %H:%M:%S.000Z")


def test_show_as_json_has_attempts_events_and_calls(run, story):
    told = run("show", "crm-0", "--json").json

    assert (told["id"], told["state"]) == (story.called, "called")
    assert [attempt["outcome"] for attempt in told["attempts_made"]] == ["busy", "accepted"]
    assert [event["status"] for event in told["events"]] == ["ringing", "completed"]
    assert [turn["speaker"] for turn in told["calls"][0]["details"]["turns"]] == ["agent", "lead", "agent"]


def test_show_finds_a_key_that_has_the_form_of_an_id(run, story):
    key = "d41d8cd98f00b204e9800998ecf8427e"
    campaign = story.ledger.campaigns.get(CAMPAIGN)
    story.ledger.leads.take_in(
        campaign, [make_lead(77, key=key)], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW
    )

    assert run("show", key, "--json").json["key"] == key


@pytest.mark.parametrize("what", ["11111111-1111-1111-1111-111111111111", "9811122334", "no such key", "\x1b[31m"])
def test_a_lead_that_nobody_knows_is_exit_2(run, story, what):
    done = run("show", what)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("pipeline: no lead found for ")
    assert "\x1b" not in done.err
