"""Events: post-call events from the broker into the ledger, each call folded from all events that it has.

1. The events of a message are read, stored and merged in one transaction: the ledger stores them as they came, locks
   their calls and gives all events of each; the stage folds them; the ledger writes the calls and moves their leads on.
2. If that fails, the events are stored by themselves first. Then each half is tried, down to the event to blame, which
   goes to quarantine.
3. If a process died over the message before, its events are stored first and merged one by one. An event over which
   processes die again goes to quarantine, and the rest is merged.

Safe to repeat: an event's body is stored once, and a call is folded anew from all its events each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime

import orjson

from pipeline.broker import WebEvent, kind_of
from pipeline.coordination.counters import Counters
from pipeline.coordination.crash_counter import CrashCounter
from pipeline.domain.call import Event, UnreadableEvent, describe, merge, read_event, reference
from pipeline.ledger import CALLS_AT_ONCE, Actor, CallRow, Ledger, StoredEvent, digest_of, ledger_is_at_fault
from pipeline.observability import tracing
from pipeline.observability.logs import logger
from pipeline.observability.metrics import EVENT_LAG, EVENTS
from pipeline.settings import Settings

log = logger(__name__)

_PAGES_OF_PENDING = 50  # of 200 events; what is left after them waits for the next time
_MOST_DEATHS = 2  # of processes that merged an event by itself, before it goes to quarantine

# As wide as the ledger's columns; longer values are kept whole in the raw event.
_STATUS_WIDTH, _DISPOSITION_WIDTH, _ID_WIDTH = 40, 100, 64  # characters


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a batch of events; those that were merged before count as nothing."""

    events: int = 0
    calls: int = 0
    orphans: int = 0
    quarantined: int = 0

    def plus(self, more: Kept) -> Kept:
        """The sum of both."""
        return Kept(*(mine + others for mine, others in zip(astuple(self), astuple(more), strict=True)))


class Events:
    """Stores, reads, merges and replays events."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        crash_counter: CrashCounter | None = None,
        counters: Counters | None = None,
    ) -> None:
        """*crash_counter* counts the processes that died over an event; without it none is counted."""
        self._ledger = ledger
        self._settings = settings
        self._crash_counter = crash_counter or CrashCounter(None)
        self._counters = counters or Counters()

    def take_in(self, events: Sequence[WebEvent], *, again: bool = False) -> Kept:
        """Store the events as they came and merge them into their calls; what cannot be read goes to quarantine.

        *again*: a process died when it did this before, so an event that kills may be among them. A message without
        events, which the release before sends, merges what waits in the ledger.
        """
        now = self._ledger.now()
        stored = [StoredEvent(digest_of(one.body), one.body, one.received_at) for one in events if not one.fault]
        for one in events:
            if one.fault:
                kind, reason = kind_of(one.fault)
                self._ledger.quarantine.put(kind, one.body, reason=reason, now=one.received_at)
        if events:
            kept = self._merge_all(stored, one_by_one=again, now=now)
            self._counters.count(EVENTS, "known", by=len(stored) - kept.events)
        else:
            kept = self._merge_pending(None, one_by_one=again, now=now)
        self._counters.count(EVENTS, "merged", by=kept.events - kept.quarantined)
        self._counters.count(EVENTS, "quarantined", by=len(events) - len(stored) + kept.quarantined)
        return kept

    def merge_left_over(self, *, before: datetime | None, now: datetime) -> int:
        """Merge the events that were stored before a moment, or all, but not merged; return how many.

        A worker that died left them, or one of the release before. One by one where the last time did not end: one of
        them may be why.
        """
        with self._crash_counter.counted("left over") as deaths:
            return self._merge_pending(before, one_by_one=deaths > 0, now=now).events

    def replay(self, *, now: datetime, only: str | None = None, by: Actor | None = None) -> Kept:
        """Read every quarantined event again, such as after a fix; what can be read now is merged and released.

        *only* is the digest of one in quarantine, to read no other.
        """
        noted = by and self._ledger.audit.begin(by, "events replay", details={"only": only} if only else {}, now=now)
        kept = Kept()
        for page in self._ledger.quarantine.pages(kind="event", size=CALLS_AT_ONCE, only=only):
            found = [(one.digest, StoredEvent(digest_of(one.body), one.body, one.received_at)) for one in page]
            readable = {digest: event for digest, event in found if isinstance(self._read(event), Event)}
            # Stored before it is released: a body that the web process refused is only in quarantine until now.
            self._ledger.calls.keep(list(readable.values()))
            self._ledger.quarantine.release(list(readable), now=now)
            merged = self._merge_all(list(readable.values()), one_by_one=False, now=now)
            left = len(page) - len(readable) + merged.quarantined
            kept = kept.plus(Kept(len(page), merged.calls, merged.orphans, left))
        if noted:
            self._ledger.audit.end(noted, changed=kept.events - kept.quarantined)
        return kept

    def _merge_pending(self, before: datetime | None, *, one_by_one: bool, now: datetime) -> Kept:
        kept = Kept()
        for _ in range(_PAGES_OF_PENDING):
            page = self._merge_all(self._ledger.calls.pending(before=before), one_by_one=one_by_one, now=now)
            if not page.events:
                break
            kept = kept.plus(page)
        return kept

    def _merge_all(self, stored: Sequence[StoredEvent], *, one_by_one: bool, now: datetime) -> Kept:
        """Merge events; one that cannot be read or merged goes to quarantine and keeps no other from it."""
        kept = Kept()
        if one_by_one:
            self._ledger.calls.keep(stored)
            for event in stored:
                kept = kept.plus(self._merge_suspect(event, now))
            return kept
        readable: list[tuple[StoredEvent, Event]] = []
        for event in stored:
            read = self._read(event)
            if isinstance(read, Event):
                readable.append((event, read))
            else:
                kept = kept.plus(self._quarantine(event, read))
        for start in range(0, len(readable), CALLS_AT_ONCE):
            kept = kept.plus(self._merge(readable[start : start + CALLS_AT_ONCE], now))
        return kept

    def _merge_suspect(self, event: StoredEvent, now: datetime) -> Kept:
        """Merge one event over which processes may have died; after too many deaths it goes to quarantine.

        A living process that merges it has its row locked, so that the quarantine waits and then finds it merged.
        """
        with self._crash_counter.counted(f"event:{event.digest}") as deaths:
            if deaths < _MOST_DEATHS:
                return self._merge_all([event], one_by_one=False, now=now)
            log.error("an event kills its workers", digest=event.digest, deaths=deaths)
            return self._quarantine(event, f"{deaths} worker processes died when it was merged")

    def _merge(self, events: Sequence[tuple[StoredEvent, Event]], now: datetime) -> Kept:
        """Merge events in one transaction; where that fails, each half, down to the one to blame."""
        stored = [event for event, _ in events]
        try:
            return self._merge_together(stored, {event.digest: read for event, read in events}, now)
        except Exception as error:
            self._ledger.calls.keep(stored)
            if ledger_is_at_fault(error):
                raise
            if len(events) == 1:
                return self._quarantine(stored[0], f"it could not be merged: {_one_line(error)}")
            # The error's text may quote an event, so only its kind is logged.
            log.warning("the merge is tried in halves", events=len(events), error=type(error).__name__)
        events, half = sorted(events, key=lambda one: (one[0].received_at, one[0].digest)), len(events) // 2
        return self._merge(events[:half], now).plus(self._merge(events[half:], now))

    def _merge_together(self, stored: Sequence[StoredEvent], read: Mapping[str, Event], now: datetime) -> Kept:
        call_of = {digest: event.call_sid for digest, event in read.items()}
        with self._ledger.calls.merging(stored, call_of) as merging:
            rows = [self._fold(events, read) for events in merging.events_of.values()]
            leads = merging.write(rows, now=now)
        if not rows:
            return Kept()
        orphans = [row.call_sid for row in rows if row.call_sid not in leads]
        log.info("calls merged", events=len(merging.fresh), calls=len(rows), orphans=orphans, leads=[*leads.values()])
        done = self._ledger.now()
        for event in merging.fresh:
            self._counters.observe(EVENT_LAG, max(0.0, (done - event.received_at).total_seconds()))
        if tracing.is_on() and leads:
            traces, took = self._ledger.leads.traces(list(leads.values())), datetime.now(UTC) - now
            for sid, lead in leads.items():
                tracing.note("call merged", traces.get(lead), {"lead": str(lead), "call": sid}, began=now, took=took)
        return Kept(len(merging.fresh), len(rows), len(orphans), 0)

    def _quarantine(self, event: StoredEvent, reason: str) -> Kept:
        if not self._ledger.calls.quarantine(event, reason=reason):
            return Kept()
        log.warning("event quarantined", digest=event.digest)  # the reason may quote it
        return Kept(1, 0, 0, 1)

    def _read(self, event: StoredEvent) -> Event | str:
        """The event as it can be read, or the reason why it cannot."""
        try:
            return read_event(event.body, received_at=event.received_at, default_region=self._settings.default_region)
        except UnreadableEvent as error:
            return error.reason
        except Exception as error:  # noqa: BLE001 - a fault of ours: it must not keep all others from being merged
            return f"it could not be read: {_one_line(error)}"

    def _fold(self, stored: Sequence[StoredEvent], known: Mapping[str, Event]) -> CallRow:
        """The call that these events tell, with what enrichment finds in it; those in *known* are read already."""
        events: list[Event] = []
        for one in stored:
            read = known.get(one.digest) or self._read(one)
            if isinstance(read, Event):
                events.append(read)
            else:  # an earlier release may have merged what this one cannot read
                log.warning("a merged event can no longer be read", digest=one.digest, reason=read)
        if not events:
            raise UnreadableEvent("none of the call's events can be read any more")
        call = describe(merge(events), default_region=self._settings.default_region)
        key = self._settings.reference_key
        referred = next(filter(None, (reference(event, key) for event in events)), None) if key else None
        return CallRow(
            call_sid=call.call_sid,
            campaign_id=_id(call.campaign_id),
            futwork_lead_id=_id(call.futwork_lead_id),
            reference=_id(referred),
            phone=next(filter(None, (event.phone for event in events)), None) or call.recipient_phone,
            status=call.status[:_STATUS_WIDTH],
            is_final=call.is_final,
            outcome=call.outcome.value,
            disposition=call.disposition[:_DISPOSITION_WIDTH] if call.disposition else None,
            duration_seconds=call.duration_seconds,
            callback_at=call.callback_at,
            recording_url=call.recording_url,
            details=orjson.dumps(call, option=orjson.OPT_UTC_Z).decode(),
            first_event_at=min(one.received_at for one in stored),
            last_event_at=max(one.received_at for one in stored),
        )


def _id(text: str | None) -> str | None:
    """An id as the ledger keeps it; one that is too long is none of ours, and its beginning would be another's."""
    return text if text and len(text) <= _ID_WIDTH else None


def _one_line(error: BaseException) -> str:
    """The kind of an error and its first line: databases quote the row that they refuse in the lines after it."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"
