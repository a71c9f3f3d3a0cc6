"""The shapes of an answer."""

import json

import pytest

from pipeline.sandbox.answers import MIXED, SHAPES, malformed_body, refusal_body, success_body

LEAD_ID = "68ecc93cd9fbecbe9431a2a1"
DRAWS = [number / 100 for number in range(100)]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in {"none", "empty"}])
def test_the_lead_id_is_where_the_shape_says(shape):
    content = json.loads(success_body(shape, LEAD_ID, 0.0))
    for key in shape.split("."):
        content = content[key]
    assert content == LEAD_ID


def test_an_answer_may_have_no_lead_id_or_no_body_at_all():
    assert json.loads(success_body("none", LEAD_ID, 0.0)) == {"success": True, "message": "Lead added successfully"}
    assert success_body("empty", LEAD_ID, 0.0) == b""


def test_a_mixture_has_every_shape():
    mixed = {success_body(MIXED, LEAD_ID, draw) for draw in DRAWS}
    assert mixed == {success_body(shape, LEAD_ID, 0.0) for shape in SHAPES}


def test_a_malformed_answer_is_never_json():
    bodies = {malformed_body(LEAD_ID, draw) for draw in DRAWS}
    assert len(bodies) == 4
    for body in bodies:
        with pytest.raises(ValueError, match=r"(?s)."):
            json.loads(body)


def test_a_refusal_says_no_or_carries_an_error():
    bodies = {refusal_body(draw) for draw in DRAWS}
    assert len(bodies) == 3
    for content in map(json.loads, bodies):
        assert content.get("success") is False or set(content) == {"error"}
