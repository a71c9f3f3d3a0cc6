"""What belongs to one process of a worker: its services, and whether its parent shuts down."""

from __future__ import annotations

import multiprocessing
from typing import Any

from celery import Task, signals

from pipeline.observability import tracing
from pipeline.wiring import Services, close_services, services

_stopping = multiprocessing.get_context("fork").Value("b", 0, lock=False)
"""The parent sets it when it shuts down; its children see it, because they share this memory since the fork."""


def services_of(task: Task) -> Services:
    """The services of this process, for a task that runs in it."""
    return services(task.app.pipeline_settings, stopping=lambda: bool(_stopping.value))


@signals.worker_init.connect(weak=False)
def _begin(**_: Any) -> None:
    _stopping.value = 0


@signals.worker_shutting_down.connect(weak=False)
def _tell_children(**_: Any) -> None:
    _stopping.value = 1


@signals.worker_process_shutdown.connect(weak=False)
def _close(**_: Any) -> None:
    close_services()
    tracing.end()
