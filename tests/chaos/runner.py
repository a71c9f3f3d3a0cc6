"""Runs an experiment: a rig, rounds of load and faults, the wait until all is quiet, the comparison of the books."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pipeline.devstack.supervisor import ProcessFailed
from pipeline.ledger.tables import attempts, calls, leads
from tests.chaos import mechanisms
from tests.chaos.books import Findings, compare, not_drained, patiently, read_books
from tests.chaos.brokers import ServiceMissing
from tests.chaos.feed import Feed
from tests.chaos.rig import Plan, Rig

SETTLE_SECONDS = 1.5  # how long all must stay quiet: longer than a sweep, so that nothing was merely between two steps
DOOMED_SECONDS = 40.0  # with a mechanism switched off: it is expected to fail
DRAIN_SECONDS = 150.0  # without any change; the machine may be slow, and nothing here depends on how fast it is


@dataclass(slots=True)
class Round:
    """What an experiment works with: the rig, the clients, and how long it may take."""

    rig: Rig
    feed: Feed
    number: int
    short: bool
    problems: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    drain_seconds: float = DRAIN_SECONDS

    def size(self, full: int, short: int) -> int:
        """The number for a long or a short run."""
        return short if self.short else full

    def expect(self, claim: bool, otherwise: str) -> None:
        """Note a broken promise that only this experiment can see."""
        if not claim:
            self.problems.append(otherwise)

    def drain(self) -> float:
        """Wait until everything has drained by itself and stays so; return how long it took, note what did not."""
        self.feed.join()
        seconds = self.drain_seconds
        began = time.monotonic()
        quiet_since = None
        self.rig.flush_webhooks()
        flushed = changed = began
        before: list[str] = []
        while True:
            for name in self.rig.revive():
                self.problems.append(f"{name} ended by itself")
            left = not_drained(self.rig, self.feed.accepted)
            now = time.monotonic()
            self.rig.log(f"{now - began:5.1f} s of draining: {'; '.join(left) or 'quiet'}")
            if left != before:
                before, changed = left, now
            if left:
                quiet_since = None
            elif quiet_since is None:
                quiet_since = now
            elif now - quiet_since >= SETTLE_SECONDS:
                return quiet_since - began
            if now - changed > seconds or now - began > 3 * seconds:
                self.problems.append(f"not drained after {now - began:.0f} s: {'; '.join(left)}")
                return now - began
            if now - flushed > 3:
                self.rig.flush_webhooks()
                flushed = now
            time.sleep(0.5)

    def uncertain(self) -> int:
        """How many leads are uncertain now."""
        return int(self.status()["leads"]["uncertain"])

    def known(self) -> set[uuid.UUID]:
        """The ids of the leads in the ledger."""
        with self.rig.ledger.database.read() as connection:
            return set(connection.scalars(sa.select(leads.c.id)))

    def unrecorded(self) -> int:
        """How many POSTs reached the sandbox whose outcome nobody lived to record."""
        noted = patiently(lambda: sum(self.rig.ledger.reports.attempts_by_outcome().values()))
        return int(self.rig.stats()["received"]) - noted

    def called_before_answered(self) -> int:
        """Of how many leads the last event was there before the answer to their POST."""

        def ask() -> int:
            both = sa.select(calls.c.last_event_at, attempts.c.started_at, attempts.c.duration_ms)
            both = both.join(attempts, attempts.c.lead_id == calls.c.lead_id).where(calls.c.is_final)
            with self.rig.ledger.database.read() as connection:
                found = connection.execute(both).all()
            return sum(row.last_event_at < row.started_at + timedelta(milliseconds=row.duration_ms) for row in found)

        return patiently(ask)

    def await_all_sent(self) -> None:
        """Wait until no lead is queued or being sent: every claim is recorded, or was given up for lost."""
        self.await_in_ledger()
        seconds = self.drain_seconds
        deadline = time.monotonic() + seconds
        while (states := self.status()["leads"])["queued"] or states["sending"]:
            if time.monotonic() > deadline:
                self.problems.append(f"after {seconds:g} s {states['queued']} are queued, {states['sending']} sending")
                return
            time.sleep(0.4)

    def await_at_work(self, name: str, seconds: float = 30.0) -> None:
        """Wait until a worker that was started again has taken something from the broker."""
        log = self.rig.folder / "logs" / f"{name}.log"
        deadline, start = time.monotonic() + seconds, log.stat().st_size
        while time.monotonic() < deadline:
            with log.open("rb") as file:
                file.seek(start)
                if b" received" in file.read():
                    return
            time.sleep(0.05)

    def in_quarantine(self) -> int:
        """How much waits in quarantine now."""
        return int(self.status()["events"]["quarantined"])

    def await_in_ledger(self) -> None:
        """Wait until every lead that was accepted is in the ledger."""
        self.feed.join()
        seconds = self.drain_seconds
        deadline = time.monotonic() + seconds
        while self.status()["accepted"] < len(self.feed.accepted.leads):
            if time.monotonic() > deadline:
                self.problems.append(f"leads were not in the ledger after {seconds:g} s")
                return
            time.sleep(0.05)

    def await_that(self, claim: Callable[[], object], otherwise: str, *, seconds: float) -> float:
        """Wait until *claim* holds; return how long it took, and note what is *otherwise* if it does not in time."""
        began = time.monotonic()
        while not claim():
            if time.monotonic() - began > seconds:
                self.problems.append(f"{otherwise} (waited {seconds:g} s)")
                break
            time.sleep(0.05)
        return time.monotonic() - began

    def campaign(self, campaign_id: str) -> dict[str, Any]:
        """A campaign in the report, with its leads by state."""
        found = [one for one in self.status()["campaigns"] if one["id"] == campaign_id]
        return found[0] if found else {"state": "unknown", "hold_kind": None, "leads": {}}

    def watch_spool(self, seconds: float) -> int:
        """Let time pass and return the largest number of files that were in the spool."""
        ends, most = time.monotonic() + seconds, 0
        while time.monotonic() < ends:
            most = max(most, self.rig.spooled())
            time.sleep(0.1)
        return most

    def status(self) -> dict[str, Any]:
        """The pipeline's own report."""
        return patiently(lambda: self.rig.ledger.reports.status(now=datetime.now(UTC)))


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment: what it does in a round, on which rig, and which mechanism it proves."""

    name: str
    proves: str
    run: Callable[[Round], None]
    plan: Plan
    rounds: int
    may_resend: bool
    takes_seconds: float
    """About how long; the longest are started first."""


@dataclass(slots=True)
class Result:
    """A line of the table."""

    name: str
    rounds: int
    faults: int
    kills: int
    seconds: float
    seed: int
    folder: Path
    findings: Findings
    skipped: str = ""
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether an invariant broke."""
        return bool(self.findings.problems)


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(
    name: str,
    *,
    proves: str,
    plan: Plan | None = None,
    rounds: int = 1,
    may_resend: bool = False,
    takes_seconds: float = 20,
) -> Callable[[Callable[[Round], None]], Callable[[Round], None]]:
    """Register a function as an experiment; it does one round."""

    def register(run: Callable[[Round], None]) -> Callable[[Round], None]:
        EXPERIMENTS[name] = Experiment(name, proves, run, plan or Plan(), rounds, may_resend, takes_seconds)
        return run

    return register


def perform(
    *which: Experiment,
    seed: int,
    rounds: int | None = None,
    short: bool = False,
    keep: bool = False,
    without: Sequence[str] = (),
) -> Result:
    """Run an experiment to its end, or several one after another on one rig with one wait and one comparison.

    The folder of logs stays only if an invariant broke. Whatever is switched off by *without* stays so in this process.
    """
    mechanisms.switch_off(without)
    patience = DOOMED_SECONDS if without else DRAIN_SECONDS
    name = "+".join(one.name for one in which)
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{which[0].name}-"))
    rounds = rounds or (1 if short else which[0].rounds)
    result = Result(name, rounds, 0, 0, 0.0, seed, folder, Findings())
    began = time.monotonic()
    try:
        with Rig(folder, _together(which), seed=seed ^ zlib.crc32(name.encode()), short=short, without=without) as rig:
            feed = Feed(rig)
            broken: list[str] = []
            for number in range(rounds):
                for one in which:
                    rig.calm(one.plan)
                    this = Round(rig, feed, number, short, broken, result.notes, patience)
                    one.run(this)
                this.drain()
                if broken:
                    break
            may_resend = any(one.may_resend for one in which)
            result.findings = compare(rig, read_books(rig, feed.accepted), may_resend=may_resend)
            result.findings.problems += broken
            result.faults, result.kills = len(rig.faults), rig.kills
    except ServiceMissing as error:
        result.skipped = str(error)
    except ProcessFailed as error:
        result.findings.problems.append(str(error))
    result.seconds = time.monotonic() - began
    if not result.broken and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _together(which: Sequence[Experiment]) -> Plan:
    """One plan for several experiments: the rig of the first, with the settings of all."""
    settings = {name: value for one in which for name, value in one.plan.settings.items()}
    return replace(which[0].plan, settings=settings, sandbox={})
