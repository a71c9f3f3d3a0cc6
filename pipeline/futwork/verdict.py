"""What an answer of Futwork's means: its outcome, its lead id, its wait. Pure, and lenient: none is documented."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import orjson

from pipeline.domain.lead import Outcome
from pipeline.futwork.wire import BODY_BYTES

EXCERPT_CHARACTERS = 300
_RETRY_AFTER_SECONDS = 1e9  # the longest that is worth telling apart; the settings cap it much lower
_LEAD_ID_KEYS = ("leadId", "lead_id")
_ANY_ID_KEYS = ("id", "_id")
_ID_HOMES = ("data", "lead", "result")
_NO = frozenset({"error", "fail", "failed", "failure"})
_ID = re.compile(r"[!-~]{1,64}")  # as wide as the ledger's column; Futwork's ids have 24 hexadecimal digits
_PHONE_LIKE = re.compile(r"\+?\d[\d\s().-]{7,}\d")
_UNCERTAIN_STATUS = frozenset({408, 502, 504, 520, 524, 598, 599})
"""A gateway's word that it passed the request on and got no proper answer; 52x are Cloudflare's, 59x some proxies'."""


def judge(status: int, body: bytes) -> tuple[Outcome, str | None]:
    """Decide the outcome of an answer that came back, and find Futwork's lead id in it if one is there."""
    if 200 <= status < 300:
        payload = _json(body)
        if _says_no(payload):
            return Outcome.REJECTED, None
        return Outcome.ACCEPTED, find_lead_id(payload)
    if status == 429:
        return Outcome.THROTTLED, None
    if status == 503:
        return Outcome.BUSY, None
    if status in _UNCERTAIN_STATUS or not 200 <= status < 600:
        return Outcome.UNCERTAIN, None
    if status in (401, 403):
        return Outcome.REFUSED_KEY, None
    if status == 404 or 300 <= status < 400:
        return Outcome.REFUSED_CAMPAIGN, None
    return (Outcome.REJECTED if status < 500 else Outcome.FAILED), None


def find_lead_id(payload: object) -> str | None:
    """Futwork's id of the lead, wherever a client was ever seen to look for it; None is a normal result.

    A key that names the lead wins over a plain `id`, which may be that of the request.
    """
    if not isinstance(payload, dict):
        return None
    homes = [payload]
    for name in _ID_HOMES:
        if isinstance(home := payload.get(name), dict):
            homes.append(home)  # noqa: PERF401 - at every lead: a comprehension costs more
    for names in (_LEAD_ID_KEYS, _ANY_ID_KEYS):
        for home in homes:
            for name in names:
                value = home.get(name)
                if value is None or isinstance(value, bool) or not isinstance(value, str | int):
                    continue
                if _ID.fullmatch(text := str(value)):
                    return text
    return None


def parse_retry_after(value: str | None, *, now: datetime) -> timedelta | None:
    """The wait that a `Retry-After` asks for, given in seconds or as an HTTP date; None if it says nothing readable."""
    if value is None:
        return None
    text = value.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return timedelta(seconds=min(float(text), _RETRY_AFTER_SECONDS))
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError, OverflowError):  # whatever its parser stumbles over
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(timedelta(), moment - now)


def excerpt_of(body: bytes, *, secret: str = "") -> str:
    """The first part of a body on one line, with *secret* and whatever looks like a phone number masked."""
    text = " ".join(body[:BODY_BYTES].decode("utf-8", "replace").replace("\0", "").split())
    if secret:
        text = text.replace(secret, "…")
    return _PHONE_LIKE.sub(lambda match: "…" + match[0][-2:], text)[:EXCERPT_CHARACTERS]


def _says_no(payload: object) -> bool:
    """Whether a 2xx body refuses the lead: `success: false`, or an error and no lead."""
    if not isinstance(payload, dict):
        return False
    success, status = payload.get("success"), payload.get("status")
    if success is False or (isinstance(success, str) and success.strip().lower() == "false"):
        return True
    named = payload.get("error") or payload.get("errors")
    marked = isinstance(status, str) and status.strip().lower() in _NO
    return bool(named or marked) and success is not True and find_lead_id(payload) is None


def _json(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
