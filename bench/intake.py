"""Leads a second into the ledger on PostgreSQL: the intake stage against COPY into a table with the same indexes.

Both take the same batches of 500 as a worker has them after decoding a message, and commit each. Intake reads and
checks every row, derives its id and drops what it knows already; COPY does none of it. Both start with empty tables.
"""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime

import psycopg
import sqlalchemy as sa

from bench import fake_leads
from bench.backends import CAMPAIGN, Absent, Backends
from bench.figures import Figure, compare, interleave
from bench.peers.copy_rows import copy_batch, create_table
from pipeline.broker import lead_batch
from pipeline.intake import Intake

LEADS = 20_000
_BATCH = 500


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    if not services.has_postgres:
        raise Absent("PostgreSQL")
    number = LEADS // 2 if quick else LEADS
    with services.ledger() as ledger:
        settings = services.settings()
        woken: list[str] = []
        intake = Intake(ledger, settings, wake=woken.append)
        rows = [{**row, "phone": f"+91{row['phone']}", "key": f"+91{row['phone']}"} for row in fake_leads.rows(number)]
        messages = [
            lead_batch(CAMPAIGN, rows[place : place + _BATCH], batch_id=uuid.uuid4())
            for place in range(0, number, _BATCH)
        ]
        plain = list(fake_leads.rows(number))
        url = sa.make_url(ledger.database.url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:

            def ours() -> float:
                with ledger.database.write() as writing:
                    writing.execute(sa.text("TRUNCATE leads, batches, attempts, calls"))
                started = time.perf_counter()
                accepted = sum(intake.take_in(message).accepted for message in messages)
                if accepted != number:
                    raise RuntimeError(f"{accepted:,} of {number:,} leads taken in")
                return number / (time.perf_counter() - started)

            def copy() -> float:
                create_table(connection)
                started = time.perf_counter()
                for place in range(0, number, _BATCH):
                    copy_batch(connection, CAMPAIGN, plain[place : place + _BATCH], datetime.now(UTC))
                return number / (time.perf_counter() - started)

            numbers = interleave(rounds, {"intake": ours, "COPY, same indexes": copy})
    mine, other = numbers.values()
    note = f"{number:,} leads in batches of {_BATCH}, each committed, one process"
    return [compare("intake", mine, other, unit="leads/s", goal=0.5, note=f"against COPY, unchecked; {note}")]
