"""The books of the chaos suite: whatever is doctored in them must be found, or the experiments prove nothing."""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from pipeline.domain.call import describe, merge, read_event
from tests.chaos.books import Books, compare
from tests.chaos.feed import Accepted
from tests.conftest import CAMPAIGN

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)
RIG: Any = SimpleNamespace(plan=SimpleNamespace(rate="10/s"))
LEADS = 4


def body_of(sid: str, status: str, number: int = 0) -> bytes:
    phone = f"+9198{number:08d}"
    return orjson.dumps(
        {"callSid": sid, "campaignId": CAMPAIGN, "status": status, "contextDetails": {"recipientPhoneNumber": phone}}
    )


def event_of(body: bytes, seconds: int = 0) -> Any:
    sid = orjson.loads(body)["callSid"]
    return SimpleNamespace(
        digest=hashlib.sha256(body).hexdigest(), body=body, call_sid=sid, state="merged",
        received_at=NOW + timedelta(seconds=seconds),
    )  # fmt: skip


def call_of(events: list[Any], lead: uuid.UUID | None) -> Any:
    call = describe(merge([read_event(one.body, received_at=one.received_at) for one in events]))
    details = orjson.dumps(asdict(call), option=orjson.OPT_UTC_Z).decode()
    return SimpleNamespace(
        status=call.status, is_final=call.is_final, outcome=call.outcome.value, details=details, lead_id=lead
    )


def good_books() -> Books:
    """Four leads: posted once each, called, two events a call; and one stranger's event that a client posted."""
    journal, webhooks, leads, events, calls = [], [], {}, [], {}
    for number in range(LEADS):
        id_, phone, sid = uuid.UUID(int=number), f"98{number:08d}", f"call-{number}"
        journal.append(
            {
                "campaign_id": CAMPAIGN, "phone": phone, "accepted": True, "status": 200, "outcome": "accepted",
                "time": NOW.timestamp() + number,
            }
        )  # fmt: skip
        leads[id_] = SimpleNamespace(
            id=id_, campaign_id=CAMPAIGN, phone=f"+91{phone}", state="called", claim_expires_at=None, reason=None
        )
        told = enumerate(("initiated", "completed"))
        mine = [event_of(body_of(sid, status, number), at) for at, status in told]
        for one, last in zip(mine, (False, True), strict=True):
            webhooks.append(
                {
                    "campaign_id": CAMPAIGN, "phone": phone, "call_sid": sid, "kind": "event", "outcome": "delivered",
                    "status": orjson.loads(one.body)["status"], "last": last, "delivered": True,
                }
            )  # fmt: skip
        events += mine
        calls[sid] = call_of(mine, id_)
    stranger = event_of(body_of("stranger", "completed", 99))
    calls["stranger"] = call_of([stranger], None)
    promised = Accepted(leads=set(leads), events={stranger.digest}, offered={stranger.digest})
    status = {"accepted": LEADS, "leads": {"called": LEADS, "uncertain": 0, "sending": 0}}
    return Books(promised, journal, webhooks, status, leads, [*events, stranger], calls, [], {"accepted": LEADS})


def doctored(change: Callable[[Books], object]) -> list[str]:
    books = good_books()
    change(books)
    return compare(RIG, books).problems


def first(books: Books) -> Any:
    return books.leads[uuid.UUID(int=0)]


def lose_a_lead(books: Books) -> None:
    del books.leads[uuid.UUID(int=0)]
    books.status["leads"]["called"] -= 1
    books.status["accepted"] -= 1


def lose_an_event(books: Books) -> None:
    """A middle one: its call still ends, and is still what its other events say."""
    gone = next(one for one in books.events if one.call_sid == "call-1")
    books.events.remove(gone)
    books.calls["call-1"] = call_of([one for one in books.events if one.call_sid == "call-1"], uuid.UUID(int=1))


def lose_a_clients_event(books: Books) -> None:
    books.events.pop()


def keep_an_event_twice(books: Books) -> None:
    again = copy.copy(books.events[0])
    again.digest = "another"
    books.events.append(again)


def keep_a_clients_event_twice(books: Books) -> None:
    books.events.append(copy.copy(books.events[-1]))


def invent_an_event(books: Books) -> None:
    books.events.append(event_of(body_of("invented", "completed")))
    books.calls["invented"] = call_of(books.events[-1:], None)


def post_again(books: Books, **how: Any) -> None:
    books.journal.append(books.journal[0] | {"time": NOW.timestamp() + 100} | how)


def post_again_after(books: Books, status: int | None) -> None:
    """Nothing was accepted at first, but who could know?"""
    books.journal.insert(0, books.journal[0] | {"accepted": False, "status": status, "outcome": "x"})


def crowd(books: Books) -> None:
    """Fifteen POSTs within a second where ten a second are allowed, each proven not taken before."""
    for number in range(15):
        throttled = {"accepted": False, "status": 429, "outcome": "throttled"}
        books.journal.insert(0, books.journal[0] | throttled | {"time": NOW.timestamp() + 50 + number / 20})


def not_merged(books: Books) -> None:
    books.events[0].state = "pending"


def wrong_call(books: Books) -> None:
    books.calls["call-0"].outcome = "busy"


def wrong_details(books: Books) -> None:
    books.calls["call-0"].details = books.calls["call-0"].details.replace("completed", "ringing")


def regressed(books: Books) -> None:
    books.calls["call-0"] = call_of([one for one in books.events if one.call_sid == "call-0"][:1], uuid.UUID(int=0))


DOCTORED: dict[str, tuple[Callable[[Books], object], str]] = {
    "a lead is lost": (lose_a_lead, "1 leads were promised and are not in the ledger"),
    "the sum is wrong": (lambda books: books.status["leads"].update(called=5), "accepted 4, sum over states 5"),
    "accepted is wrong": (lambda books: books.status.update(accepted=3), "accepted 3, sum over states 4"),
    "a claim is left": (lambda books: setattr(first(books), "claim_expires_at", NOW), "1 claims are left over"),
    "a lead is left sending": (lambda books: setattr(first(books), "state", "sending"), "1 claims are left over"),
    "a client gave up": (lambda books: books.promised.given_up.append("an event"), "clients gave up: an event"),
    "accepted twice": (post_again, "was accepted 2 times"),
    "posted again after a reset": (lambda books: post_again_after(books, None), "was posted again after x (None)"),
    "posted again after a 502": (lambda books: post_again_after(books, 502), "was posted again after x (502)"),
    "posted again after a 408": (lambda books: post_again_after(books, 408), "was posted again after x (408)"),
    "called but not accepted": (lambda books: books.journal.pop(0), "although the sandbox never accepted it"),
    "accepted but uncertain": (
        lambda books: setattr(first(books), "state", "uncertain"), "was accepted by the sandbox and is uncertain"
    ),
    "ended but submitted": (lambda books: setattr(first(books), "state", "submitted"), "and it is submitted"),
    "an event is lost": (lose_an_event, "1 events were answered 200 and are not in the ledger"),
    "a client's event is lost": (lose_a_clients_event, "1 events were answered 200 and are not in the ledger"),
    "an event is there twice": (keep_an_event_twice, "1 events are in the ledger twice"),
    "a client's event is there twice": (keep_a_clients_event_twice, "1 events are in the ledger twice"),
    "an event was never sent": (invent_an_event, "1 events in the ledger were never sent"),
    "an event is not merged": (not_merged, "1 events were kept and never merged"),
    "a call has no row": (lambda books: books.calls.pop("call-0"), "call call-0 has events and no row"),
    "a call has another outcome": (wrong_call, "call call-0 is not what its 2 events say"),
    "a call has other details": (wrong_details, "call call-0 is not what its 2 events say"),
    "a call went back": (regressed, "call call-0 is not what its 2 events say"),
    "a call found no lead": (
        lambda books: setattr(books.calls["call-0"], "lead_id", None),
        "call call-0 of 9800000000 ended and found no lead",
    ),
    "a call found another's lead": (
        lambda books: setattr(books.calls["call-0"], "lead_id", uuid.UUID(int=1)),
        "call call-0 of 9800000000 is linked to another's lead",
    ),
    "a stranger was posted": (
        lambda books: books.journal.append(books.journal[0] | {"phone": "9700000000", "time": 1.0}),
        "1 were posted without a lead in the ledger",
    ),
    "an acceptance was made up": (lambda books: books.noted.update(accepted=LEADS + 1), "5 acceptances are noted"),
    "too fast": (crowd, "POSTs arrived within 1 s"),
}  # fmt: skip


def test_good_books_are_in_order() -> None:
    found = compare(RIG, good_books())
    assert found.problems == []
    assert (found.leads, found.events, found.lost, found.duplicated) == (LEADS, 2 * LEADS + 1, 0, 0)


@pytest.mark.parametrize("name", DOCTORED)
def test_what_is_doctored_is_found(name: str) -> None:
    change, expected = DOCTORED[name]
    problems = doctored(change)
    assert [problem for problem in problems if expected in problem], problems


@pytest.mark.parametrize("status", [401, 403, 404, 422, 429, 500, 503])
def test_a_post_after_an_answer_that_proves_that_it_was_not_taken_is_in_order(status: int) -> None:
    def change(books: Books) -> None:
        post_again_after(books, status)

    assert doctored(change) == []


def test_lost_and_twice_are_counted() -> None:
    for change, lost, twice in (
        (lose_a_lead, 1, 0), (lose_an_event, 1, 0), (post_again, 0, 1), (keep_an_event_twice, 0, 1)
    ):  # fmt: skip
        books = good_books()
        change(books)
        found = compare(RIG, books)
        assert (found.lost, found.duplicated) == (lost, twice), change
