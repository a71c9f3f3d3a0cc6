"""What is in quarantine, read again after a fix: events, rows that were no leads, and messages.

The command and the status pages both replay here.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.broker import decode_events, lead_batch
from pipeline.domain.lead import InvalidLead
from pipeline.events import Events
from pipeline.futwork.fields import read_lead
from pipeline.intake import Intake
from pipeline.ledger import Actor, Ledger, ledger_is_at_fault
from pipeline.ledger.quarantine import Quarantined
from pipeline.settings import Settings
from pipeline.status.text import count

_AT_ONCE = 200


@dataclass(slots=True)
class Replayed:
    """How many of each kind were tried, and how many of them stay."""

    events: int = 0
    calls: int = 0
    quarantined: int = 0
    """Events that stay."""
    rows: int = 0
    rows_kept: int = 0
    messages: int = 0
    messages_kept: int = 0

    @property
    def tried(self) -> int:
        """What was tried, of every kind."""
        return self.events + self.rows + self.messages

    @property
    def kept(self) -> int:
        """What stays in quarantine, of every kind that can be replayed."""
        return self.quarantined + self.rows_kept + self.messages_kept

    def texts(self) -> list[str]:
        """What was done, a line for each kind that was tried."""
        kinds = (
            ("event", self.events, self.quarantined, "read"),
            ("row", self.rows, self.rows_kept, "taken in"),
            ("message", self.messages, self.messages_kept, "taken in"),
        )
        found = [
            f"{tried - kept:,} of {count(tried, kind)} {done}; {kept:,} stay in quarantine"
            for kind, tried, kept, done in kinds
            if tried
        ]
        return found or ["Nothing in quarantine can be replayed."]


def replay_all(ledger: Ledger, settings: Settings, *, only: str | None = None, by: Actor | None = None) -> Replayed:
    """Try everything again that a fix may have made readable; what was taken in is released. Safe to repeat.

    *only* is the digest of one thing in quarantine, to try no other. Messages come first, because what is bad within
    one goes to quarantine by itself. A message on our queues that is no task of ours (kind `message`) is not tried:
    nobody knows what it was meant for.
    """
    done = Replayed()
    details = {"only": only} if only else {}
    noted = by and ledger.audit.begin(by, "events replay", details=details, now=ledger.now())
    intake, events = Intake(ledger, settings, wake=lambda _: None), Events(ledger, settings)
    for page in ledger.quarantine.pages(kind="batch", size=1, only=only):  # each may hold hundreds of leads or events
        for one in page:
            done.messages += 1
            if _take_message_in(one.body, intake, events):
                ledger.quarantine.release([one.digest], now=ledger.now())
            else:
                done.messages_kept += 1
    for page in ledger.quarantine.pages(kind="lead", size=_AT_ONCE, only=only):
        done.rows += len(page)
        done.rows_kept += _take_rows_in(page, ledger, settings, intake)
    kept = events.replay(now=ledger.now(), only=only)
    done.events, done.calls, done.quarantined = kept.events, kept.calls, kept.quarantined
    if noted:
        ledger.audit.end(noted, changed=done.tried - done.kept)
    return done


def _take_rows_in(page: list[Quarantined], ledger: Ledger, settings: Settings, intake: Intake) -> int:
    """Take in the rows that are valid leads by now, and return how many are not."""
    kept = 0
    by_campaign: dict[str, list[tuple[str, Any]]] = {}
    for one in page:
        try:
            row = json.loads(one.body)
            read_lead(row["lead"], region=settings.default_region)
        except (InvalidLead, ValueError, KeyError, TypeError, RecursionError):
            kept += 1
        else:
            by_campaign.setdefault(row["campaign_id"], []).append((one.digest, row["lead"]))
    for campaign_id, rows in by_campaign.items():
        digests = [digest for digest, _ in rows]
        batch_id = uuid.uuid5(uuid.NAMESPACE_OID, "".join(digests))  # the same if it is broken off and repeated
        intake.take_in(lead_batch(campaign_id, [row for _, row in rows], batch_id=batch_id))
        ledger.quarantine.release(digests, now=ledger.now())
    return kept


def _take_message_in(body: bytes, intake: Intake, events: Events) -> bool:
    """Take a task's message in, as its worker would have; false if it still cannot be."""
    try:
        messages = list(_messages(json.loads(body)))  # not orjson: a lone surrogate may be what is wrong with it
        for message in messages:
            if isinstance(message, dict) and "events" in message:
                events.take_in(decode_events(message))
            else:
                intake.take_in(message)
    except Exception as error:
        if ledger_is_at_fault(error):
            raise
        return False
    return bool(messages)


def _messages(arguments: Any) -> Iterator[Any]:
    """The one argument of a task, as `pipeline.worker.app` puts it in quarantine: `[[argument], {}]`."""
    if isinstance(arguments, list) and len(arguments) == 2 and not arguments[1]:
        given = arguments[0]
        if isinstance(given, list) and len(given) == 1:
            yield given[0]
