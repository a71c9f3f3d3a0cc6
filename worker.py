"""Celery's entry in a checkout: `celery -A worker worker|beat|flower`."""

from pipeline.worker.celery import app

__all__ = ["app"]
