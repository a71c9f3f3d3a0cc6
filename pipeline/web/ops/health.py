"""Whether each part of the pipeline runs, as far as a web process can tell."""

from __future__ import annotations

import time
from typing import Any

from pipeline.broker import QUEUES, BrokerUnavailable
from pipeline.coordination.connection import RedisUnavailable
from pipeline.settings import SettingsError
from pipeline.web.ops.masking import count
from pipeline.wiring import Services


def health(mine: Services) -> dict[str, Any]:
    """The parts, each with `name`, `state` (up, warn, down), `text`, and `title` and `advice` for when it is not up.

    The ledger is up where this is asked: the page has read it.
    """
    found = [_broker(mine), _part("Ledger", "up", "answers")]
    found += _living(mine)
    found.append(_spool(mine))
    return {"parts": found, "up": all(one["state"] == "up" for one in found)}


def _part(name: str, state: str, text: str, *, title: str = "", advice: str = "") -> dict[str, Any]:
    return {"name": name, "state": state, "text": text, "title": title, "advice": advice}


def _broker(mine: Services) -> dict[str, Any]:
    began = time.monotonic()
    try:
        depths = mine.broker.depths()
    except BrokerUnavailable:
        advice = "The webhook spools events to disk meanwhile. See that Redis, Valkey or RabbitMQ runs."
        return _part("Broker", "down", "does not answer", title="The broker does not answer", advice=advice)
    waiting = sum(depths.values())
    took = (time.monotonic() - began) * 1000
    return _part("Broker", "up", f"{count(waiting, 'message')} waiting" if waiting else f"answers in {took:.0f} ms")


def _living(mine: Services) -> list[dict[str, Any]]:
    try:
        signs = mine.heartbeats.alive()
    except (RedisUnavailable, SettingsError):
        text = "not known: Redis does not answer"
        advice = "Nothing is sent without the Redis of the shared limit. See REDIS_URL."
        return [
            _part("Workers", "down", text, title="The limit's Redis does not answer", advice=advice),
            _part("Beat", "up", "not known"),
        ]
    workers = [sign for sign in signs if sign.kind == "worker"]
    served = {queue for sign in workers for queue in sign.queues}
    missing = [queue for queue in QUEUES if queue not in served]
    beats = [sign for sign in signs if sign.kind == "beat"]
    if missing:
        queues = ", ".join(missing)
        workers_part = _part(
            "Workers", "down", f"none for {queues}", title=f"Nobody works on {queues}",
            advice=f"Start one: celery -A worker worker -Q {','.join(missing)}",
        )  # fmt: skip
    else:
        workers_part = _part("Workers", "up", f"{count(len(workers), 'worker')} on every queue")
    if beats:
        beat = _part("Beat", "up", f"heard {max(0, round(min(sign.seconds_ago for sign in beats)))} s ago")
    else:
        advice = "Retries, probes and lost claims wait for it. Start one: celery -A worker beat"
        beat = _part("Beat", "down", "not heard of", title="Beat does not run", advice=advice)
    return [workers_part, beat]


def _spool(mine: Services) -> dict[str, Any]:
    files, size = mine.spool.size()
    if not files:
        return _part("Spool", "up", "empty")
    text = f"{count(files, 'file')}, {size / 1024:,.0f} kB"
    advice = (
        "Events wait on this host's disk until the broker takes them. If the broker answers, they drain by themselves."
    )
    return _part("Spool", "warn", text, title=f"{text} in the spool", advice=advice)
