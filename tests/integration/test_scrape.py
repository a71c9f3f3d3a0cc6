"""A scrape over a real Valkey and a real ledger: whole whatever is slow or away, bounded, and without personal data."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from pipeline import wiring
from pipeline.devstack.embedded_valkey import free_port
from pipeline.domain.campaign import Hold, HoldKind
from pipeline.ledger import Ledger
from pipeline.observability.metrics import (
    DUE_OLDEST,
    EVENTS,
    METRICS,
    QUARANTINED,
    SUBMISSION_SECONDS,
    UNCERTAIN_OVERDUE,
)
from pipeline.settings import Settings
from pipeline.status.snapshot import Source
from pipeline.web import metrics
from pipeline.wiring import Services
from tests.conftest import CAMPAIGN, make_lead
from tests.waiting import patience

Samples = dict[tuple[str, tuple[str, ...]], float]
HOUR = timedelta(hours=1)


@pytest.fixture
def make_parts(
    make_settings: Callable[..., Settings], valkey_url: str, valkey: redis.Redis
) -> Iterator[Callable[..., Services]]:
    built = []

    def make(ledger: Ledger | None = None, **overrides: Any) -> Services:
        values = {"broker_url": valkey_url} | overrides
        mine = Services(make_settings(**values))
        if ledger is not None:
            mine.__dict__["ledger"] = ledger
        built.append(mine)
        return mine

    yield make
    for mine in built:
        if "redis" in mine.__dict__:
            mine.redis.close()
    wiring.close_services()


def samples(mine: Services) -> Samples:
    body, content_type = metrics.scrape(mine)
    assert content_type.startswith("text/plain; version=")
    families = list(text_string_to_metric_families(body.decode()))
    assert len({family.name for family in families}) == len(families)
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


def of(found: Samples, name: str) -> dict[tuple[str, ...], float]:
    return {labels: value for (sample, labels), value in found.items() if sample == name}


def take_in(ledger: Ledger, campaign: str, many: int, *, ago: timedelta = timedelta(), start: int = 0) -> None:
    then = datetime.now(UTC) - ago
    known = ledger.campaigns.ensure(campaign, now=then)
    leads = [make_lead(start + number) for number in range(many)]
    ledger.leads.take_in(known, leads, batch_id=uuid.uuid4(), max_age=10 * HOUR, now=then)


def make_uncertain(ledger: Ledger, campaign: str, *, ago: timedelta) -> None:
    """A lead whose worker died so long ago."""
    take_in(ledger, campaign, 1, ago=ago, start=99)
    then = datetime.now(UTC) - ago
    assert len(ledger.leads.claim(campaign, 1, lease=timedelta(seconds=-1), now=then)) == 1
    assert ledger.leads.settle_lost_claims(now=then)


def test_a_scrape_tells_what_the_ledger_the_broker_and_redis_hold(
    ledger: Ledger, make_parts: Callable[..., Services], valkey: redis.Redis
) -> None:
    mine = make_parts(ledger, account_rate="30/s", futwork_api_keys="north=k2")
    take_in(ledger, CAMPAIGN, 3, ago=timedelta(seconds=90))
    take_in(ledger, "held", 2)
    make_uncertain(ledger, "overdue", ago=3 * HOUR)
    held = Hold(HoldKind.REFUSED_CAMPAIGN, "404")
    ledger.campaigns.hold("held", held, probe_at=datetime.now(UTC), now=datetime.now(UTC))
    ledger.quarantine.put("event", b"9800000001", reason="unreadable", now=datetime.now(UTC))
    mine.broker.publish("pipeline.dispatch", CAMPAIGN, about="()")
    mine.heartbeats.record("worker", "w@a", ["dispatch", "events"])
    mine.heartbeats.record("beat", "b@a")
    mine.heartbeats.ran("sweep")
    mine.limiter.stop("north", timedelta(seconds=60))
    mine.counters.observe(SUBMISSION_SECONDS, 0.2, "accepted")
    mine.counters.count(EVENTS, "merged", by=4)
    mine.counters.flush()

    found = samples(mine)

    assert found["pipeline_leads_accepted_total", ()] == 6
    assert found["pipeline_leads", (CAMPAIGN, "queued")] == 3
    assert found["pipeline_leads", ("overdue", "uncertain")] == 1
    assert found["pipeline_leads_unaccounted", ()] == 0
    assert 90 <= found["pipeline_due_oldest_age_seconds", (CAMPAIGN,)] < 200
    assert ("pipeline_due_oldest_age_seconds", ("held",)) not in found
    assert of(found, "pipeline_campaigns") == {("active",): 2, ("held",): 1, ("paused",): 0}
    assert of(found, "pipeline_campaign_stopped") == {("held", "refused_campaign"): 1}
    assert 2 * 3600 <= found["pipeline_uncertain_overdue_seconds", ("overdue",)] < 2 * 3600 + 100
    assert found["pipeline_uncertain_overdue_seconds", (CAMPAIGN,)] == 0
    assert found["pipeline_quarantined", ()] == 1
    assert of(found, "pipeline_limiter_allowed_per_second") == {("default",): 30, ("north",): 0}
    assert of(found, "pipeline_limiter_configured_per_second") == {("default",): 30, ("north",): 30}
    assert 0 < found["pipeline_limiter_stopped_seconds", ("north",)] <= 60
    assert found["pipeline_queue_messages", ("dispatch",)] == 1
    assert of(found, "pipeline_queue_workers") == {("dispatch",): 1, ("events",): 1, ("intake",): 0, ("upkeep",): 0}
    assert of(found, "pipeline_processes") == {("worker",): 1, ("beat",): 1, ("web",): 0}
    assert set(of(found, "pipeline_last_run_age_seconds")) == {("sweep",)}
    assert found["pipeline_submission_duration_seconds_count", ("accepted",)] == 1
    assert found["pipeline_submission_duration_seconds_bucket", ("0.1", "accepted")] == 0
    assert found["pipeline_submission_duration_seconds_bucket", ("0.25", "accepted")] == 1
    assert found["pipeline_submission_duration_seconds_bucket", ("+Inf", "accepted")] == 1
    assert found["pipeline_events_total", ("merged",)] == 4
    assert {found[f"pipeline_{what}_up", ()] for what in ("ledger", "broker", "limiter")} == {1}
    assert {name for name, _ in found} <= {name for one in METRICS for name in one.series} | OF_THE_CLIENT


OF_THE_CLIENT = {  # what Prometheus' library tells of its own process, where it does not add up several
    f"{name}{part}"
    for name in ("pipeline_webhook_answers", "pipeline_intake_rows", "pipeline_webhook_handoff_seconds")
    for part in ("_created",)
} | {
    "python_info", "python_gc_collections_total", "python_gc_objects_collected_total",
    "python_gc_objects_uncollectable_total", "process_virtual_memory_bytes", "process_resident_memory_bytes",
    "process_start_time_seconds", "process_cpu_seconds_total", "process_open_fds", "process_max_fds",
}  # fmt: skip


def test_a_sweep_that_ended_before_redis_clock_was_set_back_is_shown_without_a_negative_age(
    ledger: Ledger, make_parts: Callable[..., Services], valkey: redis.Redis
) -> None:
    mine = make_parts(ledger)
    mine.heartbeats.ran("sweep")
    valkey.hincrbyfloat("{futwork:pulse}:runs:ended", "sweep", 3600)
    assert of(samples(mine), "pipeline_last_run_age_seconds") == {("sweep",): 0}


def test_a_scrape_holds_no_personal_data(ledger: Ledger, make_parts: Callable[..., Services]) -> None:
    mine = make_parts(ledger, futwork_api_key="secret-key", webhook_token="secret-token")
    take_in(ledger, CAMPAIGN, 5)
    make_uncertain(ledger, "c2", ago=HOUR)
    ledger.quarantine.put("event", b'{"to": "+919800000001"}', reason="of +919800000001", now=datetime.now(UTC))
    held = Hold(HoldKind.REFUSED_KEY, "the key secret-key of +919800000001 was refused")
    ledger.campaigns.hold(CAMPAIGN, held, probe_at=datetime.now(UTC), now=datetime.now(UTC))

    text = metrics.scrape(mine)[0].decode()

    assert 'pipeline_campaign_stopped{campaign="68ecc86fd9fbecbe9431a18e",why="refused_key"} 1.0' in text
    number = r"(?<![\d.])(?:91)?98000\d{5}(?!\d)"  # not among the digits of an age in seconds
    assert re.findall(f"{number}|secret|Lead \\d", text) == []
    assert re.search(number, "of +919800000001")


def test_the_campaigns_with_the_most_unfinished_leads_are_named_and_the_rest_is_one(
    sqlite_ledger: Ledger, make_parts: Callable[..., Services]
) -> None:
    mine = make_parts(sqlite_ledger, metrics_campaigns=2)
    for campaign, many in (("small", 1), ("large", 5), ("tiny", 1), ("middle", 3)):
        take_in(sqlite_ledger, campaign, many, ago=timedelta(seconds=1000 if campaign == "tiny" else 10))
    for campaign in ("large", "small", "tiny"):
        sqlite_ledger.campaigns.pause(campaign, reason="a test", now=datetime.now(UTC))
    sqlite_ledger.campaigns.ensure("done", now=datetime.now(UTC))

    found = samples(mine)

    queued = {labels[0]: n for labels, n in of(found, "pipeline_leads").items() if labels[1] == "queued"}
    assert queued == {"large": 5, "middle": 3, "other": 2}
    assert len(of(found, "pipeline_leads")) == 3 * 10
    assert of(found, "pipeline_campaign_stopped") == {
        ("large", "paused"): 1,
        ("small", "paused"): 1,
        ("other", "paused"): 1,
    }
    assert set(of(found, DUE_OLDEST.exposed)) == {("middle",), ("other",)}
    assert set(of(found, UNCERTAIN_OVERDUE.exposed)) == {("large",), ("middle",), ("other",)}


def test_what_is_away_leaves_its_numbers_out_and_the_others_whole(
    sqlite_ledger: Ledger, make_parts: Callable[..., Services]
) -> None:
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    mine = make_parts(sqlite_ledger, redis_url=nobody)
    take_in(sqlite_ledger, CAMPAIGN, 3)

    found = samples(mine)
    assert [found[f"pipeline_{what}_up", ()] for what in ("ledger", "broker", "limiter")] == [1, 1, 0]
    assert of(found, "pipeline_submissions_total") == of(found, "pipeline_processes") == {}
    assert found["pipeline_leads", (CAMPAIGN, "queued")] == 3

    found = samples(make_parts(broker_url=nobody, database_url="postgresql://nobody@127.0.0.1:9/none"))
    assert [found[f"pipeline_{what}_up", ()] for what in ("ledger", "broker", "limiter")] == [0, 0, 0]
    assert of(found, QUARANTINED.exposed) == of(found, "pipeline_queue_messages") == {}
    assert found["pipeline_spool_files", ()] == 0
    assert ("pipeline_webhook_answers_total", ("503",)) in found


def test_a_slow_ledger_is_given_up_by_the_database_and_told_of_as_it_was(
    postgres_ledger: Ledger, make_parts: Callable[..., Services]
) -> None:
    """Its table of campaigns is locked, as by a migration."""
    mine = make_parts(postgres_ledger)
    watch = metrics.watch(mine)
    watch.statement_seconds, watch.patience_seconds = 1.5, 30
    take_in(postgres_ledger, CAMPAIGN, 3)
    before = samples(mine)
    watch.patience_seconds = 0.3

    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("LOCK TABLE campaigns IN ACCESS EXCLUSIVE MODE"))
        during = samples(mine)
        threads = [one for one in threading.enumerate() if one.name == "snapshot"]
        again = samples(mine)
        given_up = watch.overview.answer(time.monotonic() + patience())  # when the database has given the statement up

    assert during["pipeline_leads", (CAMPAIGN, "queued")] == before["pipeline_leads", (CAMPAIGN, "queued")] == 3
    assert during["pipeline_ledger_up", ()] == again["pipeline_ledger_up", ()] == 1
    assert again["pipeline_ledger_read_age_seconds", ()] > during["pipeline_ledger_read_age_seconds", ()] > 0.3
    assert len(threads) == 1
    assert given_up.value is None
    watch.patience_seconds = 30
    assert samples(mine)["pipeline_ledger_up", ()] == 1


def test_a_source_that_was_silent_for_too_long_is_away() -> None:
    go_on, asked = threading.Event(), []

    def ask() -> int:
        asked.append(1)
        if len(asked) > 1:
            go_on.wait(patience())
        return len(asked)

    source = Source(ask, stale_seconds=60)
    source.begin()
    assert source.answer(time.monotonic() + patience()).value == 1
    for _ in range(3):
        source.begin()
    assert source.answer(0).value == 1
    source.stale_seconds = 0.0
    assert source.answer(0).value is None
    go_on.set()
    source.stale_seconds = 60.0

    assert source.answer(time.monotonic() + patience()).value == 2
    assert len(asked) == 2


def test_a_fault_of_ours_in_one_source_leaves_the_others_whole(
    sqlite_ledger: Ledger, make_parts: Callable[..., Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make_parts(sqlite_ledger)
    monkeypatch.setattr(sqlite_ledger.reports, "overview", lambda **_: 1 / 0)

    found = samples(mine)

    assert (found["pipeline_ledger_up", ()], found["pipeline_broker_up", ()]) == (0, 1)
