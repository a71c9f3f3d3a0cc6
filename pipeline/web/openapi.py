"""The HTTP surface as an OpenAPI 3.1 document, served at `/openapi.json`.

It is built from the types that the code reads and writes, and a test holds the running app to it, status by status. The
status pages are HTML for people and not part of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson
from flask import Blueprint, Response
from pydantic import TypeAdapter

from pipeline import __version__
from pipeline.domain.call.describe import Call
from pipeline.domain.call.status import CallOutcome
from pipeline.domain.lead import Lead, LeadState, Outcome
from pipeline.futwork import fields
from pipeline.web.feed import MOST_CALLS

blueprint = Blueprint("openapi", __name__)

_SCHEMAS = "#/components/schemas/"
_CAMPAIGN = "68ecc86fd9fbecbe9431a18e"
_LEAD = "1c1d3a36-0a2f-5c0e-9b0e-6f6a3d9b1c11"
_NAMES = {"phone": fields.PHONE, "data": fields.DATA}


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """The description of what this server answers; it holds nothing of the installation."""
    return Response(_encoded(), content_type="application/json")


@cache
def _encoded() -> bytes:
    return orjson.dumps(describe())


def describe() -> dict[str, Any]:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Futwork lead pipeline",
            "version": __version__,
            "description": "Leads in, and what became of them; the webhook that Futwork reports its calls to.",
        },
        "paths": {
            "/v1/campaigns/{campaign_id}/leads": {"parameters": [_campaign_id()], "post": _take_leads()},
            "/v1/leads/{lead_id}": {"parameters": [_lead_id()], "get": _tell_lead()},
            "/v1/calls": {"get": _tell_calls()},
            "/webhooks/futwork": {"post": _receive("receiveEvent", [{"apiKey": []}, {"webhookSecret": []}])},
            "/webhooks/futwork/{token}": {
                "parameters": [_parameter("token", "The token itself, for a sender that can set no header.")],
                "post": _receive("receiveEventWithTokenInPath", []),
            },
            "/": {
                "get": {
                    "operationId": "index",
                    "summary": "What this server answers; a browser is led to the status pages if they are on",
                    "security": [],
                    "responses": {
                        "200": {
                            "description": "The service, its release and its paths.",
                            "content": {"application/json": {"schema": {"type": "object"}}},
                        },
                        "302": {"description": "The status pages are on, and a browser asks."},
                    },
                }
            },
            "/healthz": {"get": _health("health", "Whether the process serves", [200])},
            "/readyz": {"get": _health("readiness", "Whether broker and ledger answer", [200, 503])},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "The state of the pipeline for Prometheus",
                    "security": [],
                    "responses": {
                        "200": {
                            "description": "Prometheus' text form.",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        }
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document",
                    "security": [],
                    "responses": {
                        "200": {
                            "description": "An OpenAPI document.",
                            "content": {"application/json": {"schema": {"type": "object"}}},
                        }
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A token of INTAKE_TOKENS."},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "webhookSecret": {"type": "apiKey", "in": "header", "name": "x-webhook-secret"},
            },
            "schemas": _schemas(),
        },
    }


# Operations


def _take_leads() -> dict[str, Any]:
    example = {"phone": "9999789877", "data": {"customer_name": "Asha", "place": "Pune"}, "key": "crm-4711"}
    one = {"anyOf": [_ref("Lead"), _ref("LeadInFutworksNames")]}
    lines = {"schema": {"type": "string"}, "example": '{"phone": "9999789877", "data": {}}\n'}
    return {
        "operationId": "takeLeads",
        "summary": "Hand in one lead, an array of leads, or one a line",
        "description": (
            "A row with an id in its result is in the broker and never lost. Sending the same again is harmless: a lead"
            " is known by campaign and key. One whose number is on the do-not-call list is taken in and never sent."
        ),
        "security": [{"bearer": []}],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "maxItems": 50_000}]},
                    "examples": {"one": {"value": example}, "several": {"value": [example]}},
                },
                "application/x-ndjson": lines,
                "application/jsonl": lines,
                "application/x-jsonlines": lines,
            },
        },
        "responses": {
            "202": _says("At least one row is a lead; each result holds its id or its error.", "Report"),
            "422": _says(
                "Nothing was taken: no row is a lead, the body is not JSON, or the campaign's id is wrong.",
                "Refused",
            ),
            **_errors(400, 401, 403, 408, 413, 415, 503),
        },
    }


def _tell_lead() -> dict[str, Any]:
    return {
        "operationId": "tellLead",
        "summary": "One lead's story: state, attempts, calls",
        "security": [{"bearer": []}],
        "responses": {
            "200": _says("The lead as the ledger has it.", "Story"),
            **_errors(401, 404, 503),
        },
    }


def _tell_calls() -> dict[str, Any]:
    limit = {"type": "integer", "minimum": 1, "maximum": MOST_CALLS, "default": 100}
    errors = _errors(400, 401, 403, 503)
    errors["400"] = _says("A parameter that cannot be, or a cursor that is not of this ledger's feed.", "Error")
    return {
        "operationId": "tellCalls",
        "summary": "The calls that changed after a cursor, in an order that misses none",
        "description": (
            "Begin without a cursor, and give `next` of each page as `after` of the next. A call that changed several"
            " times since comes once, as it is now, and again when it changes again: take its `cursor` as its version."
            " With a filter a page may be empty although there is `more`."
        ),
        "security": [{"bearer": []}],
        "parameters": [
            _query("after", "`next` of the page before.", {"type": "string", "pattern": "^[0-9]{1,18}$"}),
            _query("limit", "How many calls a page may have.", limit),
            _query("campaign", "Calls of this campaign alone.", {"type": "string"}),
            _query("final", "Whether only calls that have ended.", {"type": "boolean", "default": False}),
        ],
        "responses": {
            "200": _says("A page; it may be empty.", "PageOfCalls"),
            "304": {"description": "The page is still what the `ETag` in `If-None-Match` was for."},
            **errors,
        },
    }


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _receive(name: str, security: list[dict[str, list[str]]]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": "Take one post-call event of Futwork's",
        "description": (
            "Any JSON object is kept as it came and read later; what is none is kept in quarantine and answered 400."
            " The content type is not looked at."
        ),
        "security": security,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object"},
                    "example": {"callSid": "3f19eab8", "leadId": "68ecc93c", "status": "completed"},
                }
            },
        },
        "responses": {"200": _says("The event is in the broker, or synced to disk.", "Taken"), **_errors(*_WEBHOOK)},
    }


_WEBHOOK = (400, 401, 408, 413, 415, 503)


def _health(name: str, summary: str, statuses: list[int]) -> dict[str, Any]:
    told = {200: "It does.", 503: "It does not; the webhook works all the same."}
    responses = {str(status): _says(told[status], "Health") for status in statuses}
    return {"operationId": name, "summary": summary, "security": [], "responses": responses}


def _errors(*statuses: int) -> dict[str, Any]:
    told = {
        400: "The body cannot be read as what it says it is.",
        401: "No token, or one that is not known.",
        403: "The token is for another campaign.",
        404: "No such lead, or not one that this token may see; one that was just accepted is known in a moment.",
        408: "The body did not arrive whole in time.",
        413: "The body is larger than the server takes, or has too many rows.",
        415: "Another content type, or another content encoding than gzip and deflate.",
        503: "What keeps this is away. Count on nothing, and send it again.",
    }
    headers = {
        401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
        503: {"Retry-After": {"schema": {"type": "string"}}},
    }
    return {
        str(status): _says(told[status], "Error") | ({"headers": headers[status]} if status in headers else {})
        for status in statuses
    }


def _says(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _SCHEMAS + name}


def _campaign_id() -> dict[str, Any]:
    return _parameter("campaign_id", "Futwork's campaign id.", example=_CAMPAIGN)


def _lead_id() -> dict[str, Any]:
    return _parameter("lead_id", "The id that the intake answered.", format="uuid", example=_LEAD)


def _parameter(name: str, description: str, *, example: str | None = None, **schema: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "in": "path", "required": True, "description": description}
    return found | {"schema": {"type": "string"} | schema} | ({"example": example} if example else {})


# Schemas


def _schemas() -> dict[str, Any]:
    lead = _lead()
    properties = lead["properties"]
    call, parts = _call()
    return {
        "Lead": lead,
        "LeadInFutworksNames": lead
        | {
            "description": "The same in the names of Futwork's own API.",
            "properties": {_NAMES.get(name, name): schema for name, schema in properties.items()},
            "required": [_NAMES.get(name, name) for name in lead["required"]],
        },
        "Report": _object(
            {
                "campaign_id": {"type": "string"},
                "accepted": _COUNT,
                "refused": _COUNT,
                "results": {"type": "array", "items": {"anyOf": [_ref("AcceptedRow"), _ref("RefusedRow")]}},
            }
        ),
        "AcceptedRow": _object({"index": _COUNT, "id": {"type": "string", "format": "uuid"}}),
        "RefusedRow": _object({"index": _COUNT, "error": {"type": "string"}}),
        "Refused": _object(
            {
                "error": {"type": "string"},
                "campaign_id": {"type": "string"},
                "accepted": _COUNT,
                "refused": _COUNT,
                "results": {"type": "array", "items": _ref("RefusedRow")},
            },
            required=["error"],
        ),
        "Error": _object({"error": {"type": "string", "description": "What is wrong, for a person."}}),
        "Taken": _object({"event": {"const": "accepted"}}),
        "Health": _object(
            {"status": {"type": "string"}, "broker": {"type": "string"}, "ledger": {"type": "string"}},
            required=["status"],
        ),
        "Story": _story(),
        "Attempt": _object(
            {
                "started_at": _TIME,
                "duration_ms": _COUNT,
                "outcome": {"enum": [outcome.value for outcome in Outcome]},
                "http_status": {"type": ["integer", "null"]},
                "excerpt": {"type": "string"},
            }
        ),
        "LinkedCall": _object(
            {
                "call_sid": {"type": "string"},
                "linked_by": _TEXT_OR_NOTHING,
                "status": {"type": "string"},
                "is_final": {"type": "boolean"},
                "outcome": {"enum": [outcome.value for outcome in CallOutcome]},
                "disposition": _TEXT_OR_NOTHING,
                "duration_seconds": {"type": ["number", "null"]},
                "callback_at": _TIME_OR_NOTHING,
                "recording_url": _TEXT_OR_NOTHING,
                "first_event_at": _TIME,
                "last_event_at": _TIME,
                "details": _ref("Call"),
            }
        ),
        "PageOfCalls": _object(
            {
                "calls": {"type": "array", "items": _ref("CallInFeed")},
                "next": {"type": "string", "description": "The cursor of the next page."},
                "more": {"type": "boolean", "description": "Whether the next page may be asked for at once."},
            }
        ),
        "CallInFeed": {"allOf": [_ref("LinkedCall"), _call_in_feed()]},
        "EventSeen": _object({"received_at": _TIME, "call_sid": {"type": "string"}, "status": {}}),
        "Call": call,
        **parts,
    }


_COUNT = {"type": "integer", "minimum": 0}
_TIME = {"type": "string", "format": "date-time"}
_TIME_OR_NOTHING = {"type": ["string", "null"], "format": "date-time"}
_TEXT_OR_NOTHING = {"type": ["string", "null"]}


def _call_in_feed() -> dict[str, Any]:
    return _object(
        {
            "cursor": {"type": "string", "description": "Its place in the feed: higher after each change."},
            "lead_id": {"type": ["string", "null"], "format": "uuid"},
            "key": _TEXT_OR_NOTHING | {"description": "The lead's idempotency key."},
            "campaign_id": _TEXT_OR_NOTHING,
            "phone": _TEXT_OR_NOTHING,
            "futwork_lead_id": _TEXT_OR_NOTHING,
            "reference": _TEXT_OR_NOTHING,
        }
    )


def _story() -> dict[str, Any]:
    return _object(
        {
            "id": {"type": "string", "format": "uuid"},
            "campaign_id": {"type": "string"},
            "key": {"type": "string"},
            "phone": {"type": "string", "description": "E.164."},
            "state": {"enum": [state.value for state in LeadState]},
            "reason": _TEXT_OR_NOTHING,
            "attempts": _COUNT,
            "due_at": _TIME,
            "expires_at": _TIME,
            "futwork_lead_id": _TEXT_OR_NOTHING,
            "accepted_at": _TIME,
            "submitted_at": _TIME_OR_NOTHING,
            "called_at": _TIME_OR_NOTHING,
            "changed_at": _TIME,
            "data": {"type": "object"},
            "attempts_made": {"type": "array", "items": _ref("Attempt")},
            "calls": {"type": "array", "items": _ref("LinkedCall")},
            "events": {"type": "array", "items": _ref("EventSeen")},
        }
    )


def _lead() -> dict[str, Any]:
    """A lead as `Lead` reads it, and what its validators add to that."""
    schema = Lead.model_json_schema()
    properties = schema["properties"]
    properties["phone"] = {
        "type": ["string", "integer"],
        "description": "In any spelling; a number without a country code is of the server's region.",
    }
    properties["key"] = {
        "type": ["string", "integer", "null"],
        "maxLength": properties["key"]["maxLength"],
        "description": "Your idempotency key; without it, the number is the key.",
    }
    properties["data"] = {"type": "object", "description": "recipientData: the fields of the campaign's LeadSchema."}
    return {
        "type": "object",
        "description": "One person to be called.",
        "properties": properties,
        "required": schema["required"],
        "additionalProperties": False,
    }


def _call() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call's events tell, and the types that it is made of; a call of an earlier release may lack a field."""
    schema = TypeAdapter(Call).json_schema(mode="serialization", ref_template=_SCHEMAS + "{model}")
    parts: dict[str, Any] = schema.pop("$defs", {})
    schema.pop("required", None)
    return schema, parts


def _object(properties: dict[str, Any], *, required: list[str] | None = None) -> dict[str, Any]:
    """An object that may gain fields in a later release."""
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required}
