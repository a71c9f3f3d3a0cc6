"""The broker: Celery configured the same way for all processes, and publishing with bounded waits.

Celery, kombu and the settings are imported when they are first used, for the sake of a backend that imports `enqueue`.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from pipeline.addresses import read_address
from pipeline.observability import tracing

if TYPE_CHECKING:
    from celery import Celery

    from pipeline.broker.redis_transport import RedisQueues
    from pipeline.settings import ProducerSettings

QUEUES = ("intake", "dispatch", "events", "upkeep")
ROUTES = {
    "pipeline.intake": "intake",
    "pipeline.dispatch": "dispatch",
    "pipeline.events": "events",
    "pipeline.sweep": "upkeep",
    "pipeline.tidy": "upkeep",
}
VISIBILITY_SECONDS = 30
"""After how long Redis delivers a message again that was not acknowledged, such as that of a worker that was killed.

A late-ack task runs for well under a second, and may wait for a slice of dispatch (5 s) or SQLite's write lock (15 s).
If one takes longer, it is delivered a second time, which changes nothing in the ledger.
"""
_PUBLISH_TIMEOUT_SECONDS = 1.0  # up to three of them in a row on a broker that freezes; see `Broker`
_POOL_WAIT_SECONDS = 1.0
_SLOT_WAIT_SECONDS = 0.5  # less than a publish to a frozen broker takes; a longer wait would gain nothing
_CONNECTIONS = 10
_NO_ROUTE = 312  # AMQP's reply code for a message that fits no queue


class BrokerUnavailable(Exception):
    """The broker did not take a message in the time allowed; none of it counts as accepted."""


class _QueueGone(BrokerUnavailable):
    """The broker has no queue for the message."""


def celery_app(settings: ProducerSettings, *, works: bool) -> Celery:
    """Celery as this pipeline needs it; `docs/decisions.md` gives the reason for each line that is not a default.

    With *works* the waits suit a worker, which must outlast a broker's restart; without, a web request, which must not.
    """
    import kombu
    from celery import Celery

    from pipeline.broker.redis_transport import WorkerAMQP
    from pipeline.settings import SettingsError

    if not settings.broker_url:
        raise SettingsError(
            "BROKER_URL is not set: give the address of a Redis, Valkey or RabbitMQ, or run `pipeline up`,"
            " which starts a private one"
        )
    address = read_address(settings.broker_url)
    app = Celery("pipeline", broker=address.url, set_as_current=works, amqp=WorkerAMQP if works else None)
    app.conf.update(
        broker_use_ssl=address.for_celery() or False,
        task_queues=[
            kombu.Queue(
                name,
                kombu.Exchange(name, type="direct"),
                routing_key=name,
                queue_arguments=_queue_arguments(settings),
            )
            for name in QUEUES
        ],
        task_routes={task: {"queue": queue} for task, queue in ROUTES.items()},
        task_default_queue="upkeep",
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        enable_utc=True,
        timezone="UTC",
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=_CONNECTIONS,
        broker_pool_acquire_timeout=5 if works else _POOL_WAIT_SECONDS,
        broker_transport_options=_transport_options(settings.broker_url, works=works),
        broker_connection_timeout=3 if works else _PUBLISH_TIMEOUT_SECONDS,
        task_publish_retry=True,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.2},
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,  # it counts tasks of a lost connection, and may do so for ever
    )
    return app


def _queue_arguments(settings: ProducerSettings) -> dict[str, Any]:
    """RabbitMQ's arguments of a queue; one that exists must have been declared with the same."""
    if settings.rabbitmq_queue_type == "quorum" and settings.broker_url.startswith(("amqp", "pyamqp")):
        return {"x-queue-type": "quorum"}
    return {}


def _transport_options(url: str, *, works: bool) -> dict[str, Any]:
    if url.startswith(("amqp", "pyamqp")):
        wait = 10 if works else _PUBLISH_TIMEOUT_SECONDS
        return {"confirm_publish": True, "read_timeout": wait, "write_timeout": wait, "max_retries": 1}
    return {
        "visibility_timeout": VISIBILITY_SECONDS,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_timeout": 10 if works else _PUBLISH_TIMEOUT_SECONDS,
        "socket_connect_timeout": 3 if works else _PUBLISH_TIMEOUT_SECONDS,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "max_connections": 64,
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0.1,
    }


class Broker:
    """Publishes tasks. Every method ends within about four seconds, whatever the broker does; safe for threads.

    kombu speaks to the broker, except that messages are put into the queues of a Redis directly.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._speaks_redis = str(app.conf.broker_url).startswith(("redis://", "rediss://"))
        self._queues: RedisQueues | None = None
        # kombu bounds the wait for a producer, but not the one for the connection that it needs next. If each of many
        # threads opened a connection of its own to a frozen Redis, nothing would bound their waits either.
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)

    def publish(self, task: str, payload: object, *, about: str, expires_seconds: float | None = None) -> None:
        """Put a task into its queue, or raise `BrokerUnavailable`.

        *about* is what Flower and events show instead of the arguments; it must hold no personal data.
        """
        if not self._slots.acquire(timeout=_SLOT_WAIT_SECONDS):
            raise BrokerUnavailable("the broker took no message: all connections wait for it")
        try:
            with _translated("the broker took no message"), tracing.publishing(task, about) as headers:
                options = {
                    "argsrepr": about,
                    "kwargsrepr": "{}",
                    "expires": expires_seconds,
                    "ignore_result": True,
                    "headers": headers,
                }
                if self._speaks_redis:
                    self._put(task, payload, options)
                    return
                with self._app.producer_or_acquire() as producer:
                    try:
                        self._send(producer, task, payload, options)
                    except _QueueGone:
                        self._send(producer, task, payload, options)  # over a new connection, which declares it
        finally:
            self._slots.release()

    def _put(self, task: str, payload: object, options: dict[str, Any]) -> None:
        """Put a task, as Celery would write it, into its queue of a Redis."""
        parent = self._app.current_worker_task
        if parent:
            options["parent_id"] = parent.request.id
            options["root_id"] = parent.request.root_id or parent.request.id
        headers, properties, body, _ = self._app.amqp.create_task_message(
            str(uuid.uuid4()), task, [payload], {}, reply_to=self._app.thread_oid, **options
        )
        # As `send_task` does, which sends some options twice.
        properties |= {name: headers[name] for name in ("argsrepr", "kwargsrepr")} | {"delivery_mode": 2}
        if options["expires"]:
            properties["expiration"] = str(int(options["expires"] * 1000))
        self._redis_queues().put(ROUTES[task], headers | options["headers"], properties, _json(body))

    def _redis_queues(self) -> RedisQueues:
        from pipeline.broker.redis_transport import RedisQueues

        if self._queues is None:
            with self._connection() as connection:  # kombu translates the address and our options for redis-py
                self._queues = RedisQueues(connection.default_channel.pool)
        return self._queues

    def _send(self, producer: Any, task: str, payload: object, options: dict[str, Any]) -> None:
        """Send a task, and raise `_QueueGone` if its queue was deleted since this process declared it.

        RabbitMQ drops a message that fits no queue and confirms it all the same, unless it is published as mandatory.
        """
        connection = producer.connection
        try:
            self._app.send_task(task, args=[payload], producer=_FastJson(producer), mandatory=True, **options)
        except connection.channel_errors as error:
            # What else arrives on this connection belongs to the message that failed.
            connection.close()
            producer.revive(connection)
            if getattr(error, "reply_code", None) == _NO_ROUTE:
                raise _QueueGone(f"the queue of {task} does not exist") from error
            raise

    def ping(self) -> None:
        """Raise `BrokerUnavailable` unless the broker answers."""
        with _translated("the broker does not answer"), self._connection() as connection:
            self._depth(connection, QUEUES[0])

    def depths(self) -> dict[str, int]:
        """How many messages wait in each queue."""
        with _translated("the broker does not answer"), self._connection() as connection:
            return {name: self._depth(connection, name) for name in QUEUES}

    def held(self, queue: str) -> frozenset[bytes]:
        """The tags of the queue's messages that workers hold; no depth counts them. RabbitMQ does not show them."""
        from pipeline.broker.redis_transport import held

        with _translated("the broker does not answer"), self._connection() as connection:
            return held(connection.default_channel, queue)

    def server(self) -> str:
        """The broker's name and version, such as `RabbitMQ 4.0.5`; empty for a Redis, whose `INFO` says more."""
        with _translated("the broker does not answer"), self._connection() as connection:
            told = getattr(connection.connection, "server_properties", None) or {}
            return f"{told.get('product', '')} {told.get('version', '')}".strip()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        with self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1, timeout=3)
            yield connection

    @staticmethod
    def _depth(connection: Any, queue: str) -> int:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except connection.channel_errors:
            return 0  # it was not declared yet, or is empty on Redis: nothing waits in it


class _FastJson:
    """A kombu producer that writes its JSON with orjson, in a tenth of the time; any consumer reads it."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer

    def publish(self, body: object, *, serializer: str, **options: Any) -> Any:
        """Publish as the producer does that this one wraps."""
        if serializer != "json":
            return self._producer.publish(body, serializer=serializer, **options)
        return self._producer.publish(_json(body), content_type="application/json", content_encoding="utf-8", **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


def _json(body: object) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError as error:
        from kombu.exceptions import EncodeError

        raise EncodeError(str(error)) from error


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Translate what kombu, its transports and the socket raise into the one error that callers catch."""
    import amqp.exceptions
    import redis.exceptions
    from kombu import exceptions as kombu_errors

    try:
        yield
    except (
        kombu_errors.KombuError,
        kombu_errors.OperationalError,
        kombu_errors.LimitExceeded,
        amqp.exceptions.AMQPError,
        redis.exceptions.RedisError,
        OSError,
    ) as error:
        if isinstance(error, kombu_errors.EncodeError | kombu_errors.DecodeError):
            raise
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokerUnavailable(f"{what}: {cause}") from error
