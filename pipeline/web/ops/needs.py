"""What needs a person, from what the pages know: each with the reason in words and what to do about it; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.domain.campaign import ADVICE, HoldKind
from pipeline.web.ops.masking import count, span

Weight = Literal["stopped", "look", "know"]

_PATIENCE_SECONDS = 120.0  # how long a due lead may wait before it is worth a line


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that wants a person's eye."""

    weight: Weight
    title: str
    text: str
    campaign: str | None = None
    advice: str = ""
    quote: str = ""
    """The reason in a stranger's words."""
    probe_at: Any = None
    since: Any = None
    can_resume: bool = False
    link: str = ""
    """Where the things are: an endpoint of the pages."""
    query: dict[str, Any] = field(default_factory=dict)
    label: str = ""


def needs(overview: Mapping[str, Any], health: Mapping[str, Any]) -> list[Need]:
    """Everything that needs a person, what stands still first."""
    found = [
        *_of_health(health, overview),
        *_stopped(overview["campaigns"]),
        *_leads(overview["campaigns"]),
        *_strays(overview),
    ]
    order: Sequence[Weight] = ("stopped", "look", "know")
    return sorted(found, key=lambda need: order.index(need.weight))


def _of_health(health: Mapping[str, Any], overview: Mapping[str, Any]) -> list[Need]:
    found = [
        Need("stopped", one["title"], one["text"], advice=one.get("advice", ""))
        for one in health["parts"]
        if one["state"] == "down"
    ]
    found += [
        Need("look", one["title"], one["text"], advice=one.get("advice", ""))
        for one in health["parts"]
        if one["state"] == "warn"
    ]
    if not overview["adds_up"]:
        total = sum(overview["leads"].values())
        text = f"{overview['accepted']:,} leads were accepted, but the states add up to {total:,}."
        advice = "Run pipeline status, which counts anew."
        found.append(Need("stopped", "The books do not add up", text, advice=advice))
    for one in overview["campaigns"]:
        waits = one["oldest_due_seconds"]
        if one["state"] == "active" and waits and waits > _PATIENCE_SECONDS and not one["posts_last_minutes"]:
            text = f"Its oldest lead is due for {span(waits)}, and nothing was sent in the last ten minutes."
            advice = "See that a worker serves the queue dispatch, and that its log shows no trouble."
            title = f"Campaign {one['id']} is active, but stands still"
            found.append(Need("stopped", title, text, campaign=one["id"], advice=advice))
    return found


def _stopped(campaigns: Sequence[Mapping[str, Any]]) -> list[Need]:
    found = []
    for one in campaigns:
        waiting = count(one["leads"]["queued"], "lead waits", "leads wait")
        if one["state"] == "held":
            what, advice = ADVICE[HoldKind(one["hold_kind"])]
            found.append(
                Need(
                    "stopped", f"Campaign {one['id']} is held: {what}", f"{waiting}; none is lost.",
                    campaign=one["id"], advice=advice, quote=one["reason"] or "", probe_at=one["probe_at"],
                    since=one["stopped_at"], can_resume=True,
                )
            )  # fmt: skip
        elif one["state"] == "paused":
            found.append(
                Need(
                    "know", f"Campaign {one['id']} is paused by an operator", f"{waiting}.", campaign=one["id"],
                    quote=one["reason"] or "", since=one["stopped_at"], can_resume=True,
                )
            )  # fmt: skip
    return found


def _leads(campaigns: Sequence[Mapping[str, Any]]) -> list[Need]:
    found = []
    for one in campaigns:
        name, unsure = one["id"], one["uncertain"]
        if unsure["total"]:
            ages = ", ".join(
                f"{unsure['older_than'][key]:,} for more than {text}"
                for key, text in (("hour", "an hour"), ("day", "a day"))
                if unsure["older_than"][key]
            )
            text = f"The oldest is so for {span(unsure['oldest_seconds'])}" + (f"; {ages}." if ages else ".")
            found.append(
                Need(
                    "look" if unsure["older_than"]["hour"] else "know",
                    f"{count(unsure['total'], 'lead is', 'leads are')} uncertain in {name}", text, campaign=name,
                    advice="Their POST may or may not have reached Futwork. Most settle when the call comes back; look"
                    " for the others in Futwork's console, then say sent, resend or drop.",
                    link="ops.leads", query={"campaign": name, "state": "uncertain"}, label="Look and resolve",
                )
            )  # fmt: skip
        for state, why in (
            ("exhausted", "Every allowed attempt was used up."),
            ("rejected", "Futwork refused these very leads."),
            ("expired", "They grew older than the campaign allows."),
        ):
            if one["leads"][state]:
                found.append(
                    Need(
                        "know", f"{count(one['leads'][state], 'lead is', 'leads are')} {state} in {name}", why,
                        campaign=name, link="ops.leads", query={"campaign": name, "state": state},
                        label="Look and retry",
                    )
                )  # fmt: skip
    return found


def _strays(overview: Mapping[str, Any]) -> list[Need]:
    found = []
    if n := overview["quarantined"]:
        found.append(
            Need(
                "look", f"{count(n, 'message is', 'messages are')} in quarantine",
                "They could not be read, and are kept whole.",
                link="ops.quarantine", label="Look and replay",
            )
        )  # fmt: skip
    if n := overview["orphans"]:
        found.append(
            Need(
                "know", f"{count(n, 'call has', 'calls have')} no lead", "They are looked at again every 15 seconds.",
                link="ops.quarantine", query={"_anchor": "orphans"}, label="Look and link",
            )
        )  # fmt: skip
    return found
