"""The broker killed, wiped, full, away."""

from __future__ import annotations

from tests.chaos.rig import Plan
from tests.chaos.runner import Round, experiment

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
