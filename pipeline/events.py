"""Events: post-call events from the broker into the ledger, raw first, then merged into calls.

1. A task stores its message's events as they came. From here on they are kept.
2. It merges what waits, whoever stored it, in portions. If another worker is at that already, it leaves its events to
   that one: so the cost of a merge is shared by all messages that come in during the one before, and a message that
   comes alone is merged at once.

Safe to repeat: an event's body is stored once, and a call is folded anew from all its events each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import orjson

from pipeline.broker import WebEvent, kind_of
from pipeline.coordination.counters import Counters
from pipeline.coordination.crash_counter import MUTEX_SECONDS, CrashCounter
from pipeline.domain.call import Event, UnreadableEvent, describe, merge, read_event, reference
from pipeline.ledger import (
    CALLS_AT_ONCE,
    EVENTS_AT_ONCE,
    Actor,
    CallRow,
    Ledger,
    Merged,
    StoredEvent,
    digest_of,
    ledger_is_at_fault,
)
from pipeline.observability import tracing
from pipeline.observability.logs import logger
from pipeline.observability.metrics import EVENT_LAG, EVENTS
from pipeline.settings import Settings

log = logger(__name__)

_PAGES_OF_LEFT_OVERS = 20  # of 500 events; what is left after them waits for the next time
_REPLAYED_AT_ONCE = 200  # events, each of up to WEBHOOK_MAX_BYTES
_LONGEST_MERGE_SECONDS = 5.0  # of one task, for others' events too; far below the visibility timeout
_LOCKED_SECONDS = 0.02  # between two looks at events that others have locked; without it a core would be busy
_HELP_FROM = 2 * EVENTS_AT_ONCE  # waiting events: then one worker cannot keep up with the others' storing
_BEHIND = timedelta(seconds=1)  # an event older than this waited for others: then a little more costs nobody
_STORED_AT_MOST = 300  # events that a process that is behind stores before it merges all the same
_LONGEST_CAREFULLY_SECONDS = MUTEX_SECONDS * 2 / 3  # one event more may come, and must be within the mutex
_MOST_DEATHS = 2  # of processes that merged an event by itself, before it goes to quarantine

# As wide as the ledger's columns; longer values are kept whole in the raw event.
_STATUS_WIDTH, _DISPOSITION_WIDTH, _ID_WIDTH = 40, 100, 64  # characters


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a batch of events."""

    events: int
    calls: int
    orphans: int
    quarantined: int

    def plus(self, more: Kept) -> Kept:
        """The sum of both."""
        return Kept(
            self.events + more.events,
            self.calls + more.calls,
            self.orphans + more.orphans,
            self.quarantined + more.quarantined,
        )


class Later(Protocol):
    """A task without events of its own, behind all messages that wait, which merges what was left to it."""

    def ask(self) -> bool:
        """See that there is one; False if that cannot be had."""

    def begin(self) -> None:
        """This is it: whoever asks from now on asks for another."""


@dataclass(slots=True)
class _Portion:
    """Events that wait, sorted by call as far as they can be read."""

    reader: Callable[[StoredEvent], Event]
    by_call: dict[str, list[StoredEvent]] = field(default_factory=dict)
    read: dict[str, Event] = field(default_factory=dict)
    unreadable: list[tuple[StoredEvent, str]] = field(default_factory=list)

    def sort_out(self, stored: Sequence[StoredEvent]) -> dict[str, str]:
        """The call of each event that can be read, as far as one transaction holds them."""
        call_of: dict[str, str] = {}
        for event in stored:
            try:
                read = self.reader(event)
            except UnreadableEvent as error:
                self.unreadable.append((event, error.reason))
                continue
            except Exception as error:  # noqa: BLE001 - a fault of ours: it must not keep all others from being merged
                self.unreadable.append((event, f"it could not be read: {_one_line(error)}"))
                continue
            if read.call_sid in self.by_call or len(self.by_call) < CALLS_AT_ONCE:
                self.by_call.setdefault(read.call_sid, []).append(event)
                self.read[event.digest] = read
                call_of[event.digest] = read.call_sid
        return call_of


class Events:
    """Keeps, reads, merges and links events."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        crash_counter: CrashCounter | None = None,
        go_on: Callable[[], None] = lambda: None,
        later: Later | None = None,
        counters: Counters | None = None,
    ) -> None:
        """*crash_counter* counts the processes that died over an event; *go_on* has another task merge what waits.

        With *later* a task that is behind leaves the merge to one that comes after those that wait already.
        """
        self._ledger = ledger
        self._settings = settings
        self._crash_counter = crash_counter or CrashCounter(None)
        self._go_on = go_on
        self._later = later
        self._stored = 0  # events since this process merged last
        self._counters = counters or Counters()

    def take_in(self, events: Sequence[WebEvent], *, again: bool = False) -> Kept:
        """Store the events as they came, then merge what waits; what cannot be read goes to quarantine.

        *again*: a process died when it did this before, so an event that kills may be among those that wait.
        """
        now = self._ledger.now()
        stored = []
        for event in events:
            if event.fault:
                kind, reason = kind_of(event.fault)
                self._ledger.quarantine.put(kind, event.body, reason=reason, now=event.received_at)
            else:
                stored.append(StoredEvent(digest_of(event.body), event.body, event.received_at))
        waiting = self._ledger.calls.keep(stored)
        self._counters.count(EVENTS, "known", by=len(stored) - len(waiting))
        if not again and self._leaves_to_later(stored, now):
            kept = Kept(0, 0, 0, 0)
        else:
            self._stored = 0
            kept = self._merge_carefully(now) if again else self._merge_waiting(now)
        self._counters.count(EVENTS, "merged", by=kept.events - kept.quarantined)
        self._counters.count(EVENTS, "quarantined", by=len(events) - len(stored) + kept.quarantined)
        log.info(
            "events taken in",
            events=len(events),
            merged=kept.events,
            calls=kept.calls,
            orphans=kept.orphans,
            refused=kept.quarantined,
        )
        return kept

    def _leaves_to_later(self, stored: Sequence[StoredEvent], now: datetime) -> bool:
        """Whether a task behind the messages that wait now will merge these events with theirs.

        So it is while events come faster than each message can be merged by itself, which shows in their age.
        """
        if self._later is None:
            return False
        if not stored:  # the task that others left their merge to: who asks from here on asks for another
            self._later.begin()
            return False
        self._stored += len(stored)
        is_behind = now - min(event.received_at for event in stored) > _BEHIND
        return is_behind and self._stored < _STORED_AT_MOST and self._later.ask()

    def merge(self, stored: Sequence[StoredEvent], *, now: datetime) -> Kept:
        """Merge stored events into their calls; one that cannot be merged does not keep the others from it."""
        by_call: dict[str, list[StoredEvent]] = {}
        quarantined = 0
        for event in stored:
            try:
                by_call.setdefault(self._read(event).call_sid, []).append(event)
            except UnreadableEvent as error:
                self._ledger.calls.set_aside(event, reason=error.reason)
                quarantined += 1
        kept = Kept(len(stored), 0, 0, quarantined)
        for call_sids in _in_batches(by_call, CALLS_AT_ONCE):
            kept = kept.plus(self._merge_calls({sid: by_call[sid] for sid in call_sids}, now))
        return kept

    def merge_left_over(self, *, before: datetime | None, now: datetime) -> int:
        """Merge events that were stored before a moment, or all, by a worker that died before it merged them.

        Event by event where the last time did not end: one of them may be why.
        """
        done = 0
        with self._crash_counter.counted("left over") as deaths:
            for _ in range(_PAGES_OF_LEFT_OVERS):
                left = self._ledger.calls.pending(before=before)
                if not left:
                    break
                if not deaths:
                    self.merge(left, now=now)
                elif not self._merge_suspects(left, now):
                    break
                done += len(left)
        return done

    def replay(self, *, now: datetime, only: str | None = None, by: Actor | None = None) -> Kept:
        """Read every quarantined event again, such as after a fix; what can be read now is merged and released.

        *only* is the digest of one in quarantine, to read no other.
        """
        noted = by and self._ledger.audit.begin(by, "events replay", details={"only": only} if only else {}, now=now)
        kept = self._replay(only, now)
        if noted:
            self._ledger.audit.end(noted, changed=kept.events - kept.quarantined)
        return kept

    def _replay(self, only: str | None, now: datetime) -> Kept:
        kept = Kept(0, 0, 0, 0)
        for page in self._ledger.quarantine.pages(kind="event", size=_REPLAYED_AT_ONCE, only=only):
            readable = []
            for one in page:
                event = StoredEvent(digest_of(one.body), one.body, one.received_at)
                try:
                    self._read(event)
                except UnreadableEvent:
                    continue
                readable.append((one.digest, event))
            merged = Kept(0, 0, 0, 0)
            if readable:
                # First the one, then the other: a body that the web process refused is only in quarantine until now.
                self._ledger.calls.keep([event for _, event in readable])
                self._ledger.quarantine.release([digest for digest, _ in readable], now=now)
                merged = self.merge(self._ledger.calls.keep([event for _, event in readable]), now=now)
            unread = len(page) - len(readable) + merged.quarantined
            kept = kept.plus(Kept(len(page), merged.calls, merged.orphans, unread))
        return kept

    def _merge_waiting(self, now: datetime) -> Kept:
        """Merge what waits, portion by portion, until nothing does or another worker is at it."""
        kept, ends = Kept(0, 0, 0, 0), time.monotonic() + _LONGEST_MERGE_SECONDS
        helps = False
        while time.monotonic() < ends:
            portion = _Portion(self._read)
            fold = partial(self._fold, known=portion.read)
            try:
                merged = self._ledger.calls.merge_waiting(portion.sort_out, fold, even_beside_others=helps, now=now)
            except Exception as error:
                if ledger_is_at_fault(error) or not portion.by_call:
                    raise
                kept = kept.plus(self._merge_halves(portion.by_call, error, now))
            else:
                if merged is None:
                    helps = self._ledger.calls.is_waiting(more_than=_HELP_FROM)
                    if not helps:
                        return kept
                    continue
                kept = kept.plus(Kept(0, merged.calls, merged.orphans, 0))
                self._tell({event.digest: event.call_sid for event in portion.read.values()}, merged, now)
            for event, reason in portion.unreadable:
                self._ledger.calls.set_aside(event, reason=reason)
            done = self._ledger.now()
            for one in portion.read.values():
                self._counters.observe(EVENT_LAG, max(0.0, (done - one.received_at).total_seconds()))
            kept = kept.plus(Kept(len(portion.read) + len(portion.unreadable), 0, 0, len(portion.unreadable)))
            if helps or not self._ledger.calls.is_waiting():
                return kept
            if not portion.read and not portion.unreadable:
                time.sleep(_LOCKED_SECONDS)  # a helper has all that waits in hand, and may leave some of it
        self._go_on()
        return kept

    def _merge_carefully(self, now: datetime) -> Kept:
        """Merge what waits event by event, so that one which kills its process is found and goes to quarantine.

        If another worker is at that, it merges what is stored by now when it is done; if it dies before, tidy.
        """
        kept = self._merge_suspects(self._ledger.calls.pending(limit=EVENTS_AT_ONCE), now)
        return kept.plus(self._merge_waiting(now)) if kept else Kept(0, 0, 0, 0)

    def _merge_suspects(self, events: Sequence[StoredEvent], now: datetime) -> Kept | None:
        """Merge events one by one; None if another worker does so, which this one would take for dead.

        What is left when most of the time of the mutex is over is left for another time.
        """
        kept, ends = Kept(0, 0, 0, 0), time.monotonic() + _LONGEST_CAREFULLY_SECONDS
        with self._crash_counter.mutex("merge") as is_ours:
            if not is_ours:
                return None
            for event in events:
                kept = kept.plus(self._merge_suspect(event, now))
                if time.monotonic() > ends:
                    break
        return kept

    def _merge_suspect(self, event: StoredEvent, now: datetime) -> Kept:
        with self._crash_counter.counted(f"event:{event.digest}") as deaths:
            if deaths < _MOST_DEATHS:
                return self.merge([event], now=now)
            log.error("an event kills its workers", digest=event.digest, deaths=deaths)
            reason = f"{deaths} worker processes died when it was merged"
            if self._ledger.calls.set_aside(event, reason=reason):
                return Kept(1, 0, 0, 1)
            return Kept(0, 0, 0, 0)  # another process has merged it meanwhile

    def _merge_calls(self, by_call: Mapping[str, Sequence[StoredEvent]], now: datetime) -> Kept:
        """Merge the events of some calls in one transaction; where that fails, each half, down to the one to blame."""
        call_of = {event.digest: sid for sid, events in by_call.items() for event in events}
        try:
            merged = self._merge(call_of, now)
        except Exception as error:
            if ledger_is_at_fault(error):
                raise
            return self._merge_halves(by_call, error, now)
        return Kept(0, merged.calls, merged.orphans, 0)

    def _merge_halves(self, by_call: Mapping[str, Sequence[StoredEvent]], error: Exception, now: datetime) -> Kept:
        # The error's text may quote an event, so only its kind is logged.
        log.warning("the merge is tried in parts", calls=len(by_call), error=type(error).__name__)
        if len(by_call) == 1:
            ((sid, events),) = by_call.items()
            return self._merge_one_by_one(sid, events, now)
        kept = Kept(0, 0, 0, 0)
        for sids in _in_batches(by_call, (len(by_call) + 1) // 2):
            kept = kept.plus(self._merge_calls({sid: by_call[sid] for sid in sids}, now))
        return kept

    def _merge_one_by_one(self, call_sid: str, events: Sequence[StoredEvent], now: datetime) -> Kept:
        """Merge the events of a call oldest first; one that makes the merge fail is quarantined by itself."""
        merged, quarantined = Merged(0, 0), 0
        for event in sorted(events, key=lambda one: (one.received_at, one.digest)):
            try:
                merged = self._merge({event.digest: call_sid}, now)
            except Exception as error:
                if ledger_is_at_fault(error):
                    raise
                self._ledger.calls.set_aside(event, reason=f"it could not be merged: {_one_line(error)}")
                quarantined += 1
        return Kept(0, merged.calls, merged.orphans, quarantined)

    def _merge(self, call_of: Mapping[str, str], now: datetime) -> Merged:
        """Merge events, given as digest → callSid, and tell the log which leads they were about."""
        merged = self._ledger.calls.merge(call_of, self._fold, now=now)
        self._tell(call_of, merged, now)
        return merged

    def _tell(self, call_of: Mapping[str, str], merged: Merged, now: datetime) -> None:
        orphans = [sid for sid in dict.fromkeys(call_of.values()) if sid not in merged.links]
        leads = list(dict.fromkeys(merged.links.values()))
        log.info("calls merged", events=len(call_of), calls=merged.calls, orphans=orphans, leads=leads)
        if tracing.is_on() and leads:
            traces = self._ledger.leads.traces(leads)
            for sid, lead in merged.links.items():
                tracing.note(
                    "call merged", traces.get(lead), {"lead": str(lead), "call": sid}, began=now, took=_since(now)
                )

    def _read(self, event: StoredEvent) -> Event:
        return read_event(event.body, received_at=event.received_at, default_region=self._settings.default_region)

    def _readable(self, stored: Sequence[StoredEvent], known: Mapping[str, Event]) -> Iterator[Event]:
        """The events that this release reads: an earlier one may have merged what this one cannot."""
        for one in stored:
            try:
                yield known.get(one.digest) or self._read(one)
            except UnreadableEvent as error:
                log.warning("a merged event can no longer be read", digest=one.digest, reason=error.reason)

    def _fold(self, stored: Sequence[StoredEvent], *, known: Mapping[str, Event] = MappingProxyType({})) -> CallRow:
        """The call that these events tell, with what enrichment finds in it; those in *known* are read already."""
        events = list(self._readable(stored, known))
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


def _since(moment: datetime) -> timedelta:
    return datetime.now(UTC) - moment


def _in_batches(call_sids: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(call_sids)
    while batch := list(islice(rest, size)):
        yield batch


def _id(text: str | None) -> str | None:
    """An id as the ledger keeps it; one that is too long is none of ours, and its beginning would be another's."""
    return text if text and len(text) <= _ID_WIDTH else None


def _one_line(error: BaseException) -> str:
    """The kind of an error and its first line: databases quote the row that they refuse in the lines after it."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"
