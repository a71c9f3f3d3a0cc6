"""A Futwork that resets, stalls, throttles, flaps or refuses."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.ledger import LeadFilter
from tests.chaos.rig import CAMPAIGN, KEY, Plan
from tests.chaos.runner import Round, experiment

# Futwork


@experiment(
    "reset-after", proves="an unknown fate is uncertain, and a post-call event settles it without a second POST",
    plan=Plan(sandbox={"faults": "reset_after=0.05"}),
)  # fmt: skip
def reset_after(this: Round) -> None:
    """Futwork takes the lead and drops the connection, for one POST in twenty."""
    before = this.uncertain()
    this.feed.leads(this.size(600, 100), seconds=3)
    this.drain()
    dropped = this.rig.stats()["outcomes"].get("reset_after", 0)
    this.notes["dropped"] = dropped
    this.expect(dropped > 0, "no connection was dropped: the experiment proves nothing")
    left = this.uncertain() - before
    this.expect(left <= 0, f"{left} leads are uncertain although the calls of all of them came back")


@experiment(
    "error-after", proves="a lead whose POST was answered 500 is never sent again without proof",
    plan=Plan(sandbox={"faults": "500=0.1"}),
)  # fmt: skip
def error_after(this: Round) -> None:
    """One POST in ten is answered 500, and Futwork took the lead of every second one of these."""
    before = this.uncertain()
    this.feed.leads(this.size(600, 150), seconds=3)
    this.drain()
    failed = [entry for entry in this.rig.lines("journal") if entry["status"] == 500]
    taken = sum(entry["accepted"] for entry in failed)
    this.notes["500s"], this.notes["taken"] = len(failed), taken
    this.expect(0 < taken < len(failed), "the 500s were all taken or none: the experiment proves nothing")
    left = this.uncertain() - before
    this.expect(left <= len(failed) - taken, f"{left} leads are uncertain, {len(failed) - taken} 500s were not taken")


@experiment(
    "stall", proves="a read timeout is uncertain, never sent again", plan=Plan(sandbox={"faults": "stall=0.08"})
)
def stall(this: Round) -> None:
    """Futwork takes the lead and answers long after the read timeout."""
    this.feed.leads(this.size(400, 60), seconds=3)
    this.drain()
    stalled = this.rig.stats()["outcomes"].get("stalled", 0)
    this.notes["stalled"] = stalled
    this.expect(stalled > 0, "nothing stalled: the experiment proves nothing")


@experiment(
    "throttled", proves="a 429 stops all workers for its Retry-After and costs no attempt",
    plan=Plan(sandbox={"rate": "30/s"}, settings={"RETRY_AFTER_CAP_SECONDS": "6"}),
)  # fmt: skip
def throttle(this: Round) -> None:
    """Futwork allows a third of what we believe, then nothing at all for a while, then everything."""
    this.feed.leads(this.size(900, 250), seconds=1)
    this.rig.pause(2.0, 3.0)
    heard = _throttled(this)
    this.rig.control(rate="1/m")
    this.rig.note("Futwork throttles everything, Retry-After up to a minute")
    this.await_that(lambda: _throttled(this) > heard, "no worker was told to be silent", seconds=30)
    this.rig.pause(1.0, 2.0)
    before = this.rig.stats()["received"]
    this.rig.pause(3.0, 4.0)
    storm = this.rig.stats()["received"] - before
    this.notes["posts in the storm"] = storm
    this.expect(storm <= 2, f"{storm} POSTs went out while Futwork asked for a minute of silence")
    this.rig.control(rate=None)


def _throttled(this: Round) -> int:
    return int(this.rig.stats()["outcomes"].get("throttled", 0))


@experiment(
    "many-dispatchers", proves="all workers on all machines together stay within the rate",
    plan=Plan(rate="60/s", sandbox={"latency_ms": 500}, settings={"DISPATCH_CONCURRENCY": "32"}),
)  # fmt: skip
def dispatch_from_two_machines(this: Round) -> None:
    """Two machines with two dispatchers each, which could send four times as fast as the rate, and one that dies."""
    this.rig.start("dispatch-2")
    this.feed.leads(this.size(400, 150), seconds=0.5)
    this.feed.leads(this.size(400, 150), seconds=0.5, campaign="other-campaign")
    this.rig.pause(2.0, 3.0)
    this.rig.kill_child("dispatch")
    this.drain()
    this.rig.end("dispatch-2")


@experiment("flapping", proves="an outage holds the campaign, probes find its end", plan=Plan(rate="60/s"))
def flap(this: Round) -> None:
    """Futwork goes through resets, 500, 502, 503, refused connections and health, again and again."""
    before, times = this.uncertain(), this.size(4, 2)
    this.feed.leads(this.size(400, 120), seconds=1)
    for number in range(times):
        this.rig.pause(0.5, 1.5)
        fault = this.rig.rng.choice(["500=1", "502=1", "503=1", "500=0.5,503=0.3"]) if number else "reset_before=1"
        this.rig.note(f"Futwork: {fault}")
        this.rig.control(faults=fault)
        this.rig.pause(1.0, 2.0)
        this.rig.control(faults="none")
        this.rig.pause(0.5, 1.0)
        this.rig.note("Futwork refuses connections")
        this.rig.control(refuse_now=this.rig.rng.uniform(0.3, 1.5))
    this.drain()
    uncertain, at_most = this.uncertain() - before, 10 * times  # a run of five, and what was out by then
    this.expect(
        uncertain <= at_most, f"{uncertain} leads became uncertain in {times} outages, at most {at_most} should"
    )


@experiment(
    "holds", proves="a wrong key, a lost campaign, an outage and a changed schema hold, burn nothing, and are released",
    takes_seconds=100,
)  # fmt: skip
def hold_and_release(this: Round) -> None:
    """Each of the four in the middle of 100,000 queued leads: what is spent, who is told, what it takes to go on."""
    this.drain()
    this.feed.into_the_ledger(this.size(100_000, 2_000))
    for hold in HOLDS:
        _hold_and_release(this, hold)
    this.rig.ledger.interventions.cancel(LeadFilter(campaign=CAMPAIGN), now=datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class _Held:
    """One way to be held: how it begins and ends, and what the sandbox answers meanwhile."""

    kind: str
    begins: dict[str, Any]
    ends: dict[str, Any]
    status: str
    spares_others: bool = False


HOLDS = (
    _Held("refused_key", {"api_keys": []}, {"api_keys": [KEY]}, "401"),
    _Held("refused_campaign", {"gone_campaigns": [CAMPAIGN]}, {"gone_campaigns": []}, "404", spares_others=True),
    _Held("outage", {"faults": "503=1"}, {"faults": "none"}, "503"),
    _Held("rejections", {"lead_schema": ["another_name"]}, {"lead_schema": None}, "422"),
)


_OUT_AT_ONCE = 4 * 32  # what four dispatchers can have out: one batch


_PROBES = 8  # in the time that a hold lasts here


_PROBE_CAP_SECONDS = 4.0


_WORSE = ("rejected", "exhausted", "expired", "cancelled", "uncertain")


def _hold_and_release(this: Round, how: _Held) -> None:
    rig = this.rig

    def state() -> tuple[str, str | None]:
        campaign = this.campaign(CAMPAIGN)
        return campaign["state"], campaign["hold_kind"]

    def told() -> int:
        lines = rig.logged("dispatch", "campaign held")
        return sum(line["kind"] == how.kind and line["campaign"] == CAMPAIGN for line in lines)

    def worse() -> dict[str, int]:
        return {name: this.status()["leads"][name] for name in _WORSE}

    sent = rig.stats()["accepted"]
    this.await_that(lambda: rig.stats()["accepted"] > sent, f"nothing is sent before {how.kind}", seconds=30)
    rig.pause(0.3, 1.0)
    spent, lines, before = rig.stats()["statuses"].get(how.status, 0), told(), worse()
    rig.note(how.kind)
    rig.control(**how.begins)
    this.await_that(lambda: state() == ("held", how.kind), f"the campaign is not held for {how.kind}", seconds=30)
    if how.spares_others:
        sent = rig.stats()["accepted"]
        this.feed.leads(20, seconds=0, campaign="other-campaign")
        this.await_that(lambda: rig.stats()["accepted"] >= sent + 20, "another campaign is held up too", seconds=30)
    rig.pause(this.size(3, 1), this.size(4, 2))
    metric = f'pipeline_campaign_stopped{{campaign="{CAMPAIGN}",why="{how.kind}"}} 1.0'
    this.expect(metric in rig.metrics(), f"no metric says {how.kind}")
    this.expect(told() - lines == 1, f"{told() - lines} lines of the log say {how.kind}, one should")
    spent = rig.stats()["statuses"].get(how.status, 0) - spent
    this.notes[f"{how.status}s"] = spent
    this.expect(0 < spent <= _OUT_AT_ONCE + _PROBES, f"{spent} POSTs saw {how.status}: more than one batch and probes")
    rig.control(**how.ends)
    took = this.await_that(lambda: state()[0] == "active", f"no probe released {how.kind}", seconds=60)
    this.expect(took < _PROBE_CAP_SECONDS + 6, f"{how.kind} was released only after {took:.1f} s")
    this.notes["released after"] = round(max(took, float(str(this.notes.get("released after", 0)))), 1)
    this.expect(worse() == before, f"leads changed for the worse under {how.kind}: {before} before, {worse()} after")
