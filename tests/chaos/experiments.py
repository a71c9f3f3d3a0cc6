"""The experiments, by the part that is hurt."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

from pipeline.broker import MESSAGE_VERSION, messages
from pipeline.ledger import LeadFilter
from tests.chaos.poison import send_poison
from tests.chaos.rig import CAMPAIGN, KEY, Plan
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


# The web process


@experiment("web-worker", proves="an event is answered only when it is in the broker or on disk")
def kill_web_workers(this: Round) -> None:
    """Kill gunicorn's workers in the middle of requests."""
    this.feed.leads(this.size(250, 60), seconds=4, by="http")
    this.feed.events(this.size(400, 100), seconds=4, clients=8)
    for _ in range(this.size(8, 4)):
        this.rig.pause(0.2, 0.7)
        this.rig.kill_child("web")


@experiment("web-master", proves="the same, when the whole web server dies")
def kill_web_master(this: Round) -> None:
    """Kill gunicorn as a whole, and its master alone, in the middle of requests."""
    this.feed.leads(this.size(250, 60), seconds=5, by="http")
    this.feed.events(this.size(300, 80), seconds=5, clients=8)
    this.rig.pause(0.5, 1.5)
    this.rig.kill_whole("web", down_seconds=0.5)
    this.rig.pause(2.5, 3.5)
    this.rig.kill_parent("web")


# The broker


@experiment("valkey-kill", proves="an append-only file keeps what was accepted when the broker is killed")
def kill_valkey(this: Round) -> None:
    """Kill Valkey (appendfsync everysec) under load and start it again on the same disk."""
    _kill_valkey(this)


@experiment("valkey-kill-always", proves="the same with appendfsync always", plan=Plan(appendfsync="always"))
def kill_valkey_always(this: Round) -> None:
    """Kill Valkey (appendfsync always) under load and start it again on the same disk."""
    _kill_valkey(this)


def _kill_valkey(this: Round) -> None:
    this.feed.leads(this.size(300, 60), seconds=this.size(6, 4))
    this.feed.events(this.size(300, 60), seconds=this.size(6, 4))
    for _ in range(this.size(3, 2)):
        this.rig.pause(0.7, 1.5)
        this.rig.kill_valkey(down_seconds=this.rig.rng.uniform(0, 0.7))


@experiment("valkey-wipe", proves="what reached the ledger does not need the broker")
def wipe_valkey(this: Round) -> None:
    """Lose the broker with its disk while the leads, all in the ledger, go out; then with leads that only it had."""
    rig = this.rig
    this.drain()
    rig.control(latency_ms=300, webhooks_paused=True)
    this.feed.leads(this.size(600, 100), seconds=1, by="enqueue")
    this.await_in_ledger()
    rig.pause(0.2, 1.0)
    rig.kill_valkey(down_seconds=rig.rng.uniform(0, 1), wipe=True)
    rig.control(webhooks_paused=False)
    this.drain()

    rig.freeze("records")
    before = set(this.feed.accepted.leads)
    rows = this.feed.leads(this.size(100, 40), seconds=0, by="http")
    this.feed.join()
    at_stake = this.feed.accepted.leads - before
    rig.kill_valkey(down_seconds=0, wipe=True)
    rig.thaw("records")
    rig.pause(2.0, 3.0)
    lost = len(at_stake - this.known())
    this.notes["only in the broker"], this.notes["lost with its disk"] = len(at_stake), lost
    this.feed.again(rows)  # what a backend does that cannot be sure: it is harmless, and brings them back


@experiment("broker-away", proves="events go to the spool, and are drained when the broker is back", takes_seconds=50)
def take_broker_away(this: Round) -> None:
    """Take the broker away for half a minute during which webhooks and leads arrive."""
    away = this.size(30, 4)
    this.feed.leads(this.size(300, 60), seconds=away + 4)
    this.feed.events(this.size(600, 80), seconds=away + 4)
    refused = this.feed.accepted.events_refused
    this.rig.pause(1.0, 2.0)
    this.rig.valkey.kill()
    this.rig.note(f"Valkey away for {away} s", kills=True)
    most = this.watch_spool(away)
    this.rig.valkey.start()
    this.drain()
    refused = this.feed.accepted.events_refused - refused
    this.notes["spooled files"] = most
    this.expect(most > 0, "nothing went to the spool although the broker was away")
    this.expect(refused == 0, f"{refused} events were refused although the spool had room")


@experiment(
    "spool-full",
    proves="what no disk takes is refused, what was taken is kept",
    plan=Plan(disk_bytes=64 * 1024, appendfsync="always"),
)
def fill_the_disk(this: Round) -> None:
    """Take the broker away until the disk under the spool is full, and on."""
    away = this.size(12, 5)
    refused = this.feed.accepted.events_refused
    this.feed.events(this.size(200, 80), seconds=away, clients=8, make=this.feed.large_event)
    this.rig.valkey.kill()
    this.rig.note(f"Valkey away for {away} s", kills=True)
    full = lambda: this.feed.accepted.events_refused - refused  # noqa: E731 - asked several times
    this.await_that(full, "the disk never filled up: the experiment proves nothing", seconds=60)
    this.rig.pause(1.0, 2.0)
    this.rig.valkey.start()
    this.drain()
    this.notes["events refused for now"] = full()


@experiment("rabbitmq-drops", proves="publisher confirms and late ack on RabbitMQ", plan=Plan(broker="rabbitmq"))
def drop_rabbitmq_connections(this: Round) -> None:
    """Close every connection to RabbitMQ again and again, and kill workers meanwhile."""
    this.feed.leads(this.size(300, 60), seconds=this.size(8, 4))
    this.feed.events(this.size(300, 60), seconds=this.size(8, 4))
    for name in ("records", "dispatch", "records")[: this.size(3, 1)]:
        this.rig.pause(0.3, 1.0)
        this.rig.note(f"{this.rig.rabbit.drop_connections()} connections to RabbitMQ closed")
        this.rig.pause(0.3, 1.0)
        this.rig.kill_child(name)
        this.rig.pause(0.3, 1.0)
        this.rig.kill_whole(name)


@experiment(
    "rabbitmq-restart", proves="the same while RabbitMQ itself is killed and restarted",
    plan=Plan(broker="private-rabbitmq"), takes_seconds=90,
)  # fmt: skip
def restart_rabbitmq(this: Round) -> None:
    """Kill a RabbitMQ node under load and start it again on its disk; then stop and start it in an orderly way."""
    for how in ("kill", "stop")[: this.size(2, 1)]:
        this.feed.leads(this.size(200, 60), seconds=6)
        this.feed.events(this.size(300, 60), seconds=6, clients=8)
        this.rig.pause(0.8, 2.0)
        this.rig.note(f"RabbitMQ: {how}", kills=how == "kill")
        if how == "kill":
            this.rig.rabbit.kill()
        else:
            this.rig.rabbit.stop()
        this.rig.rabbit.start()
        this.feed.join()


# The ledger


@experiment("postgres-cut", proves="a message whose ledger is away goes back to its queue")
def cut_postgres_connections(this: Round) -> None:
    """Terminate the connections to PostgreSQL, in the middle of transactions too, again and again."""
    this.feed.leads(this.size(300, 60), seconds=5)
    this.feed.events(this.size(300, 60), seconds=5)
    ends = time.monotonic() + 5
    cut = 0
    while time.monotonic() < ends:
        this.rig.pause(0.05, 0.4)
        cut += this.rig.database.cut(busy_only=this.rig.rng.random() < 0.7)
        this.rig.note("connections to PostgreSQL cut")
    this.notes["cut"] = this.notes.get("cut", 0) + cut


@experiment(
    "postgres-restart", proves="the same while the database restarts, fast and after a crash",
    plan=Plan(ledger="private-postgres"),
)  # fmt: skip
def restart_postgres(this: Round) -> None:
    """Restart a private PostgreSQL under load: fast, immediate, and after SIGKILL."""
    this.feed.leads(this.size(400, 60), seconds=this.size(14, 6))
    this.feed.events(this.size(300, 40), seconds=this.size(14, 6))
    for how in ("fast", "immediate", "kill")[this.size(0, 2) :]:
        this.rig.pause(1.0, 2.0)
        this.rig.note(f"PostgreSQL: {how}", kills=how == "kill")
        if how == "kill":
            this.rig.database.kill()
        else:
            this.rig.database.down(how)
        this.rig.pause(0.5, 2.0)
        this.rig.database.up()


@experiment("sqlite-locked", proves="writers queue up for SQLite", plan=Plan(ledger="sqlite"))
def lock_sqlite(this: Round) -> None:
    """Hold SQLite's write lock from another process, once for longer than our writers wait."""
    this.feed.leads(this.size(250, 40), seconds=4)
    this.feed.events(this.size(200, 30), seconds=4)
    for seconds in (2.0, 18.0)[: this.size(2, 1)]:
        this.rig.pause(0.5, 1.0)
        with contextlib.closing(sqlite3.connect(this.rig.database.path, isolation_level=None, timeout=30)) as other:
            other.execute("BEGIN IMMEDIATE")
            this.rig.note(f"SQLite locked for {seconds:g} s")
            time.sleep(seconds)
            other.execute("ROLLBACK")


@experiment("sqlite-kills", proves="the ledger on SQLite survives its writers", plan=Plan(ledger="sqlite"))
def kill_over_sqlite(this: Round) -> None:
    """Kill workers and their children over an SQLite ledger."""
    this.feed.leads(this.size(250, 50), seconds=5)
    this.feed.events(this.size(250, 50), seconds=5)
    for name in ("records", "dispatch") * this.size(4, 1):
        this.rig.pause(0.2, 0.7)
        this.rig.kill_child(name)
    this.rig.kill_whole("records")
    this.rig.kill_whole("dispatch")


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
