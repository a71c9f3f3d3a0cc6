"""Which parts of the pipeline run, and what they report, at one moment.

A `Watch` asks the ledger, the broker and Redis, each on a thread of its own, and never waits longer than its patience.
A part that is away, or slow, keeps nobody from hearing of the others. Readers: `/readyz`, `/metrics`, `/ops`,
`pipeline top`, `pipeline status` and `pipeline doctor`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar

from pipeline.broker import QUEUES, Broker, BrokerUnavailable
from pipeline.broker.spool import Spool
from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.heartbeats import ALIVE_SECONDS, Heartbeat, Heartbeats
from pipeline.coordination.limiter import Limiter
from pipeline.ledger import Ledger, ledger_is_at_fault
from pipeline.observability.logs import logger
from pipeline.observability.metrics import LAST_RUN
from pipeline.settings import Settings, SettingsError
from pipeline.status.text import first_line

log = logger(__name__)

PATIENCE_SECONDS = 4.0  # for all parts together; Prometheus gives a scrape ten by default
STATEMENT_SECONDS = 20.0  # for one statement in the ledger
_REMEMBERED = timedelta(minutes=10)  # so long a process that fell silent is reported as silent

T = TypeVar("T")


class Parts(Protocol):
    """The connections of one process, each built when it is first used (`pipeline.wiring.Services`)."""

    @property
    def settings(self) -> Settings: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def broker(self) -> Broker: ...
    @property
    def limiter(self) -> Limiter: ...
    @property
    def heartbeats(self) -> Heartbeats: ...
    @property
    def spool(self) -> Spool: ...


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What a part reported, or why it did not."""

    value: T | None
    error: Exception | None = None
    age_seconds: float = 0.0
    """How long ago it was asked."""
    took_seconds: float = 0.0

    @property
    def why(self) -> str:
        """Why it is away, in a line; empty if it is not."""
        return first_line(self.error) if self.error else ""

    def get(self) -> T:
        """What it reported; raises the reason if it is away."""
        if self.value is None:
            raise self.error or TimeoutError("no answer in time")
        return self.value


@dataclass(frozen=True, slots=True)
class Shared:
    """What the Redis of the rate limiter reports."""

    accounts: dict[str, tuple[float, float]]
    """For each account how long Futwork's 429 still stops it, in seconds, and the share of its rate that it may use."""
    heartbeats: list[Heartbeat]
    """Of processes that run, or fell silent a few minutes ago."""
    last_runs: dict[str, float | None]
    """How many seconds ago each periodic task last finished; None if that is not known."""

    @property
    def alive(self) -> list[Heartbeat]:
        """The processes that run."""
        return [one for one in self.heartbeats if one.seconds_ago <= ALIVE_SECONDS]

    @property
    def silent(self) -> list[Heartbeat]:
        """The processes that fell silent lately."""
        return [one for one in self.heartbeats if one.seconds_ago > ALIVE_SECONDS]

    def of_kind(self, kind: str) -> list[Heartbeat]:
        """The running processes of a kind."""
        return [one for one in self.alive if one.kind == kind]

    @property
    def workers_by_queue(self) -> dict[str, int]:
        """How many workers serve each of our queues."""
        return {queue: sum(queue in one.queues for one in self.alive) for queue in QUEUES}

    @property
    def unserved(self) -> list[str]:
        """Our queues that no worker serves."""
        return [queue for queue, workers in self.workers_by_queue.items() if not workers]


@dataclass(frozen=True, slots=True)
class SpoolContent:
    """What waits in the spool of this host."""

    files: int
    bytes: int
    damaged: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pipeline at one moment."""

    at: datetime
    ledger: Answer[dict[str, Any]]
    """The ledger's overview, in the shape of `pipeline.ledger.reports.overview`."""
    broker: Answer[dict[str, int]]
    """How many messages wait in each queue."""
    shared: Answer[Shared]
    spool: SpoolContent | None
    """None where this process may not read it."""

    @property
    def away(self) -> dict[str, str]:
        """The parts that did not answer, each with the reason."""
        parts: dict[str, Answer[Any]] = {"broker": self.broker, "limit": self.shared, "ledger": self.ledger}
        return {name: answer.why for name, answer in parts.items() if answer.value is None}


class Source(Generic[T]):
    """Something that is asked on a thread of its own, by one thread at a time, however long it takes."""

    def __init__(self, ask: Callable[[], T], *, stale_seconds: float = PATIENCE_SECONDS) -> None:
        self.stale_seconds = stale_seconds
        self._ask = ask
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last: tuple[T | None, Exception | None, float, float] | None = None

    def begin(self) -> None:
        """Ask, unless an earlier question is not answered yet."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._try, name="snapshot", daemon=True)
                self._thread.start()

    def answer(self, until: float) -> Answer[T]:
        """Wait until then for an answer; without one give the last, unless that is older than `stale_seconds`."""
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, until - time.monotonic()))
        if self._last is not None:
            value, error, asked_at, took = self._last
            age = time.monotonic() - asked_at
            if error is not None or age - took < self.stale_seconds:
                return Answer(value, error, age, took)
        return Answer(None, TimeoutError("no answer in time"))

    def _try(self) -> None:
        started = time.monotonic()
        value, error = None, None
        try:
            value = self._ask()
        except Exception as caught:
            error = caught
            if not _is_absence(caught):
                log.exception("a part could not be asked")
        self._last = (value, error, started, time.monotonic() - started)


def _answers(ping: Callable[[], None]) -> bool:
    ping()
    return True


def _is_absence(error: Exception) -> bool:
    absences = (BrokerUnavailable, RedisUnavailable, SettingsError, OSError)
    return isinstance(error, absences) or ledger_is_at_fault(error)


@dataclass(slots=True)
class Watch:
    """Takes snapshots over the connections of one process.

    The answer of a part that is slow may be up to *stale_seconds* old. *ledger* opens another ledger than the parts'.
    """

    parts: Parts
    ledger: Callable[[], Ledger] | None = None
    patience_seconds: float = PATIENCE_SECONDS
    statement_seconds: float = STATEMENT_SECONDS
    stale_seconds: float = PATIENCE_SECONDS
    overview: Source[dict[str, Any]] = field(init=False)
    depths: Source[dict[str, int]] = field(init=False)
    shared: Source[Shared] = field(init=False)
    _pings: dict[str, Source[bool]] = field(init=False)

    def __post_init__(self) -> None:
        self.overview = Source(self._ask_ledger, stale_seconds=self.stale_seconds)
        self.depths = Source(self._ask_broker, stale_seconds=self.stale_seconds)
        self.shared = Source(self._ask_redis, stale_seconds=self.stale_seconds)
        self._pings = {
            "broker": Source(lambda: _answers(self.parts.broker.ping)),
            "ledger": Source(lambda: _answers(self._ledger().ping)),
        }

    def look(self) -> Snapshot:
        """Ask every part at once; answers within the patience."""
        for source in (self.overview, self.depths, self.shared):
            source.begin()
        until = time.monotonic() + self.patience_seconds
        spool = self.spool()
        broker, shared, ledger = self.depths.answer(until), self.shared.answer(until), self.overview.answer(until)
        at = ledger.value["now"] if ledger.value is not None else datetime.now(UTC)
        return Snapshot(at, ledger, broker, shared, spool)

    def ready(self) -> dict[str, Answer[bool]]:
        """Whether broker and ledger answer at all, and nothing more."""
        for source in self._pings.values():
            source.begin()
        until = time.monotonic() + self.patience_seconds
        return {name: source.answer(until) for name, source in self._pings.items()}

    def spool(self) -> SpoolContent | None:
        """What waits in this host's spool."""
        try:
            return SpoolContent(*self.parts.spool.size(), self.parts.spool.damaged())
        except OSError:
            return None

    def _ledger(self) -> Ledger:
        return self.ledger() if self.ledger else self.parts.ledger

    def _ask_ledger(self) -> dict[str, Any]:
        ledger = self._ledger()
        return ledger.reports.overview(now=ledger.now(), within=timedelta(seconds=self.statement_seconds))

    def _ask_broker(self) -> dict[str, int]:
        return self.parts.broker.depths()

    def _ask_redis(self) -> Shared:
        accounts = {}
        for account in sorted(self.parts.settings.api_keys()) or ["default"]:
            stopped, factor = self.parts.limiter.standing(account)
            accounts[account] = (stopped.total_seconds(), factor)
        last = {task: self.parts.heartbeats.last_run(task) for task in LAST_RUN.values["task"]}
        runs = {task: None if ago is None else max(0.0, ago) for task, ago in last.items()}
        return Shared(accounts, self.parts.heartbeats.alive(within=_REMEMBERED), runs)
