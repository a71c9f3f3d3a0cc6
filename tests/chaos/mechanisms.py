"""The mechanisms that keep the promises, each with a switch: off, its experiment must break.

`python -m tests.chaos --without NAME` runs the experiment of a mechanism with the mechanism switched off in every
process, and fails if nothing broke: a promise whose experiment cannot fail is not proven. The switches reach into the
pipeline's insides on purpose, and say so at once if those have moved.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

VARIABLE = "CHAOS_WITHOUT"


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A mechanism, the promise that it keeps, and the experiment that must break without it."""

    name: str
    keeps: str
    experiment: str
    says: str
    """A part of what the experiment must say without it: breaking for another reason proves nothing."""
    switch_off: Callable[[], None]


MECHANISMS: dict[str, Mechanism] = {}


def mechanism(
    name: str, *, keeps: str, experiment: str, says: str
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that switches a mechanism off in this process."""

    def register(switch_off: Callable[[], None]) -> Callable[[], None]:
        MECHANISMS[name] = Mechanism(name, keeps, experiment, says, switch_off)
        return switch_off

    return register


def named_in_environment() -> list[str]:
    """The mechanisms that this process must do without."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def switch_off(names: Iterable[str]) -> None:
    """Switch mechanisms off in this process, before it builds anything."""
    for name in names:
        MECHANISMS[name].switch_off()


def _replace(owner: Any, name: str, value: Any) -> Any:
    """Put *value* in the place of something that must be there; return what was."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return before


# Accepted is kept


@mechanism(
    "append-only-file",
    keeps="a killed broker keeps what it accepted",
    experiment="valkey-kill",
    says="are not in the ledger",
)
def _no_append_only_file() -> None:
    from tests.chaos import brokers

    _replace(brokers, "APPEND_ONLY", "no")


@mechanism(
    "late-ack",
    keeps="the broker holds a batch until it is in the ledger",
    experiment="records-worker",
    says="are not in the ledger",
)
def _acknowledge_early() -> None:
    from pipeline.worker import app

    build = app.build_app

    def build_app(settings: Any) -> Any:
        built = build(settings)
        for name in ("pipeline.intake", "pipeline.events"):
            built.tasks[name].acks_late = False
        return built

    _replace(app, "build_app", build_app)


@mechanism(
    "booked-delivery",
    keeps="a message enters the unacked set in the step that takes it",
    experiment="frozen-machine",
    says="are not in the ledger",
)
def _take_as_kombu_does() -> None:
    from pipeline.broker import redis_transport

    _replace(redis_transport, "TRANSPORTS", {})


@mechanism(
    "commit-before-answer",
    keeps="200 means that the event is in the broker or on disk",
    experiment="web-worker",
    says="are not in the ledger",
)
def _answer_first() -> None:
    import threading

    from pipeline.broker import GroupCommit

    submit = GroupCommit.submit

    def answer_at_once(self: Any, item: Any) -> tuple[()]:
        threading.Timer(0.2, submit, (self, item)).start()
        return ()

    _replace(GroupCommit, "submit", answer_at_once)


@mechanism(
    "spool", keeps="events are taken while the broker is away", experiment="broker-away", says="events were refused"
)
def _no_spool() -> None:
    from pipeline.broker.spool import Spool, SpoolFull

    def refuse(self: Any, events: Any) -> None:
        raise SpoolFull("the spool is switched off")

    _replace(Spool, "write", refuse)


@mechanism(
    "spool-refuses",
    keeps="a full disk is said, not hidden",
    experiment="spool-full",
    says="answered 200 and are not in the ledger",
)
def _spool_hides_it() -> None:
    from pipeline.broker.spool import Spool, SpoolFull

    write = Spool.write

    def hide(self: Any, events: Any) -> None:
        try:
            write(self, events)
        except SpoolFull:
            return

    _replace(Spool, "write", hide)


@mechanism(
    "publisher-confirms",
    keeps="RabbitMQ has what its producer was told it has",
    experiment="rabbitmq-restart",
    says="are not in the ledger",
)
def _no_confirms() -> None:
    from pipeline.broker import publisher

    options = publisher._transport_options

    def without_confirms(url: str, *, works: bool) -> dict[str, Any]:
        return options(url, works=works) | {"confirm_publish": False}

    _replace(publisher, "_transport_options", without_confirms)


@mechanism(
    "back-to-the-queue",
    keeps="a batch whose ledger is away goes back to the broker",
    experiment="postgres-restart",
    says="are not in the ledger",
)
def _give_up_at_once() -> None:
    from pipeline.worker import guard

    def give_up(task: Any, error: BaseException) -> None:
        """Nothing: the message is acknowledged."""

    _replace(guard, "_put_back", give_up)


@mechanism("quarantine", keeps="what cannot be read is kept whole", experiment="poison", says="are in quarantine")
def _drop_what_is_strange() -> None:
    from celery.worker.consumer import Consumer

    from pipeline.worker.consumer import QuarantiningConsumer

    for name in ("on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error"):
        _replace(QuarantiningConsumer, name, getattr(Consumer, name))


@mechanism(
    "message-version",
    keeps="an older worker leaves newer messages to newer ones",
    experiment="mixed-versions",
    says="went to quarantine",
)
def _read_whatever_comes() -> None:
    from pipeline.worker import guard

    def cannot_read(services: Any, task: Any, message: Any) -> bool:
        if isinstance(message, dict) and message.get("v", 0) > guard.MESSAGE_VERSION:
            raise guard.UnreadableBatch("an older release does not understand it")
        return False

    _replace(guard, "_left_to_newer", cannot_read)


# Nobody is called twice


@mechanism("claims", keeps="a lead belongs to one dispatcher at a time", experiment="dispatch-child", says="times")
def _claim_without_leaving_the_queue() -> None:
    import sqlalchemy as sa

    from pipeline.ledger.leads import Leads
    from pipeline.ledger.tables import leads

    claim = Leads.claim

    def claim_and_leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        claimed = claim(self, *args, **kwargs)
        with self._db.write() as connection:
            connection.execute(
                sa.update(leads)
                .where(leads.c.id.in_([one.lead_id for one in claimed]))
                .values(state="queued", claim_expires_at=None)
            )
        return claimed

    _replace(Leads, "claim", claim_and_leave)


@mechanism(
    "uncertain",
    keeps="a POST whose fate is unknown is not repeated",
    experiment="reset-after",
    says="was accepted 2 times",
)
def _resend_blindly() -> None:
    from pipeline import futwork
    from pipeline.futwork import verdict

    for module in (futwork, verdict):
        _replace(module, "Outcome", _Blind())


class _Blind:
    """`Outcome`, except that what is unknown is taken for a lead that Futwork did not take."""

    def __getattr__(self, name: str) -> Any:
        from pipeline.domain.lead import Outcome

        return Outcome.BUSY if name == "UNCERTAIN" else getattr(Outcome, name)


@mechanism(
    "server-error",
    keeps="a 500 proves nothing: its POST is not repeated",
    experiment="error-after",
    says="was accepted 2 times",
)
def _believe_server_errors() -> None:
    from dataclasses import replace

    from pipeline import dispatch

    settle = dispatch.settle

    def settle_and_retry(answer: Any, retry: Any, **options: Any) -> Any:
        return settle(answer, replace(retry, after_server_error=True), **options)

    _replace(dispatch, "settle", settle_and_retry)


@mechanism(
    "fence",
    keeps="a record changes only a lead that is still its own",
    experiment="early-webhooks",
    says="and it is submitted",
)
def _record_over_whatever_is_there() -> None:
    from pipeline.ledger import leads

    fenced = leads._settling

    def unfenced(recorded: Any) -> Any:
        statement = fenced(recorded)
        fence = ("state IN", "claim =")
        kept = [part for part in statement._where_criteria if not any(word in str(part) for word in fence)]
        assert len(kept) == len(statement._where_criteria) - len(fence), "the fence has moved"
        statement._where_criteria = tuple(kept)
        return statement

    _replace(leads, "_settling", unfenced)


@mechanism(
    "derived-id",
    keeps="the id that a producer was told is the lead's",
    experiment="valkey-wipe",
    says="are not in the ledger",
)
def _another_id_each_time() -> None:
    from pipeline.ledger import leads

    _replace(leads, "lead_id", lambda *_: uuid.uuid4())


# The limit


@mechanism(
    "shared-limit",
    keeps="all workers together stay within the rate",
    experiment="many-dispatchers",
    says="POSTs arrived within",
)
def _a_limit_for_each_process() -> None:
    from pipeline.coordination.limiter import Limiter

    key = Limiter._key

    def own_key(self: Any, kind: str, name: str) -> str:
        return f"{key(self, kind, name)}:{os.getpid()}"

    _replace(Limiter, "_key", own_key)


@mechanism(
    "stop-on-429",
    keeps="a 429 stops all workers for as long as it asks",
    experiment="throttled",
    says="while Futwork asked",
)
def _do_not_stop() -> None:
    from pipeline.coordination.limiter import Limiter

    _replace(Limiter, "stop", lambda *_: None)


# Events


@mechanism(
    "fold", keeps="a call is a function of the set of its events", experiment="wild-webhooks", says="is not what its"
)
def _the_last_event_wins() -> None:
    from pipeline.events import Events

    fold = Events._fold
    _replace(Events, "_fold", lambda self, stored, known: fold(self, stored[-1:], known))


@mechanism(
    "digest",
    keeps="an event is kept once, however often it comes",
    experiment="wild-webhooks",
    says="are in the ledger twice",
)
def _every_delivery_is_new() -> None:
    from pipeline import events

    digest = events.digest_of
    _replace(events, "digest_of", lambda body: digest(body + uuid.uuid4().bytes))


@mechanism(
    "evidence",
    keeps="a call's event ends the uncertainty about its lead",
    experiment="reset-after",
    says="and it is uncertain",
)
def _events_prove_nothing() -> None:
    from pipeline.ledger import calls

    def only_submitted(state: Any) -> list[str]:
        return ["submitted"]

    _replace(calls, "may_become", only_submitted)


# It finds its way back alone


@mechanism("sweep", keeps="the ledger starts what died", experiment="dispatch-worker", says="are queued")
def _never_sweep() -> None:
    from pipeline.sweep import Sweep

    _replace(Sweep, "sweep", lambda _: None)


@mechanism(
    "holds",
    keeps="a refused key, a campaign that is gone, an outage burn nothing",
    experiment="holds",
    says="is not held",
)
def _never_hold() -> None:
    from pipeline.ledger import leads

    _replace(leads, "hold_after", lambda *_, **__: None)


@mechanism("probes", keeps="a held campaign is released by itself", experiment="holds", says="no probe released")
def _never_probe() -> None:
    from pipeline.ledger.campaigns import Campaigns

    _replace(Campaigns, "take_probe", lambda *_, **__: False)


@mechanism("steady-beat", keeps="sweeps go on when the clock is set back", experiment="clock-jump", says="not drained")
def _beat_by_the_wall_clock() -> None:
    from celery.beat import Scheduler

    from pipeline.worker.beat import SteadyScheduler

    _replace(SteadyScheduler, "tick", Scheduler.tick)


@mechanism("one-clock", keeps="due times mean the same to every machine", experiment="clock-skew", says="not drained")
def _every_machine_by_its_own() -> None:
    from datetime import UTC

    from pipeline.ledger import database

    _replace(database.Database, "now", lambda _: database.datetime.now(UTC))


@mechanism(
    "future-taken-back", keeps="a clock that goes back strands nothing", experiment="clock-jump", says="not drained"
)
def _wait_for_the_future() -> None:
    from pipeline.ledger.leads import Leads

    _replace(Leads, "take_back_the_future", lambda *_, **__: 0)
