"""Intake: a batch of leads goes into the ledger once, its bad rows into quarantine; on both databases."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pipeline.domain.lead import lead_id
from pipeline.intake import Intake, TakenIn, UnreadableBatch
from pipeline.ledger import LeadFilter, Ledger
from pipeline.ledger.tables import batches, campaigns, leads, quarantine
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN, story_of

MakeSettings = Callable[..., Settings]
BATCH = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"


@pytest.fixture
def woken() -> list[str]:
    """The campaigns for which a dispatcher was asked."""
    return []


@pytest.fixture
def intake(ledger: Ledger, make_settings: MakeSettings, woken: list[str]) -> Intake:
    """The stage, over the test's ledger."""
    return Intake(ledger, make_settings(), wake=woken.append)


def message(*rows: object, **overrides: Any) -> dict[str, Any]:
    return {"v": 1, "campaign_id": CAMPAIGN, "batch": BATCH, "leads": list(rows)} | overrides


def row(number: int = 0, **overrides: Any) -> dict[str, Any]:
    return {"phone": f"98{number:08d}", "data": {"customer_name": f"Lead {number}"}} | overrides


def counts(ledger: Ledger) -> dict[str, int]:
    """How many rows each table has."""
    with ledger.database.read() as connection:
        return {
            table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in (campaigns, batches, leads, quarantine)
        }


def listed(ledger: Ledger) -> list[dict[str, Any]]:
    return sorted(ledger.reports.leads(LeadFilter()), key=lambda lead: str(lead["key"]))


def test_valid_leads_are_queued_and_a_dispatcher_is_woken(ledger: Ledger, intake: Intake, woken: list[str]) -> None:
    assert intake.take_in(message(row(1), row(2, key="k"))) == TakenIn(CAMPAIGN, leads=2, accepted=2, refused=0)
    first, second = listed(ledger)
    assert (first["id"], first["key"]) == (str(lead_id(CAMPAIGN, "+919800000001")), "+919800000001")
    assert (second["id"], second["key"], second["state"]) == (str(lead_id(CAMPAIGN, "k")), "k", "queued")
    assert woken == [CAMPAIGN]


def test_a_batch_that_is_delivered_again_adds_nothing(ledger: Ledger, intake: Intake) -> None:
    given = message(row(1), row(2), row(phone="12"))
    assert intake.take_in(given) == TakenIn(CAMPAIGN, 2, 2, 1)
    before = counts(ledger)
    assert before == {"campaigns": 1, "batches": 1, "leads": 2, "quarantine": 1}
    assert intake.take_in(given) == TakenIn(CAMPAIGN, 2, 0, 1)
    assert counts(ledger) == before
    assert ledger.reports.status(now=datetime.now(UTC))["accepted"] == 2


def test_a_batch_without_an_id_is_known_by_its_content(ledger: Ledger, intake: Intake) -> None:
    given = message(row(1), batch=None)
    assert [intake.take_in(given).accepted for _ in range(2)] == [1, 0]
    assert counts(ledger)["batches"] == 1
    assert intake.take_in(message(row(2), batch=None)).accepted == 1
    assert counts(ledger)["batches"] == 2


def test_bad_rows_are_kept_with_their_reason_and_the_others_are_taken(ledger: Ledger, intake: Intake) -> None:
    bad: list[Any] = [row(phone="12"), {"phone": "9800000009"}, "text", None, row(3, extra=1), row(4, key="a\x00b")]
    assert intake.take_in(message(row(1), *bad, row(2))) == TakenIn(CAMPAIGN, 2, 2, 6)
    kept = {one.body: one.reason for one in ledger.quarantine.waiting(kind="lead")}
    assert [json.loads(body)["campaign_id"] for body in kept] == [CAMPAIGN] * 6
    assert sorted(kept.values()) == [
        "a lead must be an object, not null",
        "a lead must be an object, not text",
        "data: missing",
        "extra: unknown field (put it into data)",
        "key: must not hold control characters",
        "phone: the phone number has too few digits for region IN",
    ]
    whole = [json.loads(body)["lead"] for body in kept]
    assert all(one in whole for one in bad)


@pytest.mark.parametrize(
    "odd",
    [
        {"phone": "9800000001", "data": {}, "a\x00b": 1},
        {"phone": "9800000001", "data": {}, "half \ud800": 1},
        {"phone": "9800000001", "data": {"half": "\ud800"}},
        {"phone": "9800000001", "data": {}, "key": "\udfff"},
        {"phone": "9800000001", "data": {"n": 2**70}},
        {"phone": "9800000001", "data": {"n": float("nan")}},
        {"phone": "9800000001\x00", "data": []},
    ],
)
def test_whatever_a_row_holds_it_does_not_keep_the_others_out(ledger: Ledger, intake: Intake, odd: Any) -> None:
    assert intake.take_in(message(odd, row(2))) == TakenIn(CAMPAIGN, 1, 1, 1)
    assert counts(ledger)["quarantine"] == 1


@pytest.mark.parametrize(
    ("phone", "reason"),
    [
        ("+1 415 555 2671", "another country"),
        ("+971501234567", "another country"),
        ("+44 20 7946 0958", "another country"),
    ],
)
def test_a_number_whose_last_digits_would_call_a_stranger_is_refused(
    ledger: Ledger, intake: Intake, phone: str, reason: str
) -> None:
    assert intake.take_in(message(row(phone=phone))).refused == 1
    assert reason in ledger.quarantine.waiting(kind="lead")[0].reason
    assert counts(ledger)["leads"] == 0


def test_a_batch_of_bad_rows_wakes_nobody(ledger: Ledger, intake: Intake, woken: list[str]) -> None:
    assert intake.take_in(message(row(phone="12"))) == TakenIn(CAMPAIGN, 0, 0, 1)
    assert woken == []


def test_a_repeated_batch_wakes_a_dispatcher_again_because_the_first_may_not_have(
    intake: Intake, woken: list[str]
) -> None:
    given = message(row(1))
    for _ in range(2):
        intake.take_in(given)
    assert woken == [CAMPAIGN] * 2


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("text", "a batch must be an object with campaign_id and leads"),
        (None, "a batch must be an object with campaign_id and leads"),
        ([], "a batch must be an object with campaign_id and leads"),
        ({"leads": []}, "campaign id"),
        (message(campaign_id="../other"), "campaign id"),
        (message(campaign_id=7), "campaign id"),
        (message(leads={}), "leads must be a list"),
        (message(leads=None), "leads must be a list"),
        (message(batch="not a uuid"), "batch must be a UUID"),
        (message(batch=7), "batch must be a UUID"),
        (message(batch=["x"]), "batch must be a UUID"),
    ],
)
def test_what_is_no_batch_is_refused_and_changes_nothing(
    ledger: Ledger, intake: Intake, woken: list[str], wrong: object, reason: str
) -> None:
    with pytest.raises(UnreadableBatch, match=reason):
        intake.take_in(wrong)
    assert counts(ledger) == {"campaigns": 0, "batches": 0, "leads": 0, "quarantine": 0}
    assert woken == []


def test_a_lead_ages_by_the_settings_or_by_its_campaign(
    ledger: Ledger, make_settings: MakeSettings, woken: list[str]
) -> None:
    intake = Intake(ledger, make_settings(lead_max_age_seconds=3600), wake=woken.append)
    intake.take_in(message(row(1, key="a")))
    ledger.campaigns.change(CAMPAIGN, {"lead_max_age_seconds": 60}, now=datetime.now(UTC))
    intake.take_in(message(row(1, key="b")))
    assert [lead["expires_at"] - lead["accepted_at"] for lead in listed(ledger)] == [
        timedelta(hours=1),
        timedelta(minutes=1),
    ]


def test_a_lead_is_written_in_futworks_own_names_too(ledger: Ledger, intake: Intake) -> None:
    given = {"recipientPhoneNumber": 9800000001, "recipientData": {"customer_name": "Asha"}}
    assert intake.take_in(message(given)).accepted == 1
    story = story_of(ledger, LeadFilter(campaign=CAMPAIGN))
    assert (story["phone"], story["data"]) == ("+919800000001", {"customer_name": "Asha"})


def test_a_broken_wake_loses_no_lead(ledger: Ledger, make_settings: MakeSettings) -> None:
    """The leads are committed before anybody is woken; the broker gives the batch out again, and it changes nothing."""

    def away(_: str) -> None:
        raise ConnectionError("the broker is away")

    with pytest.raises(ConnectionError):
        Intake(ledger, make_settings(), wake=away).take_in(message(row(1)))
    assert counts(ledger)["leads"] == 1
