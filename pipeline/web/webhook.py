"""Futwork's post-call webhook: check the token, bound the size, take the bytes, hand them over, answer 200.

No database and no model: whatever can be said of the event is said later, by a worker that may fail and try again. All
that is looked at is whether the body is a JSON object; one that is not is handed over as a fault, kept in quarantine
and answered 400. Nothing proves that Futwork repeats a webhook, so an event is never turned away for a state of ours
while it can be kept anywhere.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache

import orjson
from flask import Blueprint, Response, current_app, jsonify, request
from prometheus_client import Counter
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, UnsupportedMediaType

from pipeline.broker import WebEvent
from pipeline.broker.spool import SpoolFull
from pipeline.observability.logs import logger
from pipeline.settings import Settings
from pipeline.web import metrics
from pipeline.web.bodies import read_body, unpack
from pipeline.wiring import services

log = logger(__name__)
blueprint = Blueprint("webhook", __name__)

_TOKEN_HEADERS = ("HTTP_X_API_KEY", "HTTP_X_WEBHOOK_SECRET")  # as WSGI names them


@blueprint.post("/webhooks/futwork")
@blueprint.post("/webhooks/futwork/<token>")
def receive(token: str = "") -> Response:
    """Answer 200 once the event is durable; 401, 413, 400 or 415 (kept all the same) or 503 if not."""
    config, environ = current_app.config, request.environ
    settings: Settings = config["PIPELINE"]
    if not _knows_token(config["WEBHOOK_TOKENS"], (token, *(environ.get(name, "") for name in _TOKEN_HEADERS))):
        return _answer(401, error="the webhook token is missing or wrong")
    fault, status = None, 400
    try:
        body = packed = read_body(settings.webhook_max_bytes)
        try:
            body = unpack(packed, settings.webhook_max_bytes)
        except (BadRequest, UnsupportedMediaType) as error:
            fault, status = error.description, error.code
    except RequestEntityTooLarge:
        log.error("an event was too large to take", limit_bytes=settings.webhook_max_bytes)  # noqa: TRY400 - no fault of ours
        return _answer(413, error=f"an event may have {settings.webhook_max_bytes:,} bytes (WEBHOOK_MAX_BYTES)")
    fault = fault or _fault_of(body)
    try:
        waits = _hand_over(settings, WebEvent(body, datetime.now(UTC), fault))
    except SpoolFull as error:
        log.critical("an event was lost: neither broker nor spool took it", error=str(error))
        return _answer(503, error="the event could not be kept; send it again")
    for seconds in waits:
        metrics.HANDOFF_SECONDS.observe(seconds)
    if fault:
        return _answer(status, error=fault)
    return _accept()


def _hand_over(settings: Settings, event: WebEvent) -> Sequence[float]:
    """Return once the event is durable; raise `SpoolFull` if it is kept nowhere.

    Where this request published for others too, what is returned is the time that each of them took, in seconds.
    """
    mine = services(settings)
    started = time.perf_counter()
    try:
        return mine.gate.submit(event)
    except SpoolFull:
        raise
    except Exception:  # what nobody foresaw, in the broker's library or in ours, must not cost the event
        log.exception("the hand-over failed; the event goes to the spool")
        mine.spool.write([event])
    return [time.perf_counter() - started]


def _knows_token(tokens: Sequence[bytes], presented: tuple[str, ...]) -> bool:
    """Whether one of the presented tokens is ours, in a time that does not tell how much of it was right."""
    known = False
    for text in presented:
        theirs = text.encode("utf-8", "surrogateescape")
        for ours in tokens:
            known |= hmac.compare_digest(ours, theirs)
    return known


def _fault_of(body: bytes) -> str | None:
    """What keeps a body from being an event, in one line, or None."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            # NaN, halves of surrogate pairs and line ends within a text: some senders write them and we can read them.
            payload = json.loads(body, strict=False)
        except (ValueError, RecursionError):
            return "the body is not JSON"
    return None if isinstance(payload, dict) else "the body is not a JSON object"


def _answer(status: int, **body: str) -> Response:
    _count(status).inc()
    answer = jsonify(body)
    answer.status_code = status
    return answer


def _accept() -> Response:
    """`_answer(200, event="accepted")`, the one that is given thousands of times a second."""
    _count(200).inc()
    return Response(b'{"event":"accepted"}\n', content_type="application/json")


@cache
def _count(status: int) -> Counter:
    return metrics.WEBHOOK_ANSWERS.labels(status=status)
