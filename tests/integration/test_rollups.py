"""Rollups and the overview: counts that are right at every moment, whatever changes what they count; both databases."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from pipeline.domain.campaign import Campaign, Hold, HoldKind
from pipeline.domain.lead import LeadState, Outcome, Settlement
from pipeline.ledger import CallRow, LeadFilter, Ledger, StoredEvent, metadata, rollups
from pipeline.ledger.tables import batches, leads, recounts
from pipeline.ledger.tables import tallies as table
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead, merge_call
from tests.waiting import patience

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
OTHER = "another-campaign"


def take_in(ledger: Ledger, *numbers: int, campaign: str = CAMPAIGN, now: datetime = NOW) -> None:
    known = ledger.campaigns.ensure(campaign, now=now)
    given = [make_lead(number) for number in numbers]
    ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=10 * DAY, now=now)


def post(ledger: Ledger, many: int, outcome: Outcome, state: LeadState, *, now: datetime = NOW) -> list[uuid.UUID]:
    claims = ledger.leads.claim(CAMPAIGN, many, lease=MINUTE, now=now)
    assert len(claims) == many
    done = [
        Settlement(make_answer(one, outcome, started_at=now), state, now + HOUR, one.attempts + 1) for one in claims
    ]
    ledger.leads.record(Campaign(CAMPAIGN), done, probe_after=MINUTE, now=now)
    return [one.lead_id for one in claims]


def call_back(ledger: Ledger, sid: str, lead: uuid.UUID | None, *, now: datetime = NOW, **says: Any) -> None:
    row = CallRow(
        call_sid=sid, campaign_id=CAMPAIGN, futwork_lead_id=None, reference=str(lead) if lead else None, phone=None,
        status="ringing", is_final=False, outcome="unknown", disposition=None, duration_seconds=None,
        callback_at=None, recording_url=None, details="{}", first_event_at=now, last_event_at=now,
    )  # fmt: skip
    merge_call(ledger, StoredEvent(uuid.uuid4().hex, b"{}", now), replace(row, **says), now=now)


def counted(ledger: Ledger) -> dict[tuple[str, str], int]:
    with ledger.database.read() as connection:
        return rollups.read(connection)


def as_counted(ledger: Ledger) -> dict[tuple[str, str], int]:
    """The same from the rows themselves."""
    with ledger.database.read() as connection:
        states = sa.select(leads.c.campaign_id, leads.c.state, sa.func.count()).group_by(
            leads.c.campaign_id, leads.c.state
        )
        found = {(campaign, f"lead.{state}"): n for campaign, state, n in connection.execute(states)}
        sums = sa.select(batches.c.campaign_id, sa.func.sum(batches.c.accepted)).group_by(batches.c.campaign_id)
        return found | {(campaign, "accepted"): n for campaign, n in connection.execute(sums)}


def test_the_tallies_follow_leads_through_every_change(ledger: Ledger) -> None:
    take_in(ledger, *range(30))
    take_in(ledger, *range(25, 35))  # five are known
    take_in(ledger, 1, 2, campaign=OTHER)
    assert counted(ledger) == {
        (CAMPAIGN, "accepted"): 35, (CAMPAIGN, "lead.queued"): 35, (OTHER, "accepted"): 2, (OTHER, "lead.queued"): 2,
    }  # fmt: skip
    post(ledger, 10, Outcome.ACCEPTED, LeadState.SUBMITTED)
    post(ledger, 4, Outcome.UNCERTAIN, LeadState.UNCERTAIN)
    ledger.leads.claim(CAMPAIGN, 3, lease=MINUTE, now=NOW)
    ledger.leads.settle_lost_claims(now=NOW + HOUR)
    ledger.interventions.cancel(LeadFilter(campaign=OTHER), now=NOW)
    ledger.interventions.resolve(LeadFilter(campaign=CAMPAIGN), "drop", max_age=DAY, now=NOW)
    assert counted(ledger) == as_counted(ledger)
    assert counted(ledger)[CAMPAIGN, "lead.cancelled"] == 7
    ledger.rollups.compact(now=NOW)
    assert counted(ledger) == as_counted(ledger)
    with ledger.database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(table.c.part != 0)) == 0


def test_what_is_rolled_back_was_never_counted(ledger: Ledger) -> None:
    take_in(ledger, 1, 2)
    with pytest.raises(RuntimeError), ledger.database.write() as connection:
        connection.execute(sa.update(leads).values(state="rejected"))
        raise RuntimeError
    assert counted(ledger) == {(CAMPAIGN, "accepted"): 2, (CAMPAIGN, "lead.queued"): 2}


def test_a_call_is_counted_once_as_what_it_is_now(ledger: Ledger) -> None:
    take_in(ledger, 1)
    (id_,) = post(ledger, 1, Outcome.ACCEPTED, LeadState.SUBMITTED)
    call_back(ledger, "a", None)
    assert counted(ledger)[CAMPAIGN, "call.open"] == counted(ledger)[CAMPAIGN, "call.orphan"] == 1
    call_back(ledger, "a", id_, is_final=True, outcome="busy", disposition="busy")
    call_back(ledger, "a", id_, is_final=True, outcome="connected", disposition="interested", last_event_at=NOW + HOUR)
    calls = {name: n for (_, name), n in counted(ledger).items() if not name.startswith(("lead", "accepted"))}
    assert calls == {"call.connected": 1, "disposition.interested": 1}
    overview = ledger.reports.overview(now=NOW + HOUR)
    ended = {one["at"]: one["calls"] for one in overview["minutes"] if one["calls"]}
    assert ended == {NOW + HOUR: {"connected": 1}}


def test_writers_side_by_side_do_not_wait_for_each_others_counts(postgres_ledger: Ledger) -> None:
    """A dispatcher whose transaction is open must not stop another that moves leads of the same states."""
    ledger = postgres_ledger
    take_in(ledger, *range(40))
    url = ledger.database.url.render_as_string(hide_password=False)

    def move(_: int) -> int:
        other = Ledger(url)
        try:
            return len(post(other, 5, Outcome.ACCEPTED, LeadState.SUBMITTED))
        finally:
            other.close()

    with ledger.database.write() as connection:
        first = sa.select(leads.c.id).order_by(leads.c.id).limit(1).scalar_subquery()
        connection.execute(sa.update(leads).where(leads.c.id == first).values(state="rejected"))
        with ThreadPoolExecutor(3) as pool:  # claims skip the locked lead
            assert list(pool.map(move, range(3), timeout=patience())) == [5, 5, 5]
        assert ledger.rollups.compact(now=NOW) > 0
    assert counted(ledger) == as_counted(ledger)
    assert counted(ledger)[CAMPAIGN, "lead.submitted"] == 15


def test_folding_beside_writers_loses_nothing(postgres_ledger: Ledger) -> None:
    ledger, stop = postgres_ledger, threading.Event()
    url = ledger.database.url.render_as_string(hide_password=False)

    def fold() -> int:
        other, folded = Ledger(url), 0
        while not stop.is_set():
            folded += other.rollups.compact(now=NOW)
        folded += other.rollups.compact(now=NOW)
        other.close()
        return folded

    with ThreadPoolExecutor(2) as pool:
        folders = [pool.submit(fold) for _ in range(2)]
        for start in range(0, 300, 10):
            take_in(ledger, *range(start, start + 10))
            post(ledger, 10, Outcome.ACCEPTED, LeadState.SUBMITTED)
        stop.set()
        assert sum(one.result(patience()) for one in folders) > 0
    assert counted(ledger) == as_counted(ledger)


def test_minutes_are_kept_for_a_week(ledger: Ledger) -> None:
    take_in(ledger, *range(4))
    post(ledger, 2, Outcome.ACCEPTED, LeadState.SUBMITTED)
    post(ledger, 2, Outcome.ACCEPTED, LeadState.SUBMITTED, now=NOW + 7 * DAY)
    ledger.rollups.compact(now=NOW + 9 * DAY)
    with ledger.database.read() as connection:
        kept = rollups.by_minute(connection, "post.", since=NOW - DAY, until=NOW + 10 * DAY)
    assert kept == {rollups.minute_of(NOW + 7 * DAY): {"accepted": 2}}
    assert counted(ledger)[CAMPAIGN, "lead.submitted"] == 4


def test_a_recount_finds_and_mends_what_is_wrong(ledger: Ledger) -> None:
    take_in(ledger, *range(5))
    assert ledger.rollups.verified_at() is None
    assert ledger.rollups.verify(now=NOW).differences == []
    with ledger.database.write() as connection:
        connection.execute(sa.delete(table).where(table.c.name == "lead.queued"))
        connection.execute(sa.insert(table).values(minute=0, campaign_id="ghost", name="lead.called", part=0, n=3))
    assert ledger.reports.overview(now=NOW)["adds_up"] is False
    found = ledger.rollups.verify(now=NOW + MINUTE)
    assert (found.accepted, found.leads) == (5, 5)
    assert found.differences == [
        {"campaign_id": CAMPAIGN, "name": "lead.queued", "by": 5},
        {"campaign_id": "ghost", "name": "lead.called", "by": -3},
    ]
    assert counted(ledger) == as_counted(ledger)
    overview = ledger.reports.overview(now=NOW)
    assert overview["adds_up"] is True
    assert overview["recount"] == {
        "at": NOW + MINUTE, "accepted": 5, "leads": 5, "differences": found.differences,
    }  # fmt: skip
    assert ledger.rollups.verified_at() == NOW + MINUTE


def test_a_lost_lead_shows_although_the_tallies_follow_it(ledger: Ledger) -> None:
    """Accepted is intake's own count: a lead that vanishes leaves the two apart, and no recount hides it."""
    take_in(ledger, 1, 2)
    with ledger.database.write() as connection:
        connection.execute(sa.delete(leads).where(leads.c.phone == make_lead(1).phone))
    ledger.rollups.verify(now=NOW)
    overview = ledger.reports.overview(now=NOW)
    assert (overview["accepted"], overview["leads"]["queued"], overview["adds_up"]) == (2, 1, False)
    with ledger.database.read() as connection:
        row = connection.execute(sa.select(recounts)).one()
    assert (row.accepted, row.leads, row.differences) == (2, 1, "[]")


def copy_as_the_first_release_had_it(ledger: Ledger, old: Ledger) -> None:
    """Copy the rows of the tables and columns that *old* has: this release cannot write to tables older than itself."""
    known = sa.MetaData()
    known.reflect(old.database.engine)
    with ledger.database.read() as source, old.database.write() as target:
        for one in metadata().sorted_tables:
            if one.name in known.tables:
                columns = [column for column in one.columns if column.name in known.tables[one.name].columns]
                if rows := [dict(row._mapping) for row in source.execute(sa.select(*columns))]:
                    target.execute(sa.insert(one), rows)


def test_the_migration_counts_what_is_there(sqlite_ledger: Ledger, postgres_url: str, tmp_path: Any) -> None:
    take_in(sqlite_ledger, *range(5))
    post(sqlite_ledger, 2, Outcome.FAILED, LeadState.QUEUED)
    (id_,) = post(sqlite_ledger, 1, Outcome.ACCEPTED, LeadState.SUBMITTED)
    call_back(sqlite_ledger, "a", id_, is_final=True, outcome="connected")
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    name = f"pipeline_test_{uuid.uuid4().hex[:12]}"
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    urls = [f"sqlite:///{tmp_path / 'old.db'}"]
    urls.append(sa.make_url(postgres_url).set(database=name).render_as_string(hide_password=False))
    try:
        for url in urls:
            ledger = Ledger(url)
            ledger.migrate("0001")
            copy_as_the_first_release_had_it(sqlite_ledger, ledger)
            ledger.migrate()
            assert counted(ledger) == as_counted(ledger) | {(CAMPAIGN, "call.connected"): 1}
            posts = ledger.reports.overview(now=NOW)["minutes"][-1]
            assert posts == {"at": NOW, "posts": {"failed": 2, "accepted": 1}, "calls": {"connected": 1}}
            ledger.close()
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


def test_every_table_that_is_counted_has_its_triggers(ledger: Ledger) -> None:
    """A migration that rebuilds a table on SQLite drops its triggers."""
    query = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'tally_%'"
    if not ledger.database.is_sqlite:
        query = "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'tally_%'"
    with ledger.database.read() as connection:
        found = set(connection.scalars(sa.text(query)))
    events = ["insert", "update", "delete"] + ["truncate"] * (not ledger.database.is_sqlite)
    assert found == {f"tally_{name}_{event}" for name in ("leads", "batches", "calls", "attempts") for event in events}


def test_the_overview_of_an_empty_ledger_has_every_number_at_nought(ledger: Ledger) -> None:
    overview = ledger.reports.overview(now=NOW)
    minutes = overview.pop("minutes")
    none = {"total": 0, "oldest_seconds": None, "older_than": {"hour": 0, "day": 0}}
    assert overview == {
        "now": NOW, "accepted": 0, "leads": {state.value: 0 for state in LeadState}, "adds_up": True, "campaigns": [],
        "calls": {"total": 0, "open": 0}, "uncertain": none, "quarantined": 0, "orphans": 0,
        "oldest_due_seconds": None, "recount": None,
    }  # fmt: skip
    assert [one["at"] for one in minutes] == [NOW - number * MINUTE for number in range(59, -1, -1)]
    assert all(one["posts"] == one["calls"] == {} for one in minutes)


def test_the_overview_tells_how_it_stands(ledger: Ledger) -> None:
    take_in(ledger, *range(20))
    take_in(ledger, 1, 2, campaign=OTHER, now=NOW + MINUTE)
    post(ledger, 3, Outcome.ACCEPTED, LeadState.SUBMITTED)
    post(ledger, 2, Outcome.UNCERTAIN, LeadState.UNCERTAIN, now=NOW + MINUTE)
    post(ledger, 1, Outcome.FAILED, LeadState.QUEUED, now=NOW + 2 * HOUR)
    post(ledger, 1, Outcome.UNCERTAIN, LeadState.UNCERTAIN, now=NOW + 2 * HOUR)
    call_back(ledger, "stranger", None, now=NOW + 2 * HOUR, is_final=True, outcome="connected")
    call_back(ledger, "open", None, now=NOW + 2 * HOUR)
    ledger.quarantine.put("event", b"[", reason="no object", now=NOW)
    ledger.campaigns.hold(OTHER, Hold(HoldKind.OUTAGE, "down"), probe_at=NOW + HOUR, now=NOW)
    now = NOW + 2 * HOUR + 5 * MINUTE
    overview = ledger.reports.overview(now=now)
    assert (overview["accepted"], overview["adds_up"]) == (22, True)
    assert {state: n for state, n in overview["leads"].items() if n} == {"queued": 16, "submitted": 3, "uncertain": 3}
    assert list(overview["leads"]) == [state.value for state in LeadState]
    assert overview["calls"] == {"total": 2, "open": 1, "connected": 1}
    assert (overview["quarantined"], overview["orphans"]) == (1, 2)
    unsure = {"total": 3, "oldest_seconds": 7440.0, "older_than": {"hour": 2, "day": 0}}
    assert overview["uncertain"] == unsure
    mine, held = overview["campaigns"]
    if mine["id"] != CAMPAIGN:
        mine, held = held, mine
    assert mine["uncertain"] == unsure
    assert mine["posts_last_minutes"] == {"failed": 1, "uncertain": 1}
    assert (mine["accepted"], mine["leads"]["queued"], mine["oldest_due_seconds"]) == (20, 14, 7500.0)
    assert (held["state"], held["reason"], held["probe_at"]) == ("held", "down", NOW + HOUR)
    assert (held["accepted"], held["oldest_due_seconds"]) == (2, 7440.0)
    assert overview["oldest_due_seconds"] == 7500.0
    minutes = {one["at"]: one for one in overview["minutes"] if one["posts"] or one["calls"]}
    assert minutes == {
        NOW + 2 * HOUR: {
            "at": NOW + 2 * HOUR, "posts": {"failed": 1, "uncertain": 1}, "calls": {"connected": 1},
        }
    }  # fmt: skip


def test_a_truncated_table_is_counted_as_empty(postgres_ledger: Ledger) -> None:
    take_in(postgres_ledger, 1, 2)
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("TRUNCATE leads, batches, attempts, calls"))
    assert counted(postgres_ledger) == {}
