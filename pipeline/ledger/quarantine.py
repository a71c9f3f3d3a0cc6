"""What could not be read, kept whole with its reason until a person or a fix deals with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from pipeline.ledger.database import Database, storable_text
from pipeline.ledger.tables import call_events, quarantine


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One thing in quarantine."""

    digest: str
    kind: str
    reason: str
    body: bytes
    received_at: datetime


def digest_of(body: bytes) -> str:
    """The SHA-256 of a body, under which a repeat of it is the same row."""
    return hashlib.sha256(body).hexdigest()


class Quarantine:
    """The statements on the quarantine. Each method is one transaction and commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def put(self, kind: str, body: bytes, *, reason: str, now: datetime) -> str:
        """Keep a body aside and return its digest; the same body again changes nothing."""
        digest = digest_of(kind.encode() + b"\0" + body)
        with self._db.write() as connection:
            connection.execute(
                self._db.insert(quarantine)
                .values(digest=digest, kind=kind, reason=storable_text(reason), body=body, received_at=now)
                .on_conflict_do_nothing()
            )
        return digest

    def waiting(self, *, kind: str | None = None, limit: int = 100) -> list[Quarantined]:
        """What waits in quarantine, newest first."""
        query = sa.select(quarantine).where(quarantine.c.released_at.is_(None))
        if kind:
            query = query.where(quarantine.c.kind == kind)
        with self._db.read() as connection:
            found = connection.execute(query.order_by(quarantine.c.received_at.desc()).limit(limit))
            return [_quarantined(row) for row in found]

    def get(self, digest: str) -> Quarantined | None:
        """One thing that waits, or None."""
        query = sa.select(quarantine).where(quarantine.c.released_at.is_(None), quarantine.c.digest == digest)
        with self._db.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _quarantined(row)

    def pages(self, *, kind: str, size: int, only: str | None = None) -> Iterator[list[Quarantined]]:
        """All that waits, or the *only* one, oldest first, each once, also while some is released or put back."""
        query = sa.select(quarantine).where(quarantine.c.released_at.is_(None), quarantine.c.kind == kind)
        if only is not None:
            query = query.where(quarantine.c.digest == only)
        query = query.order_by(quarantine.c.received_at, quarantine.c.digest).limit(size)
        page: list[Quarantined] = []
        while True:
            rest = query
            if page:
                at, digest = page[-1].received_at, page[-1].digest
                same = (quarantine.c.received_at == at) & (quarantine.c.digest > digest)
                rest = query.where((quarantine.c.received_at > at) | same)
            with self._db.read() as connection:
                page = [_quarantined(row) for row in connection.execute(rest)]
            if not page:
                return
            yield page

    def release(self, digests: list[str], *, now: datetime) -> None:
        """Mark bodies as read after all; a released event counts as waiting to be merged."""
        with self._db.write() as connection:
            connection.execute(
                sa.update(call_events)
                .where(call_events.c.digest.in_(digests), call_events.c.state == "quarantined")
                .values(state="pending")
            )
            connection.execute(sa.update(quarantine).where(quarantine.c.digest.in_(digests)).values(released_at=now))


def _quarantined(row: Any) -> Quarantined:
    return Quarantined(row.digest, row.kind, row.reason, bytes(row.body), row.received_at)
