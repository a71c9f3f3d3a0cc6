"""What is broken, which alerts must fire for it, and how it is mended."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from pipeline.broker import WebEvent, encode_events
from tests.alerts.rig import SPOOL_BYTES, Rig
from tests.waiting import until


@dataclass(frozen=True, slots=True)
class Experiment:
    """One fault and its mend: *breaks* breaks something, yields, and mends it."""

    name: str
    alerts: tuple[str, ...]
    fault: str
    mend: str
    breaks: Callable[[Rig], Iterator[None]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of an experiment; times in seconds."""

    experiment: Experiment
    fired_after: dict[str, float]
    silent_after: dict[str, float]
    others: Sequence[str]
    """Alerts that fired although the fault was meant for another: it has more than one effect."""


def run(rig: Rig, experiment: Experiment, *, seconds: float = 90) -> Seen:
    """Break, see every alert fire, mend, see every one fall silent. Fails if one does not."""
    rig.await_silence()
    fired: dict[str, float] = {}
    others: set[str] = set()
    silent: dict[str, float] = {}

    def all_fire() -> bool:
        for name, _ in rig.prometheus.firing():
            fired.setdefault(name, time.monotonic() - started)
            others.add(name)
        return set(experiment.alerts) <= set(fired)

    def all_silent() -> bool:
        firing = {name for name, _ in rig.prometheus.firing()}
        others.update(firing)
        for name in set(experiment.alerts) - firing:
            silent.setdefault(name, time.monotonic() - mended)
        for name in firing:
            silent.pop(name, None)
        return set(experiment.alerts) <= set(silent)

    started = time.monotonic()
    steps = experiment.breaks(rig)
    next(steps)
    try:
        until(all_fire, seconds=seconds, what=lambda: f"{experiment.name}: {sorted(rig.prometheus.firing())}")
    finally:
        next(steps, None)
    mended = time.monotonic()
    until(all_silent, seconds=seconds, what=lambda: f"{experiment.name}: {sorted(rig.prometheus.firing())}")
    return Seen(
        experiment,
        {name: fired[name] for name in experiment.alerts},
        silent,
        sorted(others - set(experiment.alerts)),
    )


# The faults


def web_ends(rig: Rig) -> Iterator[None]:
    rig.stop("web")
    yield
    rig.start("web")


def a_lock_is_held(rig: Rig) -> Iterator[None]:
    with rig.fleet.ledger.database.write() as connection:
        rig.prometheus.pace(5)  # a scrape waits for four seconds
        connection.execute(sa.text("LOCK TABLE campaigns IN ACCESS EXCLUSIVE MODE"))
        yield
    rig.prometheus.pace(1)


def a_table_is_gone(rig: Rig) -> Iterator[None]:
    _sql(rig, "ALTER TABLE campaigns RENAME TO gone")
    yield
    _sql(rig, "ALTER TABLE gone RENAME TO campaigns")


def the_limit_is_away(rig: Rig) -> Iterator[None]:
    rig.limit.kill()
    yield
    rig.limit.start()


def the_broker_is_away(rig: Rig) -> Iterator[None]:
    """Until the spool is full and the webhook refuses."""
    rig.broker.kill()
    sent = 0
    while rig.post(_event(f"spooled-{sent}", size=SPOOL_BYTES // 20)) == 200:
        sent += 1
        assert sent < 100
    assert sent > 10
    yield
    rig.broker.start()


def strangers_knock(rig: Rig) -> Iterator[None]:
    assert rig.post(_event("x"), token="wrong") == 401
    assert rig.post(b"no json") == 400
    assert rig.post(_event("of-nobody")) == 200
    rig.publisher().publish("pipeline.intake", "no batch", about="()")
    yield


def dispatch_ends(rig: Rig) -> Iterator[None]:
    rig.stop("dispatch")
    rig.enqueue("stuck", 3)
    yield
    rig.start("dispatch")


def beat_ends(rig: Rig) -> Iterator[None]:
    rig.stop("beat")
    yield
    rig.start("beat")


def records_end(rig: Rig) -> Iterator[None]:
    """The worker of the other queues, and a pile of events comes."""
    rig.stop("records")
    publisher, now = rig.publisher(), datetime.now(UTC)
    for number in range(1100):
        batch = [WebEvent(_event("late", number=number), now)]
        publisher.publish("pipeline.events", encode_events(batch), about="(1 event)")
    yield
    rig.start("records")


def events_come_late(rig: Rig) -> Iterator[None]:
    """Out of a queue that nobody worked on for a while."""
    rig.stop("records")
    assert rig.post(_event("slow")) == 200
    time.sleep(3)  # the lag itself
    rig.start("records")
    yield


def the_key_is_refused(rig: Rig) -> Iterator[None]:
    rig.change(api_keys=["another"])
    rig.enqueue("refused", 2)
    yield
    rig.change(api_keys=["sandbox-key"])


def answers_are_lost(rig: Rig) -> Iterator[None]:
    rig.change(faults={"reset_after": 1.0}, webhooks_paused=True)
    rig.enqueue("unsure", 2)
    yield
    rig.pipeline("resolve", "--campaign", "unsure", "--drop")
    rig.change(faults={}, webhooks_paused=False)


def leads_grow_old(rig: Rig) -> Iterator[None]:
    rig.pipeline("campaign", "pause", "calm")
    rig.pipeline("campaign", "set", "calm", "--lead-max-age-seconds", "1")
    rig.enqueue("calm", 3, start=100)
    yield
    rig.pipeline("campaign", "resume", "calm")


def a_lead_is_deleted(rig: Rig) -> Iterator[None]:
    _sql(rig, "CREATE TABLE kept AS SELECT * FROM leads WHERE campaign_id = 'calm' AND state = 'expired' LIMIT 1")
    _sql(rig, "DELETE FROM leads WHERE id IN (SELECT id FROM kept)")
    yield
    _sql(rig, "INSERT INTO leads SELECT * FROM kept")
    _sql(rig, "DROP TABLE kept")


def futwork_throttles(rig: Rig) -> Iterator[None]:
    rig.change(rate="1/s")
    rig.enqueue("fast", 2)
    yield
    rig.change(rate=None)


def a_spooled_file_is_damaged(rig: Rig) -> Iterator[None]:
    spool = rig.fleet.folder / "spool"
    spool.mkdir(exist_ok=True)
    (spool / "00000000000000000001-x.events").write_bytes(b"00000000\n{}")
    yield
    for file in spool.glob("*.damaged"):
        file.unlink()


EXPERIMENTS = (
    Experiment(
        "web", ("PipelineNoData", "PipelineWebAway"), "the only web host is stopped", "it is started", web_ends
    ),
    Experiment(
        "lock", ("PipelineLedgerSlow",), "a transaction locks the table of campaigns", "it ends", a_lock_is_held
    ),
    Experiment("ledger", ("PipelineLedgerAway",), "the table of campaigns is gone", "it is back", a_table_is_gone),
    Experiment("limit", ("PipelineLimiterAway",), "the limit's Redis is killed", "it is started", the_limit_is_away),
    Experiment(
        "broker", ("PipelineBrokerAway", "PipelineSpoolGrows", "PipelineSpoolFillsUp", "PipelineWebhookRefuses"),
        "the broker is killed, and events come until the spool is full", "it is started", the_broker_is_away,
    ),
    Experiment(
        "strangers",
        ("PipelineWebhookRefuses", "PipelineQuarantineGrows", "PipelineOrphansGrow", "PipelineTasksFail"),
        "an event with a wrong token, one that is not JSON, one of an unknown call; a batch that is none",
        "nothing more of it comes", strangers_knock,
    ),
    Experiment(
        "dispatch", ("PipelineNoWorker", "PipelineWorkPastDue"),
        "the worker of the queue dispatch is stopped, and leads are handed in", "it is started", dispatch_ends,
    ),
    Experiment("beat", ("PipelineNoBeat", "PipelineSweepStopped"), "beat is stopped", "it is started", beat_ends),
    Experiment(
        "records", ("PipelineNoWorker", "PipelineQueueLong"),
        "the worker of the other queues is stopped, and 1,100 messages pile up", "it is started", records_end,
    ),
    Experiment(
        "lag", ("PipelineEventLag",), "an event waits three seconds for a worker", "later ones are quick",
        events_come_late,
    ),
    Experiment(
        "key", ("PipelineCampaignHeld",), "Futwork refuses the key", "it takes it again, and a probe is accepted",
        the_key_is_refused,
    ),
    Experiment(
        "uncertain", ("PipelineUncertainOverdue",), "the connection breaks after each POST; the policy is `hold`",
        "`pipeline resolve --drop`", answers_are_lost,
    ),
    Experiment(
        "expiry", ("PipelineLeadsExpire",), "leads outlive their age in a paused campaign", "no more of them come",
        leads_grow_old,
    ),
    Experiment(
        "deleted", ("PipelineLeadsUnaccounted",), "a lead's row is deleted by hand", "it is put back", a_lead_is_deleted
    ),
    Experiment(
        "throttle", ("PipelineThrottled",), "Futwork answers 429", "it does so no more, and the rate climbs back",
        futwork_throttles,
    ),
    Experiment(
        "damaged", ("PipelineSpoolDamaged",), "a spooled file has a wrong checksum", "it is removed",
        a_spooled_file_is_damaged,
    ),
)  # fmt: skip


def _sql(rig: Rig, statement: str) -> None:
    with rig.fleet.ledger.database.write() as connection:
        connection.execute(sa.text(statement))


def _event(call: str, *, size: int = 0, number: int = 0) -> bytes:
    return json.dumps(
        {
            "callSid": call,
            "status": "completed",
            "campaignId": "nobody",
            "n": number,
            "x": uuid.uuid4().hex,
            "pad": "x" * size,
        }
    ).encode()
