"""Error reporting: what goes wrong in our processes goes to Sentry if `SENTRY_DSN` is set.

Nothing of Sentry is imported otherwise. The other variables that its library reads (`SENTRY_ENVIRONMENT`,
`SENTRY_RELEASE`) mean what they always mean, from the environment or from `.env`.

A report is built from a list of what it may contain: the event name and the plain fields of our log lines, the types of
exceptions, and the places in the code. It has no variable, argument, request, address or text of an exception, because
databases quote the row that they refuse, and a row is a person.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from pipeline.settings import Settings, SettingsError, lend_to_libraries

_FIELDS = frozenset({
    "campaign", "task", "task_id", "kind", "digest", "size", "batch", "call", "lead", "leads", "account", "outcome",
    "state", "where", "status", "logger", "level", "limit_bytes", "trace_id",
})  # fmt: skip
_MOST_IDS = 20
_KIND = re.compile(r"[A-Za-z_][\w.]*")
_FRAME = ("filename", "module", "function", "lineno", "in_app", "abs_path")
_CONTEXTS = ("runtime", "trace")


def begin(settings: Settings, *, part: str) -> None:
    """Begin to report the errors of this process, if the settings ask for it.

    *part* says what the process is, such as `web`. Raises `SettingsError` if the extra `sentry` is not installed.
    """
    dsn = settings.sentry_dsn.get_secret_value()
    if not dsn:
        return
    try:
        import sentry_sdk
    except ImportError:
        raise SettingsError(
            "SENTRY_DSN is set, but Sentry's library is not installed: install the extra `sentry`"
        ) from None
    lend_to_libraries("SENTRY_")
    try:
        sentry_sdk.init(dsn=dsn, **options(part))
    except sentry_sdk.utils.BadDsn:
        raise SettingsError("SENTRY_DSN: must be the address that Sentry shows as the project's DSN") from None


def options(part: str) -> dict[str, Any]:
    """The options of Sentry's library."""
    return {
        "before_send": lambda event, hint: scrub(event, hint, part=part),
        "before_send_transaction": lambda _event, _hint: None,
        "include_local_variables": False,
        "include_source_context": False,
        "max_request_body_size": "never",
        "max_breadcrumbs": 0,
        "auto_session_tracking": False,
        "send_client_reports": False,
        "traces_sample_rate": None,
        "server_name": os.environ.get("SENTRY_SERVER_NAME") or os.uname().nodename,
    }


def scrub(event: Mapping[str, Any], hint: Mapping[str, Any], *, part: str) -> dict[str, Any] | None:
    """The event with only what a report may contain; None if a line of our log has reported it already."""
    raised = [one.get("type") for one in (event.get("exception") or {}).get("values") or []]
    if raised and raised[-1] == "StageFailed":
        return None
    told = {
        name: event[name]
        for name in ("event_id", "timestamp", "platform", "level", "logger", "sdk", "release", "environment",
                     "server_name", "transaction", "transaction_info")
        if name in event
    }  # fmt: skip
    told["tags"] = {"part": part}
    contexts = event.get("contexts") or {}
    told["contexts"] = {name: contexts[name] for name in _CONTEXTS if name in contexts}
    line = getattr(hint.get("log_record"), "msg", None)
    values = (event.get("exception") or _exception_of(line)).get("values") or []
    if values:
        told["exception"] = {"values": [_exception(one) for one in values]}
    if isinstance(line, dict):
        name = str(line.get("event", "an error"))
        told["logentry"] = {"message": name, "formatted": name}
        told["fingerprint"] = [name, _kind(line.get("error"))]
        told["extra"] = {key: _plain(value) for key, value in line.items() if key in _FIELDS}
        if (kind := _kind(line.get("error"))) != "":
            told["extra"]["error"] = kind
    elif not values:
        told["logentry"] = {"message": str(event.get("logger") or "an error")}
    return told


def _exception_of(line: object) -> Mapping[str, Any]:
    """The exception that one of our lines was logged with, in Sentry's form."""
    given = line.get("exc_info") if isinstance(line, dict) else None
    if given is True:
        given = sys.exc_info()
    if not given or given == (None, None, None):
        return {}
    import sentry_sdk
    from sentry_sdk.utils import event_from_exception

    found: Any = event_from_exception(given, client_options=sentry_sdk.get_client().options)[0]
    return dict(found.get("exception") or {})


def _exception(one: Mapping[str, Any]) -> dict[str, Any]:
    frames, how = (one.get("stacktrace") or {}).get("frames") or [], one.get("mechanism") or {}
    return {
        "type": one.get("type"),
        "module": one.get("module"),
        "mechanism": {"type": str(how.get("type", "generic")), "handled": bool(how.get("handled", True))},
        "stacktrace": {"frames": [{key: frame[key] for key in _FRAME if key in frame} for frame in frames]},
    }


def _kind(error: object) -> str:
    """The type of an error, if the field `error` of a line has one; a text may quote anything."""
    return error if isinstance(error, str) and _KIND.fullmatch(error) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, list | tuple):
        shown = [str(one) for one in value[:_MOST_IDS]]
        return shown if len(value) <= _MOST_IDS else [*shown, f"and {len(value) - _MOST_IDS} more"]
    return value if isinstance(value, bool | int | float | None) else str(value)[:300]
