"""Runs a stage for a task, so that no message is lost: done, put back into its queue, or in quarantine whole.

A message that cannot be read, or whose worker keeps crashing on it, ends in quarantine and never in a loop. What a
message holds is personal data: neither logs nor events show it, whoever sent it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Literal

from celery import Task
from celery.exceptions import Reject
from kombu.exceptions import EncodeError

from pipeline.broker import MESSAGE_VERSION, BrokerUnavailable
from pipeline.domain.campaign import InvalidCampaignId, check_campaign_id
from pipeline.intake import UnreadableBatch
from pipeline.ledger import ledger_is_at_fault
from pipeline.observability import tracing
from pipeline.observability.logs import first_line, logged_with, logger, place
from pipeline.observability.metrics import TASK_SECONDS, TASKS_DONE
from pipeline.wiring import Services
from pipeline.worker.dead_letters import arguments_as_bytes, quarantine
from pipeline.worker.process import services_of
from pipeline.worker.request import describe_arguments

log = logger(__name__)

MOST_CRASHES = 3  # of worker processes on one message, before it goes to quarantine
PAUSE_SECONDS = 2.0  # before a message goes back to its queue because something that it needs is away


class StageFailed(Exception):
    """A stage ended with an exception; the message has its first line, for the rest of it may quote a lead."""


def plain(stage: Callable[..., None]) -> Callable[..., None]:
    """The task of a stage that the ledger starts again if it fails; a failure is logged without what it quotes."""

    @wraps(stage)
    def run(task: Task, *args: Any) -> None:
        services, started = services_of(task), time.perf_counter()
        result = "failed"
        try:
            with _observed(task, args):
                stage(services, *args)
            result = "done"
        except Exception as error:  # noqa: BLE001 - it is raised again, in words that may be logged
            _log_failure(task, error)
            raise StageFailed(f"{type(error).__name__}: {first_line(error)} ({place(error)})") from None
        finally:
            _measure(services, stage, result, started)

    return run


def guarded(stage: Callable[..., None]) -> Callable[..., None]:
    """The task of a stage whose message must not be lost: done, put back, or quarantined whole."""

    @wraps(stage)
    def run(task: Task, *args: Any, **kwargs: Any) -> None:
        services, started = services_of(task), time.perf_counter()
        result = "failed"
        try:
            with _observed(task, args), _crashes_counted(services, task) as crashes:
                result = _settle(stage, services, task, args, kwargs, crashes)
        except Reject:
            result = "put_back"
            raise
        finally:
            _measure(services, stage, result, started)

    return run


def _settle(
    stage: Callable[..., None], services: Services, task: Task, args: Any, kwargs: Any, crashes: int
) -> Literal["done", "put_back", "quarantined"]:
    """Run the stage, put the message back, or quarantine it, and return which; `Reject` has it delivered again."""
    try:
        if crashes > MOST_CRASHES:
            raise UnreadableBatch(f"{crashes} worker processes crashed on it")
        if len(args) != 1 or kwargs:
            raise UnreadableBatch("the task takes one argument, the message")
        if _left_to_newer(services, task, args[0]):
            return "put_back"
        stage(services, args[0], again=bool(crashes or task.request.retries))
        return "done"
    except Reject:
        raise
    except UnreadableBatch as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - a fault of ours must not lose the batch, nor run for ever
        if ledger_is_at_fault(error):
            _put_back(task, error)
        reason = f"failed: {type(error).__name__}: {first_line(error)}"
        _log_failure(task, error)
    try:
        quarantine(services.ledger, "batch", arguments_as_bytes(args, kwargs), reason=reason)
    except Exception as error:  # noqa: BLE001 - then the message is safe in the broker
        _put_back(task, error)
    return "quarantined"


def _left_to_newer(services: Services, task: Task, message: Any) -> bool:
    """Whether the message has a newer version, and was put back into its queue for a worker that can read it.

    It is published again before this process pauses, while it still holds the old copy. If it gave the message back
    after the pause, it would take it again at once, before an idle worker looks. If it dies now there are two copies,
    which does no harm.
    """
    version = message.get("v", MESSAGE_VERSION) if isinstance(message, dict) else MESSAGE_VERSION
    if not isinstance(version, int) or version <= MESSAGE_VERSION:
        return False
    log.warning("a newer release's message is left to newer workers", version=version, ours=MESSAGE_VERSION)
    try:
        services.broker.publish(task.name, message, about=describe_arguments(task.name, (message,)))
    except (BrokerUnavailable, EncodeError):
        _pause()
        services.crash_counter.mark_requeued(task.request.id)
        raise Reject(f"message version {version} is newer than {MESSAGE_VERSION}", requeue=True) from None
    _pause()
    return True


def _put_back(task: Task, error: BaseException) -> None:
    """Give the message back to the broker after a pause, because the ledger cannot take it now."""
    log.warning("the message goes back to its queue", task=task.name, error=first_line(error))
    _pause()
    services_of(task).crash_counter.mark_requeued(task.request.id)
    raise Reject("the ledger is away", requeue=True) from error


@contextlib.contextmanager
def _crashes_counted(services: Services, task: Task) -> Iterator[int]:
    """How many processes crashed while they ran this message, as far as that can be known.

    Celery counts the crashes of children, but not those of whole workers, whose messages the broker delivers again. So
    each run of a redelivered message is counted until it ends in an orderly way. The first run was not counted; it is
    taken for a crash, unless it put the message back itself.
    """
    redelivered = (task.request.delivery_info or {}).get("redelivered")
    if not redelivered or services.crash_counter.was_requeued(task.request.id):
        yield 0
        return
    with services.crash_counter.counted(task.request.id) as counted:
        yield counted + 1


@contextlib.contextmanager
def _observed(task: Task, args: Any) -> Iterator[None]:
    """Trace the task, and add it and its campaign, if it has one, to every line that is logged meanwhile."""
    tracing.begin(task.app.pipeline_settings, part="worker")
    about, parent = describe_arguments(task.name, args), getattr(task.request, "traceparent", None)
    fields = {"task": task.name, "task_id": task.request.id} | _campaign(task, args)
    with logged_with(**fields), tracing.running(task.name, id_=task.request.id, about=about, parent=parent):
        yield


def _campaign(task: Task, args: Any) -> dict[str, str]:
    first = args[0] if args else None
    campaign_id = first.get("campaign_id") if isinstance(first, dict) else None
    if task.name == "pipeline.dispatch":  # any other task may be given any text, also a phone number
        campaign_id = first
    with contextlib.suppress(InvalidCampaignId):
        return {"campaign": check_campaign_id(campaign_id)}  # type: ignore[arg-type]  # it checks the type too
    return {}


def _measure(services: Services, stage: Callable[..., None], result: str, started: float) -> None:
    services.counters.count(TASKS_DONE, stage.__name__, result)
    services.counters.observe(TASK_SECONDS, time.perf_counter() - started, stage.__name__)


def _log_failure(task: Task, error: BaseException) -> None:
    """Log where a stage failed; the text of the exception may quote a lead."""
    log.error("a stage failed", task=task.name, error=type(error).__name__, where=place(error))


def _pause() -> None:
    threading.Event().wait(PAUSE_SECONDS)
