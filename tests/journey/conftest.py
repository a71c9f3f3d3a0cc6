"""Fleets of workers for the journeys, and what their brokers and ledgers hold."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis

from pipeline import EnqueueFailed, enqueue
from tests.chaos.brokers import RabbitVhost, ServiceMissing
from tests.conftest import CAMPAIGN, missing
from tests.integration.test_broker import rabbitmq_alone
from tests.journey.fleet import Fleet, Process, Valkey
from tests.waiting import patience, until


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    valkey = Valkey(tmp_path / "valkey")
    yield valkey
    valkey.kill()


@pytest.fixture
def make_fleet(own_valkey: Valkey, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    fleets = []

    def make(**overrides: Any) -> Fleet:
        values = {
            "broker_url": own_valkey.url,
            "redis_url": own_valkey.url,
            "database_url": f"sqlite:///{tmp_path / 'ledger.db'}",
        }
        fleets.append(Fleet(tmp_path, **(values | overrides)))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.end()


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Iterator[Fleet]:
    """A fleet on SQLite and a Valkey of its own; at its end no log holds a phone number that was sent."""
    fleet = make_fleet()
    fleet.ledger.migrate()
    yield fleet
    assert phones_in(fleet.logs()) == []


def is_idle(fleet: Fleet) -> bool:
    return sum(fleet.broker.depths().values()) == in_flight(fleet) == 0


@contextlib.contextmanager
def says_anew(worker: Process, text: str) -> Iterator[None]:
    """Its log holds *text* once more, at the latest a while after the block."""
    before = worker.log.count(text)
    yield
    until(lambda: worker.log.count(text) > before, what=lambda: f"{text!r} not once more in\n{worker.log}")


def phones_in(text: str) -> list[str]:
    """The numbers of `rows` and `make_lead` that a log gives away; digests and durations are none."""
    return re.findall(r"(?<![0-9a-f.])(?:91)?9800\d{6}(?![0-9a-f])", text)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"phone": f"9800{number:06d}", "data": {"name": f"Lead {number}"}} for number in numbers]


def quarantined(fleet: Fleet) -> list[Any]:
    return fleet.ledger.quarantine.waiting(limit=1000)


def push_raw(fleet: Fleet, body: Any, *, queue: str = "intake", **properties: Any) -> None:
    """Put a message into a queue as some other program might."""
    with kombu.Connection(fleet.broker_url) as connection:
        kombu.Producer(connection).publish(
            body, routing_key=queue, exchange="", **({"content_type": "application/json"} | properties)
        )


def task_headers(task: str = "pipeline.intake", **overrides: Any) -> dict[str, Any]:
    return {"lang": "py", "task": task, "id": str(uuid.uuid4()), "retries": 0} | overrides


@pytest.fixture
def alone_on_rabbitmq(rabbitmq_url: str) -> Iterator[None]:
    with rabbitmq_alone(rabbitmq_url):
        yield


@pytest.fixture
def own_vhost(rabbitmq_url: str) -> Iterator[str]:
    """The address of a RabbitMQ virtual host of the test's own: quorum queues cannot take the names of classic ones."""
    vhost = RabbitVhost()
    try:
        vhost.start()
    except ServiceMissing as error:
        missing("RabbitMQ's control", error)
    yield vhost.url
    vhost.close()


# Around


def own_client(fleet: Fleet) -> Any:
    return contextlib.closing(redis.Redis.from_url(fleet.redis_url, socket_timeout=patience()))


def in_flight(fleet: Fleet) -> int:
    """How many messages a Redis broker has given out that nobody acknowledged."""
    with own_client(fleet) as client:
        return int(client.hlen("unacked"))


def slow_ledger(fleet: Fleet) -> Any:
    """Hold SQLite's write lock, so that every intake that runs waits in the middle of its work."""
    return fleet.ledger.database.write()


def succeeds_to_enqueue(fleet: Fleet, leads: list[dict[str, Any]]) -> bool:
    try:
        enqueue(CAMPAIGN, leads, settings=fleet.settings)
    except EnqueueFailed:
        return False
    return True
