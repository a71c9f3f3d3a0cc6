"""Webhook endpoints as people write them: one that only answers, and one that calls `delay()` and answers.

Shape: the Flask quickstart ("A Minimal Application") and Flask's pattern "Background Tasks with Celery"; the broker's
settings as in the Celery documentation, results ignored.
"""

from __future__ import annotations

import os

from celery import Celery
from flask import Flask, request

celery = Celery("peer", broker=os.environ["BROKER_URL"])
celery.conf.update(task_ignore_result=True)


@celery.task
def handle_event(event: dict) -> None:
    """What a worker would do with the event."""


bare = Flask("bare")


@bare.post("/webhook")
def answer() -> tuple[str, int]:
    """Answer, and keep nothing."""
    return "", 200


delaying = Flask("delaying")


@delaying.post("/webhook")
def answer_and_delay() -> tuple[str, int]:
    """Hand the event to a task, and answer."""
    handle_event.delay(request.get_json())
    return "", 200
