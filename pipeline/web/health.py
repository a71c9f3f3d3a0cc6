"""Health for orchestrators, and metrics for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from pipeline.ledger import SchemaMismatch
from pipeline.observability.logs import logger
from pipeline.settings import Settings
from pipeline.web import metrics
from pipeline.wiring import services

log = logger(__name__)
blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> Response:
    """200 while the process serves requests at all, whatever the parts that it depends on do."""
    return jsonify(status="ok")


@blueprint.get("/readyz")
def readyz() -> tuple[Response, int]:
    """200 if broker and ledger answer, else 503 with the one that does not.

    The webhook works without either while the spool has room, so do not take this process out of service for it.
    """
    found = {}
    for name, answer in metrics.watch(services(_settings())).ready().items():
        found[name] = "ok" if answer.value else "away"
        if isinstance(answer.error, SchemaMismatch):
            found[name] = str(answer.error)
        elif answer.error is not None:
            log.warning("a part does not answer", part=name, error=type(answer.error).__name__)
    is_ready = set(found.values()) == {"ok"}
    return jsonify(status="ok" if is_ready else "not ready", **found), 200 if is_ready else 503


@blueprint.get("/metrics")
def scrape() -> Response:
    """All metrics in Prometheus' text form; they contain no personal data."""
    body, content_type = metrics.scrape(services(_settings()))
    return Response(body, content_type=content_type)


def _settings() -> Settings:
    settings: Settings = current_app.config["PIPELINE"]
    return settings
