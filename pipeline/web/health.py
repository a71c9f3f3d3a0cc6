"""Health for orchestrators, and metrics for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from pipeline.broker import BrokerUnavailable
from pipeline.ledger import SchemaMismatch, ledger_is_at_fault
from pipeline.observability.logs import logger
from pipeline.settings import Settings
from pipeline.web import metrics
from pipeline.wiring import services

log = logger(__name__)
blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """200 while the process serves requests at all; says nothing of what it depends on."""
    return jsonify(status="ok")


@blueprint.get("/readyz")
def readyz() -> tuple[Response, int]:
    """200 if broker and ledger answer, else 503; names what does not.

    The webhook works without either as long as the spool has room, so do not take this process out of service for it.
    """
    mine = services(_settings())
    found = {"broker": "ok", "ledger": "ok"}
    try:
        mine.broker.ping()
    except BrokerUnavailable:
        found["broker"] = "away"
    try:
        mine.ledger.ping()
    except SchemaMismatch as error:
        found["ledger"] = str(error)
    except Exception as error:
        if not (ledger_is_at_fault(error) or isinstance(error, OSError)):
            raise
        log.warning("the ledger does not answer", error=type(error).__name__)
        found["ledger"] = "away"
    ready = set(found.values()) == {"ok"}
    return jsonify(status="ok" if ready else "not ready", **found), 200 if ready else 503


@blueprint.get("/metrics")
def scrape() -> Response:
    """Everything this process can tell, in Prometheus' text form; holds no personal data."""
    body, content_type = metrics.scrape(services(_settings()))
    return Response(body, content_type=content_type)


def _settings() -> Settings:
    settings: Settings = current_app.config["PIPELINE"]
    return settings
