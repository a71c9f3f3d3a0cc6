"""A Celery task that does nothing, and whose result its caller waits for.

Shape: the Celery documentation, "First Steps with Celery" (`delay()`, then `get()`), with the Redis result backend that
it names for that, on the broker that everything else uses.
"""

from __future__ import annotations

import os

from celery import Celery

app = Celery("peer", broker=os.environ["BROKER_URL"], backend=os.environ["BROKER_URL"])
app.conf.update(
    task_default_queue="round-trip",
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)


@app.task
def nothing() -> None:
    """Come back."""


def round_trip() -> None:
    """There and back."""
    nothing.delay().get(timeout=30)
