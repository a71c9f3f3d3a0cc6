"""The pages that show: overview, campaign, leads, lead, quarantine and orphans, audit log."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import orjson
from flask import Response, abort, redirect, render_template, request, url_for
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response as AnyResponse

from pipeline.domain.campaign import ADVICE
from pipeline.domain.lead import LeadState
from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.ledger import LeadFilter
from pipeline.ledger.filters import RETRYABLE
from pipeline.settings import Rate
from pipeline.web.ops import charts
from pipeline.web.ops.filter_form import WrongChoice, fields_of, place_of, read_choice, read_place
from pipeline.web.ops.health import health
from pipeline.web.ops.layout import blueprint, now, ops, see, visitor
from pipeline.web.ops.needs import needs

_PAGE = 50
_ENTRIES = 100
_TROUBLE = ("uncertain", "failed", "busy", "not_sent", "throttled", "rejected", "refused_key", "refused_campaign")


@blueprint.get("/")
def overview() -> str:
    """How it stands, and what needs a person."""
    moment = now()
    found = ops().ledger.reports.overview(now=moment)
    parts = health(ops().services)
    limit = _account_limit(found)
    recent = sum(n for one in found["campaigns"] for name, n in one["posts_last_minutes"].items() if name == "accepted")
    return render_template(
        "ops/overview.html",
        found=see(found | {"recount": found["recount"]}),
        health=parts,
        needs=see_needs(needs(found, parts)),
        per_minute=recent / 10,
        limit=limit,
        chart=_posts_chart(found["minutes"], limit),
        refresh=10,
    )


@blueprint.get("/campaigns/<campaign_id>")
def campaign(campaign_id: str) -> str:
    """One campaign: how far it is, how fast it goes, what became of its calls."""
    moment = now()
    found = ops().ledger.reports.campaign(campaign_id, now=moment)
    if found is None:
        abort(404, "The ledger knows no such campaign.")
    settings = ops().settings
    rate = Rate.parse(found["rate"]) if found["rate"] else settings.campaign_rate
    limit = min(rate.per_second, settings.account_rate.per_second) * 60
    had = found["leads"]["submitted"] + found["leads"]["called"]
    steps = [
        ("accepted", "taken into the ledger", found["accepted"]),
        ("submitted", "Futwork has them", had),
        ("called", "a call came back", found["leads"]["called"]),
        ("connected", "calls in which somebody spoke", found["calls"].get("connected", 0)),
    ]
    return render_template(
        "ops/campaign.html",
        found=see(found),
        hold=ADVICE.get(found["hold_kind"]),
        steps=steps,
        rate=rate,
        limit=limit,
        settings=settings,
        posts=_posts_chart(found["minutes"], limit),
        calls=_calls_chart(found["minutes"]),
        log=see(ops().ledger.audit.entries(campaign=campaign_id, limit=5)),
        refresh=10,
    )


@blueprint.get("/leads")
def leads() -> Any:
    """The newest leads that match a filter, and what can be done to all of them."""
    return show_leads(request.args)


@blueprint.post("/leads")
def find_leads() -> AnyResponse | str:
    """Find leads by number, id or key. It is a form's body, so that no number gets into an address or a log."""
    text = request.form.get("text", "").strip()
    if not text:
        return redirect(url_for("ops.leads"), 303)
    found: dict[str, dict[str, Any]] = {}
    for which in _meant(text):
        for one in ops().ledger.reports.page_of_leads(which, limit=_PAGE):
            found.setdefault(one["id"], one)
    if len(found) == 1:
        return redirect(url_for("ops.lead", id_=next(iter(found))), 303)
    return render_template("ops/found.html", leads=see(list(found.values())), text=text)


@blueprint.get("/leads/<uuid:id_>")
def lead(id_: uuid.UUID) -> str:
    """One lead's journey."""
    story = ops().ledger.reports.story(id_)
    if story is None:
        abort(404, "The ledger knows no such lead. One that was just accepted is known in a moment.")
    return render_template(
        "ops/lead.html",
        lead=see(story),
        journey=see(_journey(story)),
        log=see(ops().ledger.audit.entries(lead=id_, limit=20)),
        state=LeadState(story["state"]),
        may_retry=story["state"] in RETRYABLE,
    )


@blueprint.get("/leads/<uuid:id_>/raw")
def raw(id_: uuid.UUID) -> Response:
    """Everything that the ledger has of a lead, as JSON."""
    story = ops().ledger.reports.story(id_)
    if story is None:
        abort(404, "The ledger knows no such lead.")
    return Response(_json(see(story)), mimetype="application/json")


@blueprint.get("/quarantine")
def quarantine() -> str:
    """What could not be read, and the calls without a lead."""
    ledger = ops().ledger
    waiting = [
        {
            "digest": one.digest,
            "kind": one.kind,
            "reason": one.reason,
            "at": one.received_at,
            "size": len(one.body),
        }
        for one in ledger.quarantine.waiting(limit=_PAGE)
    ]
    return render_template(
        "ops/quarantine.html", waiting=see(waiting), orphans=see(ledger.reports.orphans(limit=_PAGE)), most=_PAGE
    )


@blueprint.get("/quarantine/<digest>")
def quarantined(digest: str) -> str:
    """One thing in quarantine, whole."""
    one = ops().ledger.quarantine.get(digest)
    if one is None:
        abort(404, "Nothing with this digest is in quarantine; it may have been replayed.")
    body = one.body.decode("utf-8", "replace")
    with contextlib.suppress(orjson.JSONDecodeError):
        body = _json(see(orjson.loads(one.body))).decode()
    return render_template("ops/quarantined.html", one=one, reason=see(one.reason), body=see(body))


@blueprint.get("/orphans")
def orphan() -> str:
    """One call without a lead, and the leads that it may belong to."""
    call_sid = request.args.get("call", "")
    call = ops().ledger.reports.orphan(call_sid)
    if call is None:
        abort(404, "There is no such call without a lead; it may have found one.")
    candidates: list[dict[str, Any]] = []
    if call["phone"]:
        candidates = ops().ledger.reports.page_of_leads(LeadFilter(phone=call["phone"]), limit=20)
    return render_template("ops/orphan.html", call=see(call), call_sid=call_sid, candidates=see(candidates))


@blueprint.get("/audit")
def audit() -> str:
    """Who did what."""
    before = request.args.get("before", type=int)
    entries = ops().ledger.audit.entries(limit=_ENTRIES + 1, before=before)
    more = entries[_ENTRIES - 1]["number"] if len(entries) > _ENTRIES else None
    return render_template("ops/audit.html", entries=see(entries[:_ENTRIES]), more=more)


def show_leads(form: MultiDict[str, str], *, trouble: str = "", status: int = 200) -> Any:
    """The page of the leads that a form's filter means."""
    ledger, moment = ops().ledger, now()
    try:
        which = read_choice(form, region=ops().settings.default_region, now=moment)
        found = ledger.reports.page_of_leads(which, limit=_PAGE + 1, after=read_place(form.get("after", "")))
    except WrongChoice as error:
        which, found, trouble, status = LeadFilter(), [], str(error), 422
    fields = fields_of(form)
    page = render_template(
        "ops/leads.html",
        leads=see(found[:_PAGE]),
        more=place_of(found[_PAGE - 1]) if len(found) > _PAGE else None,
        fields=fields,
        chosen=form,
        which=which,
        shown_filter=see(dict(fields)),
        campaigns=[one["id"] for one in ledger.reports.campaigns()],
        states=list(LeadState),
        trouble=trouble,
    )
    return page if status == 200 else (page, status)


def see_needs(found: list[Any]) -> Any:
    """The needs as this visitor may see them."""
    if visitor().may_change:
        return found
    from dataclasses import replace

    return [replace(one, quote=see(one.quote), text=see(one.text)) for one in found]


def _meant(text: str) -> list[LeadFilter]:
    filters = [LeadFilter(key=text)]
    with contextlib.suppress(ValueError):
        filters.append(LeadFilter(ids=(uuid.UUID(text),)))
    with contextlib.suppress(InvalidPhone):
        filters.append(LeadFilter(phone=to_e164(text, ops().settings.default_region)))
    return filters


def _journey(story: dict[str, Any]) -> list[dict[str, Any]]:
    """What happened, in order: acceptance, attempts, events."""
    steps: list[dict[str, Any]] = [{"at": story["accepted_at"], "kind": "accepted", "title": "Accepted", "text": ""}]
    for one in story["attempts_made"]:
        code = f", HTTP {one['http_status']}" if one["http_status"] else ""
        steps.append(
            {
                "at": one["started_at"],
                "kind": "good" if one["outcome"] == "accepted" else "trouble",
                "title": f"Sent to Futwork: {one['outcome'].replace('_', ' ')}",
                "text": f"{one['duration_ms']} ms{code}",
                "quote": one["excerpt"],
            }
        )
    steps += [
        {
            "at": one["received_at"],
            "kind": "event",
            "title": f"Futwork reports: {str(one['status'] or 'without a status').replace('-', ' ')}",
            "text": f"call {one['call_sid']}" if len(story["calls"]) > 1 else "",
        }
        for one in story["events"]
    ]
    return sorted(steps, key=lambda step: step["at"])


def _account_limit(found: dict[str, Any]) -> float:
    accounts = {one["account"] for one in found["campaigns"]} or {"default"}
    return ops().settings.account_rate.per_second * 60 * len(accounts)


def _posts_chart(minutes: list[dict[str, Any]], limit: float) -> Any:
    series = {
        "accepted": [one["posts"].get("accepted", 0) for one in minutes],
        "not accepted": [sum(one["posts"].get(name, 0) for name in _TROUBLE) for one in minutes],
    }
    return charts.by_minute("Submissions a minute in the last hour", minutes, series, limit=limit)


def _calls_chart(minutes: list[dict[str, Any]]) -> Any:
    series = {
        "connected": [one["calls"].get("connected", 0) for one in minutes],
        "other ends": [sum(n for name, n in one["calls"].items() if name != "connected") for one in minutes],
    }
    return charts.by_minute("Calls that ended, a minute, in the last hour", minutes, series)


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str)
