"""The feed: a company's own systems read here which calls changed, a page at a time."""

from __future__ import annotations

import gzip
from typing import Any

import orjson
from flask import Blueprint, Response, abort, current_app, request

from pipeline.ledger import PageOfCalls, UnknownCursor, ledger_is_at_fault
from pipeline.observability.logs import logger
from pipeline.settings import Settings
from pipeline.web.intake import ask_again, scope_of_token
from pipeline.wiring import services

log = logger(__name__)
blueprint = Blueprint("feed", __name__)

MOST_CALLS = 1000  # of a page; a call with a long transcript has some 10 kB
_CALLS = 100
_PARAMETERS = {"after", "limit", "campaign", "final"}
_CURSOR_DIGITS = 18  # of a 64-bit number
_WORTH_PACKING_BYTES = 1024


@blueprint.get("/v1/calls")
def tell_calls() -> Response | tuple[Response, int]:
    """The calls that changed after the cursor, each as it is now, in the order of the feed.

    400 for a parameter that cannot be, or a cursor beyond the end of the feed; 403 for another campaign than the
    token's; 503 while the ledger is away.
    """
    settings: Settings = current_app.config["PIPELINE"]
    scope = scope_of_token(settings)
    if unknown := set(request.args) - _PARAMETERS:
        abort(400, f"no such parameter: {', '.join(sorted(unknown))}; there are {', '.join(sorted(_PARAMETERS))}")
    campaign = request.args.get("campaign", scope)
    if scope is not None and campaign != scope:
        abort(403, "this token is for another campaign")
    final = request.args.get("final", "false")
    if final not in ("true", "false"):
        abort(400, "final must be true or false")
    after, limit = _number("after", 0), _number("limit", _CALLS)
    if not 1 <= limit <= MOST_CALLS:
        abort(400, f"limit must be a number from 1 to {MOST_CALLS}")
    try:
        page = services(settings).ledger.feed.calls(
            after=after, limit=limit, campaign=campaign, only_final=final == "true"
        )
    except UnknownCursor as error:
        abort(400, f"{error}: begin again without a cursor")
    except Exception as error:
        if not (ledger_is_at_fault(error) or isinstance(error, OSError)):
            raise
        log.warning("the feed could not be read", error=type(error).__name__)
        return ask_again("the ledger is away; ask again with the same cursor")
    return _answer(page)


def _number(name: str, default: int) -> int:
    text = request.args.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) <= _CURSOR_DIGITS):
        abort(400, f"{name} must be a number" + (": give `next` of the page before" if name == "after" else ""))
    return int(text)


def _answer(page: PageOfCalls) -> Response:
    said: dict[str, Any] = {"calls": page.calls, "next": str(page.next), "more": page.more}
    answer = Response(orjson.dumps(said, option=orjson.OPT_UTC_Z), mimetype="application/json")
    answer.add_etag(weak=True)  # weak: packed or not, it is the same
    answer.vary.add("Accept-Encoding")
    answer.make_conditional(request)
    if answer.status_code == 200 and request.accept_encodings["gzip"] and len(answer.data) >= _WORTH_PACKING_BYTES:
        answer.data = gzip.compress(answer.data, compresslevel=1, mtime=0)
        answer.content_encoding = "gzip"
    return answer
