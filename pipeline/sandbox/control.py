"""The `/_…` endpoints: settings at run time, counters, the journal, the record of webhooks."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from pipeline.sandbox.answers import error_body
from pipeline.sandbox.options import OptionsError
from pipeline.sandbox.protocol import Document, Request

if TYPE_CHECKING:
    from pipeline.sandbox.server import Sandbox

_JSON = "application/json"
_JSON_LINES = "application/x-ndjson"


def answer(sandbox: "Sandbox", request: Request) -> Document | None:
    """Answer a request to a `/_…` endpoint; None when there is no such endpoint."""
    match request.method, request.path:
        case "GET", "/_control":
            return _json(200, settings(sandbox))
        case "POST", "/_control":
            return _change(sandbox, request.body)
        case "GET", "/_stats":
            return _json(200, stats(sandbox))
        case "GET", "/_journal":
            return Document(200, _JSON_LINES, sandbox.journal.chunks())
        case "GET", "/_webhooks":
            return Document(200, _JSON_LINES, sandbox.webhooks.lines())
        case "POST", "/_webhooks/flush":
            return _json(200, {"flushed": sandbox.webhooks.flush()})
        case _, "/_control" | "/_stats" | "/_journal" | "/_webhooks" | "/_webhooks/flush":
            return _error(405, "Method not allowed")
    return None


def settings(sandbox: "Sandbox") -> dict[str, Any]:
    """The settings in force, as JSON can hold them."""
    return sandbox.options.model_dump(mode="json")


def stats(sandbox: "Sandbox") -> dict[str, Any]:
    """The counters so far.

    `rejected` counts, by HTTP status, the POSTs whose lead was not accepted, `statuses` counts all of them; `none`
    stands for those that got no answer. `duplicates` counts leads that were accepted although the same campaign, phone
    number and data had been accepted before.
    """
    reception = sandbox.reception
    return {
        **reception.tally.as_json(),
        "max_accepted_in_a_second": reception.busiest_accepting.most,
        "rejected": _sorted(reception.rejected),
        "statuses": _sorted(reception.statuses),
        "outcomes": _sorted(reception.outcomes),
        "campaigns": {name: tally.as_json() for name, tally in reception.campaigns.items()},
        "calls": sandbox.webhooks.calls,
        "webhooks": sandbox.webhooks.stats(),
        "connections": len(sandbox.connections),
        "refusals": sandbox.refusals,
    }


def _change(sandbox: "Sandbox", body: bytes | None) -> Document:
    try:
        changes = orjson.loads(body or b"")
    except orjson.JSONDecodeError:
        return _error(400, "Body is not valid JSON")
    if not isinstance(changes, dict):
        return _error(400, "Body must be a JSON object of settings")
    try:
        sandbox.change(changes)
    except OptionsError as error:
        return _error(422, str(error))
    return _json(200, settings(sandbox))


def _json(status: int, content: Any) -> Document:
    return Document(status, _JSON, _one(orjson.dumps(content)))


def _error(status: int, message: str) -> Document:
    return Document(status, _JSON, _one(error_body(message)))


def _one(piece: bytes) -> Iterator[bytes]:
    return iter((piece,))


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items()))
