"""Leads a second into the broker: `pipeline.enqueue` against one `delay()` a lead, and against a bare Redis pipeline.

Each measurement is a process of its own, warmed up with a few hundred leads. The leads are unique, so no cache of
phone numbers helps. `delay()` is measured over fewer leads, because its cost a lead does not depend on their number.
"""

from __future__ import annotations

import json
import os
import sys
import time

from bench import fake_leads
from bench.backends import CAMPAIGN, Backends, run_json
from bench.figures import Figure, compare, interleave

LEADS = 100_000
DELAYED = 5_000
_WARM_UP = 600


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    leads = LEADS // 5 if quick else LEADS

    def contender(name: str, number: int, expected: int) -> float:
        services.clean_valkey()
        done = run_json(["-m", "bench.enqueue", name, str(number)], {"BROKER_URL": services.broker_url})
        waiting = services.valkey.llen(done["queue"])
        if waiting != expected:
            raise RuntimeError(f"{name}: {waiting} messages in the broker instead of {expected}")
        return number / done["seconds"]

    batches = -(-leads // 500) + -(-_WARM_UP // 500)
    numbers = interleave(
        rounds,
        {
            "pipeline.enqueue": lambda: contender("ours", leads, batches),
            "task.delay() a lead": lambda: contender("delay", DELAYED, DELAYED + _WARM_UP),
            "redis-py pipeline of JSON": lambda: contender("redis", leads, leads + _WARM_UP),
        },
    )
    services.clean_valkey()
    ours, delay, raw = numbers.values()
    note = f"{leads:,} leads in the broker, {DELAYED:,} for delay(); one producer process"
    return [
        compare("enqueue", ours, delay, unit="leads/s", goal=40, note=f"against task.delay() a lead; {note}"),
        compare(
            "enqueue_raw", ours, raw, unit="leads/s", goal=0.3, note=f"against RPUSH of JSON, no validation; {note}"
        ),
    ]


def _run(name: str, number: int) -> None:
    warm_up, leads = list(fake_leads.rows(_WARM_UP, start=90_000_000)), list(fake_leads.rows(number))
    if name == "ours":
        from pipeline import enqueue
        from pipeline.broker import Broker, celery_app
        from pipeline.settings import Settings

        settings = Settings(_env_file=None, broker_url=os.environ["BROKER_URL"])
        publisher = Broker(celery_app(settings, works=False))
        queue = "intake"

        def hand_in(rows: list) -> None:
            report = enqueue(CAMPAIGN, rows, settings=settings, publisher=publisher)
            if report.accepted != len(rows):
                raise RuntimeError(f"{len(report.refused)} rows were refused")
    elif name == "delay":
        from bench.peers.celery_task import QUEUE as queue  # noqa: N811 - the queue's name is a value here
        from bench.peers.celery_task import enqueue_all as hand_in
    else:
        from bench.peers.redis_pipeline import QUEUE as queue  # noqa: N811
        from bench.peers.redis_pipeline import enqueue_all as hand_in
    hand_in(warm_up)
    started = time.perf_counter()
    hand_in(leads)
    print(json.dumps({"seconds": time.perf_counter() - started, "queue": queue}))


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]))
