"""Builds the objects of one process from its settings, each when it is first needed.

Nothing here connects before it is used, and `services` keeps one set a process id: a worker's children build their own
connections after the fork.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property

from pipeline.broker import Broker, BrokerUnavailable, celery_app
from pipeline.broker.gate import EventGate
from pipeline.broker.spool import Spool, drain_spool
from pipeline.coordination.connection import Redis, RedisUnavailable, connect
from pipeline.coordination.counters import Counters
from pipeline.coordination.crash_counter import CrashCounter
from pipeline.coordination.dispatch_leases import DispatchLeases
from pipeline.coordination.heartbeats import Heartbeats
from pipeline.coordination.limiter import Limiter
from pipeline.dispatch import Dispatcher
from pipeline.events import Events
from pipeline.futwork import Futwork
from pipeline.intake import Intake
from pipeline.ledger import Ledger, open_ledger
from pipeline.observability.logs import logger
from pipeline.settings import Settings, SettingsError, load_settings
from pipeline.sweep import Sweep

log = logger(__name__)

_REQUEST_EXPIRES_SECONDS = 6 * 3600.0
"""Of a message that asks for a dispatcher: more than two hosts' clocks differ by, which judge it; one that comes late
finds nothing to do."""

_HELD_PATIENCE_SECONDS = 2.0  # for events that workers hold: one that lives merges them in a fraction of it
_HELD_PAUSE_SECONDS = 0.1


class Services:
    """The services of the pipeline over one process's connections."""

    def __init__(self, settings: Settings, *, stopping: Callable[[], bool] = lambda: False) -> None:
        self.settings = settings
        self._stopping = stopping

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger, its tables checked."""
        return open_ledger(self.settings.database_url)

    @cached_property
    def broker(self) -> Broker:
        """The broker, for publishing."""
        return Broker(celery_app(self.settings, works=False))

    @cached_property
    def redis(self) -> Redis:
        """The Redis of the limit and the dispatch leases."""
        return connect(self.settings.limiter_url)

    @property
    def redis_if_any(self) -> Redis | None:
        """The same, or None beside RabbitMQ without `REDIS_URL`."""
        try:
            return self.redis
        except SettingsError:
            return None

    @cached_property
    def dispatch_leases(self) -> DispatchLeases:
        """Who dispatches which campaign."""
        return DispatchLeases(self.redis)

    @cached_property
    def limiter(self) -> Limiter:
        """The shared rate limit."""
        return Limiter(self.redis)

    @cached_property
    def heartbeats(self) -> Heartbeats:
        """Which processes live, and when the sweeps last ended."""
        return Heartbeats(self.redis)

    @cached_property
    def counters(self) -> Counters:
        """What this process counts for `/metrics`; without a Redis it counts for itself."""
        return Counters(self.redis_if_any)

    @cached_property
    def crash_counter(self) -> CrashCounter:
        """How many processes died over what; without a Redis nobody counts."""
        return CrashCounter(self.redis_if_any)

    @cached_property
    def spool(self) -> Spool:
        """Where events wait while the broker is away."""
        return Spool(self.settings.spool_dir, max_bytes=self.settings.spool_max_bytes)

    @cached_property
    def gate(self) -> EventGate:
        """Where the webhook leaves events."""
        return EventGate(self.broker, self.spool)

    @cached_property
    def intake(self) -> Intake:
        """Batches of leads into the ledger."""
        return Intake(self.ledger, self.settings, wake=self.wake, counters=self.counters)

    @cached_property
    def dispatcher(self) -> Dispatcher:
        """Leads from the ledger to Futwork."""
        return Dispatcher(
            self.ledger,
            Futwork(self.settings),
            self.limiter,
            self.dispatch_leases,
            self.settings,
            request_dispatcher=self.request_dispatcher,
            stopping=self._stopping,
            counters=self.counters,
        )

    @cached_property
    def events(self) -> Events:
        """Post-call events into calls."""
        return Events(self.ledger, self.settings, crash_counter=self.crash_counter, counters=self.counters)

    @cached_property
    def sweep(self) -> Sweep:
        """What the others left behind."""
        return Sweep(
            self.ledger,
            self.settings,
            wake=self.wake,
            merge_left_over=lambda before, now: self.events.merge_left_over(before=before, now=now),
            drain_spool=self._drain_spool,
            events_wait=self._events_wait,
            counters=self.counters,
        )

    def wake(self, campaign_id: str) -> None:
        """See that a dispatcher works on the campaign soon; does nothing if one does, or is requested, already."""
        self._request_dispatchers(campaign_id, most=1)

    def request_dispatcher(self, campaign_id: str) -> None:
        """Request one more dispatcher beside those that work on the campaign, up to the bound."""
        self._request_dispatchers(campaign_id, most=self.settings.dispatchers_per_campaign)

    def _request_dispatchers(self, campaign_id: str, *, most: int) -> None:
        try:
            if not self.dispatch_leases.request(campaign_id, most=most):
                return
            try:
                about = f"({campaign_id})"
                self.broker.publish(
                    "pipeline.dispatch", campaign_id, about=about, expires_seconds=_REQUEST_EXPIRES_SECONDS
                )
            except BrokerUnavailable:
                self.dispatch_leases.withdraw(campaign_id)
                raise
        except (BrokerUnavailable, RedisUnavailable) as error:
            log.warning("no dispatcher could be requested; the sweep will", campaign=campaign_id, error=str(error))

    def _events_wait(self) -> bool:
        try:
            if self.spool.size()[0] or self.spool.damaged() or self.broker.depths()["events"]:
                return True  # what the drain left in this host's spool may be evidence, too
            until, held = time.monotonic() + _HELD_PATIENCE_SECONDS, self.broker.held("events")
            while held and time.monotonic() < until:  # workers that live end with what they held at the start
                time.sleep(_HELD_PAUSE_SECONDS)
                held &= self.broker.held("events")
            # A message that was put back meanwhile is in the queue again.
            return bool(held) or self.broker.depths()["events"] > 0
        except (BrokerUnavailable, OSError) as error:
            log.warning("no policy decides: nobody knows whether events wait in the broker", error=str(error))
            return True

    def _drain_spool(self) -> int:
        try:
            return drain_spool(self.spool, self.broker)
        except BrokerUnavailable as error:
            log.warning("the spool waits for the broker", error=str(error))
        except OSError as error:
            log.warning("the spool could not be read", error=str(error))
        return 0


_of_process: dict[int, Services] = {}


def services(settings: Settings | None = None, *, stopping: Callable[[], bool] = lambda: False) -> Services:
    """This process's services, built at the first call; a child of a fork gets its own."""
    pid = os.getpid()
    mine = _of_process.get(pid)
    if mine is None:
        for other in set(_of_process) - {pid}:
            _of_process.pop(other, None)  # what a parent built is not ours to use, nor to close
        mine = _of_process.setdefault(pid, Services(settings or load_settings(), stopping=stopping))
    return mine


def close_services() -> None:
    """Hand in what this process has counted, and close its connections to the ledger, if it has any."""
    mine = _of_process.pop(os.getpid(), None)
    if mine and "counters" in mine.__dict__:
        mine.counters.flush()
    ledger = mine.__dict__.get("ledger") if mine else None
    if ledger is not None:
        ledger.close()
