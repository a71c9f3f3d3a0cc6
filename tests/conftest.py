"""What the tests share: a private Valkey, the ledger on both databases, and factories.

A test that needs a service which is absent skips and says so; with REQUIRE_SERVICES=1 the skip is a failure.
"""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from pipeline.devstack.embedded_valkey import embedded_broker
from pipeline.domain.lead import Answer, Claim, Lead, Outcome, lead_id
from pipeline.ledger import CallRow, LeadFilter, Ledger, StoredEvent, metadata
from pipeline.settings import PREFIX, Settings
from tests.waiting import measured_slowness, patience

POSTGRES_URL = os.environ.get("TEST_DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
RABBITMQ_URL = os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//")
CAMPAIGN = "68ecc86fd9fbecbe9431a18e"
NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)

JOURNEYS = Path(__file__).parent / "journey"
LIMIT_SECONDS = 300  # what no test takes on an idle machine unless it hangs
CHAOS_LIMIT_SECONDS = 1800

for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:  # under `nohup` or in a script's background
        signal.signal(_number, lambda *_: None)  # ignored here as before, and heeded by the processes that tests start


def missing(service: str, why: object) -> None:
    """Skip for want of a service, or fail where every service is required."""
    message = f"{service} is not there: {' '.join(str(why).split())[:200]}"
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(message)
    pytest.skip(message)


def pytest_configure() -> None:
    """Measure the machine before pytest-xdist starts processes, which inherit what was found."""
    measured_slowness()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the journeys, and begin each process of pytest-xdist with its share of them, as they take longest.

    It gives each process one piece of the list; who is done early takes short tests from the end of another's piece.
    """
    journeys = [item for item in items if JOURNEYS in item.path.parents]
    for item in journeys:
        item.add_marker("journey")
    short = [item for item in items if JOURNEYS not in item.path.parents]
    pieces, left = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items)
    ordered: list[pytest.Item] = []
    for piece in range(pieces):
        size = left // (pieces - piece)
        left -= size
        mine = journeys[piece::pieces]
        mine += [short.pop(0) for _ in range(size - len(mine))]
        ordered += mine
    items[:] = ordered + short


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let pytest-timeout end a test that hangs; the limit grows with what the machine does now."""
    limit = CHAOS_LIMIT_SECONDS if item.get_closest_marker("chaos") else LIMIT_SECONDS
    item.add_marker(pytest.mark.timeout(patience(limit)), append=False)
    return (yield)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads this machine's settings: none of our variables, and no .env file."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private Valkey for this test process."""
    with embedded_broker(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def valkey(valkey_url: str) -> Iterator[redis.Redis]:
    """The private Valkey, empty."""
    client = redis.Redis.from_url(valkey_url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    """A RabbitMQ that answers."""
    import kombu

    try:
        with kombu.Connection(RABBITMQ_URL, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1)
    except (OSError, kombu.exceptions.KombuError) as error:
        missing("RabbitMQ", error)
    return RABBITMQ_URL


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A database of this test process's own on the PostgreSQL server, dropped at the end."""
    server = sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    name = f"pipeline_test_{uuid.uuid4().hex[:12]}"
    try:
        with server.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
            connection.execute(sa.text(f"ALTER DATABASE {name} SET synchronous_commit = off"))  # no test cuts the power
    except sa.exc.OperationalError as error:
        server.dispose()
        missing("PostgreSQL", error)
    url = sa.make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)
    yield url
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(scope="session")
def _postgres_migrated(postgres_url: str) -> str:
    ledger = Ledger(postgres_url)
    ledger.migrate()
    ledger.close()
    return postgres_url


def empty(ledger: Ledger) -> None:
    """Delete every row; for a few of them that takes half the time of TRUNCATE."""
    with ledger.database.write() as connection:
        tables = [table for table in reversed(metadata().sorted_tables) if table.name != "tallies"]
        for table in (*tables, metadata().tables["tallies"]):  # last: triggers count what goes
            connection.execute(sa.delete(table))


@pytest.fixture
def postgres_ledger(_postgres_migrated: str) -> Iterator[Ledger]:
    """The ledger on PostgreSQL, empty."""
    ledger = Ledger(_postgres_migrated)
    empty(ledger)
    with ledger.database.write() as connection:
        connection.execute(sa.text("ALTER SEQUENCE attempts_id_seq RESTART"))
    yield ledger
    ledger.close()


@pytest.fixture(scope="session")
def _sqlite_migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    ledger.migrate()
    ledger.close()
    return path


@pytest.fixture
def sqlite_ledger(tmp_path: Path, _sqlite_migrated: Path) -> Iterator[Ledger]:
    """The ledger on SQLite, empty."""
    shutil.copyfile(_sqlite_migrated, tmp_path / "ledger.db")
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


@pytest.fixture(params=["sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """The ledger, once on SQLite and once on PostgreSQL."""
    return request.getfixturevalue(f"{request.param}_ledger")


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings for a test: no environment, no waiting, any field overridden."""

    def make(**overrides: Any) -> Settings:
        values: dict[str, Any] = {
            "futwork_api_key": "sandbox-key",
            "futwork_base_url": "http://127.0.0.1:9/api",
            "database_url": f"sqlite:///{tmp_path / 'ledger.db'}",
            "spool_dir": tmp_path / "spool",
            "account_rate": "5000/s",
            "campaign_rate": "5000/s",
            "backoff_base_seconds": 0.05,
            "backoff_cap_seconds": 0.2,
        }
        return Settings(_env_file=None, **(values | overrides))

    return make


def story_of(ledger: Ledger, which: LeadFilter) -> dict[str, Any]:
    """The story of the one lead that matches."""
    (lead,) = ledger.reports.leads(which, limit=2)
    story = ledger.reports.story(uuid.UUID(lead["id"]))
    assert story is not None
    return story


def make_lead(number: int = 0, **overrides: Any) -> Lead:
    """A valid lead; each *number* is another person."""
    values: dict[str, Any] = {"phone": f"+9198{number:08d}", "data": {"customer_name": f"Lead {number}"}}
    values |= overrides
    values.setdefault("key", values["phone"])
    return Lead(**values)


def make_claim(number: int = 0, **overrides: Any) -> Claim:
    """A claim of `make_lead(number)`."""
    lead = make_lead(number)
    values: dict[str, Any] = {
        "lead_id": lead_id(CAMPAIGN, lead.key),
        "campaign_id": CAMPAIGN,
        "token": uuid.uuid4(),
        "expires_at": datetime.now(UTC) + timedelta(hours=6),
        "phone": lead.phone,
        "data": '{"customer_name":"Lead"}',
        "attempts": 0,
        "lead_expires_at": datetime.now(UTC) + timedelta(days=1),
    }
    return Claim(**(values | overrides))


def make_answer(claim: Claim, outcome: Outcome, **overrides: Any) -> Answer:
    """What came of the claim's POST."""
    values: dict[str, Any] = {
        "started_at": NOW,
        "duration": timedelta(milliseconds=12),
        "http_status": 422 if outcome is Outcome.REJECTED else None,
        "excerpt": "" if outcome is Outcome.ACCEPTED else f"it was {outcome.value}",
    }
    return Answer(claim, outcome, **(values | overrides))


def merge_call(ledger: Ledger, event: StoredEvent, row: CallRow, *, now: datetime = NOW) -> None:
    """Store an event and write its call, as the stage does with what it folds."""
    with ledger.calls.merging([event], {event.digest: row.call_sid}) as merging:
        first = min(one.received_at for one in merging.events_of[row.call_sid])
        merging.write([replace(row, first_event_at=first)], now=now)
