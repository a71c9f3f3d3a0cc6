"""Clocks that disagree or are set: the ledger's is the one that counts, and one that goes back strands nothing."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.beat import Service

from pipeline.domain.campaign import Campaign, Hold, HoldKind
from pipeline.domain.lead import Outcome, Retry, settle
from pipeline.ledger import Ledger, StoredEvent, database
from pipeline.ledger.tables import campaigns, leads
from pipeline.settings import Settings
from pipeline.wiring import Services
from pipeline.worker import tasks
from pipeline.worker.app import build_app
from pipeline.worker.request import DiscreetRequest
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead
from tests.waiting import until

HOUR = timedelta(hours=1)
LATER = NOW + HOUR
"""What the clock showed before it was set back to `NOW`."""
RETRY = Retry(base=timedelta(seconds=10), cap=timedelta(minutes=10), max_attempts=8)


def take_in(ledger: Ledger, numbers: range, *, now: datetime) -> None:
    known = ledger.campaigns.ensure(CAMPAIGN, now=now)
    given = [make_lead(number) for number in numbers]
    ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=24 * HOUR, now=now)


def due(ledger: Ledger) -> list[datetime]:
    with ledger.database.read() as connection:
        return list(connection.scalars(sa.select(leads.c.due_at).order_by(leads.c.due_at)))


def test_the_ledger_on_postgresql_tells_its_own_time(postgres_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose clock is two hours off must not find leads due two hours late, or claims over at once."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + 2 * HOUR

    monkeypatch.setattr(database, "datetime", Wrong)
    assert abs(postgres_ledger.now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_the_time_goes_on_while_the_ledger_is_away(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(postgres_url)
    told = ledger.now()
    ledger.close()
    monkeypatch.setattr(database, "_ASK_TIME_SECONDS", 0.0)  # it wants to ask, and cannot
    monkeypatch.setattr(ledger.database, "engine", sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:9/none"))
    assert told < ledger.now() < told + HOUR
    ledger.close()


def test_leads_that_were_queued_in_the_future_wait_as_long_as_they_were_told(ledger: Ledger) -> None:
    take_in(ledger, range(3), now=LATER)
    claims = ledger.leads.claim(CAMPAIGN, 1, lease=timedelta(minutes=2), now=LATER)
    failed = [settle(make_answer(one, Outcome.BUSY), RETRY, now=LATER, jitter=random.Random(7)) for one in claims]
    ledger.leads.record(Campaign(CAMPAIGN), failed, probe_after=timedelta(seconds=30), now=LATER)
    wait = failed[0].due_at - LATER
    assert ledger.leads.take_back_the_future(now=NOW) == 3
    assert due(ledger) == [NOW, NOW, NOW + wait]
    assert ledger.leads.take_back_the_future(now=NOW) == 0


def test_a_lead_that_became_uncertain_in_the_future_waits_for_its_policy_from_now_on(ledger: Ledger) -> None:
    take_in(ledger, range(2), now=LATER)
    claims = ledger.leads.claim(CAMPAIGN, 1, lease=timedelta(minutes=2), now=LATER)
    unknown = [settle(make_answer(one, Outcome.UNCERTAIN), RETRY, now=LATER, jitter=random.Random(7)) for one in claims]
    ledger.leads.record(Campaign(CAMPAIGN), unknown, probe_after=timedelta(seconds=30), now=LATER)

    def resend(now: datetime) -> int:
        after = timedelta(minutes=1)
        policy: dict[str, Any] = {"default_policy": "resend", "default_after": after, "default_max_attempts": 8}
        return ledger.leads.settle_old_uncertain(**policy, now=now)["resend"]

    assert ledger.leads.take_back_the_future(now=NOW) == 2
    assert resend(NOW + timedelta(seconds=59)) == 0
    assert resend(NOW + timedelta(seconds=60)) == 1
    assert ledger.leads.take_back_the_future(now=NOW + timedelta(seconds=60)) == 0


def test_leads_that_wait_for_a_reason_go_on_waiting(ledger: Ledger) -> None:
    take_in(ledger, range(1), now=NOW)
    claims = ledger.leads.claim(CAMPAIGN, 1, lease=timedelta(minutes=2), now=NOW)
    throttled = make_answer(claims[0], Outcome.THROTTLED, retry_after=HOUR)
    settled = [settle(throttled, RETRY, now=NOW, jitter=random.Random(7))]
    ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=timedelta(seconds=30), now=NOW)
    assert ledger.leads.take_back_the_future(now=NOW) == 0
    assert due(ledger) == [NOW + HOUR]


def test_a_claim_of_the_future_is_given_up_and_its_answer_still_counts(ledger: Ledger) -> None:
    take_in(ledger, range(1), now=LATER)
    claims = ledger.leads.claim(CAMPAIGN, 1, lease=timedelta(minutes=2), now=LATER)
    assert ledger.leads.settle_lost_claims(now=NOW) == 1
    accepted = [settle(make_answer(claims[0], Outcome.ACCEPTED), RETRY, now=NOW, jitter=random.Random(7))]
    assert ledger.leads.record(Campaign(CAMPAIGN), accepted, probe_after=timedelta(seconds=30), now=NOW).settled == 1


def test_a_probe_of_the_future_is_due(ledger: Ledger) -> None:
    ledger.campaigns.ensure(CAMPAIGN, now=LATER)
    why = Hold(HoldKind.OUTAGE, "down")
    ledger.campaigns.hold(CAMPAIGN, why, probe_at=LATER + timedelta(seconds=30), now=LATER)
    assert ledger.campaigns.take_back_the_future(longest=2 * HOUR, now=NOW) == 0
    assert ledger.campaigns.take_back_the_future(longest=timedelta(minutes=10), now=NOW) == 1
    with ledger.database.read() as connection:
        assert connection.scalar(sa.select(campaigns.c.probe_at)) == NOW


def test_an_event_of_the_future_that_was_left_over_is_merged(ledger: Ledger) -> None:
    event = StoredEvent("digest", b"{}", LATER)
    ledger.calls.keep([event])
    assert ledger.calls.pending(before=NOW - timedelta(seconds=30)) == [event]
    assert ledger.calls.pending(before=LATER - timedelta(seconds=30)) == []  # whoever stored it may be at it


def test_sweep_and_tidy_run_although_redis_clock_was_set_back_since_they_last_did(
    ledger: Ledger, make_settings: Callable[..., Settings], valkey_url: str, valkey: Any
) -> None:
    """They took themselves for just run, for an hour, without a word."""
    url = ledger.database.url.render_as_string(hide_password=False)
    parts = Services(make_settings(broker_url=valkey_url, database_url=url))
    take_in(ledger, range(1), now=ledger.now())
    for what in ("sweep", "tidy"):
        parts.heartbeats.ran(what)
        valkey.hincrbyfloat("{futwork:pulse}:runs:ended", what, 3600)
        assert -3601 < parts.heartbeats.last_run(what) < -3500  # type: ignore[operator]  # it is known
    tasks.sweep(parts)
    tasks.tidy(parts)
    assert parts.broker.depths()["dispatch"] == 1
    for what in ("sweep", "tidy"):
        assert 0 <= parts.heartbeats.last_run(what) < 60  # type: ignore[operator]
    parts.ledger.close()


@pytest.mark.parametrize("retries", [0, 1])
def test_a_retry_that_a_clock_ahead_has_set_is_not_held_until_then(retries: int) -> None:
    """What a killed process had is tried again in two seconds; a producer that asks for a time gets it."""
    app = Celery("test", set_as_current=False)

    @app.task(name="pipeline.events", shared=False)
    def task(_message: Any) -> None: ...

    sent = app.amqp.as_task_v2("an-id", task.name, args=[{}], eta=datetime.now(UTC) + HOUR, retries=retries)
    message = SimpleNamespace(
        headers=sent.headers, properties=sent.properties, body=sent.body, payload=sent.body,
        content_type="application/json", content_encoding="utf-8", delivery_info={"redelivered": False},
    )  # fmt: skip
    request = DiscreetRequest(message, app=app, task=task, headers=sent.headers, body=sent.body, decoded=True)
    assert (request.eta - datetime.now(UTC) < timedelta(seconds=3)) is bool(retries)


def test_beat_sends_on_when_the_clock_is_set_back(
    make_settings: Callable[..., Settings], valkey_url: str, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery's own scheduler would wait for an hour."""
    app = build_app(make_settings(broker_url=valkey_url, sweep_seconds=0.05))
    sent: list[str] = []
    scheduler = Service(app=app, scheduler_cls=app.conf.beat_scheduler).scheduler
    monkeypatch.setattr(scheduler, "apply_async", lambda entry, **_: sent.append(entry.name))
    scheduler.tick()
    assert sorted(sent) == ["sweep", "tidy"]
    for entry in scheduler.schedule.values():
        entry.last_run_at = datetime.now(UTC) + HOUR
    sent.clear()

    def ticked() -> list[str]:
        scheduler.tick()
        return sent

    assert until(ticked) == ["sweep"]
