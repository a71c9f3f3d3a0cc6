"""Finding a lead by what a person has in hand; read by `pipeline show`, the search on `/ops` and the HTTP API."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.ledger import LeadFilter, Ledger
from pipeline.ledger.database import storable_text


def find_leads(
    ledger: Ledger, text: str, *, region: str, campaign: str | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """The leads that the text may mean, newest first of each kind; one text may be several things.

    It may be an id or a phone number in any spelling, an idempotency key, Futwork's lead id, or a call's `callSid`.
    """
    text = storable_text(text).strip()
    if not text:
        return []
    filters = [LeadFilter(key=text, campaign=campaign)]
    if (id_ := read_id(text)) is not None:
        filters.append(LeadFilter(ids=(id_,), campaign=campaign))
    with contextlib.suppress(InvalidPhone):
        filters.append(LeadFilter(phone=to_e164(text, region), campaign=campaign))
    if ids := ledger.reports.leads_of_futwork(text, limit=limit):
        filters.append(LeadFilter(ids=tuple(ids), campaign=campaign))
    found: dict[str, dict[str, Any]] = {}
    for which in filters:
        for one in ledger.reports.page_of_leads(which, limit=limit):
            found.setdefault(one["id"], one)
    return list(found.values())[:limit]


def find_lead(ledger: Ledger, text: str, *, region: str) -> uuid.UUID | None:
    """The id of the one lead that the text means; None if it means none, or several."""
    found = find_leads(ledger, text, region=region, limit=2)
    return uuid.UUID(found[0]["id"]) if len(found) == 1 else None


def read_id(text: str) -> uuid.UUID | None:
    """A lead's id in any spelling: upper case, without hyphens, in braces or as a URN; None if it is none."""
    try:
        return uuid.UUID(text.strip())
    except ValueError:
        return None
