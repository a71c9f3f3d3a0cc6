"""A row of each table as plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import orjson
import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger.tables import leads


def state_is(state: LeadState) -> sa.ColumnElement[bool]:
    """A condition with the state written out: a plan that leaves it open cannot keep to the partial indexes."""
    return leads.c.state == sa.literal_column(f"'{state.value}'")


def counts(rows: Iterable[Any]) -> dict[str, int]:
    return {name: int(count) for name, count in rows}


def every_state(counts: dict[str, int]) -> dict[str, int]:
    return {state.value: counts.get(state.value, 0) for state in LeadState}


def age(moment: Any, now: datetime) -> float | None:
    if isinstance(moment, str):  # SQLite's min() gives the stored text
        moment = datetime.fromisoformat(moment)
    return None if moment is None else max(0.0, (now - moment).total_seconds())


def campaign_row(row: Any) -> dict[str, Any]:
    hold = _columns(row, "hold_kind") | {"reason": row.hold_reason} | _columns(row, "stopped_at", "probe_at")
    policies = ("rate", "on_uncertain", "uncertain_after_seconds", "on_server_error", "max_attempts")
    return _columns(row, "id", "account", "state") | hold | _columns(row, *policies, "lead_max_age_seconds")


def lead_row(row: Any) -> dict[str, Any]:
    state = ("state", "reason", "attempts", "due_at", "expires_at", "futwork_lead_id")
    times = ("accepted_at", "submitted_at", "called_at", "changed_at")
    return {"id": str(row.id)} | _columns(row, "campaign_id", "key", "phone", *state, *times)


def attempt_row(row: Any) -> dict[str, Any]:
    return _columns(row, "started_at", "duration_ms", "outcome", "http_status", "excerpt")


def call_row(row: Any) -> dict[str, Any]:
    found = ("disposition", "duration_seconds", "callback_at", "recording_url")
    names = ("call_sid", "linked_by", "status", "is_final", "outcome", *found, "first_event_at", "last_event_at")
    return _columns(row, *names) | {"details": orjson.loads(row.details)}


def orphan_row(row: Any) -> dict[str, Any]:
    leads_to_it = ("campaign_id", "phone", "futwork_lead_id", "reference")
    return _columns(row, "call_sid", *leads_to_it, "status", "is_final", "outcome", "first_event_at", "last_event_at")


def event_row(row: Any) -> dict[str, Any]:
    try:
        payload = orjson.loads(row.body)
    except orjson.JSONDecodeError:
        payload = None
    status = payload.get("status") if isinstance(payload, dict) else None
    return {
        "received_at": row.received_at,
        "call_sid": row.call_sid,
        "state": row.state,
        "status": status,
        "payload": payload,
    }


def _columns(row: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}
