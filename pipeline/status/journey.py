"""One lead's story in order: read by `pipeline show`, the lead's page on `/ops`, and `GET /v1/leads/{id}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pipeline.status.text import count

Kind = Literal["accepted", "good", "trouble", "event", "person"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened to a lead."""

    at: datetime
    kind: Kind
    """`good` and `trouble`: a POST that was accepted, or not. `person`: what an operator did."""
    title: str
    text: str = ""
    quote: str = ""
    """Futwork's answer, as it came."""


def journey(story: Mapping[str, Any]) -> list[Step]:
    """The steps of a lead's story, oldest first; *story* is in the shape of `Reports.story`."""
    steps = [Step(story["accepted_at"], "accepted", "Accepted"), *_posts(story), *_events(story), *_people(story)]
    return sorted(steps, key=lambda step: step.at)


def _posts(story: Mapping[str, Any]) -> Iterator[Step]:
    for one in story["attempts_made"]:
        code = f"HTTP {one['http_status']}, " if one["http_status"] else ""
        kind: Kind = "good" if one["outcome"] == "accepted" else "trouble"
        title = f"Sent to Futwork: {one['outcome'].replace('_', ' ')}"
        yield Step(one["started_at"], kind, title, f"{code}{one['duration_ms']} ms", one["excerpt"])


def _events(story: Mapping[str, Any]) -> Iterator[Step]:
    has_several = len(story["calls"]) > 1
    for one in story["events"]:
        said = str(one["status"] or "without a status").replace("-", " ")
        about = [f"call {one['call_sid']}"] if has_several else []
        about += {"quarantined": ["in quarantine"], "pending": ["not merged yet"]}.get(one["state"], [])
        yield Step(one["received_at"], "event", f"Futwork reports: {said}", ", ".join(about))


def _people(story: Mapping[str, Any]) -> Iterator[Step]:
    for one in story["interventions"]:
        action, _, verdict = one["action"].partition(": ")
        title = {"call link": "Call linked", "resolve": f"Resolved as {verdict}"}.get(action, action.capitalize())
        text = f"{one['who']}, {'by command' if one['via'] == 'cli' else 'on the status pages'}"
        if not one["is_certain"]:
            title = f"{title} of {count(one['changed'], 'lead')}, possibly of this one"
        yield Step(one["at"], "person", title, text)
