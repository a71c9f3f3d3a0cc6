"""Campaigns: which outcomes hold them, how long they wait for a probe, and what an id may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.domain.campaign import (
    Hold,
    HoldKind,
    InvalidCampaignId,
    Runs,
    check_campaign_id,
    hold_after,
    probe_interval,
)
from pipeline.domain.lead import Outcome
from pipeline.settings import Settings


@pytest.mark.parametrize(
    ("outcome", "after"),
    [
        (Outcome.ACCEPTED, Runs(0, 0)),
        (Outcome.REJECTED, Runs(0, 8)),
        (Outcome.NOT_SENT, Runs(4, 7)),
        (Outcome.BUSY, Runs(4, 7)),
        (Outcome.FAILED, Runs(4, 7)),
        (Outcome.UNCERTAIN, Runs(4, 7)),
        (Outcome.THROTTLED, Runs(3, 7)),
        (Outcome.REFUSED_KEY, Runs(3, 7)),
        (Outcome.REFUSED_CAMPAIGN, Runs(3, 7)),
    ],
)
def test_every_outcome_counts_as_the_design_says(outcome: Outcome, after: Runs) -> None:
    assert Runs(troubled=3, rejected=7).after(outcome) == after


@pytest.mark.parametrize(
    ("outcome", "runs", "hold"),
    [
        (Outcome.ACCEPTED, Runs(), None),
        (Outcome.FAILED, Runs(4, 0), None),
        (Outcome.FAILED, Runs(5, 0), Hold(HoldKind.OUTAGE, "5 submissions in a row failed, the last: why")),
        (Outcome.REJECTED, Runs(0, 19), None),
        (
            Outcome.REJECTED,
            Runs(0, 20),
            Hold(HoldKind.REJECTIONS, "20 leads in a row were rejected, the last with: why"),
        ),
        (Outcome.REFUSED_KEY, Runs(), Hold(HoldKind.REFUSED_KEY, "Futwork refused the API key: why")),
        (Outcome.REFUSED_KEY, Runs(9, 30), Hold(HoldKind.REFUSED_KEY, "Futwork refused the API key: why")),
        (
            Outcome.REFUSED_CAMPAIGN,
            Runs(),
            Hold(HoldKind.REFUSED_CAMPAIGN, "Futwork does not take leads at this campaign's address: why"),
        ),
        (Outcome.THROTTLED, Runs(4, 19), None),
    ],
)
def test_a_hold_follows_its_outcome_and_runs(outcome: Outcome, runs: Runs, hold: Hold | None) -> None:
    assert hold_after(outcome, runs, excerpt="why") == hold


def test_holds_for_the_key_alone_span_the_account() -> None:
    spanning = {kind for kind in HoldKind if Hold(kind, "").spans_account}
    assert spanning == {HoldKind.REFUSED_KEY, HoldKind.NO_KEY}


def test_the_wait_for_a_probe_doubles_up_to_its_cap(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(probe_first_seconds=30, probe_cap_seconds=600)
    waits = [probe_interval(probes, settings).total_seconds() for probes in (0, 1, 2, 3, 4, 5, 6, 10**9)]
    assert waits == [30, 60, 120, 240, 480, 600, 600, 600]


@pytest.mark.parametrize("text", ["68ecc86fd9fbecbe9431a18e", "a", "A-1_b", "9" * 64])
def test_a_campaign_id_is_taken_as_it_is(text: str) -> None:
    assert check_campaign_id(text) == text


@pytest.mark.parametrize("text", ["", "a/b", "a b", "-a", "..", "a\n", "é", "9" * 65, "a?x=1", "a%2fb", None, 7, ["a"]])
def test_what_could_change_the_url_is_no_campaign_id(text: object) -> None:
    with pytest.raises(InvalidCampaignId, match="campaign id"):
        check_campaign_id(text)  # type: ignore[arg-type]  # whatever a message holds
