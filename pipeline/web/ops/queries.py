"""The pages that show: overview, campaign, leads, lead, quarantine and orphans, do-not-call list, audit log."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import asdict, replace
from typing import Any

import orjson
from flask import Response, abort, g, redirect, render_template, request, url_for
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response as AnyResponse

from pipeline.domain.campaign import ADVICE
from pipeline.domain.lead import LeadState
from pipeline.ledger import LeadFilter
from pipeline.settings import Rate
from pipeline.status import search
from pipeline.status.actions import ACTIONS, LEAD_ACTIONS
from pipeline.status.attention import Attention, attention, headline
from pipeline.status.journey import journey
from pipeline.status.policies import POLICIES
from pipeline.status.snapshot import Snapshot
from pipeline.status.text import count, span
from pipeline.web.ops import charts
from pipeline.web.ops.filter_form import WrongChoice, fields_of, place_of, read_choice, read_place
from pipeline.web.ops.layout import blueprint, now, ops, see, visitor

_PAGE = 50
_ENTRIES = 100
_TROUBLE = ("uncertain", "failed", "busy", "not_sent", "throttled", "rejected", "refused_key", "refused_campaign")


_PARTS = {
    "broker": "Broker", "ledger": "Ledger", "limiter": "Rate limiter", "workers": "Workers", "beat": "Beat",
    "web": "Web", "spool": "Spool",
}  # fmt: skip
_ANCHORS = {"quarantine": "quarantine", "orphans": "orphans"}


@blueprint.get("/")
def overview() -> str:
    """The state of the pipeline, and what needs attention."""
    seen = ops().watch.look()
    found = seen.ledger.get()
    g.moment = seen.at
    items = attention(seen, ops().settings)
    level, said = headline(items)
    limit = _account_limit(found)
    recent = sum(one["posts_last_minutes"].get("accepted", 0) for one in found["campaigns"])
    return render_template(
        "ops/overview.html",
        found=see(found),
        level=level,
        headline=said,
        parts=_parts(seen, items),
        attention=[(see_attention(one), _link(one)) for one in items],
        per_minute=recent / 10,
        limit=limit,
        chart=_posts_chart(found["minutes"], limit),
        refresh=10,
    )


def _parts(seen: Snapshot, items: list[Attention]) -> list[dict[str, str]]:
    """Each part of the pipeline with its `name`, its `level`, empty if it is well, and a few words."""
    wrong = {one.part: one for one in reversed(items)}
    well = {"spool": "empty", "ledger": f"answers in {span(seen.ledger.took_seconds)}"}
    if seen.broker.value is not None:
        waiting = sum(seen.broker.value.values())
        well["broker"] = f"{count(waiting, 'message')} waiting" if waiting else "answers, nothing waits"
    if (shared := seen.shared.value) is not None:
        well["limiter"] = "Redis reachable"
        well["workers"] = f"{count(len(shared.of_kind('worker')), 'worker')}, every queue is served"
        well["beat"] = f"last sweep {span(shared.last_runs.get('sweep'))} ago"
        well["web"] = count(len(shared.of_kind("web")), "host")
    parts: list[dict[str, str]] = []
    for part, name in _PARTS.items():
        if (one := wrong.get(part)) is not None:  # type: ignore[call-overload]
            parts.append({"name": name, "level": one.level, "text": one.title})
        else:
            parts.append({"name": name, "level": "", "text": well.get(part, "unknown")})
    return parts


def _link(one: Attention) -> str:
    """The page where the thing is, or nothing."""
    if one.state is not None:
        return url_for("ops.leads", campaign=one.campaign, state=one.state)
    if one.code in _ANCHORS:
        return url_for("ops.quarantine", _anchor=_ANCHORS[one.code])
    return url_for("ops.campaign", campaign_id=one.campaign) if one.campaign else ""


@blueprint.get("/campaigns/<campaign_id>")
def campaign(campaign_id: str) -> str:
    """One campaign: its progress, its rate, and the outcomes of its calls."""
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
        policies=POLICIES,
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
    """Find leads by phone number, id, key or call. It is a form's body, so that no number gets into a URL or a log."""
    text = request.form.get("text", "").strip()
    if not text:
        return redirect(url_for("ops.leads"), 303)
    found = search.find_leads(ops().ledger, text, region=ops().settings.default_region, limit=_PAGE)
    if len(found) == 1:
        return redirect(url_for("ops.lead", id_=found[0]["id"]), 303)
    return render_template("ops/found.html", leads=see(found), text=text)


@blueprint.get("/leads/<uuid:id_>")
def lead(id_: uuid.UUID) -> str:
    """One lead's journey."""
    story = ops().ledger.reports.story(id_)
    if story is None:
        abort(404, "The ledger knows no such lead. One that was just accepted is known in a moment.")
    return render_template(
        "ops/lead.html",
        lead=see(story),
        journey=see([asdict(step) for step in journey(story)]),
        actions=[name for name in LEAD_ACTIONS if story["state"] in ACTIONS[name].states],
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
    """Messages that could not be read, and calls without a lead."""
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
    """One message in quarantine, with its body."""
    one = ops().ledger.quarantine.get(digest)
    if one is None:
        abort(404, "Nothing in quarantine has this digest; it may have been replayed.")
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
        abort(404, "There is no such call without a lead; it may have a lead by now.")
    candidates: list[dict[str, Any]] = []
    if call["phone"]:
        candidates = ops().ledger.reports.page_of_leads(LeadFilter(phone=call["phone"]), limit=20)
    return render_template("ops/orphan.html", call=see(call), call_sid=call_sid, candidates=see(candidates))


@blueprint.get("/do-not-call")
def do_not_call() -> str:
    """The newest entries of the do-not-call list."""
    entries = ops().ledger.suppressions.listed(limit=_PAGE + 1)
    page, has_more = entries[:_PAGE], len(entries) > _PAGE
    return render_template("ops/do_not_call.html", entries=see(page), has_more=has_more, most=_PAGE)


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
        actions=LEAD_ACTIONS,
        trouble=trouble,
    )
    return page if status == 200 else (page, status)


def see_attention(one: Attention) -> Attention:
    """What needs attention, as this visitor may see it."""
    if visitor().may_change:
        return one
    return replace(one, quote=str(see(one.quote)), text=str(see(one.text)))


def _account_limit(found: dict[str, Any]) -> float:
    accounts = {one["account"] for one in found["campaigns"]} or {"default"}
    return ops().settings.account_rate.per_second * 60 * len(accounts)


def _posts_chart(minutes: list[dict[str, Any]], limit: float) -> Any:
    series = {
        "accepted": [one["posts"].get("accepted", 0) for one in minutes],
        "not accepted": [sum(one["posts"].get(name, 0) for name in _TROUBLE) for one in minutes],
    }
    return charts.by_minute("Submissions per minute in the last hour", minutes, series, limit=limit)


def _calls_chart(minutes: list[dict[str, Any]]) -> Any:
    series = {
        "connected": [one["calls"].get("connected", 0) for one in minutes],
        "not connected": [sum(n for name, n in one["calls"].items() if name != "connected") for one in minutes],
    }
    return charts.by_minute("Ended calls per minute in the last hour", minutes, series)


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str)
