"""What waits in quarantine, tried again: events, rows that were no leads, and messages that could not be taken in."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.broker import decode_events, lead_batch
from pipeline.domain.lead import InvalidLead, Lead
from pipeline.events import Events
from pipeline.intake import Intake
from pipeline.ledger import Actor, Ledger, ledger_is_at_fault
from pipeline.settings import Settings

_AT_ONCE = 200


@dataclass(slots=True)
class Replayed:
    """How much of what kind was tried, and how much of it stays."""

    events: int = 0
    calls: int = 0
    quarantined: int = 0
    """Events that stay."""
    rows: int = 0
    rows_kept: int = 0
    messages: int = 0
    messages_kept: int = 0

    @property
    def kept(self) -> int:
        """What stays in quarantine, of every kind that can be replayed."""
        return self.quarantined + self.rows_kept + self.messages_kept


def replay_all(ledger: Ledger, settings: Settings, *, by: Actor | None = None) -> Replayed:
    """Try everything again that a fix may have made readable; what was taken in is released. Safe to repeat.

    Messages come first, because what is bad within one goes to quarantine by itself. Something on our queues that is no
    task of ours (kind `message`) is not tried: nobody knows what it was meant for.
    """
    done = Replayed()
    intake, events = Intake(ledger, settings, wake=lambda _: None), Events(ledger, settings)
    for page in ledger.quarantine.pages(kind="batch", size=1):  # each may hold hundreds of leads or events
        for one in page:
            done.messages += 1
            if _take_message_in(one.body, intake, events):
                ledger.quarantine.release([one.digest], now=ledger.now())
            else:
                done.messages_kept += 1
    for page in ledger.quarantine.pages(kind="lead", size=_AT_ONCE):
        done.rows += len(page)
        by_campaign: dict[str, list[tuple[str, Any]]] = {}
        for one in page:
            try:
                row = json.loads(one.body)
                Lead.read(row["lead"], region=settings.default_region)
            except (InvalidLead, ValueError, KeyError, TypeError, RecursionError):
                done.rows_kept += 1
            else:
                by_campaign.setdefault(row["campaign_id"], []).append((one.digest, row["lead"]))
        for campaign_id, rows in by_campaign.items():
            digests = [digest for digest, _ in rows]
            batch_id = uuid.uuid5(
                uuid.NAMESPACE_OID, "".join(digests)
            )  # the same batch if it is broken off and repeated
            intake.take_in(lead_batch(campaign_id, [row for _, row in rows], batch_id=batch_id))
            ledger.quarantine.release(digests, now=ledger.now())
    kept = events.replay(now=ledger.now(), by=by)
    done.events, done.calls, done.quarantined = kept.events, kept.calls, kept.quarantined
    return done


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
    """The one argument of a task, as `pipeline.worker.dead_letters` quarantines it: `[[argument], {}]`."""
    if isinstance(arguments, list) and len(arguments) == 2 and not arguments[1]:
        given = arguments[0]
        if isinstance(given, list) and len(given) == 1:
            yield given[0]
