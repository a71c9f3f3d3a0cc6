"""Connections to the ledger's database: what the pool does with one that was closed while it idled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.ledger import Ledger, LedgerUnavailable, postgres
from tests.waiting import patience

_END_ALL = sa.text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def end_idle_connections(ledger: Ledger) -> None:
    """End every connection of the ledger's pool, from one of its own."""
    other = sa.create_engine(ledger.database.url)
    with other.connect() as connection:
        assert connection.scalar(_END_ALL) >= 1
    other.dispose()


def test_a_connection_that_was_closed_while_it_idled_is_replaced(
    postgres_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_FRESH_SECONDS", 0.0)
    postgres_ledger.ping()
    end_idle_connections(postgres_ledger)
    postgres_ledger.ping()


def test_a_connection_that_was_just_used_is_not_asked(postgres_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a round trip; whoever meets the break tries again, and gets a new connection."""
    monkeypatch.setattr(postgres, "_FRESH_SECONDS", 3600.0)
    postgres_ledger.ping()
    end_idle_connections(postgres_ledger)
    with pytest.raises(LedgerUnavailable):
        postgres_ledger.ping()
    postgres_ledger.ping()


def test_a_new_sqlite_file_may_be_opened_several_times_at_once(tmp_path: Path) -> None:
    """SQLite refused one of two that turned to write-ahead logging together, in about one of seven such rounds."""
    together = threading.Barrier(4)

    def open_it(ledger: Ledger) -> None:
        together.wait(patience())
        ledger.ping()

    for number in range(60):
        hosts = [Ledger(f"sqlite:///{tmp_path / f'{number}.db'}") for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(open_it, hosts))
        for host in hosts:
            host.close()
