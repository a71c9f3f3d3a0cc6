"""One way to open a database, and the few places where SQLite and PostgreSQL differ.

Everything else in the ledger is written once. A *reading* connection never blocks a writer; a *writing* one is a
transaction that commits at the end of its block. On SQLite it begins with `BEGIN IMMEDIATE`, so that two writers queue
up instead of failing when both begin as readers and then write.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import TypeDecorator

from pipeline.extras import require
from pipeline.ledger import postgres

_SQLITE_BUSY_MS = 15_000  # how long a writer waits for another; a batch of ours takes a few milliseconds
_ASK_TIME_SECONDS = 10.0  # between two questions for the database's time
CLOCKS_APART = timedelta(minutes=5)
"""How far ahead a time may be that was written a moment ago; further, and the clock was set back since."""

Columns = Mapping[str, sa.types.TypeEngine[Any]]
"""The columns of a batch, each with its type."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time: `timestamptz` on PostgreSQL, sortable ISO text on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(sa.String(27))
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("the ledger takes aware times only")
        return iso(value) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, _dialect: sa.Dialect) -> datetime | None:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # as an earlier release wrote some
        return None if value is None else value.astimezone(UTC)


def iso(moment: datetime) -> str:
    """A UTC time as fixed-width text, so that text order is time order."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Database:
    """An engine with the ledger's two kinds of connection, and rows as a table for batch statements."""

    def __init__(self, url: str, *, statement_seconds: float | None = None) -> None:
        self.url = postgres.read_url(url)
        self.engine = _create_engine(self.url, statement_seconds)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._asked_at: float | None = None
        self._known_time = datetime.min.replace(tzinfo=UTC)

    def now(self) -> datetime:
        """The time by the database's clock, by which every due time, claim and probe in it is measured.

        Machines disagree about the time, and their clocks jump; every caller gets the same answer here. The database is
        asked every ten seconds. In between, and while it is away, this machine's steady clock counts on. SQLite has no
        clock but that of its machine.
        """
        if self.is_sqlite:
            return datetime.now(UTC)
        steady = time.monotonic()
        if self._asked_at is None or steady - self._asked_at >= _ASK_TIME_SECONDS:
            try:
                with self.read() as connection:
                    found = connection.scalar(sa.text("SELECT clock_timestamp()"))
            except sa.exc.SQLAlchemyError:
                if self._asked_at is None:
                    return datetime.now(UTC)  # whatever is to be done with it fails too
            else:
                self._known_time, self._asked_at = found, time.monotonic()
        assert self._asked_at is not None
        return self._known_time + timedelta(seconds=time.monotonic() - self._asked_at)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection for queries; nothing is committed."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that commits when the block ends and rolls back when it raises."""
        with self.engine.connect().execution_options(ledger_writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def one_moment(self, *, within: timedelta | None = None) -> Iterator[sa.Connection]:
        """A connection whose queries all see the ledger as it was at the first: only then do numbers add up.

        On PostgreSQL, a statement that takes longer than *within* is given up.
        """
        with self.read() as connection:
            if not self.is_sqlite:  # where a transaction sees one moment anyway
                connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
                if within is not None:
                    milliseconds = max(1, round(within.total_seconds() * 1000))
                    connection.execute(sa.text(f"SET LOCAL statement_timeout = {milliseconds}"))
            yield connection

    @contextmanager
    def write_one(self) -> Iterator[sa.Connection]:
        """A connection for a single statement that writes: it commits by itself, without round trips around it.

        So does each that follows, save on SQLite, where all are one transaction.
        """
        if self.is_sqlite:
            with self.write() as connection:
                yield connection
            return
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    def check_writable(self) -> None:
        """Raise one of `LedgerUnavailable` unless the database answers and takes writes."""
        if self.is_sqlite:
            with self.read() as connection:
                connection.execute(sa.text("SELECT 1"))
            if self.url.database and not os.access(self.url.database, os.W_OK):
                raise postgres.LedgerReadOnly(None, None, Exception(f"{self.url.database} cannot be written"))
            return
        with self.read() as connection:
            postgres.check_writable(connection)

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    def insert(self, table: sa.Table) -> Any:
        """An INSERT of the dialect, which knows `on_conflict_do_nothing` on both."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def rows(self, name: str, columns: Columns) -> sa.Subquery:
        """A table made of one JSON parameter `:{name}`, so that a batch is one statement whatever its length.

        Pass the parameter through `encode`. The statement's text does not depend on the number of rows, so it is
        compiled and prepared once.
        """
        parameter = sa.bindparam(name, type_=sa.Text())
        if self.is_sqlite:
            each = sa.func.json_each(parameter).table_valued("value", name=f"{name}_each")
            picked = [
                sa.type_coerce(sa.func.json_extract(each.c.value, f"$.{column}"), kind).label(column)
                for column, kind in columns.items()
            ]
            return sa.select(*picked).select_from(each).where(sa.true()).subquery(name)
        record = sa.func.jsonb_to_recordset(sa.cast(parameter, postgresql.JSONB))
        table = record.table_valued(*(sa.column(column, kind) for column, kind in columns.items()))
        derived = table.render_derived(name=f"{name}_rec", with_types=True)
        return sa.select(*(derived.c[column] for column in columns)).subquery(name)

    def encode(self, rows: Sequence[Mapping[str, object]]) -> str:
        """Rows as the JSON parameter of `rows`: times as text, on SQLite in the form in which it stores them."""
        if self.is_sqlite:
            return orjson.dumps(rows, default=_plain, option=orjson.OPT_PASSTHROUGH_DATETIME).decode()
        return orjson.dumps(rows).decode()


def plain_id(value: uuid.UUID) -> str:
    """An id as 32 hexadecimal digits: how SQLite stores it and PostgreSQL reads it."""
    return value.hex


def storable_text(text: str) -> str:
    """Text as both databases take it: PostgreSQL refuses NUL, and neither stores half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return iso(value)
    raise TypeError(f"{type(value).__name__} has no place in a batch")


def _create_engine(url: sa.URL, statement_seconds: float | None) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        require("postgres")
        return postgres.create_engine(url, statement_seconds)
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        hide_parameters=True,
        connect_args={"timeout": _SQLITE_BUSY_MS / 1000, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    if statement_seconds is not None:
        _bound_sqlite(engine, statement_seconds)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself; _begin_sqlite does
    for pragma in (f"busy_timeout={_SQLITE_BUSY_MS}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    _keep_a_wal(connection)


def _keep_a_wal(connection: Any) -> None:
    """Switch to write-ahead logging; of two that do so in a new file at once SQLite refuses one without a wait."""
    ends = time.monotonic() + _SQLITE_BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            kind = error.sqlite_errorcode & 0xFF  # what is above says more of the kind
            if kind != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise
        time.sleep(0.01)


def _bound_sqlite(engine: sa.Engine, seconds: float) -> None:
    """End a statement that takes longer; SQLite asks us every so many steps whether to go on."""

    def start(connection: Any, *_: Any) -> None:
        ends = time.monotonic() + seconds
        connection.connection.driver_connection.set_progress_handler(lambda: time.monotonic() > ends, 100_000)

    sa.event.listen(engine, "before_cursor_execute", start)


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("ledger_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
