"""A lead: what is refused, which id it gets, and what every outcome makes of it."""

from __future__ import annotations

import itertools
import math
import random
import uuid
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.domain.lead import (
    DATA_MAX_BYTES,
    NAMESPACE,
    TRANSITIONS,
    InvalidLead,
    Lead,
    LeadState,
    Outcome,
    Retry,
    lead_id,
    settle,
)
from tests.conftest import CAMPAIGN, NOW, make_answer, make_claim, make_lead

PHONE = "9999789877"
E164 = "+919999789877"
DAY = timedelta(days=1)
RETRY = Retry(base=timedelta(seconds=2), cap=timedelta(minutes=10), max_attempts=8)


class Draws(random.Random):
    """Draws the same share each time."""

    def __init__(self, share: float) -> None:
        super().__init__(0)
        self._share = share

    def random(self) -> float:
        return self._share


def refusal(row: object) -> str:
    """Why a row is refused."""
    with pytest.raises(InvalidLead) as refused:
        Lead.read(row, region="IN")
    return str(refused.value)


# reading


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "a lead must be an object, not null"),
        ("9999789877", "a lead must be an object, not text"),
        ([PHONE, {}], "a lead must be an object, not a list"),
        (7, "a lead must be an object, not a number"),
        (True, "a lead must be an object, not true or false"),
        ({}, "phone: missing; data: missing"),
        ({"phone": PHONE}, "data: missing"),
        ({"data": {}}, "phone: missing"),
        ({"phone": PHONE, "data": {}, "colour": 1}, "colour: unknown field (put it into data)"),
        (
            {"phone": PHONE, "data": {}, "half \ud800": 1},
            "the name of a field: Input should be a valid string, unable to parse raw data as a unicode string",
        ),
        ({"phone": PHONE, "data": {}, "key": True}, "key: must be text"),
        ({"phone": PHONE, "data": {}, "key": ["a"]}, "key: must be text"),
        ({"phone": PHONE, "data": {}, "key": "a\0b"}, "key: must not hold control characters"),
        ({"phone": PHONE, "data": {}, "key": "a\nb"}, "key: must not hold control characters"),
        ({"phone": PHONE, "data": {"a": math.nan}}, "data.a: nan is not a number that JSON can hold"),
        ({"phone": PHONE, "data": {"a": [1, -math.inf]}}, "data.a[1]: -inf is not a number that JSON can hold"),
        ({"phone": 7, "key": []}, "phone: the phone number has too few digits; data: missing; key: must be text"),
    ],
)
def test_a_bad_row_is_refused_with_every_reason(row: object, reason: str) -> None:
    assert refusal(row) == reason


@pytest.mark.parametrize("phone", ["", "12", "call me", None, True, [], "99997898771234567890", "0000000000"])
def test_what_is_no_phone_number_is_refused_by_the_fields_name(phone: object) -> None:
    assert refusal({"phone": phone, "data": {}}).startswith("phone: ")


@pytest.mark.parametrize("data", [None, [], "text", 7, [["a", 1]]])
def test_data_that_is_no_object_is_refused(data: object) -> None:
    assert refusal({"phone": PHONE, "data": data}).startswith("data: ")


@pytest.mark.parametrize("data", [{"a": object()}, {"a": {1, 2}}, {"a": "\ud800"}, {"a": 2**80}])
def test_data_that_is_no_json_is_refused(data: dict[str, Any]) -> None:
    assert refusal({"phone": PHONE, "data": data}).startswith("data: cannot be written as JSON")


def test_data_is_taken_up_to_its_bound_and_not_a_byte_more() -> None:
    fits = {"a": "x" * (DATA_MAX_BYTES - len('{"a":""}'))}
    assert Lead.read({"phone": PHONE, "data": fits}, region="IN").data == fits
    assert refusal({"phone": PHONE, "data": {"a": fits["a"] + "x"}}) == (
        "data: 32,769 bytes of JSON are more than the 32,768 allowed"
    )
    assert refusal({"phone": PHONE, "data": {"a": "x" * 65536}}).startswith("data: 65,544 bytes")


def test_a_key_is_taken_up_to_200_characters() -> None:
    assert Lead.read({"phone": PHONE, "data": {}, "key": "k" * 200}, region="IN").key == "k" * 200
    assert refusal({"phone": PHONE, "data": {}, "key": "k" * 201}).startswith("key: ")


@pytest.mark.parametrize("key", [None, "", "  ", ...])
def test_a_lead_without_a_key_is_known_by_its_number(key: object) -> None:
    row: dict[str, Any] = {"phone": PHONE, "data": {}} | ({} if key is ... else {"key": key})
    assert Lead.read(row, region="IN").key == E164


@pytest.mark.parametrize(("given", "kept"), [(" K-1 ", "K-1"), (17, "17"), ("१७", "१७"), ("a b", "a b")])
def test_a_key_is_kept_as_text_without_the_space_around_it(given: object, kept: str) -> None:
    assert Lead.read({"phone": PHONE, "data": {}, "key": given}, region="IN").key == kept


def test_a_lead_is_read_again_as_it_is() -> None:
    lead = make_lead(3, key="K-1")
    assert Lead.read(lead, region="IN") == lead


def test_a_lead_that_was_made_by_hand_gets_the_key_of_its_number_in_e164() -> None:
    """A key of another spelling would be another lead, and the person would be called twice."""
    assert Lead.read(Lead(phone="099997 89877", data={}), region="IN") == Lead(phone=E164, data={}, key=E164)


def test_a_lead_does_not_change_with_the_row_that_it_was_read_from() -> None:
    row: dict[str, Any] = {"phone": PHONE, "data": {"name": "Asha"}}
    lead = Lead.read(row, region="IN")
    row["data"]["name"] = "Ravi"
    assert lead == Lead(phone=E164, data={"name": "Asha"}, key=E164)
    assert lead.model_dump() == {"phone": E164, "data": {"name": "Asha"}, "key": E164}


@pytest.mark.parametrize("levels", [16, 17, 40])
@pytest.mark.parametrize("leaf", [1, None, [], {}])
def test_data_is_taken_up_to_its_depth_and_not_a_level_deeper(levels: int, leaf: object) -> None:
    """The leaf makes the 16th level below `data`, or one beyond it."""
    data: Any = leaf
    for _ in range(levels):
        data = {"a": data}
    if levels == 16:
        assert Lead.read({"phone": PHONE, "data": data}, region="IN").data == data
    else:
        assert refusal({"phone": PHONE, "data": data}) == "data: nested more than 16 levels deep"


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_data = st.recursive(
    st.dictionaries(st.text(max_size=5), _scalars, max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=5), inner | st.lists(inner | _scalars, max_size=3), max_size=3),
    max_leaves=6,
)
_phones = st.sampled_from([PHONE, E164, "099997 89877", "12", "", "+14155552671"]) | st.integers()


@settings(max_examples=300, deadline=None)
@given(phone=_phones, data=_data | _scalars, key=_scalars | st.text(), more=st.sampled_from([{}, {"x": 1}]))
def test_what_is_read_reads_back_as_itself_whatever_kind_of_mapping_it_is(
    phone: Any, data: Any, key: Any, more: dict[str, int]
) -> None:
    row = {"phone": phone, "data": data, "key": key} | more
    try:
        lead = Lead.read(row, region="IN")
    except InvalidLead as refused:
        assert refusal(MappingProxyType(row)) == str(refused)
    else:
        assert Lead.read(MappingProxyType(row), region="IN") == lead
        assert Lead.read(orjson.loads(orjson.dumps(dict(lead))), region="IN") == lead
        assert lead.data == data
        assert lead.key


def test_a_refusal_does_not_tell_the_number_or_the_data() -> None:
    reason = refusal({"phone": PHONE, "data": {"name": "Asha"}, "secret": "9876501234", "key": ["9876501234"]})
    assert "98765" not in reason
    assert "Asha" not in reason
    assert PHONE not in reason


# ids


def test_a_lead_id_never_changes() -> None:
    """It is part of the wire contract: a producer that kept an id finds its lead by it for ever."""
    assert uuid.UUID("ff63b5c4-2161-55bc-a925-d58ded343d98") == NAMESPACE
    assert lead_id(CAMPAIGN, E164) == uuid.UUID("e10e701d-f9ea-5721-9012-136ae5eae1f1")


@given(key=st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_a_lead_id_is_the_uuid5_of_campaign_and_key(key: str) -> None:
    assert lead_id(CAMPAIGN, key) == uuid.uuid5(NAMESPACE, f"{CAMPAIGN}:{key}")


def test_every_spelling_of_a_number_is_one_lead() -> None:
    spellings = [PHONE, "+91 99997 89877", "09999789877", "0091-9999-789877", 9999789877, "919999789877"]
    leads = [Lead.read({"phone": one, "data": {}}, region="IN") for one in spellings]
    assert {lead_id(CAMPAIGN, lead.key) for lead in leads} == {lead_id(CAMPAIGN, E164)}


def test_another_campaign_or_key_is_another_lead() -> None:
    ids = {lead_id(campaign, key) for campaign in ("a", "b") for key in ("x", "y")}
    assert len(ids) == 4


# settling


@pytest.mark.parametrize(
    ("outcome", "state", "costs"),
    [
        (Outcome.ACCEPTED, LeadState.SUBMITTED, 1),
        (Outcome.REJECTED, LeadState.REJECTED, 1),
        (Outcome.NOT_SENT, LeadState.QUEUED, 1),
        (Outcome.THROTTLED, LeadState.QUEUED, 0),
        (Outcome.BUSY, LeadState.QUEUED, 1),
        (Outcome.FAILED, LeadState.UNCERTAIN, 1),
        (Outcome.UNCERTAIN, LeadState.UNCERTAIN, 1),
        (Outcome.REFUSED_KEY, LeadState.QUEUED, 0),
        (Outcome.REFUSED_CAMPAIGN, LeadState.QUEUED, 0),
    ],
)
def test_every_outcome_makes_of_a_lead_what_the_design_says(outcome: Outcome, state: LeadState, costs: int) -> None:
    answer = make_answer(make_claim(attempts=2, lead_expires_at=NOW + DAY), outcome)
    settled = settle(answer, RETRY, now=NOW, jitter=Draws(1.0))
    assert (settled.state, settled.attempts, settled.answer) == (state, 2 + costs, answer)
    waits = {LeadState.QUEUED: timedelta(seconds=2 * 2 ** (2 + costs))}
    assert settled.due_at - NOW == waits.get(state, timedelta())


@pytest.mark.parametrize("outcome", list(Outcome))
def test_the_last_attempt_exhausts_a_lead_only_where_the_outcome_costs_one(outcome: Outcome) -> None:
    answer = make_answer(make_claim(attempts=7, lead_expires_at=NOW + DAY), outcome)
    settled = settle(answer, RETRY, now=NOW, jitter=Draws(0.5))
    spent = {Outcome.NOT_SENT, Outcome.BUSY}
    assert (settled.state is LeadState.EXHAUSTED) == (outcome in spent)


@pytest.mark.parametrize("outcome", [Outcome.THROTTLED, Outcome.REFUSED_KEY, Outcome.REFUSED_CAMPAIGN])
def test_an_outcome_that_costs_nothing_never_exhausts_a_lead(outcome: Outcome) -> None:
    claim = make_claim(attempts=100, lead_expires_at=NOW + DAY)
    settled = settle(make_answer(claim, outcome), RETRY, now=NOW, jitter=Draws(0.5))
    assert (settled.state, settled.attempts) == (LeadState.QUEUED, 100)


@pytest.mark.parametrize(
    ("retry_after", "share", "wait"), [(None, 0.5, 4), (1, 0.5, 4), (90, 0.5, 90), (90, 0.0, 90), (None, 0.0, 0)]
)
def test_a_lead_waits_for_the_longer_of_retry_after_and_backoff(
    retry_after: int | None, share: float, wait: int
) -> None:
    asked = None if retry_after is None else timedelta(seconds=retry_after)
    answer = make_answer(make_claim(attempts=1, lead_expires_at=NOW + DAY), Outcome.BUSY, retry_after=asked)
    settled = settle(answer, RETRY, now=NOW, jitter=Draws(share))
    assert (settled.state, settled.due_at) == (LeadState.QUEUED, NOW + timedelta(seconds=wait))


@pytest.mark.parametrize("outcome", [Outcome.NOT_SENT, Outcome.BUSY])
def test_a_probe_that_learns_that_the_outage_lasts_costs_no_attempt(outcome: Outcome) -> None:
    """Else an outage of an hour would exhaust the last lead of a campaign, which probes again and again."""
    answer = make_answer(make_claim(attempts=RETRY.max_attempts - 1), outcome)
    probed = settle(answer, RETRY, now=NOW, jitter=Draws(0.5), probe=True)
    assert (probed.state, probed.attempts) == (LeadState.QUEUED, RETRY.max_attempts - 1)
    assert settle(answer, RETRY, now=NOW, jitter=Draws(0.5)).state is LeadState.EXHAUSTED


def test_a_server_error_is_tried_again_only_where_the_company_says_so() -> None:
    retry = replace(RETRY, after_server_error=True)
    answer = make_answer(make_claim(attempts=6, lead_expires_at=NOW + DAY), Outcome.FAILED)
    last = make_answer(make_claim(attempts=7, lead_expires_at=NOW + DAY), Outcome.FAILED)
    assert settle(answer, RETRY, now=NOW, jitter=Draws(0.5)).state is LeadState.UNCERTAIN
    assert settle(answer, retry, now=NOW, jitter=Draws(0.5)).state is LeadState.QUEUED
    assert settle(last, retry, now=NOW, jitter=Draws(0.5)).state is LeadState.EXHAUSTED
    probed = settle(last, retry, now=NOW, jitter=Draws(0.5), probe=True)
    assert (probed.state, probed.attempts) == (LeadState.QUEUED, 7)
    probed = settle(last, RETRY, now=NOW, jitter=Draws(0.5), probe=True)
    assert (probed.state, probed.attempts) == (LeadState.UNCERTAIN, 8)


@pytest.mark.parametrize(("age", "state"), [(60, LeadState.EXPIRED), (61, LeadState.QUEUED)])
def test_a_lead_that_would_be_too_old_by_its_next_try_expires_at_once(age: int, state: LeadState) -> None:
    claim = make_claim(lead_expires_at=NOW + timedelta(seconds=age))
    answer = make_answer(claim, Outcome.THROTTLED, retry_after=timedelta(seconds=60))
    assert settle(answer, RETRY, now=NOW, jitter=Draws(0.5)).state is state


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_settlement_is_a_transition_that_is_allowed(outcome: Outcome) -> None:
    """From `sending`, and from `uncertain`, where a late answer finds the lead."""
    for attempts, age in itertools.product((0, 7, 50), (timedelta(), DAY)):
        claim = make_claim(attempts=attempts, lead_expires_at=NOW + age)
        state = settle(make_answer(claim, outcome), RETRY, now=NOW, jitter=Draws(0.5)).state
        assert state in TRANSITIONS[LeadState.SENDING]
        assert state in TRANSITIONS[LeadState.UNCERTAIN] | {LeadState.UNCERTAIN}


# backoff


def test_the_wait_doubles_with_each_attempt_up_to_the_cap() -> None:
    waits = [RETRY.delay(attempts, jitter=Draws(1.0)).total_seconds() for attempts in range(12)]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]


@pytest.mark.parametrize("base", [timedelta(milliseconds=1), timedelta(hours=1), timedelta(days=365)])
def test_no_number_of_attempts_is_too_many_for_the_backoff(base: timedelta) -> None:
    retry = Retry(base=base, cap=timedelta(days=400), max_attempts=10**6)
    assert retry.delay(10**6, jitter=Draws(1.0)) == timedelta(days=400)


def test_the_wait_is_drawn_from_the_whole_span() -> None:
    drawn = [RETRY.delay(3, jitter=random.Random(seed)).total_seconds() for seed in range(500)]
    assert min(drawn) >= 0
    assert max(drawn) < 16
    assert min(drawn) < 1
    assert max(drawn) > 15


# states


def test_every_state_says_what_may_follow() -> None:
    assert set(TRANSITIONS) == set(LeadState)
    assert all(state not in after for state, after in TRANSITIONS.items())
    assert TRANSITIONS[LeadState.CALLED] == frozenset()


def test_no_state_but_the_ends_is_without_a_way_to_called() -> None:
    """Evidence is taken wherever a lead may have been sent, also before its number was suppressed."""
    evidenced = {state for state, after in TRANSITIONS.items() if LeadState.CALLED in after}
    assert evidenced == set(LeadState) - {LeadState.CALLED}
