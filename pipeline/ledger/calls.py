"""Calls and their events in the ledger: raw first, then merged, then linked to the lead that they prove.

A call is what its events say. Each merge reads every stored event of the call again and folds them anew, so the order
in which events arrive, repeats, and a replay after a fix all give the same row.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from pipeline.domain.lead import LeadState
from pipeline.ledger.audit import Actor, note
from pipeline.ledger.database import CLOCKS_APART, Columns, Database, plain_id, storable_text
from pipeline.ledger.leads import may_become
from pipeline.ledger.tables import call_events, calls, leads, quarantine
from pipeline.observability.logs import logger

log = logger(__name__)

EVENTS_A_CALL = 500  # more events than a call can have; a sender that repeats itself for ever must not cost more
CALLS_AT_ONCE = 200  # in a transaction: each holds a lock, and PostgreSQL's table has room for 6,400 of all workers
EVENTS_AT_ONCE = 600  # in a pass over those that wait: the usual three events of as many calls

_MERGERS_TURN = 727275  # PostgreSQL's advisory lock of whoever merges what others stored
_MERGED: Columns = {"digest": sa.Text(), "call_sid": sa.Text()}

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A post-call event as it came: the digest of its body, the body, and when it was first received."""

    digest: str
    body: bytes
    received_at: datetime


@dataclass(frozen=True, slots=True)
class CallRow:
    """A merged call as the ledger keeps it; `details` is the enriched call as JSON text."""

    call_sid: str
    campaign_id: str | None
    futwork_lead_id: str | None
    reference: str | None
    phone: str | None
    status: str
    is_final: bool
    outcome: str
    disposition: str | None
    duration_seconds: float | None
    callback_at: datetime | None
    recording_url: str | None
    details: str
    first_event_at: datetime
    last_event_at: datetime


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge changed: calls written, and of them those that no lead was found for."""

    calls: int
    orphans: int
    links: Mapping[str, uuid.UUID] = field(default_factory=dict, compare=False)
    """The lead of each call that has one, by callSid."""


@dataclass(frozen=True, slots=True)
class _Trace:
    """What of a call leads to its lead, and what it proves about it."""

    call_sid: str
    campaign_id: str | None
    futwork_lead_id: str | None
    reference: str | None
    phone: str | None
    is_final: bool

    @classmethod
    def of(cls, row: Any) -> _Trace:
        return cls(*(getattr(row, name) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class _Link:
    lead_id: uuid.UUID
    by: str


class Calls:
    """The statements on calls and their events. Each method is one transaction and commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def keep(self, events: Sequence[StoredEvent]) -> list[StoredEvent]:
        """Store events as they came, and return those that wait to be merged, oldest first; safe to repeat.

        A body that is known keeps its first time of receipt. If a repeat turns out to be the earlier of the two, the
        time is put right and the event waits to be merged anew.
        """
        by_digest: dict[str, StoredEvent] = {}
        for event in sorted(events, key=lambda e: (e.digest, e.received_at)):  # one order of locks for every batch
            by_digest.setdefault(event.digest, event)
        if not by_digest:
            return []
        waiting, earlier = [], []
        with self._db.write_one() as connection:  # each statement is true by itself, and mostly there is just the first
            new = self._insert(connection, by_digest)
            waiting += [by_digest[digest] for digest in new]
            known = sa.select(call_events.c.digest, call_events.c.state, call_events.c.received_at)
            rest = by_digest.keys() - new
            for row in connection.execute(known.where(call_events.c.digest.in_(rest))) if rest else ():
                event = by_digest[row.digest]
                if event.received_at < row.received_at and row.state != "quarantined":
                    earlier.append({"known": row.digest, "at": event.received_at})
                    waiting.append(event)
                elif row.state == "pending":
                    waiting.append(StoredEvent(row.digest, event.body, row.received_at))
            if earlier:
                connection.execute(
                    sa.update(call_events)
                    .where(call_events.c.digest == sa.bindparam("known"), call_events.c.state != "quarantined")
                    .values(received_at=sa.bindparam("at"), state="pending"),
                    sorted(earlier, key=lambda one: str(one["known"])),
                )
        return sorted(waiting, key=lambda e: (e.received_at, e.digest))

    def _insert(self, connection: sa.Connection, events: Mapping[str, StoredEvent]) -> set[str]:
        """Insert the events that are new; the digests of those that are known to be so, on SQLite of none."""
        if self._db.is_sqlite:
            rows = [
                {"digest": e.digest, "state": "pending", "received_at": e.received_at, "body": e.body}
                for e in events.values()
            ]
            connection.execute(self._db.insert(call_events).on_conflict_do_nothing(), rows)
            return set()
        columns = zip(*((e.digest, e.received_at, e.body) for e in events.values()), strict=True)
        arrays = dict(zip(("digests", "times", "bodies"), map(list, columns), strict=True))
        return set(connection.scalars(_INSERT_ARRAYS, arrays))

    def merge(
        self, events: Mapping[str, str], fold: Callable[[Sequence[StoredEvent]], CallRow], *, now: datetime
    ) -> Merged:
        """Merge stored events, given as digest → callSid, into their calls and move the leads that they prove.

        *fold* makes a call of all its events, which come oldest first; it must be pure. Two workers with events of one
        call take turns. Give it no more than `CALLS_AT_ONCE`.
        """
        if not events:
            return Merged(0, 0)
        with self._db.write() as connection:
            mine = sa.select(call_events).where(call_events.c.digest.in_(events))
            if not self._db.is_sqlite:  # in the order in which `keep` puts times right, and before the turns, as below
                mine = mine.order_by(call_events.c.digest).with_for_update(key_share=True)
            fresh = [StoredEvent(row.digest, bytes(row.body), row.received_at) for row in connection.execute(mine)]
            self._take_turns(connection, sorted(set(events.values())))
            return self._merge(connection, fresh, events, fold, now)

    def merge_waiting(
        self,
        sort_out: Callable[[Sequence[StoredEvent]], Mapping[str, str]],
        fold: Callable[[Sequence[StoredEvent]], CallRow],
        *,
        even_beside_others: bool = False,
        now: datetime,
    ) -> Merged | None:
        """Merge a portion of what waits, whoever stored it, oldest first; None if another worker is at it already.

        *sort_out* is given the portion and says which of its events belong to which call, as digest → callSid; of
        those that it leaves out nothing is written. *even_beside_others*: take what nobody has in hand, without regard
        to who is at it.

        Who gets None leaves what it stored to the other, who looks again after its turn: see `is_waiting`.
        """
        portion = (
            sa.select(call_events.c.digest, call_events.c.body, call_events.c.received_at)
            .where(_PENDING)
            .order_by(call_events.c.received_at, call_events.c.digest)
            .limit(EVENTS_AT_ONCE)
        )
        with self._db.write() as connection:
            if not self._db.is_sqlite:  # there a writer is alone
                turn = sa.select(sa.func.pg_try_advisory_xact_lock(_MERGERS_TURN))
                if not even_beside_others and not connection.scalar(turn):
                    return None
                # Whoever has one of these rows locked merges it, or puts its time right and has it wait on.
                portion = portion.with_for_update(skip_locked=True, key_share=True)
            fresh = [StoredEvent(row.digest, bytes(row.body), row.received_at) for row in connection.execute(portion)]
            call_of = sort_out(fresh)
            if not call_of:
                return Merged(0, 0)
            self._take_turns(connection, sorted(set(call_of.values())))
            return self._merge(connection, [one for one in fresh if one.digest in call_of], call_of, fold, now)

    def is_waiting(self, *, more_than: int = 0) -> bool:
        """Whether more than so many events wait to be merged.

        The worker whose turn it was asks after the turn has ended: an event that was stored too late to be in it, by a
        worker that found the turn taken, is seen then.
        """
        nth = sa.select(call_events.c.digest).where(_PENDING).order_by(call_events.c.received_at)
        with self._db.read() as connection:
            return connection.scalar(nth.offset(more_than).limit(1)) is not None

    def _merge(
        self,
        connection: sa.Connection,
        fresh: Sequence[StoredEvent],
        call_of: Mapping[str, str],
        fold: Callable[[Sequence[StoredEvent]], CallRow],
        now: datetime,
    ) -> Merged:
        """Fold the calls of these events anew; the calls' turns are ours."""
        told = self._told_before(connection, set(call_of.values()))
        for event in fresh:
            told[call_of[event.digest]][event.digest] = event
        rows = [fold(_oldest_first(told[call_sid].values())) for call_sid in sorted(told)]
        source = self._db.rows("merged", _MERGED)
        connection.execute(
            sa.update(call_events)
            .where(call_events.c.digest == source.c.digest)
            .values(state="merged", call_sid=source.c.call_sid),
            {"merged": self._db.encode([{"digest": e.digest, "call_sid": call_of[e.digest]} for e in fresh])},
        )
        traces = [_Trace.of(row) for row in rows]
        links = self._find_leads(connection, traces)
        self._write(connection, rows, links)
        self._prove(connection, traces, links, now)
        leads_of = {sid: link.lead_id for sid, link in links.items()}
        return Merged(len(rows), sum(row.call_sid not in links for row in rows), leads_of)

    @staticmethod
    def _told_before(connection: sa.Connection, call_sids: Iterable[str]) -> dict[str, dict[str, StoredEvent]]:
        """The newest events of each call that were merged into it before, by digest."""
        ranked = (
            sa.select(
                call_events,
                sa.func.row_number()
                .over(
                    partition_by=call_events.c.call_sid,
                    order_by=(call_events.c.received_at.desc(), call_events.c.digest),
                )
                .label("newest"),
            )
            # An event that waits although it has a call was merged before: the call still says what it said.
            .where(call_events.c.call_sid.in_(call_sids), call_events.c.state != "quarantined")
            .subquery()
        )
        told: dict[str, dict[str, StoredEvent]] = defaultdict(dict)
        for row in connection.execute(sa.select(ranked).where(ranked.c.newest <= EVENTS_A_CALL)):
            told[row.call_sid][row.digest] = StoredEvent(row.digest, bytes(row.body), row.received_at)
        return told

    def pending(self, *, before: datetime | None = None, limit: int = 500) -> list[StoredEvent]:
        """Events that were stored but not merged by *before*, or at all; oldest first.

        One that a web host with a clock far ahead received is not waited for.
        """
        received = call_events.c.received_at
        old = () if before is None else ((received < before) | (received > before + 2 * CLOCKS_APART),)
        with self._db.read() as connection:
            return _stored(connection, _PENDING, *old, limit=limit)

    def set_aside(self, event: StoredEvent, *, reason: str) -> bool:
        """Put an event that could not be read into quarantine, where it stays whole until a replay reads it.

        False, and nothing is changed, if another worker has merged it meanwhile.
        """
        reason = storable_text(reason)
        with self._db.write() as connection:
            changed = connection.execute(
                sa.update(call_events)
                .where(call_events.c.digest == event.digest, call_events.c.state != "merged")
                .values(state="quarantined")
            ).rowcount
            if not changed:
                return False
            connection.execute(
                self._db.insert(quarantine)
                .values(
                    digest=event.digest, kind="event", reason=reason, body=event.body, received_at=event.received_at
                )
                .on_conflict_do_update(
                    index_elements=[quarantine.c.digest], set_={"reason": reason, "released_at": None}
                )
            )
        return True

    def link_orphans(self, limit: int = 5000, *, now: datetime) -> int:
        """Look again for the leads of orphaned calls, newest first, and link those that can now be told.

        Each batch of links is a transaction of its own. It takes turns with merges and looks again inside, because a
        merge may have changed the call, or linked it, meanwhile; it writes nothing but the link.
        """
        orphans = sa.select(*(calls.c[name] for name in _Trace.__slots__)).where(calls.c.lead_id.is_(None))
        with self._db.read() as connection:
            found = connection.execute(orphans.order_by(calls.c.last_event_at.desc(), calls.c.call_sid).limit(limit))
            linkable = sorted(self._find_leads(connection, [_Trace.of(row) for row in found]))
        linked = 0
        for some in _chunks(linkable, CALLS_AT_ONCE):
            with self._db.write() as connection:
                self._take_turns(connection, some)
                again = orphans.where(calls.c.call_sid.in_(some)).order_by(calls.c.call_sid)
                traces = [_Trace.of(row) for row in connection.execute(again)]
                links = self._find_leads(connection, traces)
                if links:
                    connection.execute(
                        sa.update(calls)
                        .where(calls.c.call_sid == sa.bindparam("sid"))
                        .values(lead_id=sa.bindparam("lead"), linked_by=sa.bindparam("by")),
                        [{"sid": sid, "lead": link.lead_id, "by": link.by} for sid, link in sorted(links.items())],
                    )
                    self._prove(connection, traces, links, now)
            for sid, link in links.items():
                log.info("call linked", call=sid, by=link.by, lead=link.lead_id)
            linked += len(links)
        return linked

    def link(self, call_sid: str, lead_id: uuid.UUID, *, now: datetime, by: Actor | None = None) -> bool:
        """Link an orphaned call to a lead, as an operator decides; False if it has a lead by now, or either is unknown.

        The call counts as evidence from then on, like any that found its lead by itself.
        """
        with self._db.write() as connection:
            self._take_turns(connection, [call_sid])
            orphan = sa.select(*(calls.c[name] for name in _Trace.__slots__)).where(
                calls.c.call_sid == call_sid, calls.c.lead_id.is_(None)
            )
            row = connection.execute(orphan).one_or_none()
            lead = connection.execute(sa.select(leads.c.campaign_id).where(leads.c.id == lead_id)).one_or_none()
            if row is None or lead is None:
                return False
            connection.execute(
                sa.update(calls).where(calls.c.call_sid == call_sid).values(lead_id=lead_id, linked_by="operator")
            )
            self._prove(connection, [_Trace.of(row)], {call_sid: _Link(lead_id, "operator")}, now)
            note(
                connection,
                by,
                "call link",
                campaign_id=lead.campaign_id,
                lead_id=lead_id,
                details={"call_sid": call_sid},
                changed=1,
                now=now,
            )
        return True

    def _take_turns(self, connection: sa.Connection, call_sids: Sequence[str]) -> None:
        """Hold one lock a call until the transaction ends, taken in one order, so that no two workers deadlock."""
        if not self._db.is_sqlite:
            connection.execute(
                sa.text(
                    "SELECT pg_advisory_xact_lock(hashtextextended(sid, 0))"
                    " FROM (SELECT DISTINCT unnest(cast(:sids AS text[])) AS sid ORDER BY 1) AS ordered"
                ),
                {"sids": list(call_sids)},
            )

    def _find_leads(self, connection: sa.Connection, rows: Sequence[_Trace]) -> dict[str, _Link]:
        """Find each call's lead: by our reference, then Futwork's lead id, then campaign and phone if one lead fits.

        A link that was made stays, whatever the call says later.
        """
        links: dict[str, _Link] = {}
        for batch in _chunks(rows, 500):
            known = sa.select(calls.c.call_sid, calls.c.lead_id, calls.c.linked_by).where(
                calls.c.call_sid.in_([row.call_sid for row in batch]), calls.c.lead_id.is_not(None)
            )
            links.update({row.call_sid: _Link(row.lead_id, row.linked_by) for row in connection.execute(known)})
            rest = [row for row in batch if row.call_sid not in links]
            for find in (_by_reference, _by_futwork_id, _by_phone):
                links.update(find(connection, rest))
                rest = [row for row in rest if row.call_sid not in links]
        return links

    def _write(self, connection: sa.Connection, rows: Sequence[CallRow], links: Mapping[str, _Link]) -> None:
        if not rows:
            return
        source = self._db.rows("calls", _CALL)
        upsert = self._db.insert(calls).from_select(list(_CALL), sa.select(*source.c).where(sa.true()))
        columns = [column.name for column in calls.columns if column.name != "call_sid"]
        connection.execute(
            upsert.on_conflict_do_update(
                index_elements=[calls.c.call_sid],
                set_={name: upsert.excluded[name] for name in columns},
                # Only a call with more events than are read could seem open again; that it ended stays.
                where=upsert.excluded.is_final | sa.not_(calls.c.is_final),
            ),
            {"calls": self._db.encode([_call_row(row, links.get(row.call_sid)) for row in rows])},
        )

    def _prove(
        self, connection: sa.Connection, rows: Sequence[_Trace], links: Mapping[str, _Link], now: datetime
    ) -> None:
        """Move the leads on: a final event makes them called, any other proves that Futwork has them."""
        ended: dict[uuid.UUID, bool] = {}
        named: dict[uuid.UUID, str] = {}
        for row in rows:
            link = links.get(row.call_sid)
            if link is not None:
                ended[link.lead_id] = ended.get(link.lead_id, False) or row.is_final
                if row.futwork_lead_id:
                    named.setdefault(link.lead_id, row.futwork_lead_id)
        if not ended:
            return
        locked = sa.select(leads.c.id, leads.c.state, leads.c.futwork_lead_id).where(leads.c.id.in_(ended))
        if not self._db.is_sqlite:  # one order of locks for every batch, see Leads.record
            # The calls' foreign keys share their locks with this one.
            locked = locked.order_by(leads.c.id).with_for_update(key_share=True)
        found = connection.execute(locked).all()
        for state, is_final in ((LeadState.CALLED, True), (LeadState.SUBMITTED, False)):
            leave = may_become(state)
            _advance(connection, [r.id for r in found if ended[r.id] is is_final and r.state in leave], state, now)
        nameless = [row.id for row in found if row.futwork_lead_id is None and row.id in named]
        if nameless:
            source = self._db.rows("named", {"id": sa.Uuid(), "futwork_lead_id": sa.Text()})
            connection.execute(
                sa.update(leads)
                .where(leads.c.id == source.c.id, leads.c.futwork_lead_id.is_(None))
                .values(futwork_lead_id=source.c.futwork_lead_id),
                {"named": self._db.encode([{"id": plain_id(i), "futwork_lead_id": named[i]} for i in nameless])},
            )


# Written out, so that every plan sees the partial index.
_PENDING = call_events.c.state == sa.literal_column("'pending'")

_INSERT_ARRAYS = sa.text(
    "INSERT INTO call_events (digest, state, received_at, body)"
    " SELECT e.digest, 'pending', e.received_at, e.body"
    " FROM unnest(:digests, :times, :bodies) AS e (digest, received_at, body)"
    " ON CONFLICT DO NOTHING RETURNING digest"
).bindparams(
    sa.bindparam("digests", type_=postgresql.ARRAY(sa.Text())),
    sa.bindparam("times", type_=postgresql.ARRAY(sa.DateTime(timezone=True))),
    sa.bindparam("bodies", type_=postgresql.ARRAY(sa.LargeBinary())),
)

_CALL: Columns = {
    column.name: sa.Text() if isinstance(column.type, sa.String) else column.type for column in calls.columns
}


def _call_row(row: CallRow, link: _Link | None) -> dict[str, object]:
    return {name: getattr(row, name) for name in CallRow.__slots__} | {
        "lead_id": plain_id(link.lead_id) if link else None,
        "linked_by": link.by if link else None,
    }


def _oldest_first(events: Iterable[StoredEvent]) -> list[StoredEvent]:
    """The newest `EVENTS_A_CALL` of a call's events, oldest first; of one moment the digest decides, both times."""
    told = sorted(events, key=lambda one: one.digest)
    if len(told) > EVENTS_A_CALL:
        told = sorted(told, key=lambda one: one.received_at, reverse=True)[:EVENTS_A_CALL]
        told.sort(key=lambda one: one.digest)
    return sorted(told, key=lambda one: one.received_at)


def _advance(connection: sa.Connection, ids: Sequence[uuid.UUID], state: LeadState, now: datetime) -> None:
    if not ids:
        return
    times: dict[str, Any] = {"submitted_at": sa.func.coalesce(leads.c.submitted_at, now)}
    if state is LeadState.CALLED:
        times["called_at"] = now
    connection.execute(
        sa.update(leads)
        .where(leads.c.id.in_(ids), leads.c.state.in_(may_become(state)))
        .values(state=state, claim_expires_at=None, changed_at=now, reason=None, **times)
    )


def _by_reference(connection: sa.Connection, rows: Sequence[_Trace]) -> dict[str, _Link]:
    wanted = {row.call_sid: id_ for row in rows if (id_ := as_lead_id(row.reference)) is not None}
    if not wanted:
        return {}
    known = set(connection.scalars(sa.select(leads.c.id).where(leads.c.id.in_(set(wanted.values())))))
    return {sid: _Link(id_, "reference") for sid, id_ in wanted.items() if id_ in known}


def _by_futwork_id(connection: sa.Connection, rows: Sequence[_Trace]) -> dict[str, _Link]:
    wanted = {row.futwork_lead_id for row in rows if row.futwork_lead_id}
    if not wanted:
        return {}
    owners = defaultdict(list)
    for row in connection.execute(
        sa.select(leads.c.futwork_lead_id, leads.c.id).where(leads.c.futwork_lead_id.in_(wanted))
    ):
        owners[row.futwork_lead_id].append(row.id)
    return {
        row.call_sid: _Link(owners[row.futwork_lead_id][0], "futwork_lead_id")
        for row in rows
        if row.futwork_lead_id and len(owners[row.futwork_lead_id]) == 1
    }


def _by_phone(connection: sa.Connection, rows: Sequence[_Trace]) -> dict[str, _Link]:
    """Only a lead that may have been sent can have been called: one that was never claimed does not fit."""
    wanted = {(row.campaign_id, row.phone) for row in rows if row.campaign_id and row.phone}
    if not wanted:
        return {}
    fits = defaultdict(list)
    for row in connection.execute(
        sa.select(leads.c.campaign_id, leads.c.phone, leads.c.id).where(
            leads.c.phone.in_({phone for _, phone in wanted}),
            leads.c.campaign_id.in_({campaign for campaign, _ in wanted}),
            (leads.c.attempts > 0) | leads.c.claim.is_not(None),
        )
    ):
        fits[row.campaign_id, row.phone].append(row.id)
    return {
        row.call_sid: _Link(fits[row.campaign_id, row.phone][0], "phone")
        for row in rows
        if len(fits.get((row.campaign_id, row.phone), ())) == 1
    }


def as_lead_id(text: str | None) -> uuid.UUID | None:
    """A lead id in any of its spellings, or None where the text is none."""
    try:
        return uuid.UUID(text) if text else None
    except ValueError:
        return None


def _stored(connection: sa.Connection, *where: Any, limit: int | None = None) -> list[StoredEvent]:
    query = sa.select(call_events.c.digest, call_events.c.body, call_events.c.received_at).where(*where)
    found = connection.execute(query.order_by(call_events.c.received_at, call_events.c.digest).limit(limit))
    return [StoredEvent(row.digest, bytes(row.body), row.received_at) for row in found]


def _chunks(rows: Sequence[_Item], size: int) -> Iterable[Sequence[_Item]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
