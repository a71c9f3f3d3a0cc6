"""The way of an event out of the web process: to the broker if it answers, else to the spool."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipeline.broker.group_commit import GroupCommit
from pipeline.broker.messages import WebEvent, encode_events
from pipeline.broker.publisher import Broker, BrokerUnavailable
from pipeline.broker.spool import Spool, SpoolFull, drain_spool
from pipeline.observability.logs import logger

log = logger(__name__)


class EventGate:
    """Gives events to the broker if it answers, else to the spool; safe for threads.

    Once the broker has failed, events go straight to the spool, so that no further request waits for a timeout. A
    background thread pings the broker, drains the spool when it answers, and opens the direct way again. It also drains
    what an earlier process left in the spool.
    """

    RETRY_SECONDS = 2.0

    def __init__(self, broker: Broker, spool: Spool) -> None:
        self._broker = broker
        self._spool = spool
        self._group: GroupCommit[WebEvent] = GroupCommit(self._hand_over, size_of=lambda event: len(event.body))
        self._broker_is_away = False
        self._drainer_lock = threading.Lock()
        self._drainer: threading.Thread | None = None
        self.spooled = 0
        if not self._spool_is_empty():
            self._start_drainer()

    def submit(self, event: WebEvent) -> Sequence[float]:
        """Return once the event is in the broker or on disk; raise `SpoolFull` if neither took it.

        `GroupCommit.submit` says what is returned.
        """
        return self._group.submit(event)

    def _hand_over(self, events: list[WebEvent]) -> None:
        asked = not self._broker_is_away
        if asked and self._published(events):
            return
        try:
            self._spool.write(events)
            self.spooled += len(events)
        except SpoolFull:
            # The last resort: the broker may be back before the drainer has noticed.
            if asked or not self._published(events):
                raise
        finally:
            self._start_drainer()  # after the write, or it could end before it sees the file

    def _published(self, events: list[WebEvent]) -> bool:
        try:
            self._broker.publish("pipeline.events", encode_events(events), about=f"({len(events)} events)")
        except BrokerUnavailable as error:
            if not self._broker_is_away:
                log.warning("the broker is away: events go to the spool", error=str(error))
            self._broker_is_away = True
            return False
        return True

    def _start_drainer(self) -> None:
        with self._drainer_lock:
            if self._drainer is None or not self._drainer.is_alive():
                self._drainer = threading.Thread(target=self._drain_until_empty, name="spool-drainer", daemon=True)
                self._drainer.start()

    def _drain_until_empty(self) -> None:
        pause = threading.Event()
        while True:
            drained = 0
            try:
                self._broker.ping()
                self._broker_is_away = False
                drained = drain_spool(self._spool, self._broker)
            except BrokerUnavailable:
                self._broker_is_away = True
            except OSError as error:
                log.warning("the spool could not be drained", error=str(error))
            with self._drainer_lock:
                if not self._broker_is_away and self._spool_is_empty():
                    self._drainer = None
                    return
            if not drained:
                pause.wait(self.RETRY_SECONDS)

    def _spool_is_empty(self) -> bool:
        try:
            return not self._spool.size()[0]
        except OSError:
            return True  # nothing can be drained out of it
