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
    return {
        "id": row.id,
        "account": row.account,
        "state": row.state,
        "hold_kind": row.hold_kind,
        "reason": row.hold_reason,
        "stopped_at": row.stopped_at,
        "probe_at": row.probe_at,
        "rate": row.rate,
        "on_uncertain": row.on_uncertain,
        "uncertain_after_seconds": row.uncertain_after_seconds,
        "on_server_error": row.on_server_error,
        "max_attempts": row.max_attempts,
        "lead_max_age_seconds": row.lead_max_age_seconds,
    }


def lead_row(row: Any) -> dict[str, Any]:
    return {
        "id": str(row.id),
        "campaign_id": row.campaign_id,
        "key": row.key,
        "phone": row.phone,
        "state": row.state,
        "reason": row.reason,
        "attempts": row.attempts,
        "due_at": row.due_at,
        "expires_at": row.expires_at,
        "futwork_lead_id": row.futwork_lead_id,
        "accepted_at": row.accepted_at,
        "submitted_at": row.submitted_at,
        "called_at": row.called_at,
        "changed_at": row.changed_at,
    }


def attempt_row(row: Any) -> dict[str, Any]:
    return {
        "started_at": row.started_at,
        "duration_ms": row.duration_ms,
        "outcome": row.outcome,
        "http_status": row.http_status,
        "excerpt": row.excerpt,
    }


def call_row(row: Any) -> dict[str, Any]:
    return {
        "call_sid": row.call_sid,
        "linked_by": row.linked_by,
        "status": row.status,
        "is_final": row.is_final,
        "outcome": row.outcome,
        "disposition": row.disposition,
        "duration_seconds": row.duration_seconds,
        "callback_at": row.callback_at,
        "recording_url": row.recording_url,
        "first_event_at": row.first_event_at,
        "last_event_at": row.last_event_at,
        "details": orjson.loads(row.details),
    }


def orphan_row(row: Any) -> dict[str, Any]:
    return {
        "call_sid": row.call_sid,
        "campaign_id": row.campaign_id,
        "phone": row.phone,
        "futwork_lead_id": row.futwork_lead_id,
        "reference": row.reference,
        "status": row.status,
        "is_final": row.is_final,
        "outcome": row.outcome,
        "first_event_at": row.first_event_at,
        "last_event_at": row.last_event_at,
    }


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
