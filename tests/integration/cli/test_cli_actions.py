"""The commands that change something: `campaign`, bulk changes, `resolve`, `events`."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pipeline.broker import WebEvent
from pipeline.domain.campaign import ADVICE, Hold, HoldKind
from pipeline.domain.lead import lead_id
from pipeline.events import Events
from pipeline.settings import load_settings
from tests.conftest import CAMPAIGN, NOW
from tests.integration.cli.conftest import OTHER

# Acting


def test_campaigns_are_listed_with_their_leads_policies_and_reasons(run, story):
    story.ledger.campaigns.hold(
        OTHER, Hold(HoldKind.REFUSED_CAMPAIGN, "404"), probe_at=NOW + timedelta(hours=1), now=NOW
    )
    run("campaign", "set", CAMPAIGN, "--rate", "10/s", "--on-uncertain", "resend")

    listed = {one["id"]: one for one in run("campaign", "list", "--json").lines}
    out = run("campaign", "list").out

    assert (listed[CAMPAIGN]["rate"], listed[CAMPAIGN]["on_uncertain"]) == ("10/s", "resend")
    assert (listed[OTHER]["state"], listed[OTHER]["hold_kind"], listed[OTHER]["reason"]) == (
        "held",
        "refused_campaign",
        "404",
    )
    assert out == (
        f"campaign {CAMPAIGN}: active (queued 2, called 1, uncertain 1, rejected 1)\n"
        "  account default; rate 10/s, on_uncertain resend\n"
        f"campaign {OTHER}: held (queued 1)\n"
        "  refused_campaign: 404\n"
        f"  what to do: {ADVICE[HoldKind.REFUSED_CAMPAIGN][1]}\n"
        "  next probe at 2026-05-08 13:00:00.000Z; `pipeline campaign resume` does not wait for it\n"
        "  account default; every policy as in the settings\n"
    )


def test_a_held_campaign_without_waiting_leads_is_not_said_to_be_probed(run, story):
    story.ledger.campaigns.hold(
        OTHER, Hold(HoldKind.REFUSED_CAMPAIGN, "404"), probe_at=NOW + timedelta(hours=1), now=NOW
    )
    run("cancel", "--campaign", OTHER)

    out = run("campaign", "list").out

    assert "no lead waits, so there is no probe; `pipeline campaign resume` ends the hold" in out
    assert "next probe" not in out


def test_a_policy_is_set_and_set_back(run, story):
    assert run("campaign", "set", OTHER, "--max-attempts", "3").out == f"campaign {OTHER}: max_attempts 3\n"
    assert run("campaign", "set", OTHER, "--max-attempts", "default", "--json").json["max_attempts"] is None


@pytest.mark.parametrize(
    "policy",
    [
        [],
        ["--rate", "fast"],
        ["--rate", "0/s"],
        ["--account", "nobody"],
        ["--on-uncertain", "maybe"],
        ["--uncertain-after-seconds", "nan"],
        ["--uncertain-after-seconds", "inf"],
        ["--uncertain-after-seconds", "0"],
        ["--max-attempts", "-1"],
        ["--max-attempts", "1.5"],
        ["--lead-max-age-seconds", "99999999999999999999"],
    ],
)
def test_a_wrong_policy_changes_nothing(run, story, policy):
    before = run("campaign", "list", "--json").out

    assert run("campaign", "set", CAMPAIGN, *policy).code == 2
    assert run("campaign", "list", "--json").out == before


def test_a_campaign_is_paused_and_resumed(run, story):
    assert run("campaign", "pause", OTHER, "--reason", "script").out == f"campaign {OTHER} is paused\n"
    assert run("campaign", "pause", OTHER).out == f"campaign {OTHER} was paused already\n"
    assert "  paused: script\n" in run("status").out
    assert run("campaign", "resume", OTHER).out == f"campaign {OTHER} is active\n"
    assert run("campaign", "resume", OTHER).out == f"campaign {OTHER} was active already\n"
    unknown = run("campaign", "pause", "nobody")
    assert (unknown.code, unknown.err) == (2, "pipeline: no campaign nobody; see `pipeline campaign list`\n")


BULK = {
    "retry": (["retry"], "rejected", "queued again, with fresh attempts", "queued"),
    "cancel": (["cancel"], "queued", "cancelled, and not sent", "cancelled"),
    "resolve": (["resolve", "--drop"], "uncertain", "given up and cancelled", "cancelled"),
}


@pytest.mark.parametrize("command", BULK)
def test_a_bulk_change_counts_first_and_then_changes_what_the_filter_says(run, story, command):
    arguments, before, done, after = BULK[command]
    count = {"retry": 1, "cancel": 2, "resolve": 1}[command]
    leads = f"{count} {'lead' if count == 1 else 'leads'}"

    assert run(*arguments, "--campaign", CAMPAIGN, "--dry-run").out == f"{leads} would be {done}\n"
    assert len(run("leads", "--campaign", CAMPAIGN, "--state", before, "--json").lines) == count
    was = len(run("leads", "--campaign", CAMPAIGN, "--state", after, "--json").lines)
    assert run(*arguments, "--campaign", CAMPAIGN).out == f"{leads} {'was' if count == 1 else 'were'} {done}\n"
    assert run("leads", "--campaign", CAMPAIGN, "--state", before, "--json").lines == []
    assert len(run("leads", "--campaign", CAMPAIGN, "--state", after, "--json").lines) == was + count
    assert run("leads", "--campaign", OTHER, "--json").lines[0]["state"] == "queued"


@pytest.mark.parametrize("command", BULK)
@pytest.mark.parametrize(
    "filters",
    [
        [],
        ["--phone", ""],
        ["--campaign", CAMPAIGN, "--phone", ""],
        ["--campaign", CAMPAIGN, "--key", " "],
        ["--state", "queued", "--state", "uncertain", "--state", "rejected", "--campaign", ""],
        ["--unchanged-for", "0"],
        ["--unchanged-for", "1e300"],
        ["--id", "nonsense"],
        ["--phone", "12"],
    ],
)
def test_a_bulk_change_refuses_a_filter_that_is_empty_or_wrong(run, story, command, filters):
    before = run("leads", "--json").out

    done = run(*BULK[command][0], *filters)

    assert (done.code, done.out) == (2, "")
    assert run("leads", "--json").out == before


def test_resolve_wants_to_know_what_became_of_the_leads(run, story):
    done = run("resolve", "--id", story.uncertain)

    assert done.code == 2
    assert "say what became of them: --sent, --resend or --drop" in done.err
    assert run("resolve", "--id", story.uncertain, "--sent").out == "1 lead was marked submitted\n"
    assert run("show", story.uncertain, "--json").json["state"] == "submitted"


def test_quarantined_events_are_listed_and_replayed(run, story):
    (listed,) = run("events", "list", "--json").lines
    assert (listed["kind"], listed["reason"], listed["body"]) == ("event", "the body is not a JSON object", "[]")

    replayed = run("events", "replay")

    assert (replayed.code, replayed.out) == (1, "0 of 1 event read; 1 stay in quarantine\n")


def test_a_call_is_linked_to_the_lead_that_it_belongs_to(run, story):
    body = b'{"callSid": "stray", "status": "completed", "campaignId": "elsewhere"}'
    Events(story.ledger, load_settings()).take_in([WebEvent(body, NOW, None)])

    for call, lead, why in (("stray", "nobody", "is not one lead"), ("none", "crm-9", "there is no call 'none'")):
        refused = run("events", "link", call, lead)
        assert (refused.code, why in refused.err) == (2, True)
    done = run("events", "link", "stray", "crm-9")

    assert done.out == f"call stray is linked to lead {lead_id(OTHER, 'crm-9')}\n"
    told = run("show", "stray", "--json").json
    assert (told["key"], [call["linked_by"] for call in told["calls"]]) == ("crm-9", ["operator"])
    assert [(one["action"], one["is_certain"]) for one in told["interventions"]] == [("call link", True)]
    assert "Call linked (" in run("show", "crm-9").out
