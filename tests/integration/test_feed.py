"""The feed of calls: each change once, none missed, whatever order transactions commit in."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from pipeline import wiring
from pipeline.ledger import CallRow, Ledger, StoredEvent, UnknownCursor, digest_of
from pipeline.ledger.tables import call_changes, calls, feeds
from pipeline.settings import Settings
from pipeline.web.app import create_app
from tests.conftest import CAMPAIGN, NOW, make_lead, merge_call

OTHER = "68ecc86fd9fbecbe94310000"


def make_call(sid: str, **overrides: Any) -> CallRow:
    values: dict[str, Any] = dict.fromkeys(CallRow.__slots__)
    values |= {"call_sid": sid, "campaign_id": CAMPAIGN, "status": "completed", "is_final": True, "details": "{}"}
    values |= {"outcome": "connected", "first_event_at": NOW, "last_event_at": NOW}
    return CallRow(**(values | overrides))


def merge(ledger: Ledger, sid: str, **overrides: Any) -> None:
    body = json.dumps({"sid": sid, "once": uuid.uuid4().hex}).encode()
    merge_call(ledger, StoredEvent(digest_of(body), body, NOW), make_call(sid, **overrides))


def read(ledger: Ledger, after: int = 0, limit: int = 100, **which: Any) -> tuple[list[str], int, bool]:
    page = ledger.feed.calls(after=after, limit=limit, **which)
    return [call["call_sid"] for call in page.calls], page.next, page.more


def test_pages_follow_each_other_to_the_end(ledger: Ledger) -> None:
    for sid in "abc":
        merge(ledger, sid)
        read(ledger)
    assert read(ledger, limit=2) == (["a", "b"], 2, True)
    assert read(ledger, after=2, limit=2) == (["c"], 3, False)
    assert read(ledger, after=3, limit=2) == ([], 3, False)


def test_a_changed_call_comes_again_once_and_as_it_is_now(ledger: Ledger) -> None:
    merge(ledger, "a", status="ringing", is_final=False)
    merge(ledger, "b")
    _, end, _ = read(ledger)
    merge(ledger, "a", status="in-progress", is_final=False)
    merge(ledger, "a", status="completed")
    page = ledger.feed.calls(after=end, limit=10)
    assert [(call["call_sid"], call["status"]) for call in page.calls] == [("a", "completed")]
    assert read(ledger, after=page.next) == ([], page.next, False)
    assert sorted(read(ledger)[0]) == ["a", "b"]


def test_a_merge_that_changes_nothing_is_no_change(ledger: Ledger) -> None:
    merge(ledger, "a")
    _, end, _ = read(ledger)
    merge(ledger, "a")
    assert read(ledger, after=end) == ([], end, False)


def test_a_call_that_commits_late_is_not_missed(postgres_ledger: Ledger) -> None:
    """The change of *late* is made first and committed last; a reader has passed on meanwhile."""
    ledger = postgres_ledger
    row = {name: getattr(make_call("late"), name) for name in CallRow.__slots__}
    with ledger.database.engine.connect() as connection, connection.begin():
        connection.execute(sa.insert(calls).values(**row))
        merge(ledger, "early")
        found, end, _ = read(ledger)
        assert found == ["early"]
    assert read(ledger, after=end)[0] == ["late"]


def test_a_change_under_way_of_a_call_that_waits_for_its_number_blocks_no_reader(postgres_ledger: Ledger) -> None:
    ledger = postgres_ledger
    merge(ledger, "a")
    merge(ledger, "b")
    with ledger.database.engine.connect() as connection, connection.begin():
        connection.execute(sa.update(calls).where(calls.c.call_sid == "a").values(status="other"))
        found, end, _ = read(ledger)
        assert found == ["b"]
    assert read(ledger, after=end)[0] == ["a"]


def test_a_link_to_a_lead_is_a_change(ledger: Ledger) -> None:
    lead = make_lead(1)
    merge(ledger, "a", phone=lead.phone, campaign_id=None)
    _, end, _ = read(ledger)
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    taken = ledger.leads.take_in(campaign, [lead], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW)
    assert ledger.calls.link("a", taken.ids[0], now=NOW)
    (call,) = ledger.feed.calls(after=end, limit=10, campaign=CAMPAIGN).calls
    assert (call["lead_id"], call["key"], call["linked_by"]) == (str(taken.ids[0]), lead.key, "operator")


def test_filters_leave_out_and_the_cursor_goes_past_what_they_leave_out(ledger: Ledger) -> None:
    merge(ledger, "a", campaign_id=OTHER)
    read(ledger)
    merge(ledger, "b")
    read(ledger)
    merge(ledger, "c", is_final=False, status="ringing")
    read(ledger)
    assert read(ledger, campaign=CAMPAIGN) == (["b", "c"], 3, False)
    assert read(ledger, campaign=CAMPAIGN, only_final=True) == (["b"], 3, False)
    assert read(ledger, campaign=CAMPAIGN, limit=1) == (["b"], 2, True)


def test_a_number_is_not_given_again_when_the_last_call_changes(ledger: Ledger) -> None:
    """The highest number that is in the table goes away with the change; its successor must be higher all the same."""
    merge(ledger, "a")
    assert read(ledger)[1] == 1
    merge(ledger, "a", status="other")
    assert read(ledger, after=1) == (["a"], 2, False)


def test_a_call_that_is_deleted_leaves_the_feed(ledger: Ledger) -> None:
    merge(ledger, "a")
    read(ledger)
    with ledger.database.write() as connection:
        connection.execute(sa.delete(calls))
        assert connection.scalar(sa.select(sa.func.count()).select_from(call_changes)) == 0
    assert read(ledger) == ([], 1, False)


def test_calls_have_the_triggers_that_mark_them(ledger: Ledger) -> None:
    """A migration that rebuilds the table on SQLite drops them; `pipeline doctor` names what is missing."""
    assert ledger.health.missing() == []
    query = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'feed_%'"
    if not ledger.database.is_sqlite:
        query = "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'feed_%'"
    with ledger.database.read() as connection:
        found = set(connection.scalars(sa.text(query)))
    assert found == {f"feed_calls_{event}" for event in ("insert", "update", "delete")}


def test_a_cursor_beyond_the_end_is_refused(ledger: Ledger) -> None:
    merge(ledger, "a")
    with pytest.raises(UnknownCursor, match="beyond the end"):
        read(ledger, after=2)


def test_a_migration_numbers_the_calls_that_are_there_oldest_first(tmp_path: Any) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'old.db'}")
    ledger.migrate("0005")
    rows = [make_call("young"), make_call("old", last_event_at=NOW - timedelta(days=1))]
    with ledger.database.write() as connection:
        for row in rows:
            connection.execute(sa.insert(calls).values({name: getattr(row, name) for name in CallRow.__slots__}))
    ledger.migrate()
    with ledger.database.read() as connection:
        assert connection.scalar(sa.select(feeds.c.last)) == 2
    assert read(ledger) == (["old", "young"], 2, False)
    ledger.close()


# Over HTTP


@pytest.fixture
def client(make_settings: Callable[..., Settings], ledger: Ledger) -> Iterator[FlaskClient]:
    wiring.close_services()
    url = ledger.database.url.render_as_string(hide_password=False)
    made = make_settings(broker_url="redis://127.0.0.1:9", database_url=url, intake_tokens=f"all,mine:{CAMPAIGN}")
    wiring.services(made)
    yield create_app(made).test_client()
    wiring.close_services()


def test_the_feed_over_http(client: FlaskClient, ledger: Ledger) -> None:
    merge(ledger, "a", details=json.dumps({"summary": "said yes " * 200}), recording_url="https://x/y")
    read(ledger)
    merge(ledger, "b", campaign_id=OTHER)
    free, mine = {"Authorization": "Bearer all"}, {"Authorization": "Bearer mine"}

    page = client.get("/v1/calls?limit=1", headers=free)
    assert (page.status_code, page.json["next"], page.json["more"]) == (200, "1", True)
    call = page.json["calls"][0]
    assert (call["call_sid"], call["cursor"], call["campaign_id"]) == ("a", "1", CAMPAIGN)
    assert call["details"]["summary"].startswith("said yes")
    assert [one["call_sid"] for one in client.get("/v1/calls?after=1", headers=free).json["calls"]] == ["b"]
    assert [one["call_sid"] for one in client.get("/v1/calls", headers=mine).json["calls"]] == ["a"]

    packed = client.get("/v1/calls", headers=free | {"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert len(json.loads(gzip.decompress(packed.data))["calls"]) == 2
    again = client.get("/v1/calls", headers=free | {"If-None-Match": packed.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")

    refused = {
        "?after=x": 400, "?after=-1": 400, "?after=99": 400, "?limit=0": 400, "?limit=1001": 400, "?final=maybe": 400,
        "?since=1": 400,
    }  # fmt: skip
    assert {query: client.get(f"/v1/calls{query}", headers=free).status_code for query in refused} == refused
    assert client.get(f"/v1/calls?campaign={OTHER}", headers=mine).status_code == 403
    assert client.get("/v1/calls").status_code == 401
