"""The Celery app, its beat schedule, and tasks of a few lines: each hands over to the stage that it is named after.

| task | acknowledged | why |
|---|---|---|
| `pipeline.intake`, `pipeline.events` | after it ran | safe to repeat; the broker holds the only copy until it ran |
| `pipeline.dispatch`, `pipeline.sweep`, `pipeline.tidy` | before it runs | the ledger starts them again |

A message that cannot be read, or whose worker keeps dying on it, ends in the ledger's quarantine, never in a loop. What
the messages hold is personal data: neither logs nor events show it, whoever sent them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Literal

import billiard.pool
from celery import Celery, Task, bootsteps, signals
from celery.beat import Scheduler
from celery.exceptions import CPendingDeprecationWarning, InvalidTaskError, Reject
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu.exceptions import EncodeError

from pipeline.broker import MESSAGE_VERSION, BrokerUnavailable, Kind, SpoolFull, celery_app, decode_events, refused
from pipeline.broker.redis_transport import keep_malformed
from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.heartbeats import HEARTBEAT_SECONDS, HeartbeatSender
from pipeline.domain.campaign import InvalidCampaignId, check_campaign_id
from pipeline.intake import UnreadableBatch
from pipeline.ledger import Ledger, ledger_is_at_fault
from pipeline.observability import tracing
from pipeline.observability.logs import configure_logs, logged_with, logger
from pipeline.observability.metrics import TASK_SECONDS, TASKS_DONE
from pipeline.settings import Settings
from pipeline.wiring import Services, close_services, services

log = logger(__name__)

_TIDY_SECONDS = 15.0
_EXPIRES_SECONDS = 6 * 3600.0  # of sweeps nobody took: more than two hosts' clocks differ by, even with a wrong zone
_SWEPT_LATELY = 0.5  # of the time between two sweeps; one that comes sooner after another was kept waiting
_RETRY_SECONDS = 2  # until the message of a process that died is tried again
_PAUSE_SECONDS = 2.0  # before a message goes back to its queue because something that it needs is away
_LAST_RESULTS_SECONDS = 2.0  # that a child waits at its end for its parent to have read its results
_MOST_DEATHS = 3  # of worker processes on one message, before it goes to quarantine
_EMBEDDED = frozenset({"callbacks", "errbacks", "chain", "chord"})

_stopping = multiprocessing.get_context("fork").Value("b", 0, lock=False)
"""Set by the parent when it shuts down; its children see it, because the memory is shared through the fork."""


class StageFailed(Exception):
    """A stage ended with an exception; the message has its first line, for the rest of it may quote a lead."""


def build_app(settings: Settings) -> Celery:
    """The Celery app of workers, beat and Flower; raises `SettingsError` if a worker could not do its work."""
    app = celery_app(settings, works=True)
    _ = settings.limiter_url  # a worker without the limit's Redis would take leads in and never send one
    app.pipeline_settings = settings
    keep_malformed(lambda item: keep_aside(settings, "message", item, reason="its envelope is wrong"))
    app.conf.update(
        worker_consumer="pipeline.worker.app:KeepingConsumer",
        worker_lost_wait=3.0,  # a child's last result is in its pipe long before
        beat_scheduler="pipeline.worker.app:SteadyScheduler",
        beat_max_loop_interval=HEARTBEAT_SECONDS,  # however seldom it has something to send, it says that it lives
        beat_schedule={
            "sweep": {
                "task": "pipeline.sweep",
                "schedule": settings.sweep_seconds,
                "options": {"expires": max(_EXPIRES_SECONDS, 5 * settings.sweep_seconds)},
            },
            "tidy": {"task": "pipeline.tidy", "schedule": _TIDY_SECONDS, "options": {"expires": _EXPIRES_SECONDS}},
        },
    )
    app.steps["consumer"].add(HeartbeatStep)
    # A parent that shuts down may count fewer results than a child sent; the child waits for the count, else for 30 s.
    waits = _LAST_RESULTS_SECONDS / billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_INTERVAL
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = round(waits)
    common = {"bind": True, "Request": "pipeline.worker.app:DiscreetRequest"}
    late: dict[str, Any] = {"acks_late": True, "retry_on_worker_lost": True}
    late |= {"max_retries": _MOST_DEATHS, "default_retry_delay": _RETRY_SECONDS}
    app.task(_guarded(intake), name="pipeline.intake", **common, **late)
    app.task(_guarded(events), name="pipeline.events", **common, **late)
    app.task(_plain(dispatch), name="pipeline.dispatch", **common)
    app.task(_plain(sweep), name="pipeline.sweep", **common)
    app.task(_plain(tidy), name="pipeline.tidy", **common)
    signals.setup_logging.connect(lambda **_: configure_logs(settings), weak=False, dispatch_uid="pipeline")
    return app


# The tasks


def intake(mine: Services, message: Any, *, again: bool) -> None:  # noqa: ARG001 - as every guarded stage has it
    """Take a batch of leads into the ledger."""
    mine.intake.take_in(message)


def events(mine: Services, message: Any, *, again: bool) -> None:
    """Take a batch of post-call events into the ledger; *again*, if a process died over it before."""
    try:
        decoded = decode_events(message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableBatch(f"not a batch of events: {type(error).__name__}: {error}") from None
    mine.events.take_in(decoded, again=again)


def dispatch(mine: Services, campaign_id: str) -> None:
    """Dispatch a campaign for one slice, and ask for the next if due work is left."""
    done = mine.dispatcher.run(campaign_id)
    if done.more:
        mine.wake(campaign_id)


def sweep(mine: Services) -> None:
    """Wake dispatchers for due work, and settle lost claims; one of many that waited for a worker does nothing."""
    if _ran_lately(mine, "sweep", _SWEPT_LATELY * mine.settings.sweep_seconds):
        return
    mine.sweep.sweep()
    _note_run(mine, "sweep")


def tidy(mine: Services) -> None:
    """Settle what time decides, link orphans, drain the spool; one of many that waited for a worker does nothing."""
    if _ran_lately(mine, "tidy", _SWEPT_LATELY * _TIDY_SECONDS):
        return
    mine.sweep.tidy()
    _note_run(mine, "tidy")


def _note_run(mine: Services, what: str) -> None:
    with contextlib.suppress(RedisUnavailable):  # then it shows as long ago, and the limit's absence says why
        mine.heartbeats.ran(what)


def _ran_lately(mine: Services, what: str, seconds: float) -> bool:
    try:
        ago = mine.heartbeats.last_run(what)
    except RedisUnavailable:
        return False
    return ago is not None and 0 <= ago < seconds  # what ended in the future did so before the clock was set back


def _services_of(task: Task) -> Services:
    return services(task.app.pipeline_settings, stopping=lambda: bool(_stopping.value))


def _plain(stage: Callable[..., None]) -> Callable[..., None]:
    """Run a stage that the ledger starts again if it fails; then Celery logs where, and not what it quotes."""

    @wraps(stage)
    def run(task: Task, *args: Any) -> None:
        mine, started = _services_of(task), time.perf_counter()
        try:
            with _told(task, args):
                stage(mine, *args)
            _measure(mine, stage, "done", started)
        except Exception as error:  # noqa: BLE001 - it is raised again, in words that may be logged
            _measure(mine, stage, "failed", started)
            log.error(  # noqa: TRY400 - the exception's text may quote a lead, so only its place is logged
                "a stage failed", task=task.name, error=type(error).__name__, where=_where(error)
            )
            raise StageFailed(f"{type(error).__name__}: {_one_line(error)} ({_where(error)})") from None

    return run


def _guarded(stage: Callable[..., None]) -> Callable[..., None]:
    """Run a stage on a message so that the message is never lost: done, put back, or in quarantine whole."""

    @wraps(stage)
    def run(task: Task, *args: Any, **kwargs: Any) -> None:
        mine, started = _services_of(task), time.perf_counter()
        result = "failed"
        try:
            with _told(task, args), _crashes_counted(mine, task) as deaths:
                result = _settle(stage, mine, task, args, kwargs, deaths)
        except Reject:
            result = "put_back"
            raise
        finally:
            _measure(mine, stage, result, started)

    return run


def _settle(
    stage: Callable[..., None], mine: Services, task: Task, args: Any, kwargs: Any, deaths: int
) -> Literal["done", "put_back", "kept_aside"]:
    """Run the stage, or put the message back or aside, and say which; raise `Reject` if it is to come again."""
    try:
        if deaths > _MOST_DEATHS:
            raise UnreadableBatch(f"{deaths} worker processes died on it")
        if len(args) != 1 or kwargs:
            raise UnreadableBatch("the task takes one argument, the message")
        if _left_to_newer(mine, task, args[0]):
            return "put_back"
        stage(mine, args[0], again=bool(deaths or task.request.retries))
        return "done"
    except Reject:
        raise
    except UnreadableBatch as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - a fault of ours must not lose the batch, nor run for ever
        if ledger_is_at_fault(error):
            _put_back(task, error)
        reason = f"failed: {type(error).__name__}: {_one_line(error)}"
        log.error(  # noqa: TRY400 - the exception's text may quote a lead, so only its place is logged
            "a stage failed", task=task.name, error=type(error).__name__, where=_where(error)
        )
    try:
        _set_aside(mine.ledger, "batch", _as_bytes(args, kwargs), reason=reason)
    except Exception as error:  # noqa: BLE001 - then the broker is the place where it is safe
        _put_back(task, error)
    return "kept_aside"


def _measure(mine: Services, stage: Callable[..., None], result: str, started: float) -> None:
    mine.counters.count(TASKS_DONE, stage.__name__, result)
    mine.counters.observe(TASK_SECONDS, time.perf_counter() - started, stage.__name__)


@contextlib.contextmanager
def _told(task: Task, args: Any) -> Iterator[None]:
    """Let every line that is logged meanwhile say which task runs, and the campaign if it has one; and trace it."""
    tracing.begin(task.app.pipeline_settings, part="worker")
    about, parent = describe_arguments(task.name, args), getattr(task.request, "traceparent", None)
    with logged_with(**_about(task, args)), tracing.running(task.name, id_=task.request.id, about=about, parent=parent):
        yield


def _about(task: Task, args: Any) -> dict[str, str]:
    first = args[0] if args else None
    given = first.get("campaign_id") if isinstance(first, dict) else None
    if task.name == "pipeline.dispatch":  # a text that another task is given may be anything, a number too
        given = first
    about = {"task": task.name, "task_id": task.request.id}
    with contextlib.suppress(InvalidCampaignId):
        about["campaign"] = check_campaign_id(given)  # type: ignore[arg-type]  # it checks that too
    return about


def _left_to_newer(mine: Services, task: Task, message: Any) -> bool:
    """Whether the message is of a newer form, and was put back into its queue for a worker that reads it.

    It is put back before this process rests, while it still holds the old copy: given back when the rest is over, it
    would be in the hands of this process again before an idle one looks. Two copies, should it die now, do no harm.
    """
    version = message.get("v", MESSAGE_VERSION) if isinstance(message, dict) else MESSAGE_VERSION
    if not isinstance(version, int) or version <= MESSAGE_VERSION:
        return False
    log.warning("a newer release's message is left to newer workers", version=version, ours=MESSAGE_VERSION)
    try:
        mine.broker.publish(task.name, message, about=describe_arguments(task.name, (message,)))
    except (BrokerUnavailable, EncodeError):
        _pause()
        mine.crash_counter.mark_requeued(task.request.id)
        raise Reject(f"message version {version} is newer than {MESSAGE_VERSION}", requeue=True) from None
    _pause()
    return True


def _put_back(task: Task, error: BaseException) -> None:
    """Give the message back to the broker, after a moment, because the ledger cannot take it now."""
    log.warning("the message goes back to its queue", task=task.name, error=_one_line(error))
    _pause()
    _services_of(task).crash_counter.mark_requeued(task.request.id)
    raise Reject("the ledger is away", requeue=True) from error


@contextlib.contextmanager
def _crashes_counted(mine: Services, task: Task) -> Iterator[int]:
    """How many processes died while they ran this very message, as far as that can be known.

    Celery counts the deaths of children by itself, but not those of whole workers, whose messages the broker gives out
    again. So each run of a message that was given out before is noted until it ends in an orderly way; the first run,
    which is not noted, is taken for a death, unless it put the message back by itself.
    """
    redelivered = (task.request.delivery_info or {}).get("redelivered")
    if not redelivered or mine.crash_counter.was_requeued(task.request.id):
        yield 0
        return
    with mine.crash_counter.counted(task.request.id) as noted:
        yield noted + 1


def _pause() -> None:
    threading.Event().wait(_PAUSE_SECONDS)


# Signs of life


class HeartbeatStep(bootsteps.StartStopStep):
    """Lets a worker say that it lives and which queues it works on, from the loop that takes messages in.

    So a worker that hangs, or has no connection to the broker, falls silent like one that is dead.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._repeated: Any = None

    def start(self, consumer: Any) -> None:
        """Begin to note; Celery calls this at each new connection to the broker."""
        queues = sorted(consumer.app.amqp.queues.consume_from)
        noting = HeartbeatSender(consumer.app.pipeline_settings.limiter_url, "worker", str(consumer.hostname), queues)
        noting.note()
        self._repeated = consumer.timer.call_repeatedly(HEARTBEAT_SECONDS, noting.note)

    def stop(self, _consumer: Any) -> None:
        """Note no more; Celery calls this when the connection is lost and at the end."""
        if self._repeated is not None:
            self._repeated.cancel()
            self._repeated = None


class SteadyScheduler(Scheduler):
    """Beat's schedule, in memory and by a clock that nobody sets; says at each round of its loop that beat lives.

    Celery's own goes by the wall clock, and sends nothing for an hour after that was set back by one. There is nothing
    to remember: both entries are safe to run at any time.
    """

    def __init__(self, app: Celery, *args: Any, **options: Any) -> None:
        super().__init__(app, *args, **options)
        self._noting = HeartbeatSender(app.pipeline_settings.limiter_url, "beat", f"beat@{socket.gethostname()}")
        self._due: dict[str, float] = {}

    def tick(self, *_args: Any, **_options: Any) -> float:
        """Send what is due; return the seconds until the next round."""
        self._noting.note()
        now = time.monotonic()
        for entry in self.schedule.values():
            if now >= self._due.setdefault(entry.name, now):
                self._due[entry.name] = now + entry.schedule.run_every.total_seconds()
                self.apply_entry(entry, producer=self.producer)
        wait = min(self._due.values(), default=self.max_interval) - time.monotonic()
        return float(min(max(0.0, wait), self.max_interval))


# What cannot be worked on


def keep_aside(settings: Settings, kind: Kind, body: bytes, *, reason: str) -> bool:
    """Put what the broker no longer holds into the ledger's quarantine; into the local spool if the ledger is away.

    False if neither took it.
    """
    try:
        with _own_ledger(settings) as ledger:
            _set_aside(ledger, kind, body, reason=reason)
    except Exception as fault:  # noqa: BLE001 - whatever it is, the message has no other home
        try:
            Services(settings).spool.write([refused(kind, body, reason=_printable(reason), now=datetime.now(UTC))])
            log.warning("kept in the spool, because the ledger is away", kind=kind, error=_one_line(fault))
        except SpoolFull as error:
            log.critical("a message could not be kept anywhere", kind=kind, error=str(error))
            return False
    return True


@contextlib.contextmanager
def _own_ledger(settings: Settings) -> Iterator[Ledger]:
    """A ledger for a worker's parent, which must not leave an open connection to children that it forks later."""
    ledger = Ledger(settings.database_url)
    try:
        yield ledger
    finally:
        ledger.close()


def _set_aside(ledger: Ledger, kind: str, body: bytes, *, reason: str) -> None:
    digest = ledger.quarantine.put(kind, body, reason=_printable(reason), now=datetime.now(UTC))
    log.error("kept aside", kind=kind, digest=digest, size=len(body))


class KeepingConsumer(Consumer):
    """Celery's consumer, except that it keeps what it cannot read or does not know, where Celery logs and drops it.

    Celery's own would also log a part of the body, which is personal data, and end the worker on some malformed
    messages, each time anew.
    """

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """The callback that takes each message in."""
        handle = super().create_task_handler(*args, **kwargs)
        errors = (*self.connection_errors, *self.channel_errors)
        # kombu counts KeyError among Redis' errors, and would connect anew for ever over a message without an id.
        not_the_messages_fault = tuple(error for error in errors if error is not KeyError)

        def on_task_received(message: Any) -> None:
            try:
                handle(message)
            except not_the_messages_fault:
                raise
            except Exception as error:  # noqa: BLE001 - it would end the worker, and the next one too
                self._keep(message, "its form is wrong", error)

        return on_task_received

    def on_unknown_message(self, _body: Any, message: Any) -> None:
        """Keep a message that is no task."""
        self._keep(message, "it is no Celery task")

    def on_unknown_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Keep a message whose task nobody here knows."""
        self._keep(message, "nobody knows its task", exc)

    def on_invalid_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Keep a message whose task is known and whose form is not."""
        self._keep(message, "its form is wrong", exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keep a message whose body cannot be decoded."""
        self._keep(message, "it cannot be decoded", exc)

    def call_soon_ack(self, settle: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        """Acknowledge or give back a message; one of a connection that is gone stays to be given out again.

        kombu 5.7 trips over a channel to Redis that is closed, which would end the worker.
        """

        def settle_safely() -> None:
            try:
                settle(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - a message that is given out again does no harm
                log.warning("a message of a lost connection will come again", error=_one_line(error))

        return super().call_soon_ack(settle_safely)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Drop the connection and go on to the next.

        With messages in work, kombu 5.7 trips over closing a connection to a Redis that is away, which would end the
        worker. Nothing is left undone by then that matters: those messages are given out again.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CPendingDeprecationWarning)  # that the tasks in work are not killed
                super().on_connection_error_after_connected(exc)
        except Exception as error:  # noqa: BLE001 - whatever a dead connection brings up, the next one is wanted
            log.warning("the broken connection could not be closed", error=_one_line(error))

    def _keep(self, message: Any, cause: str, error: Exception | None = None) -> None:
        if message.acknowledged:
            return
        reason = f"{cause}: {type(error).__name__}: {_one_line(error)}" if error else cause
        try:
            with _own_ledger(self.app.pipeline_settings) as ledger:
                _set_aside(ledger, "message", _body_of(message), reason=reason)
        except Exception as fault:  # noqa: BLE001 - then the broker is the place where it is safe
            log.warning("a message goes back to its queue", cause=cause, error=_one_line(fault))
            self.timer.call_after(_PAUSE_SECONDS, self._give_back, (message,))
        else:
            log.error("a message was not understood", cause=cause, error=type(error).__name__ if error else None)
            message.reject_log_error(log, self.connection_errors)

    def _give_back(self, message: Any) -> None:
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors, requeue=True)


class DiscreetRequest(Request):
    """A task's message, with a description of ours in the place of the arguments that its producer let be shown.

    Producers without our code let Celery describe the arguments, which are personal data, for events and Flower.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        embedded = self._payload[2]
        if not isinstance(self._args, list | tuple) or not isinstance(self._kwargs, dict):
            raise InvalidTaskError("its body must be [[arguments], {named arguments}, {…}]")
        if embedded is not None and (not isinstance(embedded, dict) or not _EMBEDDED.issuperset(embedded)):
            raise InvalidTaskError(f"the third part of its body may hold {', '.join(sorted(_EMBEDDED))}")
        if not isinstance(self.id, str) or not isinstance(self._request_dict.get("retries") or 0, int):
            raise InvalidTaskError("its id must be text, and its retries a number")
        self.name = self.type  # whatever its producer would have it called in logs
        self._argsrepr = describe_arguments(self.type, self._args)
        self._kwargsrepr = "{…}" if self._kwargs else "{}"
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr, timelimit=None)
        self.time_limits = (None, None)  # a limit that its producer set would lose the message
        if self.eta is not None and self._request_dict.get("retries"):
            # Set by us, on a host whose clock may be ahead, or was before it was set back; it would be held until then.
            self._eta = min(self.eta, datetime.now(UTC) + timedelta(seconds=_RETRY_SECONDS))

    @property
    def request_dict(self) -> dict[str, Any]:
        """What a child is told beside the body: plain values only.

        A value that cannot be pickled, such as one that is nested too deeply, would cost the worker one of its places
        for ever. The arguments are in the body anyway.
        """
        plain = {name: value for name, value in self._request_dict.items() if isinstance(value, str | int | float)}
        return plain | {"delivery_info": {"redelivered": bool(self.delivery_info["redelivered"])}}

    def _retry_worker_lost(self, exc: BaseException, exc_info: Any) -> bool:
        """Have the message of a child that died tried again; where it cannot be published, the broker still has it.

        Celery would acknowledge it then and give it up, so that it would lie in quarantine with nothing wrong in it.
        """
        if not super()._retry_worker_lost(exc, exc_info):
            self.reject(requeue=True)
        return True

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - never the arguments themselves
        """What `celery inspect` and Flower show."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown


def describe_arguments(task: str, args: Any) -> str:
    """What the arguments are about, without personal data: the campaign, and how many leads or events."""
    first = args[0] if args else None
    if isinstance(first, dict):
        try:
            about = [check_campaign_id(first.get("campaign_id"))]  # type: ignore[arg-type]  # it checks that too
        except InvalidCampaignId:
            about = []
        about += [f"{len(first[name])} {name}" for name in ("leads", "events") if isinstance(first.get(name), list)]
        return f"({', '.join(about) or '…'})"
    if task == "pipeline.dispatch" and isinstance(first, str):
        return f"({first[:64]})"
    return "(…)" if args else "()"


@signals.task_failure.connect(weak=False)
def _keep_what_failed(
    sender: Any = None, exception: Any = None, args: Any = None, kwargs: Any = None, **_: Any
) -> None:
    """Keep a message that Celery has given up: its processes died again and again, or it could not be handed to one.

    It is acknowledged by now. Tasks that acknowledge early are started again by the ledger.
    """
    if sender is None or not sender.acks_late or isinstance(exception, Reject):
        return
    reason = f"{sender.name} ended with {type(exception).__name__}: {_one_line(exception)}"
    keep_aside(sender.app.pipeline_settings, "batch", _as_bytes(args, kwargs), reason=reason)


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


def _as_bytes(args: Any, kwargs: Any) -> bytes:
    """The arguments as JSON, whatever they hold: lone surrogates, huge numbers, deep nesting."""

    def encode() -> bytes:
        return json.dumps([args or [], kwargs or {}], default=str).encode()

    try:
        return encode()
    except RecursionError:  # on an empty stack there is room for all that could be decoded
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(encode).result()


def _body_of(message: Any) -> bytes:
    body = message.body
    if isinstance(body, str):
        return body.encode("utf-8", "surrogateescape")
    return bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b""


def _one_line(error: BaseException) -> str:
    """The first line of an error: databases quote the row that they refuse in the lines after it."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__


def _printable(text: str) -> str:
    """Text that every database takes: no NUL, no lone surrogate, no control character."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:1000]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
