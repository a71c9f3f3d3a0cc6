"""Workers that are killed lose nothing, and a message that kills them is put aside."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

import pytest

from pipeline import enqueue
from pipeline.broker import VISIBILITY_SECONDS, lead_batch
from pipeline.worker.guard import MOST_CRASHES
from tests.conftest import CAMPAIGN
from tests.journey import deadly_worker_names as deadly
from tests.journey.conftest import in_flight, phones_in, quarantined, rows, slow_ledger
from tests.journey.fleet import Fleet
from tests.waiting import until


def test_what_a_killed_worker_held_is_taken_up_by_another_in_time(fleet: Fleet) -> None:
    """The whole worker is killed in mid-intake; nothing tells the broker, which waits for VISIBILITY_SECONDS."""
    first = fleet.worker()
    with slow_ledger(fleet):
        for batch in range(4):
            enqueue(CAMPAIGN, rows(50, start=50 * batch), settings=fleet.settings)
        until(lambda: in_flight(fleet) >= 2, what=lambda: first.log)
        first.kill()
    assert fleet.accepted() == 0
    second = fleet.worker()
    until(lambda: fleet.accepted() == 200, seconds=VISIBILITY_SECONDS + 60, what=lambda: second.log)
    until(lambda: in_flight(fleet) == 0)
    assert quarantined(fleet) == []


def test_a_batch_on_which_every_process_dies_ends_in_quarantine_after_a_few(fleet: Fleet) -> None:
    worker = fleet.worker(app="tests.journey.deadly_worker")
    message = lead_batch(deadly.KILLS_ITS_PROCESS, rows(3), batch_id=uuid.uuid4())
    fleet.broker.publish("pipeline.intake", message, about="()")
    enqueue(CAMPAIGN, rows(600, start=100), settings=fleet.settings)
    [kept] = until(lambda: quarantined(fleet), what=lambda: worker.log)
    assert json.loads(kept.body) == [[message], {}]
    assert "WorkerLostError" in kept.reason
    assert (fleet.folder / "deaths").read_text().count("\n") == MOST_CRASHES + 1 == 4
    until(lambda: fleet.accepted() == 600, what=lambda: worker.log)
    until(lambda: fleet.broker.depths()["intake"] == in_flight(fleet) == 0)


@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_a_batch_on_which_every_worker_dies_ends_in_quarantine_after_a_few(
    broker: str, make_fleet: Callable[..., Fleet], request: pytest.FixtureRequest
) -> None:
    """A few are two here: the test above counts as many as there are."""
    if broker == "rabbitmq":
        url = request.getfixturevalue("rabbitmq_url")
        request.getfixturevalue("alone_on_rabbitmq")
        fleet = make_fleet(broker_url=url)
    else:
        fleet = make_fleet()
    fleet.ledger.migrate()
    message = lead_batch(deadly.KILLS_THE_WORKER, rows(3), batch_id=uuid.uuid4())
    fleet.broker.publish("pipeline.intake", message, about="()")
    deaths = 0
    while not quarantined(fleet):
        own = {"processes": 1, "ready": False, "deadly_visibility_seconds": 2}  # a test need not wait as long as a user
        own |= {"deadly_most_deaths": 1}
        worker = fleet.worker(app="tests.journey.deadly_worker", **own)
        until(
            lambda worker=worker: not worker.alive or quarantined(fleet),
            seconds=60,
            what=lambda worker=worker: worker.log,
        )
        deaths += not worker.alive
        assert deaths <= 2
    [kept] = quarantined(fleet)
    assert json.loads(kept.body) == [[message], {}]
    assert kept.reason == f"{deaths} worker processes crashed on it"
    assert deaths == 2
    assert phones_in(fleet.logs()) == []
