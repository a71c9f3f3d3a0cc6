"""The shapes of an answer's body: what is known of them is that they vary."""

from collections.abc import Callable
from typing import Any

import orjson

_LEAD_SHAPES: dict[str, Callable[[str], Any]] = {
    "leadId": lambda lead: {"leadId": lead},
    "lead_id": lambda lead: {"lead_id": lead, "status": "queued"},
    "id": lambda lead: {"id": lead, "message": "Lead created"},
    "_id": lambda lead: {"_id": lead, "__v": 0},
    "data.leadId": lambda lead: {"success": True, "data": {"leadId": lead}},
    "data.lead_id": lambda lead: {"status": "success", "data": {"lead_id": lead}},
    "data.id": lambda lead: {"success": True, "data": {"id": lead, "attempts": 0}},
    "data._id": lambda lead: {"success": True, "message": "Lead added", "data": {"_id": lead, "__v": 0}},
    "lead.id": lambda lead: {"lead": {"id": lead, "state": "new"}},
    "lead._id": lambda lead: {"message": "ok", "lead": {"_id": lead}},
    "result.leadId": lambda lead: {"error": None, "result": {"leadId": lead}},
    "result.lead_id": lambda lead: {"success": True, "result": {"lead_id": lead}},
    "none": lambda _: {"success": True, "message": "Lead added successfully"},
    "empty": lambda _: None,
}

SHAPES = tuple(_LEAD_SHAPES)
MIXED = "mixed"


def success_body(shape: str, lead_id: str, draw: float) -> bytes:
    """Body of a 2xx answer in *shape*; `mixed` picks one by *draw*, a number in [0, 1)."""
    if shape == MIXED:
        shape = SHAPES[int(draw * len(SHAPES))]
    content = _LEAD_SHAPES[shape](lead_id)
    return b"" if content is None else orjson.dumps(content)


def malformed_body(lead_id: str, draw: float) -> bytes:
    """Body of a 200 answer that is not JSON although it says so."""
    variants = (
        b'{"success": true, "data": {"leadId": "' + lead_id[:9].encode(),
        b"<html><body>Lead added</body></html>",
        b"{'success': True, 'leadId': '" + lead_id.encode() + b"'}",
        b"\xff\xfe\x00{",
    )
    return variants[int(draw * len(variants))]


def refusal_body(draw: float) -> bytes:
    """Body of a 200 answer that says the lead was not taken."""
    variants: tuple[dict[str, Any], ...] = (
        {"success": False, "message": "Lead could not be added"},
        {"success": False, "data": None, "error": {"code": "LEAD_REFUSED", "message": "Lead could not be added"}},
        {"error": "Lead could not be added"},
    )
    return orjson.dumps(variants[int(draw * len(variants))])


def error_body(message: str) -> bytes:
    """Body of a 4xx or 5xx answer."""
    return orjson.dumps({"success": False, "message": message})
