"""Rows become leads: the short way for the usual form gives what the model gives, and refuses nothing by itself."""

from __future__ import annotations

import math
import uuid
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.domain.lead import NAMESPACE, InvalidLead, Lead, lead_id
from tests.conftest import CAMPAIGN

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_data = st.recursive(
    st.dictionaries(st.text(max_size=5), _scalars, max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=5), inner | st.lists(inner | _scalars, max_size=3), max_size=3),
    max_leaves=6,
)
_phones = st.sampled_from(["9999789877", "+919999789877", "099997 89877", "12", "", "+14155552671"]) | st.integers()


def nested(levels: int, leaf: object) -> dict[str, Any]:
    """Data with so many levels of objects in it."""
    return {"a": leaf} if levels == 1 else {"a": nested(levels - 1, leaf)}


def outcome(row: Any) -> Lead | str:
    """The lead, or the reason of its refusal."""
    try:
        return Lead.read(row, region="IN")
    except InvalidLead as refusal:
        return str(refusal)


@settings(max_examples=300, deadline=None)
@given(phone=_phones, data=_data | _scalars, key=_scalars | st.text(), with_key=st.booleans(), more=st.booleans())
def test_the_short_way_and_the_model_agree(phone: Any, data: Any, key: Any, with_key: bool, more: bool) -> None:
    row = {"phone": phone, "data": data} | ({"key": key} if with_key else {}) | ({"x": 1} if more else {})
    assert outcome(row) == outcome(MappingProxyType(row))  # only a dict takes the short way


@pytest.mark.parametrize("levels", [15, 16, 17, 18, 40])
@pytest.mark.parametrize("leaf", [1, None, math.nan, [1], []])
def test_depth_and_numbers_that_json_cannot_hold_are_seen_on_both_ways(levels: int, leaf: object) -> None:
    row = {"phone": "9999789877", "data": nested(levels, leaf)}
    assert outcome(row) == outcome(MappingProxyType(row))


def test_a_lead_does_not_change_with_the_row_that_it_was_read_from() -> None:
    row: dict[str, Any] = {"phone": "9999789877", "data": {"name": "Asha"}}
    lead = Lead.read(row, region="IN")
    row["data"]["name"] = "Ravi"
    assert lead == Lead(phone="+919999789877", data={"name": "Asha"}, key="+919999789877")
    assert lead.model_dump() == {"phone": "+919999789877", "data": {"name": "Asha"}, "key": "+919999789877"}


@given(key=st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_a_lead_id_is_the_uuid5_of_campaign_and_key(key: str) -> None:
    assert lead_id(CAMPAIGN, key) == uuid.uuid5(NAMESPACE, f"{CAMPAIGN}:{key}")
