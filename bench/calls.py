"""Post-call events of the bench: those of the sandbox's calls, in the shape and the size of the integration guide."""

from __future__ import annotations

from datetime import UTC, datetime

from bench import fake_leads
from bench.backends import CAMPAIGN
from pipeline.sandbox.calls import Lead, plan
from pipeline.sandbox.options import Options


def event_bodies(number: int, *, start: int = 0) -> list[bytes]:
    """Bodies of events, one a call, each with a place for a number: `NNNNNNNNNNNN`."""
    bodies = []
    for place, row in enumerate(fake_leads.rows(number, start=start)):
        lead = Lead(f"{place:024x}", CAMPAIGN, row["phone"], row["data"], b"%d" % place)
        event = plan(lead, Options(lifecycle="final"), datetime(2026, 5, 8, tzinfo=UTC))[-1][1]
        bodies.append(event.body().replace(event.call.sid.encode()[-12:], b"NNNNNNNNNNNN"))
    return bodies


def stories(number: int, *, start: int = 0) -> list[list[bytes]]:
    """The events of *number* calls in order: some calls have one event, most three or four."""
    told = []
    for row in fake_leads.rows(number, start=start):
        seed = row["phone"].encode()
        lead = Lead(f"{int(row['phone']):024x}", CAMPAIGN, row["phone"], row["data"], seed)
        told.append([event.body() for _, event in plan(lead, Options(), datetime(2026, 5, 8, tzinfo=UTC))])
    return told
