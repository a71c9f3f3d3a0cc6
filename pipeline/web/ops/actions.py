"""What changes something: each through the ledger's own methods, in one transaction with its line in the audit log.

Every action is one of `pipeline.status.actions`, which has its wording; `ROUTES` says which form does which.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from flask import abort, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as AnyResponse

from pipeline.domain.campaign import InvalidCampaignId, check_campaign_id
from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.ledger import Actor, LeadFilter
from pipeline.replay import replay_all
from pipeline.status.actions import ACTIONS, LEAD_ACTIONS, change_leads, changed_text
from pipeline.status.policies import DEFAULT, POLICIES, InvalidPolicy, read_policies
from pipeline.status.search import find_lead
from pipeline.status.text import count
from pipeline.web.ops.filter_form import WrongChoice, command_for, fields_of, read_choice, until
from pipeline.web.ops.layout import blueprint, now, ops, visitor
from pipeline.web.ops.queries import show_leads

MOST_AT_ONCE = 50_000
"""Leads that a page changes at once: more would take longer than a browser waits, and is a command's work."""

F = TypeVar("F", bound=Callable[..., Any])

ROUTES = dict.fromkeys(LEAD_ACTIONS, "change_leads")
"""The endpoint of the form that does each action."""


def _does(name: str, path: str) -> Callable[[F], F]:
    """Register the form of an action."""

    def register(view: F) -> F:
        ROUTES[name] = view.__name__
        return blueprint.post(path)(view)

    return register


@_does("campaign pause", "/campaigns/<campaign_id>/pause")
def pause(campaign_id: str) -> AnyResponse:
    """Stop a campaign until somebody resumes it."""
    reason = request.form.get("reason", "").strip()[:500] or "paused by an operator"
    done = ops().ledger.campaigns.pause(_known(campaign_id), reason=reason, now=now(), by=_me())
    return _back(campaign_id, f"is paused. {ACTIONS['campaign pause'].note}" if done else "was paused already.")


@_does("campaign resume", "/campaigns/<campaign_id>/resume")
def resume(campaign_id: str) -> AnyResponse:
    """Make a paused or held campaign active, without waiting for a probe."""
    done = ops().ledger.campaigns.resume(_known(campaign_id), now=now(), by=_me())
    if done:
        ops().services.wake(campaign_id)  # otherwise it goes on with the next sweep, two seconds later
    return _back(campaign_id, f"is active. {ACTIONS['campaign resume'].note}" if done else "was active already.")


@_does("campaign set", "/campaigns/<campaign_id>/policies")
def set_policies(campaign_id: str) -> AnyResponse:
    """Set the campaign's policies that the form has; an empty field sets one back to the settings."""
    form = request.form
    given = {name: form[name].strip() or DEFAULT for name in POLICIES if name in form}
    try:
        changes = read_policies(given, ops().settings)
    except InvalidPolicy as error:
        abort(422, f"{POLICIES[error.name].label}: {error}.")
    before = next((one for one in ops().ledger.reports.campaigns() if one["id"] == campaign_id), None)
    if before is None:
        abort(404, "The ledger knows no such campaign.")
    changes = {name: value for name, value in changes.items() if before[name] != value}
    ops().ledger.campaigns.change(campaign_id, changes, now=now(), by=_me())
    said = ", ".join(f"{POLICIES[name].label.lower()} {given[name]}" for name in changes)
    return _back(campaign_id, f"has new policies: {said}." if said else "is as it was.")


@blueprint.post("/leads/count")
def count_leads() -> Any:
    """How many leads a change would touch; nothing is changed yet."""
    action, which, moment = _wanted()
    if which is None:
        return show_leads(request.form, trouble=action, status=422)
    found = _change(action, which, moment, dry_run=True)
    return render_template(
        "ops/confirm.html",
        action=action,
        about=ACTIONS[action],
        found=found,
        will=changed_text(action, found, will=True),
        too_many=found > MOST_AT_ONCE,
        most=MOST_AT_ONCE,
        fields=fields_of(request.form),
        which=which,
        command=command_for(action, which, now=moment),
        counted_at=moment.timestamp(),
    )


@blueprint.post("/leads/change", endpoint="change_leads")
def change_counted() -> Any:
    """Do what was counted; leads that match later are not changed."""
    action, which, moment = _wanted()
    if which is None:
        return show_leads(request.form, trouble=action, status=422)
    counted_at = request.form.get("counted_at", type=float)
    if counted_at is None or not 0 <= moment.timestamp() - counted_at < 3600:
        return show_leads(request.form, trouble="Count the leads first; a count is valid for an hour.", status=422)
    which = until(which, datetime.fromtimestamp(counted_at, moment.tzinfo))
    if _change(action, which, moment, dry_run=True) > MOST_AT_ONCE:
        abort(
            422,
            f"These are more than {MOST_AT_ONCE:,} leads: use the command `{command_for(action, which, now=moment)}`.",
        )
    changed = _change(action, which, moment, dry_run=False)
    said = f"{ACTIONS[action].label}: {changed_text(action, changed)}."
    if len(which.ids) == 1:
        return _go(url_for("ops.lead", id_=which.ids[0]), said)
    shown: dict[str, Any] = {
        name: value for name, value in fields_of(request.form) if name in ("campaign", "from", "to")
    }
    return _go(url_for("ops.leads", **shown), said)


@_does("events replay", "/quarantine/replay")
def replay() -> AnyResponse:
    """Read one thing in quarantine, or everything, again."""
    only = request.form.get("digest") or None
    done = replay_all(ops().ledger, ops().settings, only=only, by=_me())
    return _go(url_for("ops.quarantine"), " ".join(f"{line.rstrip('.')}." for line in done.texts()))


@_does("events link", "/orphans/link")
def link() -> AnyResponse:
    """Link a call to the lead that it belongs to."""
    found = find_lead(ops().ledger, request.form.get("lead", ""), region=ops().settings.default_region)
    if found is None:
        abort(422, "Name the lead by its id, or by a number that one lead alone has.")
    if not ops().ledger.calls.link(request.form.get("call", ""), found, now=now(), by=_me()):
        abort(409, "The call has a lead by now, or there is no such call or lead.")
    return _go(url_for("ops.lead", id_=found), "The call is linked to this lead.")


@_does("suppress add", "/do-not-call/add")
def suppress() -> AnyResponse:
    """Put one number on the do-not-call list."""
    phone, campaign = _suppressed_number()
    reason = request.form.get("reason", "").strip()[:500] or "do not call"
    ledger, moment = ops().ledger, now()
    details = {"campaign": campaign, "reason": reason, "from": ["status pages"]}
    noted = ledger.audit.begin(_me(), "suppress add", details=details, now=moment)
    done = ledger.suppressions.add([phone], campaign=campaign, reason=reason, source="status pages", now=moment)
    ledger.audit.end(noted, changed=done.entries)
    said = (
        f"{'Added' if done.entries else 'It was on the list already'}; {count(done.leads, 'queued lead')} suppressed."
    )
    return _go(url_for("ops.do_not_call"), said)


@_does("suppress remove", "/do-not-call/remove")
def unsuppress() -> AnyResponse:
    """Take one number off the do-not-call list."""
    phone, campaign = _suppressed_number()
    ledger = ops().ledger
    details = {"campaign": campaign, "from": ["status pages"]}
    noted = ledger.audit.begin(_me(), "suppress remove", details=details, now=now())
    removed = ledger.suppressions.remove([phone], campaign=campaign)
    ledger.audit.end(noted, changed=removed)
    said = f"{count(removed, 'entry', 'entries')} removed. {ACTIONS['suppress remove'].note}"
    return _go(url_for("ops.do_not_call"), said)


def _suppressed_number() -> tuple[str, str | None]:
    """The number of the form in E.164, and its campaign or None for all."""
    campaign = request.form.get("campaign", "").strip() or None
    try:
        if campaign is not None:
            check_campaign_id(campaign)
        return to_e164(request.form.get("phone", ""), ops().settings.default_region), campaign
    except (InvalidPhone, InvalidCampaignId) as error:
        abort(422, f"{error}.")


def _me() -> Actor:
    return Actor(visitor().name, "ops")


def _known(campaign_id: str) -> str:
    if ops().ledger.campaigns.get(campaign_id) is None:
        abort(404, "The ledger knows no such campaign.")
    return campaign_id


def _wanted() -> tuple[str, LeadFilter | None, datetime]:
    """The action and the leads that the form means; in the place of the action what is wrong, without leads."""
    moment, action = now(), request.form.get("action", "")
    if action not in LEAD_ACTIONS:
        return "Say what to do with the leads.", None, moment
    try:
        which = read_choice(request.form, region=ops().settings.default_region, now=moment)
    except WrongChoice as error:
        return str(error), None, moment
    if which.is_empty:
        text = "Choose leads first: a campaign, a state, a time. This page does not change every lead at once."
        return text, None, moment
    return action, which, moment


def _change(action: str, which: LeadFilter, moment: datetime, *, dry_run: bool) -> int:
    return change_leads(ops().ledger, ops().settings, action, which, now=moment, by=_me(), dry_run=dry_run)


def _back(campaign_id: str, said: str) -> AnyResponse:
    """To where the button was: the overview if it was there, else the campaign."""
    target = (
        url_for("ops.overview")
        if request.form.get("from") == "overview"
        else url_for("ops.campaign", campaign_id=campaign_id)
    )
    return _go(target, f"Campaign {campaign_id} {said}")


def _go(target: str, said: str) -> AnyResponse:
    return redirect(f"{target}{'&' if '?' in target else '?'}note={ops().gatekeeper.note(said)}", 303)
