"""What can be wrong with the database itself: missing parts, its clock, settings that may lose data."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from pipeline.ledger.database import Database
from pipeline.ledger.tables import metadata

_COUNTED = ("leads", "batches", "calls", "attempts")
_EVENTS = ("insert", "update", "delete")
_MOST_IN_USE = 0.9


class Health:
    """Queries only; none reads a table of ours."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def version(self) -> str:
        """The database's kind and version, such as `PostgreSQL 16.2`."""
        with self._db.read() as connection:
            query = sa.text("SELECT sqlite_version()") if self._db.is_sqlite else sa.text("SHOW server_version")
            found = str(connection.scalar(query)).split()[0]
        return f"{'SQLite' if self._db.is_sqlite else 'PostgreSQL'} {found}"

    def clock(self) -> datetime:
        """The time by the database's clock; for SQLite that is this host's."""
        if self._db.is_sqlite:
            return datetime.now(UTC)
        with self._db.read() as connection:
            found: datetime = connection.scalar(sa.text("SELECT clock_timestamp()"))
        return found.astimezone(UTC)

    def missing(self) -> list[str]:
        """The tables, columns, indexes and triggers that the code needs and the database lacks."""
        with self._db.read() as connection:
            inspector = sa.inspect(connection)
            there, gone = set(inspector.get_table_names()), []
            for table in metadata.sorted_tables:
                if table.name not in there:
                    gone.append(f"table {table.name}")
                    continue
                columns = {column["name"] for column in inspector.get_columns(table.name)}
                gone += [f"column {table.name}.{one.name}" for one in table.columns if one.name not in columns]
                indexes = {index["name"] for index in inspector.get_indexes(table.name)}
                gone += [f"index {one.name}" for one in table.indexes if one.name not in indexes]
            gone += [f"index {name} (it is there, but invalid)" for name in self._invalid(connection)]
            triggers = self._triggers(connection)
            wanted = [f"tally_{table}_{event}" for table in _COUNTED for event in _EVENTS]
            wanted += [f"feed_calls_{event}" for event in _EVENTS]
            gone += [f"trigger {name}" for name in wanted if name not in triggers]
        return sorted(gone)

    def risks(self) -> list[str]:
        """Settings of the database under which it may lose what it confirmed, or refuse connections."""
        if self._db.is_sqlite:
            return []
        found = []
        with self._db.read() as connection:
            off = [name for name in ("fsync", "full_page_writes") if _setting(connection, name) == "off"]
            found += [f"{name} is off: a crash may damage the database; turn it on" for name in off]
            if _setting(connection, "synchronous_commit") == "off":
                found.append("synchronous_commit is off: a crash loses the leads of the last moment; turn it on")
            used = int(
                connection.scalar(sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname IS NOT NULL")) or 0
            )
            most = int(_setting(connection, "max_connections"))
            if used >= _MOST_IN_USE * most:
                found.append(f"{used} of {most} connections are in use: raise max_connections, or run fewer processes")
        return found

    def _invalid(self, connection: sa.Connection) -> list[str]:
        """Indexes that were begun with CONCURRENTLY and never finished: they cost writes and serve no query."""
        if self._db.is_sqlite:
            return []
        query = sa.text(
            "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            " JOIN pg_class t ON t.oid = i.indrelid WHERE NOT i.indisvalid AND t.relname = ANY(:tables)"
        )
        return list(connection.scalars(query, {"tables": list(metadata.tables)}))

    def _triggers(self, connection: sa.Connection) -> set[Any]:
        query = sa.text("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D'")
        if self._db.is_sqlite:
            query = sa.text("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        return set(connection.scalars(query))


def _setting(connection: sa.Connection, name: str) -> str:
    return str(connection.scalar(sa.text("SELECT current_setting(:name)"), {"name": name}))
