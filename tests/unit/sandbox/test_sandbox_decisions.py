"""Fates drawn from the seed: repeatable, independent of order, in the shares that were asked for."""

from collections import Counter

import pytest

from pipeline.sandbox.decisions import decide
from pipeline.sandbox.options import ANSWER_FAULTS

PHONES = [str(9_000_000_000 + number) for number in range(4000)]


def test_a_decision_depends_on_nothing_but_its_arguments():
    forwards = {phone: decide(1, "c1", phone, 1, {"500": 0.5}) for phone in PHONES[:100]}
    backwards = {phone: decide(1, "c1", phone, 1, {"500": 0.5}) for phone in reversed(PHONES[:100])}
    assert forwards == backwards


@pytest.mark.parametrize("other", [(2, "c1", 1), (1, "c2", 1), (1, "c1", 2)])
def test_another_seed_campaign_or_attempt_is_another_decision(other):
    seed, campaign, attempt = other
    here, there = decide(1, "c1", PHONES[0], 1, {}), decide(seed, campaign, PHONES[0], attempt, {})
    assert here.lead_id != there.lead_id
    assert here.call_seed != there.call_seed


def test_every_lead_gets_an_id_of_its_own_of_24_hex_digits():
    ids = {decide(1, "c1", phone, attempt, {}).lead_id for phone in PHONES for attempt in (1, 2)}
    assert len(ids) == 2 * len(PHONES)
    assert all(len(lead_id) == 24 and set(lead_id) <= set("0123456789abcdef") for lead_id in ids)


def test_faults_come_in_their_shares():
    faults = {"500": 0.25, "stall": 0.1}
    seen = Counter(decide(1, "c1", phone, 1, faults).fault for phone in PHONES)
    assert set(seen) == {None, "500", "stall"}
    assert seen["500"] == pytest.approx(1000, abs=120)
    assert seen["stall"] == pytest.approx(400, abs=80)


def test_a_share_of_one_leaves_nothing_else():
    assert {decide(1, "c1", phone, 1, {"502": 1.0}).fault for phone in PHONES} == {"502"}


def test_the_draws_are_between_zero_and_one():
    decisions = [decide(1, "c1", phone, 1, {}) for phone in PHONES]
    for draws in zip(*((d.variant, d.latency, d.shape) for d in decisions), strict=True):
        assert 0 <= min(draws) < 0.01
        assert 0.99 < max(draws) < 1


@pytest.mark.parametrize("fault", ANSWER_FAULTS)
def test_a_fault_accepts_what_it_says(fault):
    accepted = sum(decide(1, "c1", phone, 1, {fault: 1.0}).accepts for phone in PHONES)
    if fault in {"500", "502", "504"}:
        assert accepted == pytest.approx(len(PHONES) / 2, abs=150)
    else:
        assert accepted == (len(PHONES) if fault in {"reset_after", "stall", "malformed"} else 0)
