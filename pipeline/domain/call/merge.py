"""All events of one call, folded into one payload."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import orjson

from pipeline.domain.call.event import Event
from pipeline.domain.call.status import standing
from pipeline.domain.call.values import is_blank


def merge(events: Iterable[Event]) -> dict[str, Any]:
    """Return the merged payload of one call: a pure function of the set of its events.

    Neither the order in which events are given nor repeats matter. "The last one wins" is not enough: Futwork's events
    can repeat and come out of order, several workers handle them, and a replay handles them again. Always merge the
    raw events; a merged payload is not an event.

    1. Events with the same digest are one, received when the first of them was. Of one moment the spelling decides,
       for one content can be spelled with its keys in another order.
    2. They are folded by the rank of their status, then by the time of receipt, then by digest. So a non-final status
       never follows a final one, and `completed` overrules `call-disconnected` even if it came first.
    3. Objects merge by key; in lists and single values the later one in that order wins, unless it is blank.

    Raises `ValueError` if the events are of several calls.
    """
    distinct: dict[str, Event] = {}
    for event in events:
        seen = distinct.get(event.digest)
        if seen is None or _came_first(event, seen):
            distinct[event.digest] = event
    if len({event.call_sid for event in distinct.values()}) > 1:
        raise ValueError("the events to merge are of several calls")
    merged: dict[str, Any] = {}
    for event in sorted(distinct.values(), key=_place):
        merged = _overlay(merged, event.payload)
    return merged


def _came_first(event: Event, seen: Event) -> bool:
    if event.received_at != seen.received_at:
        return event.received_at < seen.received_at
    return orjson.dumps(event.payload) < orjson.dumps(seen.payload)


def _place(event: Event) -> tuple[int, datetime, str]:
    return standing(event.status).rank, event.received_at, event.digest


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        held = result.get(key)
        if isinstance(held, dict) and isinstance(value, dict):
            result[key] = _overlay(held, value)
        elif held is None or not is_blank(value):
            result[key] = value
    return result
