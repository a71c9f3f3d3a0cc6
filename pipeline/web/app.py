"""The app: its routes, the headers that go with each answer, and errors as JSON.

The webhook never touches the database; only `GET /v1/leads/{id}`, `GET /v1/calls`, `/readyz`, `/metrics` and the
pages read the ledger. Everything that a request needs is built when the process first needs it, so an app that is
preloaded may fork.
"""

from __future__ import annotations

from pipeline.extras import require

require("server")

import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app, jsonify, redirect, request
from werkzeug.exceptions import HTTPException

from pipeline import __version__
from pipeline.coordination.heartbeats import HeartbeatSender
from pipeline.observability.logs import logger
from pipeline.settings import Settings, SettingsError
from pipeline.web import feed, health, intake, openapi, webhook

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logger(__name__)

_KEPT_HEADERS = ("Allow", "Location", "Retry-After", "WWW-Authenticate")


def create_app(settings: Settings) -> Flask:
    """The WSGI app; `wsgi` builds it from the environment."""
    app = Flask("pipeline.web", static_folder=None)
    app.config["PIPELINE"] = settings
    app.config["WEBHOOK_TOKENS"] = tuple(token.encode() for token in settings.webhook_tokens())
    app.url_map.strict_slashes = False
    app.register_blueprint(webhook.blueprint)
    app.register_blueprint(intake.blueprint)
    app.register_blueprint(feed.blueprint)
    app.register_blueprint(health.blueprint)
    app.register_blueprint(openapi.blueprint)
    app.wsgi_app = _guarded(app.wsgi_app)  # type: ignore[assignment, method-assign]
    if settings.operators():
        from pipeline.web import ops

        ops.attach(app, settings)
    app.add_url_rule("/", "index", _index)
    app.register_error_handler(HTTPException, _explain)
    app.register_error_handler(Exception, _fail)
    if not app.config["WEBHOOK_TOKENS"]:
        log.warning("the webhook answers 401 to everything: WEBHOOK_TOKEN is not set")
    if not settings.intake_scopes():
        log.warning("the HTTP intake answers 401 to everything: INTAKE_TOKENS is not set")
    return app


def keep_heartbeat(app: Flask) -> None:
    """Send heartbeats for this host; all its processes share one. Does nothing without a Redis."""
    settings: Settings = app.config["PIPELINE"]
    try:
        url = settings.limiter_url
    except SettingsError:
        return  # a web process beside RabbitMQ needs no Redis
    HeartbeatSender(url, "web", f"web@{socket.gethostname()}").start_thread()


_GUARDS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
"""What a browser that is led here may not do with an answer; a page that needs more says so itself."""


def _guarded(serve: WSGIApplication) -> WSGIApplication:
    """The same app with the guards on each answer.

    Beneath Flask and not by its `after_request`: setting four headers on a response costs as much as a whole view.
    """

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Callable[[bytes], object]:
            said = {name.lower() for name, _ in headers}
            headers += [guard for guard in _GUARDS if guard[0].lower() not in said]
            return start_response(status, headers, *more)

        return serve(environ, start)

    return guarded


def _index() -> Any:
    """What this server answers; a browser is led to the status pages if they are on."""
    if "pipeline-ops" in current_app.extensions and request.accept_mimetypes.best == "text/html":
        return redirect("/ops")
    return jsonify(service="futwork-lead-pipeline", version=__version__, paths=_paths())


def _paths() -> list[str]:
    """Each path with its methods, such as `POST /webhooks/futwork`; of the status pages only the entry."""
    found = {
        f"{method} {rule.rule.replace('<', '{').replace('>', '}')}"
        for rule in current_app.url_map.iter_rules()
        if not rule.rule.startswith("/ops/")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    return sorted(found, key=lambda path: path.split()[::-1])


def _explain(error: HTTPException) -> Response:
    """The error as JSON, with the headers that belong to it, such as a 405's `Allow`; of a wrong path what exists."""
    answer = jsonify(error=error.description, **({"paths": _paths()} if error.code in (404, 405) else {}))
    if error.response is not None:
        return answer
    plain = error.get_response()
    answer.status_code = plain.status_code
    answer.headers.extend((name, value) for name, value in plain.headers if name in _KEPT_HEADERS)
    return answer


def _fail(error: Exception) -> tuple[Response, int]:
    log.error("a request failed", error=type(error).__name__, exc_info=error)
    return jsonify(error="internal error; see the log of the web process"), 500
