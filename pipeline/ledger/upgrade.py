"""Brings the database's tables to a release while other releases work on them.

A migration leaves the tables usable for both releases (expand, then contract; see `docs/operations.md`). What is left
are its locks. A lock request that waits for a long transaction makes every later one wait as well, so on PostgreSQL a
migration waits for two seconds, gives way, and tries again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from pipeline.ledger.database import Database
from pipeline.ledger.postgres import encoding
from pipeline.observability.logs import logger

log = logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"

_ONE_AT_A_TIME = 727274  # PostgreSQL's advisory lock of the process that migrates
_PATIENCE_SECONDS = 600.0  # then an operator must end the transaction that is in the way
_LONGEST_PAUSE_SECONDS = 5.0
_IN_THE_WAY = ("55P03", "40P01")  # lock_not_available, deadlock_detected


class MigrationBlocked(Exception):
    """The tables could not be changed, because a transaction holds them; nothing of the step that waited was done."""


def upgrade(
    database: Database, revision: str, *, migrations: Path, patience_seconds: float = _PATIENCE_SECONDS
) -> None:
    """Apply every migration up to *revision*, each in a transaction of its own.

    Several hosts may do it at once: the others wait, and find nothing left to do. Raises `MigrationBlocked`.
    """
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations))
    if database.is_sqlite:
        with database.write() as connection:  # one writer at a time is all that SQLite has, and all that it needs
            _apply(config, connection, revision)
        return
    deadline = time.monotonic() + patience_seconds
    with _alone(database, deadline) as connection:
        _refuse_other_encodings(connection)
        pause = 0.2
        while True:
            try:
                _apply(config, connection, revision)
                return
            except sa.exc.DBAPIError as error:
                connection.rollback()
                if getattr(error.orig, "sqlstate", None) not in _IN_THE_WAY:
                    raise
                if time.monotonic() > deadline:
                    raise MigrationBlocked(
                        f"a transaction has held what the migration must change for {patience_seconds:g} s: find it in"
                        " pg_stat_activity, end it, and run `pipeline migrate` again"
                    ) from error
            log.warning("a migration gave way to a long transaction", again_in_seconds=pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _refuse_other_encodings(connection: sa.Connection) -> None:
    if (found := encoding(connection)) != "UTF8":
        raise MigrationBlocked(
            f"the database has the encoding {found}, and the ledger needs UTF8: create one with"
            " CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    connection.rollback()


def _apply(config: object, connection: sa.Connection, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    assert isinstance(config, Config)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


@contextmanager
def _alone(database: Database, deadline: float) -> Iterator[sa.Connection]:
    """A connection that holds the migration lock and waits only briefly for every other lock.

    The lock is requested again and again instead of waited for: an index that is built concurrently waits for every
    running statement, so another migration's statement that waits for ours would be a deadlock.
    """
    with database.engine.connect() as connection:
        try:
            while not connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": _ONE_AT_A_TIME}):
                connection.rollback()
                if time.monotonic() > deadline:
                    raise MigrationBlocked("another `pipeline migrate` has not ended; is it still there?")
                time.sleep(0.1)
            connection.execute(sa.text("SET statement_timeout = 0"))  # a large table may take its time
            connection.execute(sa.text("SET lock_timeout = '2s'"))
            connection.commit()
            yield connection
        finally:
            connection.invalidate()  # the lock and the settings end with the session
