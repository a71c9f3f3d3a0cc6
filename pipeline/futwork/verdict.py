"""What an answer of Futwork's means: its outcome, its lead id, its wait. Pure, and lenient: none is documented."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import orjson

from pipeline.domain.lead import Outcome
from pipeline.futwork.wire import BODY_BYTES
from pipeline.observability.redaction import mask_numbers

EXCERPT_CHARACTERS = 300
_RETRY_AFTER_SECONDS = 1e9  # the longest that is worth telling apart; the settings cap it much lower
_NEAR_SECONDS = 366 * 86_400.0  # a number as near to now as this is a moment, not a wait
_LEAD_ID_KEYS = ("leadId", "lead_id")
_ANY_ID_KEYS = ("id", "_id")
_ID_HOMES = ("data", "lead", "result")
_ID = re.compile(r"[!-~]{1,64}")  # as wide as the ledger's column
_FUTWORK_ID = re.compile(r"[0-9a-f]{24}")

_FLAGS = frozenset({"success", "issuccess", "successful", "succeeded", "ok", "isok"})
_CODES = frozenset({"status", "statuscode", "code", "errorcode", "httpstatus", "httpcode"})
_TRUE = frozenset({"true", "1", "yes", "y", "t", "on", "ok"})
_FALSE = frozenset({"false", "0", "no", "n", "f", "off"})
_FAILED = frozenset({"error", "fail", "failed", "failure", "rejected", "refused", "denied", "invalid", "unsuccessful"})
_ERROR_CODE = re.compile(r"[4-9][0-9]{2}( .*)?")  # longer ones are codes of the sender's own

_UNCERTAIN_STATUS = frozenset({408, 502, 504, 520, 524, 598, 599})
"""A gateway's word that it passed the request on and got no proper answer; 52x are Cloudflare's, 59x some proxies'."""
_BUSY_STATUS = frozenset({421, 425, 503, 509, 529})
"""The request was not processed: by HTTP's own words, or, with 509 and 529, because a server has too much to do."""


def judge(status: int, body: bytes) -> tuple[Outcome, str | None]:
    """Decide the outcome of an answer that came back, and find Futwork's lead id in it if one is there."""
    if 200 <= status < 300:
        payload = _json(body)
        lead_id = find_lead_id(payload)
        if _refuses(payload, lead_id):
            return Outcome.REJECTED, None
        return Outcome.ACCEPTED, lead_id
    if status == 409 and (lead_id := _id_of_known_lead(_json(body))):
        return Outcome.ACCEPTED, lead_id
    if status == 429:
        return Outcome.THROTTLED, None
    if status in _BUSY_STATUS:
        return Outcome.BUSY, None
    if status in _UNCERTAIN_STATUS or not 200 <= status < 600:
        return Outcome.UNCERTAIN, None
    if status in (401, 403):
        return Outcome.REFUSED_KEY, None
    if status == 404 or 300 <= status < 400:
        return Outcome.REFUSED_CAMPAIGN, None
    return (Outcome.REJECTED if status < 500 else Outcome.FAILED), None


def unpack(body: bytes, encoding: str) -> bytes | None:
    """A body without its `Content-Encoding`, up to its bound; None if it breaks off or cannot be unpacked.

    None was asked for, but some gateways pack whatever passes. A name that is no encoding, such as a charset, is passed
    over.
    """
    for name in reversed(encoding.lower().replace(" ", "").split(",")):
        if name in ("br", "zstd", "compress", "x-compress"):
            return None
        if name in ("gzip", "x-gzip", "deflate") and body:
            has_head = name != "deflate" or body[0] & 15 == zlib.DEFLATED
            unpacking = zlib.decompressobj(32 + zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS)
            try:
                unpacked = unpacking.decompress(body, BODY_BYTES)
            except zlib.error:
                return None
            if not unpacking.eof and max(len(unpacked), len(body)) < BODY_BYTES:
                return None
            body = unpacked
    return body


def find_lead_id(payload: object, names: Sequence[Sequence[str]] = (_LEAD_ID_KEYS, _ANY_ID_KEYS)) -> str | None:
    """Futwork's id of the lead, wherever a client was ever seen to look for it; None is a normal result.

    A key that names the lead wins over a plain `id`, which may be that of the request.
    """
    homes = _objects(payload, _ID_HOMES)
    for group in names:
        for home in homes:
            for name in group:
                value = home.get(name)
                if value is None or isinstance(value, bool) or not isinstance(value, str | int):
                    continue
                if _ID.fullmatch(text := str(value)):
                    return text
    return None


def parse_retry_after(value: str | None, *, now: datetime) -> timedelta | None:
    """The wait that a `Retry-After` asks for, or None if it says nothing readable.

    It may be given in seconds, as any HTTP date, or, against the standard, as a moment: ISO 8601, or the seconds or
    milliseconds since 1970.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        number = min(float(text), 1e15)
        for unit in (1, 1000):
            if abs(number / unit - now.timestamp()) < _NEAR_SECONDS:
                return max(timedelta(), timedelta(seconds=number / unit - now.timestamp()))
        return timedelta(seconds=min(number, _RETRY_AFTER_SECONDS))
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = read(text)
        except (TypeError, ValueError, IndexError, OverflowError):  # whatever its parser stumbles over
            continue
        return max(timedelta(), (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now)
    return None


def excerpt_of(body: bytes, *, secret: str = "") -> str:
    """The first part of a body on one line, with *secret* and whatever looks like a phone number masked."""
    text = " ".join(body[:BODY_BYTES].decode("utf-8", "replace").replace("\0", "").split())
    if secret:
        text = text.replace(secret, "…")
    return mask_numbers(text)[:EXCERPT_CHARACTERS]


def _refuses(payload: object, lead_id: str | None) -> bool:
    """Whether a 2xx body says that the lead was not taken. What does not say so clearly is an acceptance.

    `success: false` at the top is always clear. Otherwise the id of a lead proves that it was taken; a plain `id` does
    so less, because it may be the request's.
    """
    if not isinstance(payload, dict):
        return False
    flag = _flag(payload)
    if flag is False:
        return True
    if lead_id and (flag or find_lead_id(payload, (_LEAD_ID_KEYS,))):
        return False
    return any(_says_no(one, has_any_id=lead_id is not None) for one in _objects(payload, ("data", "result")))


def _says_no(fields: dict[str, Any], *, has_any_id: bool) -> bool:
    """Whether an object says no: by a flag or a code, or, where there is no id, by a word, an error or a count of 0."""
    flag = _flag(fields)
    if flag is not None:
        return not flag
    for name, value in fields.items():
        key = _key(name)
        if key in _CODES and _ERROR_CODE.fullmatch(_plain(value)):
            return True
        if not has_any_id and (
            (key in ("status", "result") and _plain(value) in _FAILED)
            or (key in ("error", "errors") and value and _plain(value) not in ("false", "0", "none", "null"))
            or (key == "accepted" and _plain(value) in _FALSE)
        ):
            return True
    return False


def _flag(fields: dict[str, Any]) -> bool | None:
    """What `success`, `ok` and their like say in any spelling; None where there is none, or nothing readable in it."""
    for name, value in fields.items():
        key = _key(name)
        if key in _FLAGS or (key == "status" and _plain(value) in ("true", "false")):
            text = _plain(value)
            if text in _FALSE or text in _FAILED:
                return False
            if text in _TRUE:
                return True
    return None


def _plain(value: object) -> str:
    """A name or a value without what its spelling adds; empty for what is neither text nor a number."""
    if not isinstance(value, str | int | float):
        return ""
    return str(value).strip().lower().replace("_", "").replace("-", "").removesuffix(".0")


_key = lru_cache(maxsize=256)(_plain)  # of names, which are the same in every answer


def _id_of_known_lead(payload: object) -> str | None:
    """The lead's id in a 409: the lead is there already. A plain `id` at the top counts if it looks like Futwork's."""
    if named := find_lead_id(payload, (_LEAD_ID_KEYS,)):
        return named
    found = find_lead_id(payload)
    is_top = isinstance(payload, dict) and found in (payload.get("id"), payload.get("_id"))
    return found if found and (not is_top or _FUTWORK_ID.fullmatch(found)) else None


def _objects(payload: object, homes: Sequence[str]) -> list[dict[str, Any]]:
    """The object itself, and those that stand in it under one of the names."""
    if not isinstance(payload, dict):
        return []
    objects = [payload]
    for name in homes:
        if isinstance(home := payload.get(name), dict):
            objects.append(home)  # noqa: PERF401 - at every lead: a comprehension costs more
    return objects


def _json(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:  # the standard library reads more: a byte order mark, UTF-16, NaN, control characters in texts
        return json.loads(body, strict=False)
    except (ValueError, RecursionError):
        return None
