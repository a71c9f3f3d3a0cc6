"""Leads written by COPY into a table with the ledger's columns, indexes and checks, one COPY and commit a batch.

Shape: the psycopg 3 documentation, "Using COPY TO and COPY FROM", row by row with `write_row`; PostgreSQL's manual,
"Populating a Database", names COPY as the fastest way in.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import datetime, timedelta

import orjson
import psycopg

_COLUMNS = "id, campaign_id, key, phone, data, state, due_at, expires_at, batch_id, accepted_at, changed_at"


def create_table(connection: psycopg.Connection) -> None:
    """A table as `leads` is, with all its indexes and checks."""
    with connection.transaction():
        connection.execute("DROP TABLE IF EXISTS copied")
        connection.execute("CREATE TABLE copied (LIKE leads INCLUDING ALL)")


def copy_batch(connection: psycopg.Connection, campaign_id: str, rows: Iterable[dict], now: datetime) -> None:
    """One batch, committed."""
    batch_id, expires_at = uuid.uuid4(), now + timedelta(days=2)
    with (
        connection.transaction(),
        connection.cursor() as cursor,
        cursor.copy(f"COPY copied ({_COLUMNS}) FROM STDIN") as copy,
    ):
        for row in rows:
            phone, data = f"+91{row['phone']}", orjson.dumps(row["data"]).decode()
            copy.write_row(
                (uuid.uuid4(), campaign_id, phone, phone, data, "queued", now, expires_at, batch_id, now, now)
            )
