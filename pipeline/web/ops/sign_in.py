"""Signing in and out."""

from __future__ import annotations

from flask import Response, make_response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as AnyResponse

from pipeline.observability.logs import logger
from pipeline.web.ops.access import COOKIE, FORM_COOKIE, FORM_SECONDS, Locked
from pipeline.web.ops.layout import blueprint, ops, visitor

log = logger(__name__)

_PATH = "/ops"


@blueprint.route("/sign-in", methods=["GET", "POST"])
def sign_in() -> AnyResponse:
    """The form; the right password leads to the page that was requested."""
    if request.method == "GET":
        return _form()
    gatekeeper = ops().gatekeeper
    if not gatekeeper.knows_form(request.form.get("form", ""), request.cookies.get(FORM_COOKIE, "")):
        return _form("This page was open for too long. Please try again.", 400)
    name = request.form.get("name", "").strip()
    try:
        cookie = gatekeeper.sign_in(name, request.form.get("password", ""), address=_address())
    except Locked:
        log.warning("a sign-in was refused: too many wrong passwords", address=_address())
        return _form("Too many wrong passwords. Try again in ten minutes.", 429)
    if cookie is None:
        log.warning("a sign-in failed", address=_address())
        return _form("Name or password is wrong.", 403)
    log.info("signed in", user=name)
    answer = redirect(_target(request.form.get("next", "")), 303)
    answer.set_cookie(
        COOKIE,
        cookie,
        max_age=ops().settings.ops_session_seconds,
        path=_PATH,
        secure=_is_secure(),
        httponly=True,
        samesite="Lax",
    )
    answer.delete_cookie(FORM_COOKIE, path=_PATH)
    return answer


@blueprint.post("/sign-out")
def sign_out() -> AnyResponse:
    """End the session, in this browser and in any other that has its cookie."""
    ops().gatekeeper.end(visitor())
    answer = redirect(url_for("ops.sign_in"), 303)
    answer.delete_cookie(COOKIE, path=_PATH)
    return answer


def _form(trouble: str = "", status: int = 200) -> Response:
    token, nonce = ops().gatekeeper.new_form()
    wanted = request.values.get("next", "")
    page = render_template("ops/sign_in.html", form=token, trouble=trouble, next=wanted, name=request.form.get("name"))
    answer = make_response(page, status)
    if status == 429:
        answer.headers["Retry-After"] = "600"
    answer.set_cookie(
        FORM_COOKIE, nonce, max_age=FORM_SECONDS, path=_PATH, secure=_is_secure(), httponly=True, samesite="Strict"
    )
    return answer


def _target(wanted: str) -> str:
    """The next page: one of ours, never another host."""
    plain = wanted.startswith("/ops") and wanted[4:5] in ("", "/", "?") and "\\" not in wanted
    return wanted if plain else url_for("ops.overview")


def _behind(header: str) -> str | None:
    """What the outermost trusted proxy put into a header to which each proxy appends."""
    steps = ops().settings.ops_proxies
    said = [part.strip() for part in request.headers.get(header, "").split(",") if part.strip()]
    return said[-steps] if steps and len(said) >= steps else None


def _address() -> str:
    return _behind("X-Forwarded-For") or request.remote_addr or "unknown"


def _is_secure() -> bool:
    return request.is_secure or (_behind("X-Forwarded-Proto") or "").lower() == "https"
