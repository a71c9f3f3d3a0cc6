"""What an operator can change, and its wording: one table for the commands, their help, and the pages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pipeline.domain.lead import LeadState
from pipeline.ledger import Actor, LeadFilter, Ledger
from pipeline.ledger.filters import RETRYABLE
from pipeline.settings import Settings
from pipeline.status.text import count

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that an operator can do."""

    command: str
    """The command that does it, after `pipeline`."""
    label: str
    """On its button."""
    summary: str
    """What it does, in one sentence."""
    becomes: str = ""
    """What the leads, or the campaign, are afterwards: "2 leads will be …", "the campaign is …"."""
    states: tuple[LeadState, ...] = ()
    """The states of the leads that it changes; it leaves all others alone."""
    note: str = ""
    """What one must know before."""
    needs_care: bool = False
    """Whether it may call somebody twice, or stops something."""

    @property
    def changes(self) -> str:
        """The leads that it changes, in words: `rejected, exhausted and expired leads`."""
        names = [state.value for state in self.states]
        return f"{' and '.join(part for part in (', '.join(names[:-1]), names[-1]) if part)} leads"

    @property
    def help(self) -> str:
        """The beginning of its command's help."""
        parts = [self.summary, f"Only {self.changes} are changed." if self.states else "", self.note]
        return "\n\n".join((parts[0], " ".join(part for part in parts[1:] if part))).rstrip()


ACTIONS = {
    "retry": Action(
        "retry", "Retry", "Queue leads again, with fresh attempts.", "queued again, with fresh attempts", RETRYABLE,
        "A lead whose number is on the do-not-call list is not changed; uncertain leads are for `resolve`.",
    ),
    "cancel": Action(
        "cancel", "Cancel", "Cancel leads that wait, so that they are not sent.", "cancelled, and not sent",
        (LeadState.QUEUED,), "Leads that are being sent, or were sent, are not changed.", needs_care=True,
    ),
    "resolve:sent": Action(
        "resolve --sent", "Resolve as sent", "Futwork has them: mark them submitted.", "marked submitted",
        (LeadState.UNCERTAIN,), "Confirm that you saw them in Futwork's console.",
    ),
    "resolve:resend": Action(
        "resolve --resend", "Resolve by sending again", "Futwork does not have them: send them again.", "sent again",
        (LeadState.UNCERTAIN,), "If Futwork had a lead after all, that person is called twice.", needs_care=True,
    ),
    "resolve:drop": Action(
        "resolve --drop", "Resolve by dropping", "Give them up: cancel them.", "given up and cancelled",
        (LeadState.UNCERTAIN,), needs_care=True,
    ),
    "campaign pause": Action(
        "campaign pause", "Pause", "Stop a campaign until somebody resumes it.", "paused",
        note="Answers and calls of leads that were already sent still come back.", needs_care=True,
    ),
    "campaign resume": Action(
        "campaign resume", "Resume", "Make a paused or held campaign active again, without waiting for a probe.",
        "active", note="If the cause is still there, it is soon held again.",
    ),
    "campaign set": Action(
        "campaign set", "Save", "Set a campaign's policies; what is not set follows the settings.",
    ),
    "events replay": Action(
        "events replay", "Replay", "Read what is in quarantine again: events, rows of leads and messages.",
        note="What can be read now is taken in and leaves the quarantine. Safe to repeat.",
    ),
    "events link": Action(
        "events link", "Link", "Link a call without a lead to the lead that it belongs to.",
        note="The link is evidence that Futwork had the lead, and cannot be undone.",
    ),
    "suppress add": Action(
        "suppress add", "Add", "Put numbers on the do-not-call list, and suppress their queued leads.",
        note="No lead with one of these numbers is sent any more; calls that are under way still come back.",
    ),
    "suppress remove": Action(
        "suppress remove", "Remove", "Take numbers off the do-not-call list.",
        note="Their suppressed leads stay suppressed until they are retried.",
    ),
}  # fmt: skip
"""Every action by its name."""

LEAD_ACTIONS = tuple(name for name, action in ACTIONS.items() if action.states)
"""What can be done to many leads at once, chosen by a filter."""


def explained(name: str) -> Callable[[F], F]:
    """Put the help of the action before a command's own docstring, which click prints."""

    def explain(command: F) -> F:
        command.__doc__ = f"{ACTIONS[name].help}\n\n{inspect.cleandoc(command.__doc__ or '')}"
        return command

    return explain


def change_leads(
    ledger: Ledger, settings: Settings, name: str, which: LeadFilter, *, now: datetime, by: Actor, dry_run: bool = False
) -> int:
    """Do one of `LEAD_ACTIONS` to the leads that match, or only count them; raises `EmptyFilter`."""
    interventions, max_age = ledger.interventions, timedelta(seconds=settings.lead_max_age_seconds)
    verb, _, verdict = name.partition(":")
    if verb == "retry":
        return interventions.retry(which, max_age=max_age, now=now, dry_run=dry_run, by=by)
    if verb == "cancel":
        return interventions.cancel(which, now=now, dry_run=dry_run, by=by)
    return interventions.resolve(which, verdict, max_age=max_age, now=now, dry_run=dry_run, by=by)


def changed_text(name: str, changed: int, *, dry_run: bool = False, will: bool = False) -> str:
    """What an action on leads has done, would do, or *will* do: `2 leads were cancelled, and not sent`."""
    are = "will be" if will else "would be" if dry_run else "was" if changed == 1 else "were"
    return f"{count(changed, 'lead')} {are} {ACTIONS[name].becomes}"
