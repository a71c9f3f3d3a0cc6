"""How workers begin and end, over each broker."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from pipeline import enqueue
from tests.conftest import CAMPAIGN, make_lead
from tests.journey.conftest import (
    in_flight,
    phones_in,
    quarantined,
    rows,
    slow_ledger,
    succeeds_to_enqueue,
)
from tests.journey.fleet import Fleet, Valkey
from tests.waiting import until

# Ends and beginnings


def test_a_worker_that_is_told_to_end_in_mid_slice_ends_before_the_slice_and_loses_nothing(fleet: Fleet) -> None:
    sandbox = fleet.sandbox("--latency", "1000")  # some twenty are always out
    own = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key", "account_rate": "20/s"}
    own |= {"campaign_rate": "20/s", "slice_seconds": 60}
    worker = fleet.worker(**own)
    enqueue(CAMPAIGN, rows(1000), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1000, what=lambda: worker.log)
    until(lambda: sandbox.stats()["accepted"] >= 20, what=lambda: worker.log)
    assert worker.stop() == 0
    states = fleet.states()
    assert set(states) == {"submitted", "queued"}
    assert sum(states.values()) == 1000
    assert states["submitted"] == sandbox.stats()["accepted"] < 1000
    assert states["submitted"] == fleet.status()["leads"]["submitted"]
    assert in_flight(fleet) == 0


def test_a_worker_goes_on_after_its_broker_was_killed_and_came_back(fleet: Fleet, own_valkey: Valkey) -> None:
    worker = fleet.worker()
    enqueue(CAMPAIGN, rows(100), settings=fleet.settings)
    until(lambda: fleet.accepted() == 100, what=lambda: worker.log)
    enqueue(CAMPAIGN, rows(100, start=100), settings=fleet.settings)
    own_valkey.kill()
    own_valkey.start()
    until(lambda: succeeds_to_enqueue(fleet, rows(100, start=200)), what=lambda: worker.log)
    until(lambda: fleet.accepted() == 300, what=lambda: worker.log)
    assert worker.alive
    assert quarantined(fleet) == []


def test_beats_find_due_work_and_two_of_them_send_no_lead_twice_and_nobody_warns(fleet: Fleet) -> None:
    sandbox = fleet.sandbox()
    own = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key", "sweep_seconds": 0.3}
    now = datetime.now(UTC)
    campaign = fleet.ledger.campaigns.ensure(CAMPAIGN, now=now)
    leads = [make_lead(number) for number in range(200)]
    fleet.ledger.leads.take_in(campaign, leads, batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=now)
    worker = fleet.worker(account_rate="500/s", campaign_rate="500/s", **own)
    beats = [fleet.celery("beat", **own) for _ in range(2)]
    until(lambda: fleet.states() == {"submitted": 200}, what=lambda: worker.log)
    stats = sandbox.stats()
    assert (stats["accepted"], stats["duplicates"]) == (200, 0)
    for beat in beats:
        assert beat.alive
        assert [record for record in beat.records() if record["level"] in ("warning", "error")] == []
        assert beat.stop() == 0
    worker.stop()
    assert [record for record in worker.records() if record["level"] not in ("debug", "info")] == []
    assert [line for line in worker.log.splitlines() if "Warning" in line and "superuser" not in line] == []
    assert sorted(path.name for path in fleet.folder.glob("celerybeat*")) == []  # it remembers nothing on disk


def test_leads_travel_over_quorum_queues_also_when_a_worker_is_killed(
    make_fleet: Callable[..., Fleet], own_vhost: str
) -> None:
    fleet = make_fleet(broker_url=own_vhost, rabbitmq_queue_type="quorum")
    fleet.ledger.migrate()
    sandbox = fleet.sandbox()
    own = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key"}
    own |= {"account_rate": "10/s", "campaign_rate": "10/s"}
    first = fleet.worker(**own)
    enqueue(CAMPAIGN, rows(500), settings=fleet.settings)
    until(lambda: sandbox.stats()["accepted"] > 0, what=lambda: first.log)
    with slow_ledger(fleet):  # so that it is killed in the middle of taking in
        for batch in range(1, 5):
            enqueue(CAMPAIGN, rows(500, start=500 * batch), settings=fleet.settings)
        until(lambda: fleet.broker.depths()["intake"] < 4, what=lambda: first.log)
        first.kill()
    assert fleet.accepted() == 500
    second = fleet.worker(**own)
    until(lambda: fleet.accepted() == 2500, what=lambda: second.log)
    assert sandbox.stats()["duplicates"] == 0
    assert second.stop() == 0


def test_leads_travel_to_futwork_over_rabbitmq_with_a_redis_for_the_limit(
    make_fleet: Callable[..., Fleet], rabbitmq_url: str, alone_on_rabbitmq: None
) -> None:
    """Also those that came before the tables were there: their message goes back to its queue, and does not spin."""
    fleet = make_fleet(broker_url=rabbitmq_url)
    sandbox = fleet.sandbox()
    worker = fleet.worker(
        futwork_base_url=sandbox.url, futwork_api_key="sandbox-key", account_rate="500/s", campaign_rate="500/s"
    )
    enqueue(CAMPAIGN, rows(10), settings=fleet.settings)
    worker.says("the message goes back to its queue")
    fleet.ledger.migrate()
    until(lambda: fleet.accepted() == 10, what=lambda: worker.log)
    assert worker.log.count("the message goes back to its queue") < 10
    enqueue(CAMPAIGN, rows(690, start=10), settings=fleet.settings)
    until(lambda: fleet.states() == {"submitted": 700}, what=lambda: worker.log)
    assert quarantined(fleet) == []
    assert sandbox.stats()["accepted"] == 700
    assert fleet.broker.depths() == {"intake": 0, "dispatch": 0, "events": 0, "upkeep": 0}
    assert phones_in(worker.log) == []
    assert worker.stop() == 0
