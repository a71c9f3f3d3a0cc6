"""Events that come wildly, early, late, broken or from nowhere; messages of other releases; everything at once."""

from __future__ import annotations

from unittest.mock import patch

from pipeline.broker import MESSAGE_VERSION, messages
from tests.chaos.poison import send_poison
from tests.chaos.rig import Plan
from tests.chaos.runner import Round, experiment

# Events


@experiment(
    "wild-webhooks", proves="events merge whatever their order, repeats and lateness",
    plan=Plan(sandbox={"faults": "dup=0.5,reorder=0.6,late=0.2,malformed_webhook=0.1", "lifecycle": "mixed"}),
)  # fmt: skip
def wild_webhooks(this: Round) -> None:
    """Webhooks are repeated, reversed, late and broken, while workers are killed."""
    this.feed.leads(this.size(300, 60), seconds=3)
    for _ in range(this.size(4, 2)):
        this.rig.pause(0.4, 1.0)
        this.rig.kill_child("records")


@experiment(
    "early-webhooks", proves="a post-call event may overtake the answer to its POST",
    plan=Plan(
        sandbox={"latency_ms": 3500, "call_seconds": 0.2, "lifecycle": "mixed"},
        settings={"READ_TIMEOUT_SECONDS": "6", "CLAIM_SECONDS": "12", "DISPATCH_CONCURRENCY": "128"},
    ),
)  # fmt: skip
def early_webhooks(this: Round) -> None:
    """Calls end before their POST is answered, and some dispatchers die meanwhile."""
    this.feed.leads(this.size(250, 50), seconds=2)
    for _ in range(2):
        this.rig.pause(0.5, 1.5)
        this.rig.kill_child("dispatch")
    this.feed.leads(this.size(50, 20), seconds=0)  # which no kill hits
    this.drain()
    early = this.called_before_answered()
    this.notes["called before answered"] = early
    this.expect(early > 0, "no call ended before its POST was answered: the experiment proves nothing")


@experiment(
    "hours-late",
    proves="evidence counts whenever it comes",
    plan=Plan(ledger="sqlite", sandbox={"faults": "reset_after=0.1"}),
)
def post_hours_late(this: Round) -> None:
    """No call is told of for three hours by the clock of all our processes, while sweeps go on; then all are."""
    rig, before = this.rig, this.uncertain()
    rig.control(webhooks_paused=True)
    this.feed.leads(this.size(300, 60), seconds=2)
    this.await_all_sent()
    this.notes["uncertain for hours"] = this.uncertain() - before
    for name in ("dispatch", "records", "beat", "web"):
        rig.set_clock(name, 3 * 3600)
    rig.pause(2.0, 3.0)
    rig.control(webhooks_paused=False)
    this.drain()
    left = this.uncertain() - before
    this.expect(left <= 0, f"{left} leads are uncertain although the calls of all of them came back")


@experiment("orphans", proves="an event without a lead is kept, and stops nothing", takes_seconds=45)
def post_orphans(this: Round) -> None:
    """Ten thousand events of calls that nobody asked for, among leads."""
    this.feed.leads(this.size(200, 40), seconds=this.size(5, 3))
    this.feed.events(this.size(10_000, 200), seconds=this.size(15, 3), clients=this.size(16, 8))


@experiment("poison", proves="what cannot be read ends in quarantine, whole, and stops nothing")
def poison(this: Round) -> None:
    """Messages that are no tasks of ours, that cannot be decoded, too large, too deep, beside good ones."""
    this.feed.leads(this.size(150, 30), seconds=this.size(4, 2))
    this.feed.events(this.size(150, 30), seconds=this.size(4, 2))
    before = this.in_quarantine()
    sent = send_poison(this)
    this.drain()
    kept = this.in_quarantine() - before
    this.notes["poisoned"], this.notes["kept"] = sent, kept
    this.expect(kept == sent, f"{sent} poisoned messages and events were sent, {kept} are in quarantine")


@experiment("mixed-versions", proves="messages of another release wait for a worker that reads them", takes_seconds=35)
def mix_versions(this: Round) -> None:
    """Workers of the previous release beside ours, ours beside the next one's, and messages of all three."""
    rig, old, new = this.rig, MESSAGE_VERSION - 1, MESSAGE_VERSION + 1

    def load(version: int) -> None:
        if version != MESSAGE_VERSION and not this.short:
            rig.become("web", CHAOS_MESSAGE_VERSION=str(version))
        this.feed.events(this.size(40, 6), seconds=1)
        with patch.object(messages, "MESSAGE_VERSION", version):
            this.feed.leads(this.size(100, 20), seconds=1, by="enqueue")
            this.feed.join()

    before = this.in_quarantine()
    rig.start("records-old", CHAOS_MESSAGE_VERSION=str(old))
    load(MESSAGE_VERSION)  # messages of ours, which the older worker must leave to the other
    this.drain()
    load(old)  # older messages, which both can read
    this.drain()
    rig.end("records-old")
    load(new)  # newer messages, before anybody reads them
    rig.pause(1.0, 2.0)
    rig.start("records-new", CHAOS_MESSAGE_VERSION=str(new))
    this.drain()
    rig.end("records-new")
    if not this.short:
        rig.become("web")
    kept = this.in_quarantine() - before
    this.expect(kept == 0, f"{kept} messages of another version went to quarantine")


@experiment(
    "storm",
    proves="all of it at once",
    plan=Plan(sandbox={"faults": "wild,success_false=0", "stall_seconds": 4, "lifecycle": "mixed"}),
    takes_seconds=60,
)
def storm(this: Round) -> None:
    """Everything at random, for a while."""
    this.feed.leads(this.size(500, 60), seconds=this.size(20, 5))
    this.feed.events(this.size(300, 40), seconds=this.size(20, 5))
    rig = this.rig
    for _ in range(this.size(14, 4)):
        rig.pause(0.3, 1.5)
        rig.rng.choice(
            [
                lambda: rig.kill_child("dispatch"),
                lambda: rig.kill_child("records"),
                lambda: rig.kill_child("web"),
                lambda: rig.kill_whole("dispatch"),
                lambda: rig.kill_whole("records"),
                lambda: rig.kill_valkey(down_seconds=rig.rng.uniform(0, 1)),
                rig.database.cut,
                lambda: rig.stop_warm("records"),
            ]
        )()
    rig.control(faults="none")
