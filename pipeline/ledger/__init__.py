"""The ledger: the truth about every lead, attempt, call and event, on SQLite or PostgreSQL with the same code.

Nothing else in the pipeline writes SQL. `open_ledger` connects; each part of the ledger holds the statements of one
subject, every method one transaction:

- `leads`: taken in, claimed, recorded, swept
- `campaigns`: policies, holds, probes
- `calls`: raw events, merged calls, the link to their leads
- `feed`: every change of a call, in an order for readers
- `quarantine`: what could not be read
- `evidence`: where proof about a lead of unknown fate may lie unread
- `suppressions`: numbers that must not be called
- `interventions`: what an operator does to many leads at once
- `audit`: who did what
- `rollups`: counts that are kept ready, and how they are verified
- `reports`: what the commands and pages show
- `health`: what is missing in the database, its clock and its care
"""

from __future__ import annotations

from pipeline.extras import require

require("server")

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pipeline.ledger.audit import Actor, Audit
from pipeline.ledger.calls import CALLS_AT_ONCE, CallRow, Calls, StoredEvent
from pipeline.ledger.campaigns import Campaigns
from pipeline.ledger.database import Database
from pipeline.ledger.evidence import Evidence, Unread
from pipeline.ledger.feed import Feed, PageOfCalls, UnknownCursor
from pipeline.ledger.filters import EmptyFilter, Interventions, LeadFilter
from pipeline.ledger.health import Health
from pipeline.ledger.leads import Leads, Recorded
from pipeline.ledger.quarantine import Quarantine, digest_of
from pipeline.ledger.reports import Reports
from pipeline.ledger.reports.listing import Place
from pipeline.ledger.rollups import Rollups
from pipeline.ledger.suppressions import Suppressed, Suppressions
from pipeline.ledger.upgrade import MIGRATIONS, MigrationBlocked, upgrade

__all__ = [
    "CALLS_AT_ONCE",
    "Actor",
    "CallRow",
    "EmptyFilter",
    "LeadFilter",
    "Ledger",
    "LedgerUnavailable",
    "MigrationBlocked",
    "PageOfCalls",
    "Place",
    "Recorded",
    "SchemaMismatch",
    "StoredEvent",
    "Suppressed",
    "UnknownCursor",
    "Unread",
    "digest_of",
    "ledger_is_at_fault",
    "open_ledger",
]

LedgerUnavailable = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
"""What the ledger raises while its database is away, locked or out of connections: the work must be tried again."""

_MIGRATIONS = MIGRATIONS


class SchemaMismatch(Exception):
    """The database's tables are not those of this release; the message says which command mends it."""


def ledger_is_at_fault(error: BaseException) -> bool:
    """Whether the database made a statement fail, and not what was to be written: the same work may succeed later.

    Beside an absence that is a missing table or right, a standby that takes no writes, a damaged file.
    """
    if isinstance(error, sa.exc.DataError | sa.exc.IntegrityError):
        return False
    return isinstance(error, sa.exc.DBAPIError | sa.exc.TimeoutError | SchemaMismatch)


class Ledger:
    """All parts of the ledger over one database."""

    def __init__(self, url: str, *, statement_seconds: float | None = None) -> None:
        self.database = Database(url, statement_seconds=statement_seconds)
        self.leads = Leads(self.database)
        self.campaigns = Campaigns(self.database)
        self.calls = Calls(self.database)
        self.feed = Feed(self.database)
        self.quarantine = Quarantine(self.database)
        self.evidence = Evidence(self.database)
        self.suppressions = Suppressions(self.database)
        self.interventions = Interventions(self.database)
        self.audit = Audit(self.database)
        self.rollups = Rollups(self.database)
        self.reports = Reports(self.database)
        self.health = Health(self.database)

    def close(self) -> None:
        """Close every connection."""
        self.database.close()

    def now(self) -> datetime:
        """The time by the ledger's own clock: what is measured in the ledger is measured by it (`Database.now`)."""
        return self.database.now()

    def ping(self) -> None:
        """Raise one of `LedgerUnavailable` unless the database answers and takes writes."""
        self.database.check_writable()

    def revisions(self) -> tuple[str | None, str | None]:
        """The revision of the database's tables, and the one that this release brings."""
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        with self.database.read() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        return current, ScriptDirectory(str(_MIGRATIONS)).get_current_head()

    def check_schema(self) -> None:
        """Raise `SchemaMismatch` unless the tables are as new as this release, or newer.

        A newer database is taken: migrations expand before they contract, so the previous release works on it.
        """
        from alembic.script import ScriptDirectory

        current, head = self.revisions()
        if current == head:
            return
        known = {revision.revision for revision in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()}
        if current is None or current in known:
            found = "has no tables yet" if current is None else f"is at revision {current}, this release needs {head}"
            raise SchemaMismatch(f"the database {self.describe()} {found}: run `pipeline migrate`")

    def migrate(self, revision: str = "head") -> tuple[str | None, str | None]:
        """Bring the tables to *revision*; return the revisions before and after.

        Safe to run from several hosts and while workers work. Raises `MigrationBlocked`.
        """
        before, _ = self.revisions()
        upgrade(self.database, revision, migrations=_MIGRATIONS)
        return before, self.revisions()[0]

    def describe(self) -> str:
        """The database's address without its password."""
        return self.database.url.render_as_string(hide_password=True)


def open_ledger(url: str, *, check: bool = True, statement_seconds: float | None = None) -> Ledger:
    """Connect to the ledger; raise `SchemaMismatch` if its tables are not those of this release.

    *statement_seconds* bounds each statement: after that long it fails like a database that is away.
    """
    ledger = Ledger(url, statement_seconds=statement_seconds)
    try:
        if check:
            ledger.check_schema()
    except BaseException:
        ledger.close()
        raise
    return ledger


def metadata() -> Any:
    """The tables as this release knows them, for migrations and tests."""
    from pipeline.ledger.tables import metadata as tables

    return tables
