"""Workers that are killed, frozen, stopped, or live by another clock."""

from __future__ import annotations

from tests.chaos.rig import Plan
from tests.chaos.runner import Round, experiment

# Workers


SLOW = {"latency_ms": 400, "webhooks_paused": True}


"""Many POSTs are out when their dispatcher dies, and no call tells of them until their claims have ended."""


@experiment(
    "dispatch-child",
    proves="claims are fenced; a lost claim is uncertain and never sent again",
    plan=Plan(sandbox=SLOW, rate="60/s"),
)
def kill_dispatch_children(this: Round) -> None:
    """Kill children of the dispatch worker in the middle of their batches."""
    before = this.unrecorded()
    this.feed.leads(this.size(300, 100), seconds=0.5)
    for _ in range(this.size(4, 2)):
        this.rig.pause(0.7, 1.3)
        this.rig.kill_child("dispatch")
    _settle_lost_claims(this, before)


@experiment(
    "dispatch-worker",
    proves="early ack loses nothing, because the sweep finds the work again",
    plan=Plan(sandbox=SLOW, rate="60/s"),
)
def kill_dispatch_worker(this: Round) -> None:
    """Kill the dispatch worker: its main process alone, then with its children."""
    before = this.unrecorded()
    this.feed.leads(this.size(400, 150), seconds=0.5)
    this.rig.pause(0.8, 1.5)
    this.rig.kill_parent("dispatch", down_seconds=this.rig.rng.uniform(0, 1))
    this.rig.pause(2.0, 3.0)
    this.rig.kill_whole("dispatch", down_seconds=this.rig.rng.uniform(0, 1))
    _settle_lost_claims(this, before)


def _settle_lost_claims(this: Round, before: int) -> None:
    this.await_all_sent()
    this.notes["posts unrecorded"] = this.unrecorded() - before
    this.rig.control(webhooks_paused=False)


LINGER = {"CHAOS_LINGER_SECONDS": "0.1"}


"""A worker is done with its batch, and has not said so to the broker, for most of its time."""


@experiment(
    "records-child", proves="late ack and the bounded retry of a message whose worker process died",
    plan=Plan(settings=LINGER), takes_seconds=25,
)  # fmt: skip
def kill_records_children(this: Round) -> None:
    """Kill children of the worker for intake and events between running and acknowledging."""
    this.feed.leads(this.size(250, 60), seconds=2)
    this.feed.events(this.size(250, 60), seconds=2)
    for _ in range(this.size(8, 4)):
        this.rig.pause(0.2, 0.7)
        this.rig.kill_child("records")


@experiment(
    "records-worker", proves="late ack and redelivery after the visibility timeout",
    plan=Plan(settings=LINGER), takes_seconds=40,
)  # fmt: skip
def kill_records_worker(this: Round) -> None:
    """Kill the worker for intake and events while it has a backlog: its main process alone, and with its children."""
    for _ in range(this.size(3, 1)):
        this.rig.freeze("records")
        this.feed.leads(this.size(80, 50), seconds=0.5)
        this.feed.events(this.size(100, 60), seconds=0.5, clients=8)
        this.feed.join()
        this.rig.thaw("records")
        this.rig.pause(0.15, 0.5)
        this.rig.kill_whole("records")
        this.await_at_work("records")
        this.rig.pause(0.1, 0.3)
        this.rig.kill_parent("records")


@experiment(
    "frozen-machine",
    proves="a message is booked in the step that takes it off its queue, so no dead socket swallows it",
)
def freeze_and_kill(this: Round) -> None:
    """Freeze the machine of intake and events while it waits for work, let work come, then lose the machine."""
    this.feed.leads(20, seconds=0)
    for _ in range(this.size(4, 1)):
        this.drain()
        this.rig.freeze("records")
        this.feed.leads(this.size(20, 10), seconds=0.3)
        this.feed.events(this.size(20, 10), seconds=0.3)
        this.feed.join()
        this.rig.kill_whole("records")


@experiment("warm-stop", proves="a warm shutdown ends the slice and leaves nothing uncertain")
def stop_warm(this: Round) -> None:
    """SIGTERM to every part in turn under load, as a deployment does."""
    this.drain()
    before = this.uncertain()
    this.feed.leads(this.size(400, 80), seconds=this.size(12, 5))
    this.feed.events(this.size(200, 40), seconds=this.size(12, 5))
    for name in this.rig.rng.sample(["dispatch", "records", "web", "beat", "dispatch"], this.size(5, 2)):
        this.rig.pause(0.2, 1.5)
        took = this.rig.stop_warm(name)
        this.expect(took < 20, f"{name} took {took:.1f} s to end after SIGTERM")
    this.drain()
    uncertain = this.uncertain() - before
    this.expect(uncertain <= 0, f"{uncertain} leads are uncertain after warm shutdowns")


@experiment(
    "quick-stop", proves="a quick shutdown loses nothing; what was out is uncertain at most", plan=Plan(sandbox=SLOW)
)
def stop_quick(this: Round) -> None:
    """SIGTERM to every part in turn under load, and SIGQUIT before it has ended: a deployment without patience."""
    before = this.unrecorded()
    this.feed.leads(this.size(400, 80), seconds=this.size(10, 3))
    this.feed.events(this.size(200, 40), seconds=this.size(10, 3))
    for name in this.rig.rng.sample(["dispatch", "records", "web", "dispatch", "records"], this.size(5, 2)):
        this.rig.pause(0.3, 1.5)
        took = this.rig.stop_quick(name, patience=this.rig.rng.uniform(0.05, 0.3))
        this.expect(took < 10, f"{name} took {took:.1f} s to end after SIGQUIT")
    _settle_lost_claims(this, before)


@experiment(
    "clock-skew",
    proves="the ledger's clock is the only one that counts between machines",
    plan=Plan(sandbox={"latency_ms": 100}),
)
def skew_clocks(this: Round) -> None:
    """Set the clock of every machine but the ledger's ahead or back by up to two hours, under load."""
    names = ["dispatch", "records", "beat", "web"]
    for ahead in (1, -1)[: this.size(2, 2)]:
        this.feed.leads(this.size(150, 40), seconds=this.size(6, 3))
        this.feed.events(this.size(150, 20), seconds=this.size(6, 3))
        for number, name in enumerate(this.rig.rng.sample(names, len(names))):
            this.rig.pause(0.1, 0.6)
            this.rig.set_clock(name, ahead * (-1) ** number * this.rig.rng.uniform(600, 7200))
        this.rig.pause(0.5, 1.0)
        this.rig.kill_child("dispatch")
        this.drain()
    for name in names:
        this.rig.set_clock(name, 0)


@experiment(
    "clock-jump", proves="a clock that goes back strands nothing, one that goes ahead loses nothing",
    plan=Plan(ledger="sqlite", sandbox={"latency_ms": 100, "faults": "500=0.1"}), takes_seconds=45,
)  # fmt: skip
def jump_clock(this: Round) -> None:
    """Set the clock of the one machine that everything runs on ahead, then back; it must drain under each."""
    names = ["dispatch", "records", "beat", "web"]
    for seconds in (3600.0, -3600.0)[this.size(0, 1) :]:
        this.feed.leads(this.size(150, 80), seconds=3)
        this.feed.events(this.size(80, 30), seconds=3)
        this.rig.pause(0.5, 1.5)
        for name in names:
            this.rig.set_clock(name, seconds)
        this.rig.pause(0.3, 1.0)
        this.rig.kill_child("dispatch")
        this.rig.kill_child("records")
        this.drain()
    for name in names:
        this.rig.set_clock(name, 0)


@experiment("two-beats", proves="sweeps and tidying may run twice at once", plan=Plan(sandbox={"faults": "mild"}))
def run_two_beats(this: Round) -> None:
    """Run other beats beside the first, with kills so that there is something to sweep."""
    for number in range(this.size(2, 1)):
        this.rig.start(f"beat-{2 + number}")
    this.feed.leads(this.size(400, 60), seconds=3)
    for _ in range(2):
        this.rig.pause(0.5, 1.5)
        this.rig.kill_child("dispatch")
