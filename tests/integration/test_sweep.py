"""Sweep and tidy: what dead processes left behind is found, and evidence counts before a policy decides."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import redis
import sqlalchemy as sa

from pipeline.domain.campaign import Hold, HoldKind
from pipeline.domain.lead import Claim, Lead
from pipeline.events import Events
from pipeline.ledger import LeadFilter, Ledger, StoredEvent, digest_of, evidence
from pipeline.ledger.tables import leads, recounts, tallies
from pipeline.settings import Settings
from pipeline.sweep import Sweep, Swept, Tidied
from pipeline.wiring import Services
from tests.conftest import CAMPAIGN, make_lead, story_of

MakeSettings = Callable[..., Settings]
LEASE = timedelta(minutes=2)
OTHER = "68ecc86fd9fbecbe9431a18f"


class Around:
    """A sweep with what is around it: the campaigns that it woke, and a spool that gives up so many files."""

    def __init__(self, ledger: Ledger, settings: Settings, *, spooled: int = 0, events_wait: bool = False) -> None:
        self.woken: list[str] = []
        self.events = Events(ledger, settings)
        self.sweep = Sweep(
            ledger,
            settings,
            wake=self.woken.append,
            merge_left_over=lambda before, now: self.events.merge_left_over(before=before, now=now),
            drain_spool=lambda: spooled,
            events_wait=lambda: events_wait,
        )


def now() -> datetime:
    return datetime.now(UTC)


def take_in(ledger: Ledger, *given: Lead, campaign: str = CAMPAIGN, max_age: timedelta = timedelta(days=1)) -> None:
    known = ledger.campaigns.ensure(campaign, now=now())
    ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=max_age, now=now())


def make_uncertain(ledger: Ledger, *given: Lead, since: timedelta) -> list[Claim]:
    """Leads whose dispatcher died so long ago."""
    take_in(ledger, *given)
    claims = ledger.leads.claim(CAMPAIGN, len(given), lease=LEASE, now=now())
    assert ledger.leads.settle_lost_claims(now=now() + LEASE) == len(given)
    with ledger.database.write() as connection:
        connection.execute(sa.update(leads).values(changed_at=now() - since))
    return claims


def stored(ledger: Ledger, phone: str, *, age: timedelta) -> None:
    """An event that a worker stored so long ago, and did not merge."""
    context = {"recipientPhoneNumber": phone, "campaignId": CAMPAIGN}
    body = json.dumps({"callSid": "c1", "campaignId": CAMPAIGN, "status": "completed", "contextDetails": context})
    ledger.calls.keep([StoredEvent(digest_of(body.encode()), body.encode(), now() - age)])


def states(ledger: Ledger) -> dict[str, int]:
    """How many leads are in each state, of those that have any."""
    return {state: n for state, n in ledger.reports.status(now=now())["leads"].items() if n}


def tidied(**changed: int) -> Tidied:
    return Tidied(**({"expired": 0, "resent": 0, "dropped": 0, "merged": 0, "linked": 0, "spooled": 0} | changed))


def test_an_empty_ledger_has_nothing_to_sweep_or_tidy(ledger: Ledger, make_settings: MakeSettings) -> None:
    around = Around(ledger, make_settings())
    assert (around.sweep.sweep(), around.sweep.tidy()) == (Swept(0, 0), tidied())
    assert around.woken == []


def test_a_campaign_with_due_leads_is_woken_and_others_are_not(ledger: Ledger, make_settings: MakeSettings) -> None:
    take_in(ledger, make_lead(1))
    take_in(ledger, make_lead(1), campaign=OTHER, max_age=timedelta())  # too old at once
    take_in(ledger, make_lead(1), campaign="paused")
    ledger.campaigns.pause("paused", reason="for a test", now=now())
    take_in(ledger, make_lead(1), campaign="empty")
    ledger.leads.claim("empty", 1, lease=LEASE, now=now())
    around = Around(ledger, make_settings())
    assert around.sweep.sweep() == Swept(woken=1, lost_claims=0)
    assert around.woken == [CAMPAIGN]


@pytest.mark.parametrize(("probe_in", "woken"), [(timedelta(seconds=-1), [CAMPAIGN]), (timedelta(minutes=1), [])])
def test_a_held_campaign_is_woken_once_its_probe_is_due(
    ledger: Ledger, make_settings: MakeSettings, probe_in: timedelta, woken: list[str]
) -> None:
    take_in(ledger, make_lead(1))
    ledger.campaigns.hold(CAMPAIGN, Hold(HoldKind.OUTAGE, "it was down"), probe_at=now() + probe_in, now=now())
    around = Around(ledger, make_settings())
    around.sweep.sweep()
    assert around.woken == woken


def test_a_held_campaign_without_a_due_lead_is_not_woken(ledger: Ledger, make_settings: MakeSettings) -> None:
    ledger.campaigns.ensure(CAMPAIGN, now=now())
    ledger.campaigns.hold(CAMPAIGN, Hold(HoldKind.OUTAGE, "it was down"), probe_at=now(), now=now())
    around = Around(ledger, make_settings())
    assert around.sweep.sweep() == Swept(0, 0)


def test_lost_claims_are_settled_also_when_nobody_can_be_woken(ledger: Ledger, make_settings: MakeSettings) -> None:
    take_in(ledger, make_lead(1))
    ledger.leads.claim(CAMPAIGN, 1, lease=timedelta(), now=now())
    take_in(ledger, make_lead(2))

    def away(_: str) -> None:
        raise ConnectionError("the broker is away")

    sweep = Sweep(
        ledger,
        make_settings(),
        wake=away,
        merge_left_over=lambda _before, _now: 0,
        drain_spool=lambda: 0,
        events_wait=lambda: False,
    )
    with pytest.raises(ConnectionError):
        sweep.sweep()
    assert states(ledger) == {"queued": 1, "uncertain": 1}


def test_old_leads_expire(ledger: Ledger, make_settings: MakeSettings) -> None:
    take_in(ledger, make_lead(1), max_age=timedelta())
    take_in(ledger, make_lead(2))
    assert Around(ledger, make_settings()).sweep.tidy() == tidied(expired=1)
    assert states(ledger) == {"queued": 1, "expired": 1}


@pytest.mark.parametrize(
    ("policy", "done", "then"),
    [
        ("hold", tidied(), {"uncertain": 2}),
        ("resend", tidied(resent=2), {"queued": 2}),
        ("drop", tidied(dropped=2), {"cancelled": 2}),
    ],
)
def test_the_policy_decides_about_leads_that_stayed_uncertain(
    ledger: Ledger, make_settings: MakeSettings, policy: str, done: Tidied, then: dict[str, int]
) -> None:
    make_uncertain(ledger, make_lead(1), make_lead(2), since=timedelta(hours=2))
    around = Around(ledger, make_settings(on_uncertain=policy))
    assert around.sweep.tidy() == done
    assert states(ledger) == then


def test_no_policy_decides_before_its_time(ledger: Ledger, make_settings: MakeSettings) -> None:
    make_uncertain(ledger, make_lead(1), since=timedelta(minutes=59))
    assert Around(ledger, make_settings(on_uncertain="resend")).sweep.tidy() == tidied()
    assert states(ledger) == {"uncertain": 1}


def test_an_event_that_was_left_over_counts_before_the_policy(ledger: Ledger, make_settings: MakeSettings) -> None:
    """A lead that Futwork called must not be sent again because the worker with its event died."""
    claims = make_uncertain(ledger, make_lead(1), make_lead(2), since=timedelta(hours=2))
    stored(ledger, claims[0].phone, age=timedelta(minutes=1))
    around = Around(ledger, make_settings(on_uncertain="resend"))
    assert around.sweep.tidy() == tidied(merged=1, resent=1)
    assert states(ledger) == {"called": 1, "queued": 1}


def test_an_orphan_that_can_be_linked_counts_before_the_policy(ledger: Ledger, make_settings: MakeSettings) -> None:
    phone = make_lead(1).phone
    around = Around(ledger, make_settings(on_uncertain="resend"))
    stored(ledger, phone, age=timedelta(minutes=1))
    assert around.sweep.tidy() == tidied(merged=1)
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    assert around.sweep.tidy() == tidied(linked=1)
    assert states(ledger) == {"called": 1}


def test_no_policy_decides_while_events_come_out_of_the_spool(ledger: Ledger, make_settings: MakeSettings) -> None:
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    settings = make_settings(on_uncertain="resend")
    assert Around(ledger, settings, spooled=3).sweep.tidy() == tidied(spooled=3)
    assert states(ledger) == {"uncertain": 1}
    assert Around(ledger, settings).sweep.tidy() == tidied(resent=1)


def test_an_event_that_was_stored_just_now_counts_before_the_policy(
    ledger: Ledger, make_settings: MakeSettings
) -> None:
    """A worker that was behind left its merge to a later task, which has not come yet."""
    claims = make_uncertain(ledger, make_lead(1), make_lead(2), since=timedelta(hours=2))
    stored(ledger, claims[0].phone, age=timedelta(seconds=10))
    assert Around(ledger, make_settings(on_uncertain="resend")).sweep.tidy() == tidied(merged=1, resent=1)
    assert states(ledger) == {"called": 1, "queued": 1}


def test_no_policy_decides_while_a_stored_event_is_not_merged(ledger: Ledger, make_settings: MakeSettings) -> None:
    claims = make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    stored(ledger, claims[0].phone, age=timedelta(seconds=10))
    sweep = Sweep(
        ledger,
        make_settings(on_uncertain="resend"),
        wake=lambda _: None,
        merge_left_over=lambda _before, _now: 0,  # as when another process has its turn
        drain_spool=lambda: 0,
        events_wait=lambda: False,
    )
    assert (sweep.tidy(), states(ledger)) == (tidied(), {"uncertain": 1})


def test_no_policy_decides_while_events_wait_in_the_broker_or_a_worker_or_it_cannot_be_asked(
    ledger: Ledger, make_settings: MakeSettings, valkey_url: str, valkey: redis.Redis
) -> None:
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    url = ledger.database.url.render_as_string(hide_password=False)

    def tidy(broker_url: str) -> Tidied:
        settings = make_settings(broker_url=broker_url, database_url=url, on_uncertain="resend")
        parts = Services(settings)
        try:
            return parts.sweep.tidy()
        finally:
            parts.ledger.close()

    valkey.lpush("events", "a message")
    assert (tidy(valkey_url), states(ledger)) == (tidied(), {"uncertain": 1})
    valkey.delete("events")
    valkey.hset("unacked", "tag", '[{"body": ""}, "", "events"]')  # a worker took it, and died or froze
    assert (tidy(valkey_url), states(ledger)) == (tidied(), {"uncertain": 1})
    valkey.hset("unacked", "tag", '[{"body": ""}, "", "upkeep"]')
    spool = make_settings().spool_dir
    spool.mkdir(parents=True, exist_ok=True)
    (spool / "1.damaged").touch()
    assert (tidy(valkey_url), states(ledger)) == (tidied(), {"uncertain": 1})
    (spool / "1.damaged").unlink()
    assert (tidy("redis://127.0.0.1:9/0"), states(ledger)) == (tidied(), {"uncertain": 1})
    assert (tidy(valkey_url), states(ledger)) == (tidied(resent=1), {"queued": 1})


def test_no_policy_decides_when_left_over_events_could_not_be_merged(
    ledger: Ledger, make_settings: MakeSettings
) -> None:
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))

    def fails(*_: Any) -> int:
        raise RuntimeError("a fault of ours")

    sweep = Sweep(
        ledger,
        make_settings(on_uncertain="resend"),
        wake=lambda _: None,
        merge_left_over=fails,
        drain_spool=lambda: 0,
        events_wait=lambda: False,
    )
    with pytest.raises(RuntimeError):
        sweep.tidy()
    assert states(ledger) == {"uncertain": 1}


def test_an_event_that_a_worker_may_be_merging_now_is_left_to_it(ledger: Ledger, make_settings: MakeSettings) -> None:
    stored(ledger, make_lead(1).phone, age=timedelta(seconds=5))
    assert Around(ledger, make_settings(), events_wait=True).sweep.tidy() == tidied()
    assert len(ledger.calls.pending(before=now())) == 1


def test_tidy_folds_the_tallies_and_recounts_them_once_an_hour(ledger: Ledger, make_settings: MakeSettings) -> None:
    take_in(ledger, make_lead(1), make_lead(2))
    around = Around(ledger, make_settings())
    around.sweep.tidy()
    first = ledger.rollups.verified_at()
    with ledger.database.write() as connection:
        connection.execute(sa.delete(tallies).where(tallies.c.name == "lead.queued"))
    around.sweep.tidy()
    assert ledger.rollups.verified_at() == first is not None
    with ledger.database.write() as connection:
        connection.execute(sa.update(recounts).values(at=now() - timedelta(minutes=61)))
    assert ledger.reports.overview(now=now())["adds_up"] is False
    around.sweep.tidy()
    after = ledger.reports.overview(now=now())
    assert (after["adds_up"], after["leads"]["queued"]) == (True, 2)
    assert [one["by"] for one in after["recount"]["differences"]] == [2]
    with ledger.database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(tallies.c.part != 0)) == 0


# Evidence that lies unread


def quarantined(ledger: Ledger, body: bytes, *, kind: str = "event", age: timedelta = timedelta()) -> None:
    ledger.quarantine.put(kind, body, reason="not readable", now=now() - age)


def about(phone: str | None, campaign: str | None = CAMPAIGN) -> bytes:
    """An event whose callSid has another name by now, so that it lies in quarantine."""
    return orjson.dumps({"call_sid": "1", "campaignId": campaign, "contextDetails": {"recipientPhoneNumber": phone}})


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (about("9800000001"), "event"),
        (about("9800000001", None), "event"),
        (about(None), "event"),
        (b"\x00 no JSON", "event"),
        (b"[1, 2]", "batch"),
        (b"no JSON either", "message"),
    ],
)
@pytest.mark.parametrize("policy", ["resend", "drop"])
def test_no_policy_decides_about_a_lead_while_an_event_in_quarantine_may_be_about_it(
    ledger: Ledger, make_settings: MakeSettings, policy: str, body: bytes, kind: str
) -> None:
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    quarantined(ledger, body, kind=kind)
    around = Around(ledger, make_settings(on_uncertain=policy))
    assert (around.sweep.tidy(), states(ledger)) == (tidied(), {"uncertain": 1})
    story = story_of(ledger, LeadFilter(campaign=CAMPAIGN))
    assert story["reason"].startswith("waits for evidence: ")
    ledger.quarantine.release([one.digest for one in ledger.quarantine.waiting()], now=now())
    around.sweep.tidy()
    assert states(ledger) == {"resend": {"queued": 1}, "drop": {"cancelled": 1}}[policy]


@pytest.mark.parametrize(
    ("body", "kind", "age"),
    [
        (about("9800000002"), "event", timedelta()),
        (about("9800000001", OTHER), "event", timedelta()),
        (about("9800000001"), "lead", timedelta()),
        (about("9800000001"), "event", timedelta(days=2)),
    ],
)
def test_what_in_quarantine_cannot_be_about_a_lead_does_not_hold_its_policy_up(
    ledger: Ledger, make_settings: MakeSettings, body: bytes, kind: str, age: timedelta
) -> None:
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    quarantined(ledger, body, kind=kind, age=age)
    assert Around(ledger, make_settings(on_uncertain="resend")).sweep.tidy() == tidied(resent=1)


def test_no_policy_decides_while_a_call_without_a_lead_may_be_the_leads(
    ledger: Ledger, make_settings: MakeSettings
) -> None:
    """Two leads of one person fit the call, so it has neither; both may have been called."""
    first, second = make_lead(1), make_lead(1, key="second")
    make_uncertain(ledger, first, second, make_lead(2), since=timedelta(hours=2))
    stored(ledger, first.phone, age=timedelta(minutes=1))
    around = Around(ledger, make_settings(on_uncertain="resend"))
    assert (around.sweep.tidy().resent, states(ledger)) == (1, {"uncertain": 2, "queued": 1})


def test_more_in_quarantine_than_is_read_may_be_about_any_lead(
    ledger: Ledger, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "_MOST_READ", 2)
    make_uncertain(ledger, make_lead(1), since=timedelta(hours=2))
    for number in (2, 3, 4):
        quarantined(ledger, about(f"980000000{number}"))
    assert (Around(ledger, make_settings(on_uncertain="resend")).sweep.tidy(), states(ledger)) == (
        tidied(),
        {"uncertain": 1},
    )
