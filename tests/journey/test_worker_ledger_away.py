"""While the ledger is away, messages stay in the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from pipeline import enqueue
from pipeline.ledger import Ledger
from tests.conftest import CAMPAIGN
from tests.journey.conftest import (
    is_idle,
    phones_in,
    push_raw,
    quarantined,
    rows,
    says_anew,
    task_headers,
)
from tests.journey.fleet import Fleet, Process, Valkey
from tests.waiting import until


@pytest.fixture(scope="module")
def running_on_postgresql(
    tmp_path_factory: pytest.TempPathFactory, _postgres_migrated: str
) -> Iterator[tuple[Fleet, Process]]:
    folder = tmp_path_factory.mktemp("postgresql")
    valkey = Valkey(folder / "valkey")
    fleet = Fleet(folder, broker_url=valkey.url, redis_url=valkey.url, database_url=_postgres_migrated)
    worker = fleet.worker()
    try:
        yield fleet, worker
    finally:
        fleet.end()
        valkey.kill()


@pytest.fixture
def on_postgresql(
    running_on_postgresql: tuple[Fleet, Process], postgres_ledger: Ledger
) -> Iterator[tuple[Fleet, Process]]:
    """A worker on PostgreSQL, for whatever befalls the database, and an empty ledger."""
    fleet, worker = running_on_postgresql
    yield fleet, worker
    until(lambda: is_idle(fleet), what=lambda: worker.log)
    assert worker.alive
    assert phones_in(worker.log) == []


def test_leads_that_were_enqueued_are_in_a_ledger_on_postgresql(on_postgresql: tuple[Fleet, Process]) -> None:
    fleet, worker = on_postgresql
    enqueue(CAMPAIGN, rows(700), settings=fleet.settings)
    until(lambda: fleet.accepted() == 700, what=lambda: worker.log)


# A ledger that is away


def test_while_the_sqlite_ledger_cannot_be_used_messages_stay_in_the_broker(make_fleet: Callable[..., Fleet]) -> None:
    """Good ones and malformed ones: first there are no tables yet, later the file cannot be opened."""
    fleet = make_fleet()
    worker = fleet.worker()
    push_raw(fleet, "null", headers=task_headers())
    push_raw(fleet, "[[7],{},{}]", headers=task_headers())
    worker.says("a message goes back to its queue")
    worker.says("the message goes back to its queue")
    enqueue(CAMPAIGN, rows(600), settings=fleet.settings)
    worker.says("run `pipeline migrate`")
    fleet.ledger.migrate()
    until(lambda: fleet.accepted() == 600 and len(quarantined(fleet)) == 2, what=lambda: worker.log)
    assert worker.log.count("the message goes back to its queue") < 20  # it does not spin

    fleet.ledger.close()
    for child in worker.children():  # those that come after them have the file to open
        child.kill()
    # Each in one step, for where SQLite finds no file it makes one, and drops the write-ahead log of the other.
    ledger, hidden, no_file = (fleet.folder / name for name in ("ledger.db", "hidden.db", "no_file"))
    no_file.symlink_to(fleet.folder)
    hidden.hardlink_to(ledger)
    no_file.replace(ledger)
    with says_anew(worker, "the message goes back to its queue"):
        enqueue(CAMPAIGN, rows(600, start=600), settings=fleet.settings)
    hidden.replace(ledger)
    until(lambda: fleet.accepted() == 1200, what=lambda: worker.log)
    assert len(quarantined(fleet)) == 2
    assert not (fleet.folder / "spool").exists()
    assert phones_in(worker.log) == []


def test_while_the_postgresql_database_is_away_messages_stay_in_the_broker(
    on_postgresql: tuple[Fleet, Process], postgres_ledger: Ledger, postgres_url: str
) -> None:
    fleet, worker = on_postgresql
    enqueue(CAMPAIGN, rows(1), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1, what=lambda: worker.log)
    name = sa.make_url(postgres_url).database
    server = sa.create_engine(sa.make_url(postgres_url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    fleet.ledger.close()
    postgres_ledger.close()
    with server.connect() as connection:
        end = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(end, {"name": name})
        try:
            with says_anew(worker, "the message goes back to its queue"):
                enqueue(CAMPAIGN, rows(600), settings=fleet.settings)
        finally:
            connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    server.dispose()
    until(lambda: fleet.accepted() == 600, what=lambda: worker.log)
    assert quarantined(fleet) == []


@pytest.mark.parametrize("trouble", ["table gone", "column gone", "standby"])
def test_a_database_that_answers_but_cannot_take_leads_loses_none(
    trouble: str, on_postgresql: tuple[Fleet, Process], postgres_ledger: Ledger, postgres_url: str
) -> None:
    """It is the database's fault, so nothing goes to quarantine: a failover would put every batch there."""
    fleet, worker = on_postgresql
    enqueue(CAMPAIGN, rows(1), settings=fleet.settings)
    until(lambda: fleet.accepted() == 1, what=lambda: worker.log)
    name = sa.make_url(postgres_url).database
    everybody_out = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    break_it, mend_it = {
        "table gone": (["ALTER TABLE batches RENAME TO hidden"], ["ALTER TABLE hidden RENAME TO batches"]),
        "column gone": (["ALTER TABLE batches RENAME leads TO hidden"], ["ALTER TABLE batches RENAME hidden TO leads"]),
        "standby": (
            [f"ALTER DATABASE {name} SET default_transaction_read_only = on", everybody_out],
            [
                "SET default_transaction_read_only = off",
                f"ALTER DATABASE {name} RESET default_transaction_read_only",
                everybody_out,
            ],
        ),
    }[trouble]
    fleet.ledger.close()
    postgres_ledger.close()
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def change(statements: list[str]) -> None:
        with server.connect() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    change(break_it)
    try:
        with says_anew(worker, "the message goes back to its queue"):
            enqueue(CAMPAIGN, rows(600), settings=fleet.settings)
    finally:
        change(mend_it)
    until(lambda: fleet.accepted() == 600, what=lambda: worker.log)
    assert quarantined(fleet) == []
