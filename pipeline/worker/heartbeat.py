"""The heartbeat of a worker."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from pipeline.coordination.heartbeats import HEARTBEAT_SECONDS, HeartbeatSender


class HeartbeatStep(bootsteps.StartStopStep):
    """Sends a worker's heartbeat, with the queues that it works on, from the loop that takes messages.

    So a worker that hangs, or has no connection to the broker, falls silent like one that is dead.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Begin; Celery calls this at each new connection to the broker."""
        queues = sorted(consumer.app.amqp.queues.consume_from)
        sender = HeartbeatSender(consumer.app.pipeline_settings.limiter_url, "worker", str(consumer.hostname), queues)
        sender.send()
        self._timer = consumer.timer.call_repeatedly(HEARTBEAT_SECONDS, sender.send)

    def stop(self, _consumer: Any) -> None:
        """End; Celery calls this when the connection is lost, and when the worker ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
