"""Migrations: they build the tables that the ledger's code knows, on both databases, from any number of hosts."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pipeline.ledger import Ledger, SchemaMismatch, metadata, open_ledger
from tests.conftest import POSTGRES_URL
from tests.waiting import patience

HEAD = "0008"


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes empty databases, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        yield lambda: f"sqlite:///{tmp_path / uuid.uuid4().hex}.db"
        return
    request.getfixturevalue("postgres_url")  # skips if there is no server
    server = sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    names: list[str] = []

    def create() -> str:
        names.append(f"pipeline_test_{uuid.uuid4().hex[:12]}")
        with server.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {names[-1]}"))
        return sa.make_url(POSTGRES_URL).set(database=names[-1]).render_as_string(hide_password=False)

    yield create
    with server.connect() as connection:
        for name in names:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def new_ledger(new_database: Callable[[], str]) -> Iterator[Callable[..., Ledger]]:
    """Makes ledgers without tables; one more on the same database, if its address is given."""
    made: list[Ledger] = []

    def make(url: str | None = None) -> Ledger:
        made.append(Ledger(url or new_database()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def address(ledger: Ledger) -> str:
    return ledger.database.url.render_as_string(hide_password=False)


def structure(ledger: Ledger) -> dict[str, Any]:
    """All that the database says about the ledger's tables: columns, keys, rules, indexes with their conditions."""
    inspector = sa.inspect(ledger.database.engine)
    names = [name for name in inspector.get_table_names() if name != "alembic_version"]

    def plain(found: Any) -> Any:
        if isinstance(found, dict):
            return sorted((key, plain(value)) for key, value in found.items())
        if isinstance(found, list):
            return sorted((plain(one) for one in found), key=repr)
        return str(found)

    return {
        name: {
            "columns": plain(inspector.get_columns(name)),
            "primary key": plain(inspector.get_pk_constraint(name)),
            "foreign keys": plain(inspector.get_foreign_keys(name)),
            "unique": plain(inspector.get_unique_constraints(name)),
            "rules": plain(inspector.get_check_constraints(name)),
            "indexes": plain(inspector.get_indexes(name)),
            "options": plain(inspector.get_table_options(name)),
        }
        for name in names
    }


def test_migrating_gives_the_tables_that_the_code_knows(new_ledger: Callable[..., Ledger]) -> None:
    migrated, created = new_ledger(), new_ledger()
    assert migrated.migrate() == (None, HEAD)
    metadata().create_all(created.database.engine)
    assert structure(migrated) == structure(created)
    assert set(structure(migrated)) == set(metadata().tables)


def test_alembic_finds_nothing_to_add(new_ledger: Callable[..., Ledger]) -> None:
    ledger = new_ledger()
    ledger.migrate()
    with ledger.database.read() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "target_metadata": metadata()}
        )
        assert compare_metadata(context, metadata()) == []


def test_a_database_without_tables_is_refused_with_the_command_that_mends_it(
    new_ledger: Callable[..., Ledger],
) -> None:
    ledger = new_ledger()
    with pytest.raises(SchemaMismatch) as refused:
        open_ledger(address(ledger))
    message = str(refused.value)
    assert message == f"the database {ledger.describe()} has no tables yet: run `pipeline migrate`"
    assert "\n" not in message
    assert sa.inspect(ledger.database.engine).get_table_names() == []


def test_the_message_holds_no_password() -> None:
    ledger = Ledger("postgresql://someone:hunter2@127.0.0.1:9/ledger")
    assert "hunter2" not in ledger.describe()


def test_a_migrated_database_is_taken(new_ledger: Callable[..., Ledger]) -> None:
    ledger = new_ledger()
    ledger.migrate()
    opened = open_ledger(address(ledger))
    assert opened.reports.status(now=datetime.now(UTC))["accepted"] == 0
    opened.close()


def test_migrating_twice_is_harmless(new_ledger: Callable[..., Ledger]) -> None:
    ledger = new_ledger()
    assert ledger.migrate() == (None, HEAD)
    ledger.campaigns.ensure("kept", now=datetime.now(UTC))
    before = structure(ledger)
    assert ledger.migrate() == (HEAD, HEAD)
    assert structure(ledger) == before
    assert ledger.campaigns.get("kept") is not None


def test_several_hosts_migrate_at_once(new_ledger: Callable[..., Ledger]) -> None:
    first = new_ledger()
    hosts = [first, *(new_ledger(address(first)) for _ in range(3))]
    together = threading.Barrier(len(hosts))

    def migrate(host: Ledger) -> str | None:
        together.wait(patience())
        return host.migrate()[1]

    with ThreadPoolExecutor(len(hosts)) as pool:
        assert list(pool.map(migrate, hosts)) == [HEAD] * len(hosts)
    with first.database.read() as connection:
        assert connection.scalars(sa.text("SELECT version_num FROM alembic_version")).all() == [HEAD]


def test_an_older_database_is_refused_and_a_newer_one_taken(new_ledger: Callable[..., Ledger]) -> None:
    """Migrations expand before they contract, so the release before a migration works on what it made."""
    ledger = new_ledger()
    ledger.migrate()
    with ledger.database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    ledger.check_schema()
    with ledger.database.write() as connection:
        connection.execute(sa.text("DELETE FROM alembic_version"))
    with pytest.raises(SchemaMismatch, match="run `pipeline migrate`"):
        ledger.check_schema()


def test_a_migration_that_fails_changes_nothing(new_ledger: Callable[..., Ledger]) -> None:
    ledger = new_ledger()
    with ledger.database.write() as connection:
        connection.execute(sa.text("CREATE TABLE quarantine (in_the_way INTEGER)"))
    with pytest.raises(sa.exc.DBAPIError):
        ledger.migrate()
    assert sa.inspect(ledger.database.engine).get_table_names() == ["quarantine"]
