"""The HTTP intake: backends that do not speak Celery hand their leads in here, and ask what became of one.

A lead is answered 202 when the batch that holds it is in the broker. Requests that arrive together share one publish.
"""

from __future__ import annotations

import codecs
import hmac
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import orjson
from flask import Blueprint, Response, abort, current_app, jsonify, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import RequestEntityTooLarge, Unauthorized

from pipeline.broker import MESSAGE_BYTES, BrokerUnavailable, GroupCommit, lead_batch
from pipeline.domain.campaign import InvalidCampaignId, check_campaign_id
from pipeline.domain.lead import InvalidLead, Lead, lead_id
from pipeline.futwork.fields import read_lead
from pipeline.ledger import ledger_is_at_fault
from pipeline.observability import tracing
from pipeline.observability.logs import logger
from pipeline.producer import LEADS_A_BATCH
from pipeline.settings import Settings
from pipeline.status.search import read_id
from pipeline.web import metrics
from pipeline.web.bodies import read_body, unpack
from pipeline.wiring import Services, services

log = logger(__name__)
blueprint = Blueprint("intake", __name__)

_JSON = ("application/json",)
_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonlines")
_MOST_ROWS = 50_000  # some three seconds and a hundred megabytes; an answer holds a result for each
_RETRY_SECONDS = "5"


@dataclass(frozen=True, slots=True)
class _Handed:
    """Valid leads of one request."""

    campaign_id: str
    leads: Sequence[Lead]
    ids: Sequence[uuid.UUID]
    trace: str | None


@dataclass(frozen=True, slots=True)
class _NotJson:
    """A line that is no JSON: refused in its place, and the others go on."""

    why: str


@blueprint.post("/v1/campaigns/<campaign_id>/leads")
def take_leads(campaign_id: str) -> tuple[Response, int]:
    """Take one lead, an array of leads, or one a line (NDJSON); answer 202 with each row's id or reason.

    422 if no row could be taken, 503 if the broker is away: then nothing of the request may be taken for accepted, and
    sending it again is harmless.
    """
    settings: Settings = current_app.config["PIPELINE"]
    _authorise(settings, campaign_id)
    try:
        check_campaign_id(campaign_id)
    except InvalidCampaignId as error:
        abort(422, str(error))
    results: list[dict[str, object]] = []
    valid: list[Lead] = []
    ids: list[uuid.UUID] = []
    for index, row in enumerate(_rows(settings)):
        try:
            if isinstance(row, _NotJson):
                raise InvalidLead(f"not JSON: {row.why}")
            lead = read_lead(row, region=settings.default_region)
        except InvalidLead as error:
            results.append({"index": index, "error": str(error)})
        else:
            valid.append(lead)
            ids.append(lead_id(campaign_id, lead.key))
            results.append({"index": index, "id": str(ids[-1])})
    metrics.INTAKE_ROWS.labels(result="refused").inc(len(results) - len(valid))
    report = {"campaign_id": campaign_id, "accepted": len(valid), "refused": len(results) - len(valid)}
    if not valid:
        return jsonify(report | {"results": results, "error": "no row could be taken"}), 422
    try:
        _gate(services(settings)).submit(_Handed(campaign_id, valid, ids, tracing.traceparent()))
    except BrokerUnavailable as error:
        log.warning("leads were turned away", campaign=campaign_id, leads=ids, error=str(error))
        return ask_again("the broker is away: count on nothing of this request, and send it again (that is harmless)")
    metrics.INTAKE_ROWS.labels(result="accepted").inc(len(valid))
    return jsonify(report | {"results": results}), 202


@blueprint.get("/v1/leads/<id_>")
def tell_lead(id_: str) -> tuple[Response, int]:
    """One lead's story: its state, attempts and calls; 404 until intake has written it."""
    settings: Settings = current_app.config["PIPELINE"]
    scope = scope_of_token(settings)
    wanted = read_id(id_)
    if wanted is None:
        abort(404, "a lead id is a UUID, as the intake returned it")
    try:
        story = services(settings).ledger.reports.story(wanted)
    except Exception as error:
        if not (ledger_is_at_fault(error) or isinstance(error, OSError)):
            raise
        log.warning("a lead could not be told of", error=type(error).__name__)
        return ask_again("the ledger is away; ask again")
    if story is None or (scope is not None and scope != story["campaign_id"]):
        abort(404, "no such lead (one that was just accepted is known in a moment)")
    for event in story["events"]:
        del event["payload"]  # the calls hold what it says; the raw body is for operators
    for one in story["interventions"]:
        del one["who"], one["details"]  # names of our own people, and other leads' filters
    return Response(orjson.dumps(story, option=orjson.OPT_UTC_Z), mimetype="application/json"), 200


def ask_again(why: str) -> tuple[Response, int]:
    """A 503 that says why, and after how many seconds to ask again."""
    answer = jsonify(error=why)
    answer.headers["Retry-After"] = _RETRY_SECONDS
    return answer, 503


def _authorise(settings: Settings, campaign_id: str) -> None:
    scope = scope_of_token(settings)
    if scope is not None and scope != campaign_id:
        abort(403, "this token is for another campaign")


def scope_of_token(settings: Settings) -> str | None:
    """The campaign that the request's bearer token is limited to, or None for all; aborts with 401 if it has none."""
    kind, _, presented = request.headers.get("Authorization", "").partition(" ")
    found: list[str | None] = []
    for token, scope in settings.intake_scopes().items():
        if hmac.compare_digest(token.encode(), presented.strip().encode("utf-8", "surrogateescape")):
            found.append(scope)
    if kind.lower() != "bearer" or not found:
        raise Unauthorized(
            "send a token of INTAKE_TOKENS as `Authorization: Bearer …`", www_authenticate=WWWAuthenticate("bearer")
        )
    return found[0]


def _rows(settings: Settings) -> Iterator[Any]:
    """The rows of the body, whichever of the three forms it has."""
    if request.mimetype not in (*_JSON, *_LINES):
        abort(415, f"send {_JSON[0]} (an object or an array) or {_LINES[0]} (one object a line)")
    try:
        body = unpack(read_body(settings.intake_max_bytes), settings.intake_max_bytes)
    except RequestEntityTooLarge:
        abort(413, f"a request may have {settings.intake_max_bytes:,} bytes (INTAKE_MAX_BYTES); send several")
    body = body.removeprefix(codecs.BOM_UTF8)
    if request.mimetype in _LINES:
        _check_rows(body.count(b"\n"))
        for line in body.splitlines():
            if line.strip():
                yield _line(line)
        return
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        abort(422, f"the body is not JSON: {error}")
    if isinstance(payload, list):
        _check_rows(len(payload))
        yield from payload
    else:
        yield payload


def _check_rows(count: int) -> None:
    if count > _MOST_ROWS:
        abort(413, f"a request may have {_MOST_ROWS:,} rows; send several")


def _line(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _NotJson(str(error))


@lru_cache(maxsize=1)
def _gate(mine: Services) -> GroupCommit[_Handed]:
    """The group commit of this process's requests."""

    def publish(handed: list[_Handed]) -> None:
        by_campaign: dict[str, list[_Handed]] = {}
        for one in handed:
            by_campaign.setdefault(one.campaign_id, []).append(one)
        for campaign_id, several in by_campaign.items():
            ids = [id_ for one in several for id_ in one.ids]
            traces = [one.trace for one in several for _ in one.ids]
            done = 0
            for rows in _batches(lead for one in several for lead in one.leads):
                batch_id = uuid.uuid4()
                runs = [(trace, len(list(run))) for trace, run in groupby(traces[done : done + len(rows)])]
                message = lead_batch(campaign_id, rows, batch_id=batch_id, traces=tracing.traces_of(runs))
                mine.broker.publish("pipeline.intake", message, about=f"({campaign_id}, {len(rows)} leads)")
                accepted, done = ids[done : done + len(rows)], done + len(rows)
                log.info("leads accepted", campaign=campaign_id, batch=batch_id, leads=accepted)

    return GroupCommit(publish)


def _batches(leads: Iterable[Lead]) -> Iterator[list[dict[str, object]]]:
    """The leads in batches that a broker takes, bounded in rows and in bytes."""
    rows: list[dict[str, object]] = []
    size = 0
    for lead in leads:
        row: dict[str, object] = {"phone": lead.phone, "data": lead.data, "key": lead.key}
        size += len(orjson.dumps(row))
        rows.append(row)
        if len(rows) >= LEADS_A_BATCH or size >= MESSAGE_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows
