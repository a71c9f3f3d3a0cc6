"""The invariants, from three sides that do not know of each other: the clients, the ledger, the sandbox's journal.

The limit is checked at the sandbox, where a POST's time is that of its arrival. What a busy machine does to it on its
way, the limiter cannot know: `JITTER_SECONDS` is how much later than its turn a POST may arrive, so that a span of T
seconds may hold what the limit grants in T + JITTER_SECONDS. Spans of one second and of five are checked; over the
longer one the allowance hardly counts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson
import sqlalchemy as sa

from pipeline.domain.call import UnreadableEvent, describe, merge, read_event
from pipeline.domain.lead import LeadState
from pipeline.ledger import LedgerUnavailable
from pipeline.ledger.tables import call_events, calls, campaigns, leads, quarantine
from pipeline.settings import Rate
from tests.chaos.feed import Accepted
from tests.chaos.rig import Rig

JITTER_SECONDS = 0.25
SPANS_SECONDS = (1.0, 5.0)
_NOT_TAKEN = frozenset({401, 403, 404, 422, 429, 500, 503})
"""Answers after which the same lead may be posted again: they prove that it was not taken."""

Answer = TypeVar("Answer")


@dataclass(slots=True)
class Books:
    """Everything that was seen once all is quiet."""

    promised: Accepted
    journal: list[dict[str, Any]]
    webhooks: list[dict[str, Any]]
    status: dict[str, Any]
    leads: dict[Any, Any]
    events: list[Any]
    calls: dict[str, Any]
    set_aside: list[Any]
    noted: dict[str, int]
    """Attempts by outcome."""


@dataclass(slots=True)
class Findings:
    """What the comparison found: the numbers of the table, and every broken invariant in a sentence."""

    leads: int = 0
    events: int = 0
    lost: int = 0
    duplicated: int = 0
    over_limit: int = 0
    uncertain: int = 0
    states: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_books(rig: Rig, promised: Accepted) -> Books:
    """Read every side."""

    def rows(query: Any) -> list[Any]:
        with rig.ledger.database.read() as connection:
            return list(connection.execute(query))

    found = patiently(
        lambda: (
            rig.ledger.reports.status(now=datetime.now(UTC)),
            {row.id: row for row in rows(sa.select(leads))},
            rows(sa.select(call_events)),
            {row.call_sid: row for row in rows(sa.select(calls))},
            rows(sa.select(quarantine)),
            rig.ledger.reports.attempts_by_outcome(),
        )
    )
    status, lead_rows, events, call_rows, set_aside, noted = found
    return Books(
        promised, rig.lines("journal"), rig.lines("webhooks"), status, lead_rows, events, call_rows, set_aside, noted
    )


def patiently(question: Callable[[], Answer], tries: int = 20) -> Answer:
    """Ask the ledger although the experiment cuts connections: ours are hit as well."""
    for _ in range(tries - 1):
        try:
            return question()
        except LedgerUnavailable:
            continue
    return question()


def not_drained(rig: Rig, promised: Accepted) -> list[str]:
    """What still has to happen before all is quiet, in words; nothing when everything has drained."""

    def ask() -> list[str]:
        with rig.ledger.database.read() as connection:
            counted = connection.execute(sa.select(leads.c.state, sa.func.count()).group_by(leads.c.state))
            by_state = {row[0]: row[1] for row in counted}
            pending = connection.scalar(
                sa.select(sa.func.count()).select_from(call_events).where(call_events.c.state == "pending")
            )
            stopped = connection.scalar(
                sa.select(sa.func.count()).select_from(campaigns).where(campaigns.c.state != "active")
            )
            taken = connection.scalar(sa.select(sa.func.count()).select_from(leads)) or 0
            open_calls = connection.scalar(
                sa.select(sa.func.count())
                .select_from(calls.join(leads, calls.c.lead_id == leads.c.id))
                .where(calls.c.is_final, leads.c.state != LeadState.CALLED)
            )
            kept = connection.scalar(sa.select(sa.func.count()).select_from(call_events))
        left = [
            f"{count} {text}"
            for text, count in (
                ("leads that were accepted are not in the ledger yet", len(promised.leads) - taken),
                ("leads are queued", by_state.get("queued", 0)),
                ("leads are being sent", by_state.get("sending", 0)),
                ("leads are submitted and not called", by_state.get("submitted", 0)),
                ("events wait to be merged", pending),
                ("campaigns are stopped", stopped),
                ("final calls have not moved their lead", open_calls),
                ("webhooks are still to come", rig.stats()["webhooks"]["pending"]),
                ("files are in the spool", rig.spooled()),
            )
            if count and count > 0
        ]
        if left:
            return left  # what follows costs more to find out
        left = [f"{count} messages are in {name}" for name, count in rig.waiting().items() if count]
        unseen = 0 if left else _unseen(rig, promised, kept or 0)
        return [*left, f"{unseen} events are in no ledger yet"] if unseen else left

    return patiently(ask)


def _unseen(rig: Rig, promised: Accepted, kept: int) -> int:
    """How many events that were answered 200 are missing at least."""
    delivered = {(w["call_sid"], w["status"]) for w in rig.lines("webhooks") if w["outcome"] == "delivered"}
    return max(0, len(delivered) + len(promised.events) - kept)


def compare(rig: Rig, books: Books, *, may_resend: bool = False) -> Findings:
    """Check every invariant."""
    found = Findings()
    found.leads, found.events = len(books.promised.leads), len(books.events)
    found.states = {state: count for state, count in books.status["leads"].items() if count}
    found.uncertain = books.status["leads"]["uncertain"]
    found.problems += [f"clients gave up: {text}" for text in books.promised.given_up]
    _check_leads(books, found)
    _check_posts(books, found, may_resend=may_resend)
    _check_events(books, found)
    _check_calls(books, found)
    _check_limit(rig, books, found)
    return found


def _check_leads(books: Books, found: Findings) -> None:
    """1: accepted = sum over states, nothing left on its way, every promised lead in the ledger."""
    status = books.status
    total = sum(status["leads"].values())
    if not status["accepted"] == total == len(books.leads):
        found.problems.append(f"accepted {status['accepted']}, sum over states {total}, leads {len(books.leads)}")
    missing = books.promised.leads - books.leads.keys()
    if missing:
        found.lost += len(missing)
        found.problems.append(f"{len(missing)} leads were promised and are not in the ledger, such as {min(missing)}")
    left = [row for row in books.leads.values() if row.claim_expires_at is not None or row.state == "sending"]
    if left:
        found.problems.append(f"{len(left)} claims are left over")


def _check_posts(books: Books, found: Findings, *, may_resend: bool) -> None:
    """2: one POST a lead unless the one before it was proven not taken; and the ledger agrees with the sandbox."""
    posts: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in books.journal:
        posts[entry["campaign_id"], entry["phone"]].append(entry)
    for whose, tried in posts.items():
        taken = sum(entry["accepted"] for entry in tried)
        if taken > 1 and not may_resend:
            found.duplicated += 1
            found.problems.append(f"{whose} was accepted {taken} times")
        doubtful = [entry for entry in tried[:-1] if entry["status"] not in _NOT_TAKEN]
        if doubtful and not may_resend:
            found.problems.append(f"{whose} was posted again after {doubtful[0]['outcome']} ({doubtful[0]['status']})")
    accepted = {whose for whose, tried in posts.items() if any(entry["accepted"] for entry in tried)}
    given = sum(entry["accepted"] for entry in books.journal)
    if books.noted.get("accepted", 0) > given:
        found.problems.append(f"{books.noted['accepted']} acceptances are noted, the sandbox gave {given}")
    strangers = posts.keys() - {_whose(row) for row in books.leads.values()}
    if strangers:
        found.problems.append(f"{len(strangers)} were posted without a lead in the ledger, such as {min(strangers)}")
    ended = {(w["campaign_id"], w["phone"]) for w in books.webhooks if w["last"] and w["delivered"]}
    for row in books.leads.values():
        whose = _whose(row)
        if whose in ended and row.state != "called":
            found.problems.append(f"the call of {whose} ended, its last event was answered 200, and it is {row.state}")
        if whose in accepted and row.state not in ("called", "submitted"):
            found.problems.append(f"{whose} was accepted by the sandbox and is {row.state}: {row.reason}")
        if whose not in accepted and row.state in ("called", "submitted"):
            found.problems.append(f"{whose} is {row.state} although the sandbox never accepted it")


def _check_events(books: Books, found: Findings) -> None:
    """3a: every event that was answered 200 is in the ledger once, raw."""
    kept = Counter(row.digest for row in books.events)
    missing = books.promised.events - kept.keys()
    theirs: Counter[tuple[str, str]] = Counter()
    for row in books.events:
        if row.digest not in books.promised.offered:
            theirs[row.call_sid, _status_of(row.body)] += 1
    delivered = {(w["call_sid"], w["status"]) for w in books.webhooks if w["outcome"] == "delivered"}
    planned = {(w["call_sid"], w["status"]) for w in books.webhooks}
    lost = len(missing) + len(delivered - theirs.keys())
    if lost:
        found.lost += lost
        found.problems.append(f"{lost} events were answered 200 and are not in the ledger")
    twice = [which for which, count in (*theirs.items(), *kept.items()) if count > 1]
    if twice:
        found.duplicated += len(twice)
        found.problems.append(f"{len(twice)} events are in the ledger twice, such as {twice[0]}")
    unknown = {which for which in theirs if which not in planned and which[0] is not None}
    if unknown:
        found.problems.append(f"{len(unknown)} events in the ledger were never sent, such as {min(unknown)}")
    waiting = [row for row in books.events if row.state == "pending"]
    if waiting:
        found.problems.append(f"{len(waiting)} events were kept and never merged")


def _check_calls(books: Books, found: Findings) -> None:
    """3b: a call is what an undisturbed fold of its events gives, and each call that was made is there."""
    told: dict[str, list[Any]] = defaultdict(list)
    for row in books.events:
        if row.state == "merged":
            told[row.call_sid].append(row)
    for call_sid, rows in told.items():
        call = books.calls.get(call_sid)
        if call is None:
            found.problems.append(f"call {call_sid} has events and no row")
            continue
        ours = [read_event(bytes(row.body), received_at=row.received_at) for row in rows]
        expected = describe(merge(ours))
        same = call.details == orjson.dumps(asdict(expected), option=orjson.OPT_UTC_Z).decode()
        columns = (call.status, call.is_final, call.outcome)
        if not same or columns != (expected.status, expected.is_final, expected.outcome.value):
            found.problems.append(f"call {call_sid} is not what its {len(rows)} events say")
    for one in books.webhooks:
        if one["kind"] != "malformed" and one["outcome"] == "delivered" and one["call_sid"] not in books.calls:
            found.problems.append(f"call {one['call_sid']} was told of and has no row")
        call = books.calls.get(one["call_sid"])
        if one["kind"] == "event" and one["last"] and one["delivered"] and call is not None and call.lead_id is None:
            found.problems.append(f"call {one['call_sid']} of {one['phone']} ended and found no lead")
        if call is not None and call.lead_id is not None and one["kind"] == "event":
            lead = books.leads.get(call.lead_id)
            if lead is None or _whose(lead) != (one["campaign_id"], one["phone"]):
                found.problems.append(f"call {one['call_sid']} of {one['phone']} is linked to another's lead")


def _check_limit(rig: Rig, books: Books, found: Findings) -> None:
    """4: never more POSTs in a sliding span than the limit and its burst, wherever they came from."""
    rate = Rate.parse(rig.plan.rate).per_second
    burst = max(1, math.floor(rate * 0.05))
    times = sorted(entry["time"] for entry in books.journal)
    for span in SPANS_SECONDS:
        allowed = math.floor(rate * (span + JITTER_SECONDS)) + burst
        most = max(_in_spans(times, span), default=0)
        if most > allowed:
            found.over_limit = max(found.over_limit, most - allowed)
            found.problems.append(f"{most} POSTs arrived within {span:g} s; the limit allows {allowed}")


def _in_spans(times: list[float], span: float) -> Iterator[int]:
    first = 0
    for last, time in enumerate(times):
        while times[first] <= time - span:
            first += 1
        yield last - first + 1


def _whose(lead: Any) -> tuple[str, str]:
    """Campaign and phone number as the sandbox has them."""
    return lead.campaign_id, lead.phone.removeprefix("+91")


def _status_of(body: bytes) -> str:
    try:
        return str(read_event(bytes(body), received_at=datetime.now(UTC)).payload.get("status"))
    except UnreadableEvent:
        return ""
