"""Quarantine for what no task can work on: the message is kept whole, with the reason."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from celery import signals
from celery.exceptions import Reject

from pipeline.broker import Kind, refused
from pipeline.broker.spool import SpoolFull
from pipeline.ledger import Ledger
from pipeline.observability.logs import first_line, logger
from pipeline.settings import Settings
from pipeline.wiring import Services

log = logger(__name__)


def quarantine(ledger: Ledger, kind: Kind, body: bytes, *, reason: str) -> None:
    """Put a message into the ledger's quarantine; raises what the ledger raises."""
    digest = ledger.quarantine.put(kind, body, reason=printable(reason), now=datetime.now(UTC))
    log.error("quarantined", kind=kind, digest=digest, size=len(body))


def quarantine_or_spool(settings: Settings, kind: Kind, body: bytes, *, reason: str) -> bool:
    """Quarantine what the broker no longer holds; if the ledger is away, spool it on this host's disk.

    False if neither took it.
    """
    try:
        with own_ledger(settings) as ledger:
            quarantine(ledger, kind, body, reason=reason)
    except Exception as fault:  # noqa: BLE001 - whatever it is, the message has no other home
        try:
            Services(settings).spool.write([refused(kind, body, reason=printable(reason), now=datetime.now(UTC))])
            log.warning("spooled for quarantine, because the ledger is away", kind=kind, error=first_line(fault))
        except SpoolFull as error:
            log.critical("a message could not be kept anywhere", kind=kind, error=str(error))
            return False
    return True


@contextlib.contextmanager
def own_ledger(settings: Settings) -> Iterator[Ledger]:
    """A ledger for a worker's parent, which must leave no open connection to children that it forks later."""
    ledger = Ledger(settings.database_url)
    try:
        yield ledger
    finally:
        ledger.close()


@signals.task_failure.connect(weak=False)
def _quarantine_what_celery_gave_up(
    sender: Any = None, exception: Any = None, args: Any = None, kwargs: Any = None, **_: Any
) -> None:
    """Quarantine a message that Celery has acknowledged as failed: its processes crashed, or none could be given it.

    Tasks that acknowledge early hold nothing; the ledger starts them again.
    """
    if sender is None or not sender.acks_late or isinstance(exception, Reject):
        return
    reason = f"{sender.name} ended with {type(exception).__name__}: {first_line(exception)}"
    quarantine_or_spool(sender.app.pipeline_settings, "batch", arguments_as_bytes(args, kwargs), reason=reason)


def arguments_as_bytes(args: Any, kwargs: Any) -> bytes:
    """The arguments as JSON, whatever they hold: lone surrogates, huge numbers, deep nesting."""

    def encode() -> bytes:
        return json.dumps([args or [], kwargs or {}], default=str).encode()

    try:
        return encode()
    except RecursionError:  # an empty stack has room for everything that could be decoded
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(encode).result()


def printable(text: str) -> str:
    """Text that every database takes: no NUL, no lone surrogate, no control character."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:1000]
