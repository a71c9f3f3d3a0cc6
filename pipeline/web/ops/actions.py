"""What changes something: each through the ledger's own methods, in one transaction with its line in the audit log."""

from __future__ import annotations

import re
import uuid
from datetime import datetime, timedelta
from typing import Any

from flask import abort, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as AnyResponse

from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.events import Events
from pipeline.ledger import Actor, LeadFilter
from pipeline.settings import Rate
from pipeline.web.ops.filter_form import WrongChoice, command_for, fields_of, read_choice, until
from pipeline.web.ops.layout import blueprint, now, ops, visitor
from pipeline.web.ops.masking import count
from pipeline.web.ops.queries import show_leads

MOST_AT_ONCE = 50_000
"""Leads that a page changes at once: more would take longer than a browser waits, and is a command's work."""

ACTIONS = {
    "retry": ("Retry", "queued again, with fresh attempts", "rejected, exhausted, expired and cancelled leads"),
    "cancel": ("Cancel", "cancelled, and not sent", "queued leads"),
    "resolve:sent": ("Resolve as sent", "taken as submitted: you saw them in Futwork's console", "uncertain leads"),
    "resolve:resend": ("Resolve by sending again", "sent again; a person whom Futwork had after all is called twice",
                       "uncertain leads"),
    "resolve:drop": ("Resolve by dropping", "given up, and cancelled", "uncertain leads"),
}  # fmt: skip
"""What can be done to many leads: its name, what becomes of them, and which leads it touches."""


@blueprint.post("/campaigns/<campaign_id>/pause")
def pause(campaign_id: str) -> AnyResponse:
    """Stop a campaign until somebody resumes it."""
    reason = request.form.get("reason", "").strip()[:500] or "paused by an operator"
    done = ops().ledger.campaigns.pause(_known(campaign_id), reason=reason, now=now(), by=_me())
    return _back(campaign_id, "is paused; what is out comes back all the same" if done else "was paused already")


@blueprint.post("/campaigns/<campaign_id>/resume")
def resume(campaign_id: str) -> AnyResponse:
    """Make a paused or held campaign active, without waiting for a probe."""
    done = ops().ledger.campaigns.resume(_known(campaign_id), now=now(), by=_me())
    if done:
        ops().services.wake(campaign_id)  # else it goes on with the next sweep, two seconds later
    return _back(
        campaign_id,
        "is active again; if the cause is still there, it is soon held anew" if done else "was active already",
    )


@blueprint.post("/campaigns/<campaign_id>/rate")
def rate(campaign_id: str) -> AnyResponse:
    """Set the campaign's own limit, or leave it to the settings."""
    text = request.form.get("rate", "").strip()
    try:
        wanted = Rate.parse(text) if text else None
    except ValueError as error:
        abort(422, f"The rate {error}.")
    ops().ledger.campaigns.change(_known(campaign_id), {"rate": wanted}, now=now(), by=_me())
    return _back(campaign_id, f"may send {wanted}" if wanted else "keeps to CAMPAIGN_RATE")


@blueprint.post("/leads/count")
def count_leads() -> Any:
    """How many leads a change would touch; nothing is changed yet."""
    action, which, moment = _wanted()
    if which is None:
        return show_leads(request.form, trouble=action, status=422)
    found = _apply(action, which, moment, dry_run=True)
    return render_template(
        "ops/confirm.html",
        action=action,
        about=ACTIONS[action],
        found=found,
        too_many=found > MOST_AT_ONCE,
        most=MOST_AT_ONCE,
        fields=fields_of(request.form),
        which=which,
        command=command_for(action, which, now=moment),
        counted_at=moment.timestamp(),
    )


@blueprint.post("/leads/change")
def change_leads() -> Any:
    """Do what was counted, to no lead that came to match since."""
    action, which, moment = _wanted()
    if which is None:
        return show_leads(request.form, trouble=action, status=422)
    counted_at = request.form.get("counted_at", type=float)
    if counted_at is None or not 0 <= moment.timestamp() - counted_at < 3600:
        return show_leads(request.form, trouble="Count the leads first; a count is good for an hour.", status=422)
    which = until(which, datetime.fromtimestamp(counted_at, moment.tzinfo))
    if _apply(action, which, moment, dry_run=True) > MOST_AT_ONCE:
        abort(
            422,
            f"These are more than {MOST_AT_ONCE:,} leads: use the command `{command_for(action, which, now=moment)}`.",
        )
    changed = _apply(action, which, moment, dry_run=False)
    name, becomes, _ = ACTIONS[action]
    said = f"{name}: {count(changed, 'lead was', 'leads were')} {re.split('[:;]', becomes)[0]}."
    if len(which.ids) == 1:
        return _go(url_for("ops.lead", id_=which.ids[0]), said)
    shown: dict[str, Any] = {
        name: value for name, value in fields_of(request.form) if name in ("campaign", "from", "to")
    }
    return _go(url_for("ops.leads", **shown), said)


@blueprint.post("/quarantine/replay")
def replay() -> AnyResponse:
    """Read one event in quarantine, or every one, again."""
    only = request.form.get("digest") or None
    kept = Events(ops().ledger, ops().settings).replay(now=now(), only=only, by=_me())
    read = kept.events - kept.quarantined
    return _go(url_for("ops.quarantine"), f"{read:,} of {count(kept.events, 'event')} read; {kept.quarantined:,} stay.")


@blueprint.post("/orphans/link")
def link() -> AnyResponse:
    """Link a call to the lead that it belongs to."""
    call_sid, text = request.form.get("call", ""), request.form.get("lead", "").strip()
    found = _lead_meant(text)
    if found is None:
        abort(422, "Name the lead by its id, or by a number that one lead alone has.")
    if not ops().ledger.calls.link(call_sid, found, now=now(), by=_me()):
        abort(409, "The call has a lead by now, or call or lead are not known.")
    return _go(url_for("ops.lead", id_=found), "The call is linked to this lead.")


def _me() -> Actor:
    return Actor(visitor().name, "ops")


def _known(campaign_id: str) -> str:
    if ops().ledger.campaigns.get(campaign_id) is None:
        abort(404, "The ledger knows no such campaign.")
    return campaign_id


def _wanted() -> tuple[str, LeadFilter | None, datetime]:
    """The action and the leads that the form means; in the place of the action what is wrong, without leads."""
    moment, action = now(), request.form.get("action", "")
    if action not in ACTIONS:
        return "Say what to do with the leads.", None, moment
    try:
        which = read_choice(request.form, region=ops().settings.default_region, now=moment)
    except WrongChoice as error:
        return str(error), None, moment
    if which.is_empty:
        return (
            "Choose leads first: a campaign, a state, a time. A change of every lead there is is not made here.",
            None,
            moment,
        )
    return action, which, moment


def _apply(action: str, which: LeadFilter, moment: datetime, *, dry_run: bool) -> int:
    interventions, max_age = ops().ledger.interventions, timedelta(seconds=ops().settings.lead_max_age_seconds)
    verb, _, verdict = action.partition(":")
    if verb == "retry":
        return interventions.retry(which, max_age=max_age, now=moment, dry_run=dry_run, by=_me())
    if verb == "cancel":
        return interventions.cancel(which, now=moment, dry_run=dry_run, by=_me())
    return interventions.resolve(which, verdict, max_age=max_age, now=moment, dry_run=dry_run, by=_me())


def _lead_meant(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        pass
    try:
        phone = to_e164(text, ops().settings.default_region)
    except InvalidPhone:
        return None
    found = ops().ledger.reports.page_of_leads(LeadFilter(phone=phone), limit=2)
    return uuid.UUID(found[0]["id"]) if len(found) == 1 else None


def _back(campaign_id: str, said: str) -> AnyResponse:
    """To where the button was: the overview if it was there, else the campaign."""
    target = (
        url_for("ops.overview")
        if request.form.get("from") == "overview"
        else url_for("ops.campaign", campaign_id=campaign_id)
    )
    return _go(target, f"Campaign {campaign_id} {said}.")


def _go(target: str, said: str) -> AnyResponse:
    return redirect(f"{target}{'&' if '?' in target else '?'}note={ops().gatekeeper.note(said)}", 303)
