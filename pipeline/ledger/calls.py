"""Calls and their events in the ledger: stored raw, folded into calls, linked to the lead that they prove.

A call is what its events say. Each merge reads every stored event of the call again, so the order in which events
arrive, repeats, and a replay after a fix all give the same row.

Locks are taken in one order by every transaction here: events by digest, calls by callSid, leads by id.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from pipeline.domain.lead import LeadState
from pipeline.ledger.audit import Actor, note
from pipeline.ledger.database import CLOCKS_APART, Columns, Database, UtcDateTime, plain_id, storable_text
from pipeline.ledger.leads import may_become
from pipeline.ledger.tables import call_events, calls, leads, quarantine
from pipeline.observability.logs import logger

log = logger(__name__)

EVENTS_A_CALL = 500  # more events than a call can have; a sender that repeats itself for ever must not cost more
CALLS_AT_ONCE = 200  # in a transaction: each holds a lock, and PostgreSQL's table has room for 6,400 of all workers

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
class _Evidence:
    """The part of a call that leads to its lead, and what it proves about it."""

    call_sid: str
    campaign_id: str | None
    futwork_lead_id: str | None
    reference: str | None
    phone: str | None
    is_final: bool

    @classmethod
    def of(cls, row: Any) -> _Evidence:
        return cls(*(getattr(row, name) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class _Link:
    lead_id: uuid.UUID
    by: str


class Merge:
    """One transaction in which calls are folded anew; their locks are held until it ends."""

    def __init__(
        self,
        statements: _Statements,
        connection: sa.Connection,
        fresh: Sequence[StoredEvent],
        events_of: Mapping[str, Sequence[StoredEvent]],
    ) -> None:
        self._statements = statements
        self._connection = connection
        self.fresh = fresh
        """The events that were not merged before, or were received earlier than the ledger knew."""
        self.events_of = events_of
        """All events of each call that has a fresh one, oldest first, by callSid."""

    def write(self, rows: Sequence[CallRow], *, now: datetime) -> Mapping[str, uuid.UUID]:
        """Write the calls, and move on the leads that they prove; return the lead of each call that has one."""
        if not rows:
            return {}
        rows = sorted(rows, key=lambda row: row.call_sid)
        evidence = [_Evidence.of(row) for row in rows]
        links = _find_leads(self._connection, evidence)
        self._statements.write_calls(self._connection, [_call_row(row, links.get(row.call_sid)) for row in rows])
        _move_leads_on(self._statements, self._connection, evidence, links, now)
        return {sid: link.lead_id for sid, link in links.items()}


class Calls:
    """The statements on calls and their events. Each method is one transaction and commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._statements = _Statements(database)

    def keep(self, events: Sequence[StoredEvent]) -> None:
        """Store events as they came, to be merged later; safe to repeat.

        A body that is known keeps its first time of receipt. If a repeat turns out to be the earlier of the two, the
        time is corrected and the event waits to be merged anew.
        """
        with self._db.write() as connection:
            self._statements.store(connection, events, {})

    @contextmanager
    def merging(self, events: Sequence[StoredEvent], call_of: Mapping[str, str]) -> Iterator[Merge]:
        """Store events as merged into their calls, given as digest → callSid, in a transaction that writes the calls.

        The caller folds `Merge.events_of` and gives the rows to `Merge.write`; the transaction commits when the block
        ends and changes nothing if it raises. An event that is merged or in quarantine already is not fresh. Two
        workers with events of one call wait for each other, and the second sees what the first has stored. Give it no
        more than `CALLS_AT_ONCE`.
        """
        with self._db.write() as connection:
            stored = self._statements.store(connection, events, call_of)
            bodies = {event.digest: event.body for event in events}
            fresh = [StoredEvent(digest, bodies[digest], at) for digest, at in stored.items()]
            events_of: dict[str, list[StoredEvent]] = defaultdict(list)
            if fresh:
                call_sids = sorted({call_of[event.digest] for event in fresh})
                self._statements.lock_calls(connection, call_sids)
                # A statement of its own after the lock: it sees what was committed while the lock was waited for.
                for row in connection.execute(_MERGED_BEFORE, {"sids": call_sids, "fresh": list(stored)}):
                    events_of[row.call_sid].append(_event(row))
                for event in fresh:
                    events_of[call_of[event.digest]].append(event)
            yield Merge(
                self._statements, connection, fresh, {sid: _oldest_first(some) for sid, some in events_of.items()}
            )

    def pending(self, *, before: datetime | None = None, limit: int = CALLS_AT_ONCE) -> list[StoredEvent]:
        """Events that were stored but not merged by *before*, or at all; oldest first.

        One that a web host with a clock far ahead received is not waited for.
        """
        received = call_events.c.received_at
        query = sa.select(call_events).where(_PENDING).order_by(received, call_events.c.digest).limit(limit)
        if before is not None:
            query = query.where((received < before) | (received > before + 2 * CLOCKS_APART))
        with self._db.read() as connection:
            return [_event(row) for row in connection.execute(query)]

    def is_waiting(self) -> bool:
        """Whether an event waits to be merged."""
        with self._db.read() as connection:
            return connection.scalar(sa.select(call_events.c.digest).where(_PENDING).limit(1)) is not None

    def quarantine(self, event: StoredEvent, *, reason: str) -> bool:
        """Store an event in quarantine, where it stays whole until a replay reads it.

        False, and nothing is changed, if it is merged or in quarantine already; it waits for a merge that is under way.
        """
        reason = storable_text(reason)
        row = {"digest": event.digest, "body": event.body, "received_at": event.received_at}
        with self._db.write() as connection:
            changed = connection.scalar(
                self._db.insert(call_events)
                .values(state="quarantined", **row)
                .on_conflict_do_update(
                    index_elements=[call_events.c.digest],
                    set_={"state": "quarantined"},
                    where=call_events.c.state == "pending",
                )
                .returning(call_events.c.digest)
            )
            if changed is None:
                return False
            connection.execute(
                self._db.insert(quarantine)
                .values(kind="event", reason=reason, **row)
                .on_conflict_do_update(
                    index_elements=[quarantine.c.digest], set_={"reason": reason, "released_at": None}
                )
            )
        return True

    def link_orphans(self, limit: int = 5000, *, now: datetime) -> int:
        """Look again for the leads of orphaned calls, newest first, and link those that are found.

        Each batch of links is a transaction of its own. It locks the calls and looks again inside, because a merge may
        have changed or linked a call meanwhile; it writes nothing but the link.
        """
        orphans = sa.select(*(calls.c[name] for name in _Evidence.__slots__)).where(calls.c.lead_id.is_(None))
        with self._db.read() as connection:
            found = connection.execute(orphans.order_by(calls.c.last_event_at.desc(), calls.c.call_sid).limit(limit))
            linkable = sorted(_find_leads(connection, [_Evidence.of(row) for row in found]))
        linked = 0
        for some in _chunks(linkable, CALLS_AT_ONCE):
            with self._db.write() as connection:
                self._statements.lock_calls(connection, some)
                again = orphans.where(calls.c.call_sid.in_(some)).order_by(calls.c.call_sid)
                evidence = [_Evidence.of(row) for row in connection.execute(again)]
                links = _find_leads(connection, evidence)
                if links:
                    connection.execute(
                        sa.update(calls)
                        .where(calls.c.call_sid == sa.bindparam("sid"))
                        .values(lead_id=sa.bindparam("lead"), linked_by=sa.bindparam("by")),
                        [{"sid": sid, "lead": link.lead_id, "by": link.by} for sid, link in sorted(links.items())],
                    )
                    _move_leads_on(self._statements, connection, evidence, links, now)
            for sid, link in links.items():
                log.info("call linked", call=sid, by=link.by, lead=link.lead_id)
            linked += len(links)
        return linked

    def link(self, call_sid: str, lead_id: uuid.UUID, *, now: datetime, by: Actor | None = None) -> bool:
        """Link an orphaned call to a lead, as an operator decides; False if it has a lead by now, or either is unknown.

        The call counts as evidence from then on, like any that found its lead by itself.
        """
        with self._db.write() as connection:
            self._statements.lock_calls(connection, [call_sid])
            orphan = sa.select(*(calls.c[name] for name in _Evidence.__slots__)).where(
                calls.c.call_sid == call_sid, calls.c.lead_id.is_(None)
            )
            row = connection.execute(orphan).one_or_none()
            lead = connection.execute(sa.select(leads.c.campaign_id).where(leads.c.id == lead_id)).one_or_none()
            if row is None or lead is None:
                return False
            connection.execute(
                sa.update(calls).where(calls.c.call_sid == call_sid).values(lead_id=lead_id, linked_by="operator")
            )
            _move_leads_on(
                self._statements, connection, [_Evidence.of(row)], {call_sid: _Link(lead_id, "operator")}, now
            )
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


# Built once: putting a statement together costs as much as running it.

_PENDING = call_events.c.state == sa.literal_column("'pending'")  # written out, so that every plan sees the index

_CALL: Columns = {
    column.name: sa.Text() if isinstance(column.type, sa.String) else column.type for column in calls.columns
}
_PROVEN: Columns = {"id": sa.Uuid(), "state": sa.Text(), "futwork_lead_id": sa.Text()}

# Also has each statement that follows in the transaction planned anew, for a tenth of a millisecond each: a plan that a
# connection keeps from when a table was small reads all of it when it has grown.
_LOCK_CALLS = sa.text(
    "SELECT pg_advisory_xact_lock(hashtextextended(sid, 0)), set_config('plan_cache_mode', 'force_custom_plan', true)"
    " FROM (SELECT DISTINCT unnest(cast(:sids AS text[])) AS sid ORDER BY 1) AS ordered"
)
_RANKED = (
    sa.select(
        call_events,
        sa.func.row_number()
        .over(partition_by=call_events.c.call_sid, order_by=(call_events.c.received_at.desc(), call_events.c.digest))
        .label("newest"),
    )
    # An event that waits although it has a call was merged before: the call still says what it said.
    .where(call_events.c.call_sid.in_(sa.bindparam("sids", expanding=True)), call_events.c.state != "quarantined")
    .where(call_events.c.digest.not_in(sa.bindparam("fresh", expanding=True)))
    .subquery()
)
_MERGED_BEFORE = sa.select(_RANKED).where(_RANKED.c.newest <= EVENTS_A_CALL)
_LINKED = sa.select(calls.c.call_sid, calls.c.lead_id, calls.c.linked_by).where(
    calls.c.call_sid.in_(sa.bindparam("sids", expanding=True)), calls.c.lead_id.is_not(None)
)
_LEADS_BY_ID = sa.select(leads.c.id).where(leads.c.id.in_(sa.bindparam("ids", expanding=True)))
_LEADS_BY_FUTWORK_ID = sa.select(leads.c.futwork_lead_id, leads.c.id).where(
    leads.c.futwork_lead_id.in_(sa.bindparam("ids", expanding=True))
)
_LEADS_BY_PHONE = sa.select(leads.c.campaign_id, leads.c.phone, leads.c.id).where(
    leads.c.phone.in_(sa.bindparam("phones", expanding=True)),
    leads.c.campaign_id.in_(sa.bindparam("campaigns", expanding=True)),
    (leads.c.attempts > 0) | leads.c.claim.is_not(None),
)


class _Statements:
    """The statements that differ between the two databases."""

    def __init__(self, database: Database) -> None:
        self._db = database
        insert = database.insert(call_events)
        new, known = insert.excluded, call_events.c
        self._store = insert.on_conflict_do_update(
            index_elements=[known.digest],
            set_={
                "state": new.state,
                "call_sid": sa.func.coalesce(new.call_sid, known.call_sid),
                "received_at": sa.case((new.received_at < known.received_at, new.received_at), else_=known.received_at),
            },
            where=(known.state == "pending") | ((known.state == "merged") & (new.received_at < known.received_at)),
        ).returning(known.digest, known.received_at)
        source = database.rows("calls", _CALL)
        upsert = database.insert(calls).from_select(list(_CALL), sa.select(*source.c).where(sa.true()))
        self._write_calls = upsert.on_conflict_do_update(
            index_elements=[calls.c.call_sid],
            set_={name: upsert.excluded[name] for name in _CALL if name != "call_sid"},
            # Only a call with more events than are read could seem open again; that it ended stays.
            where=upsert.excluded.is_final | sa.not_(calls.c.is_final),
        )
        lock = sa.select(leads.c.id, leads.c.state, leads.c.futwork_lead_id)
        self._lock_leads = lock.where(leads.c.id.in_(sa.bindparam("ids", expanding=True)))
        if not database.is_sqlite:  # one order of locks for every batch, see Leads.record
            # The calls' foreign keys share their locks with this one.
            self._lock_leads = self._lock_leads.order_by(leads.c.id).with_for_update(key_share=True)
        source = database.rows("proven", _PROVEN)
        now = sa.bindparam("now", type_=UtcDateTime)
        name = {"futwork_lead_id": sa.func.coalesce(leads.c.futwork_lead_id, source.c.futwork_lead_id)}
        self._name_leads = sa.update(leads).where(leads.c.id == source.c.id).values(name)
        self._move_leads = self._name_leads.values(
            state=source.c.state,
            submitted_at=sa.func.coalesce(leads.c.submitted_at, now),
            called_at=sa.case((source.c.state == LeadState.CALLED, now), else_=leads.c.called_at),
            changed_at=now,
            claim_expires_at=None,
            reason=None,
        )

    def store(
        self, connection: sa.Connection, events: Sequence[StoredEvent], call_of: Mapping[str, str]
    ) -> dict[str, datetime]:
        """Store events as merged into a call, or else as pending; return those that were not so before, and when.

        What is in quarantine stays there.
        """
        first: dict[str, StoredEvent] = {}
        for event in sorted(events, key=lambda e: (e.digest, e.received_at)):  # one order of locks for every batch
            first.setdefault(event.digest, event)
        rows = [
            {
                "digest": event.digest,
                "call_sid": call_of.get(event.digest),
                "state": "merged" if call_of else "pending",
                "received_at": event.received_at,
                "body": event.body,
            }
            for event in first.values()
        ]
        return {row.digest: row.received_at for row in connection.execute(self._store, rows)} if rows else {}

    def lock_calls(self, connection: sa.Connection, call_sids: Sequence[str]) -> None:
        """Hold one lock a call until the transaction ends, taken in one order, so that no two workers deadlock."""
        if not self._db.is_sqlite:  # where a writer is alone
            connection.execute(_LOCK_CALLS, {"sids": list(call_sids)})

    def write_calls(self, connection: sa.Connection, rows: Sequence[Mapping[str, object]]) -> None:
        """Insert the calls, or write over what is there."""
        connection.execute(self._write_calls, {"calls": self._db.encode(rows)})

    def lock_leads(self, connection: sa.Connection, ids: Iterable[uuid.UUID]) -> Sequence[Any]:
        """The leads' ids, states and Futwork ids, which stay as they are until the transaction ends."""
        return connection.execute(self._lock_leads, {"ids": list(ids)}).all()

    def move_leads(self, connection: sa.Connection, rows: Sequence[Mapping[str, object]], now: datetime) -> None:
        """Write each lead's state, and Futwork's id if it is not known."""
        if rows:
            connection.execute(self._move_leads, {"proven": self._db.encode(rows), "now": now})

    def name_leads(self, connection: sa.Connection, rows: Sequence[Mapping[str, object]]) -> None:
        """Write Futwork's id alone."""
        if rows:
            connection.execute(self._name_leads, {"proven": self._db.encode(rows)})


def as_lead_id(text: str | None) -> uuid.UUID | None:
    """A lead id in any of its spellings, or None if the text is not one."""
    try:
        return uuid.UUID(text) if text else None
    except ValueError:
        return None


def _event(row: Any) -> StoredEvent:
    return StoredEvent(row.digest, bytes(row.body), row.received_at)


def _oldest_first(events: Sequence[StoredEvent]) -> list[StoredEvent]:
    """The newest `EVENTS_A_CALL` of a call's events, oldest first; of one moment the digest decides, both times."""
    ordered = sorted(events, key=lambda one: one.digest)
    if len(ordered) > EVENTS_A_CALL:
        ordered = sorted(ordered, key=lambda one: one.received_at, reverse=True)[:EVENTS_A_CALL]
        ordered.sort(key=lambda one: one.digest)
    return sorted(ordered, key=lambda one: one.received_at)


def _call_row(row: CallRow, link: _Link | None) -> dict[str, object]:
    return {name: getattr(row, name) for name in CallRow.__slots__} | {
        "lead_id": plain_id(link.lead_id) if link else None,
        "linked_by": link.by if link else None,
    }


def _move_leads_on(
    statements: _Statements,
    connection: sa.Connection,
    evidence: Sequence[_Evidence],
    links: Mapping[str, _Link],
    now: datetime,
) -> None:
    """Move the leads on: a final event makes them called, any other proves that Futwork has them."""
    proven: dict[uuid.UUID, LeadState] = {}
    named: dict[uuid.UUID, str] = {}
    for one in evidence:
        link = links.get(one.call_sid)
        if link is not None:
            if one.is_final or link.lead_id not in proven:
                proven[link.lead_id] = LeadState.CALLED if one.is_final else LeadState.SUBMITTED
            if one.futwork_lead_id:
                named.setdefault(link.lead_id, one.futwork_lead_id)
    if not proven:
        return
    may_leave = {state: may_become(state) for state in (LeadState.CALLED, LeadState.SUBMITTED)}
    moved, nameless = [], []
    for row in statements.lock_leads(connection, proven):
        change = {"id": plain_id(row.id), "state": proven[row.id], "futwork_lead_id": named.get(row.id)}
        if row.state in may_leave[proven[row.id]]:
            moved.append(change)
        elif row.futwork_lead_id is None and row.id in named:
            nameless.append(change)
    statements.move_leads(connection, moved, now)
    statements.name_leads(connection, nameless)


def _find_leads(connection: sa.Connection, evidence: Sequence[_Evidence]) -> dict[str, _Link]:
    """Find each call's lead: by our reference, then Futwork's lead id, then campaign and phone if one lead fits.

    A link that was made stays, whatever the call says later.
    """
    links: dict[str, _Link] = {}
    for batch in _chunks(evidence, 500):
        known = connection.execute(_LINKED, {"sids": [one.call_sid for one in batch]})
        links.update({row.call_sid: _Link(row.lead_id, row.linked_by) for row in known})
        rest = [one for one in batch if one.call_sid not in links]
        for find in (_by_reference, _by_futwork_id, _by_phone):
            links.update(find(connection, rest))
            rest = [one for one in rest if one.call_sid not in links]
    return links


def _by_reference(connection: sa.Connection, evidence: Sequence[_Evidence]) -> dict[str, _Link]:
    wanted = {one.call_sid: id_ for one in evidence if (id_ := as_lead_id(one.reference)) is not None}
    if not wanted:
        return {}
    known = set(connection.scalars(_LEADS_BY_ID, {"ids": list(set(wanted.values()))}))
    return {sid: _Link(id_, "reference") for sid, id_ in wanted.items() if id_ in known}


def _by_futwork_id(connection: sa.Connection, evidence: Sequence[_Evidence]) -> dict[str, _Link]:
    wanted = {one.call_sid: one.futwork_lead_id for one in evidence if one.futwork_lead_id}
    if not wanted:
        return {}
    owners = defaultdict(list)
    for row in connection.execute(_LEADS_BY_FUTWORK_ID, {"ids": list(set(wanted.values()))}):
        owners[row.futwork_lead_id].append(row.id)
    return _where_one_fits(wanted, owners, "futwork_lead_id")


def _by_phone(connection: sa.Connection, evidence: Sequence[_Evidence]) -> dict[str, _Link]:
    """Only a lead that may have been sent can have been called: one that was never claimed does not fit."""
    wanted = {one.call_sid: (one.campaign_id, one.phone) for one in evidence if one.campaign_id and one.phone}
    if not wanted:
        return {}
    campaigns, phones = (list(set(values)) for values in zip(*wanted.values(), strict=True))
    fits = defaultdict(list)
    for row in connection.execute(_LEADS_BY_PHONE, {"campaigns": campaigns, "phones": phones}):
        fits[row.campaign_id, row.phone].append(row.id)
    return _where_one_fits(wanted, fits, "phone")


def _where_one_fits(wanted: Mapping[str, Any], found: Mapping[Any, list[uuid.UUID]], by: str) -> dict[str, _Link]:
    """The link of each call whose evidence names exactly one lead."""
    return {sid: _Link(found[sought][0], by) for sid, sought in wanted.items() if len(found.get(sought, ())) == 1}


def _chunks(rows: Sequence[_Item], size: int) -> Iterable[Sequence[_Item]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
