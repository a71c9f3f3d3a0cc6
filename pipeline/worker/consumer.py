"""Celery's consumer, which quarantines what Celery would log and drop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer

from pipeline.observability.logs import first_line, logger
from pipeline.worker.dead_letters import own_ledger, quarantine
from pipeline.worker.guard import PAUSE_SECONDS

log = logger(__name__)

_REFUSED_SECONDS = 1.0  # between two connections to a broker that answers and refuses


class QuarantiningConsumer(Consumer):
    """Celery's consumer, except that it quarantines a message that it cannot read or has no task for.

    Celery's own drops such a message, logs a part of its body, which is personal data, and ends the worker on some of
    them, again at each delivery.
    """

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """The callback that takes each message in."""
        handle = super().create_task_handler(*args, **kwargs)
        errors = (*self.connection_errors, *self.channel_errors)
        # kombu counts KeyError among Redis' errors, and would connect again for ever over a message without an id.
        errors_of_the_broker = tuple(error for error in errors if error is not KeyError)

        def on_task_received(message: Any) -> None:
            try:
                handle(message)
            except errors_of_the_broker:
                raise
            except Exception as error:  # noqa: BLE001 - it would end the worker, and the next one too
                self._quarantine(message, "malformed task", error)

        return on_task_received

    def on_unknown_message(self, _body: Any, message: Any) -> None:
        """Quarantine a message that is no task."""
        self._quarantine(message, "not a Celery task")

    def on_unknown_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Quarantine a message whose task has a name that no worker knows."""
        self._quarantine(message, "unknown task name", exc)

    def on_invalid_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Quarantine a message of a known task that is malformed."""
        self._quarantine(message, "malformed task", exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Quarantine a message whose body cannot be decoded."""
        self._quarantine(message, "body cannot be decoded", exc)

    def call_soon_ack(self, settle: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        """Acknowledge or reject a message; if its connection is gone, the broker delivers it again.

        kombu 5.7 fails on a channel to Redis that is closed, which would end the worker.
        """

        def settle_safely() -> None:
            try:
                settle(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - a message that is delivered again does no harm
                log.warning("a message of a lost connection will come again", error=first_line(error))

        return super().call_soon_ack(settle_safely)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Log that the broker cannot be reached, and wait for a moment if it refuses, as it does so at once."""
        super().on_connection_error_before_connected(exc)
        self._pause_if_refused(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Drop the connection, so that Celery opens the next.

        If messages are in work, kombu 5.7 fails to close a connection to a Redis that is away, which would end the
        worker. Nothing that matters is left undone: those messages are delivered again. A broker that refuses does so
        at once, so the next connection waits for a moment.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CPendingDeprecationWarning)  # that running tasks are not killed
                super().on_connection_error_after_connected(exc)
        except Exception as error:  # noqa: BLE001 - whatever a dead connection raises, the next one is wanted
            log.warning("the broken connection could not be closed", error=first_line(error))
        self._pause_if_refused(exc)

    def _pause_if_refused(self, exc: Exception) -> None:
        if isinstance(exc, self.channel_errors):
            time.sleep(_REFUSED_SECONDS)

    def _quarantine(self, message: Any, cause: str, error: Exception | None = None) -> None:
        if message.acknowledged:
            return
        reason = f"{cause}: {type(error).__name__}: {first_line(error)}" if error else cause
        try:
            with own_ledger(self.app.pipeline_settings) as ledger:
                quarantine(ledger, "message", _body_of(message), reason=reason)
        except Exception as fault:  # noqa: BLE001 - then the message is safe in the broker
            log.warning("a message goes back to its queue", cause=cause, error=first_line(fault))
            self.timer.call_after(PAUSE_SECONDS, self._put_back, (message,))
        else:
            log.error("a message was not understood", cause=cause, error=type(error).__name__ if error else None)
            message.reject_log_error(log, self.connection_errors)

    def _put_back(self, message: Any) -> None:
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors, requeue=True)


def _body_of(message: Any) -> bytes:
    body = message.body
    if isinstance(body, str):
        return body.encode("utf-8", "surrogateescape")
    return bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b""
