"""A next release migrates while this one works: nothing fails, nothing is lost, nobody waits for the migration."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import pipeline.ledger
from pipeline import enqueue
from pipeline.ledger import Ledger, MigrationBlocked
from pipeline.ledger.upgrade import upgrade
from tests.conftest import CAMPAIGN
from tests.integration.test_migrations import address, new_database, new_ledger
from tests.journey.conftest import rows
from tests.journey.fleet import Fleet
from tests.waiting import patience, until

__all__ = ["new_database", "new_ledger"]

NEXT = Path(__file__).parent / "next_release"
LEADS = 240


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process, though in none that it starts, the migrations are those of a release that is to come."""
    folder = tmp_path / "migrations"
    shutil.copytree(pipeline.ledger._MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    heads = sorted(path.name[:4] for path in (folder / "versions").glob("*.py"))
    for path in NEXT.glob("*.py"):
        (folder / "versions" / path.name).write_text(path.read_text().replace("HEAD", heads[-1]))
    monkeypatch.setattr(pipeline.ledger, "_MIGRATIONS", folder)
    yield


def test_a_next_release_migrates_while_this_one_works(
    new_ledger: Callable[..., Ledger], make_fleet: Callable[..., Fleet], request: pytest.FixtureRequest
) -> None:
    ledger = new_ledger()
    ledger.migrate()
    fleet = make_fleet(database_url=address(ledger))
    sandbox = fleet.sandbox("--seed", "3", "--faults", "none")
    settings = {"futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key", "account_rate": "80/s"}
    settings |= {"campaign_rate": "80/s", "sweep_seconds": "0.5"}
    worker = fleet.worker(**settings)
    fleet.celery("beat", "--pidfile", "", **settings)
    enqueue(CAMPAIGN, rows(LEADS // 2), settings=fleet.settings)
    until(lambda: fleet.states().get("submitted", 0) > 20, what=lambda: worker.log)
    request.getfixturevalue("next_release")

    with ThreadPoolExecutor(2) as hosts, ledger.database.read() as report:
        if not ledger.database.is_sqlite:
            report.execute(sa.text("SELECT count(*) FROM leads"))  # a long transaction holds the table
        migrations = [hosts.submit(new_ledger(address(ledger)).migrate) for _ in range(2)]
        submitted = fleet.states().get("submitted", 0)
        enqueue(CAMPAIGN, rows(LEADS // 2, start=LEADS // 2), settings=fleet.settings)
        until(lambda: fleet.states().get("submitted", 0) > submitted + 20, what=lambda: worker.log)
        report.rollback()
        assert [one.result(patience())[1] for one in migrations] == ["9001", "9001"]

    later = fleet.worker(**settings)  # one that starts on tables newer than itself
    until(lambda: fleet.states() == {"submitted": LEADS}, what=lambda: worker.log + later.log)
    assert "favourite_colour" in {one["name"] for one in sa.inspect(ledger.database.engine).get_columns("leads")}
    assert sandbox.stats()["accepted"] == LEADS
    assert worker.alive
    failed = [one for log in (worker, later) for one in log.records() if one.get("level") in ("error", "critical")]
    assert failed == []
    assert [one for one in worker.records() if one.get("event") == "the message goes back to its queue"] == []


def test_a_migration_gives_way_to_whoever_works(postgres_ledger: Ledger, next_release: None) -> None:
    """While a long transaction keeps it out, others are never behind it for longer than its patience."""
    own = Ledger(address(postgres_ledger))
    ended = threading.Event()

    def work() -> int:
        done = 0
        while not ended.is_set():
            own.campaigns.ensure("works", now=_now())
            own.reports.leads(pipeline.ledger.LeadFilter(campaign="works"))
            done += 1
        return done

    with ThreadPoolExecutor(1) as pool, postgres_ledger.database.read() as report:
        report.execute(sa.text("SELECT count(*) FROM leads"))
        working = pool.submit(work)
        with pytest.raises(MigrationBlocked, match="find it in pg_stat_activity"):
            upgrade(postgres_ledger.database, "head", migrations=pipeline.ledger._MIGRATIONS, patience_seconds=1.0)
        ended.set()
        assert working.result(patience()) > 0
    assert own.revisions()[0] != "9001"
    with own.database.read() as connection:  # nobody holds the lock of whoever migrates any more
        assert connection.scalar(sa.text("SELECT pg_try_advisory_xact_lock(727274)"))
    own.close()


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)
