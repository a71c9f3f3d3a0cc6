"""What an operator changes on the pages, and what nobody can."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import redis
import sqlalchemy as sa

from pipeline.broker import lead_batch
from pipeline.domain.campaign import Hold, HoldKind
from pipeline.ledger import LeadFilter
from pipeline.ledger.tables import leads as lead_table
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN
from tests.integration.ops.conftest import (
    DAY,
    MINUTE,
    NUMBER,
    Filled,
    Sign,
    a_minute_ago,
    changes,
    everything,
    pages,
)

# What is changed


def test_a_viewer_changes_nothing(sign: Sign, filled: Filled) -> None:
    viewer = sign("kiran")
    before = everything(filled.ledger)
    for path, fields in changes(filled):
        assert viewer.post(path, **fields).status_code == 403, path
    assert everything(filled.ledger) == before
    for path in pages(filled):
        forms = re.findall(
            r'<form[^>]*method="post"[^>]*action="([^"]+)"|<form[^>]*action="([^"]+)"[^>]*method="post"',
            viewer.get(path).text,
        )
        assert {one or other for one, other in forms} <= {"/ops/leads", "/ops/sign-out"}, path


def test_without_the_sessions_token_nothing_changes(sign: Sign, filled: Filled) -> None:
    person, other = sign("asha"), sign("asha")
    before = everything(filled.ledger)
    for path, fields in [*changes(filled), ("/ops/leads", {"text": NUMBER}), ("/ops/sign-out", {})]:
        for token in ("", "x", other.csrf):
            assert person.post(path, csrf=token, **fields).status_code == 403, path
    mine = person.csrf
    cross = person.client.post(
        f"/ops/campaigns/{CAMPAIGN}/pause", data={"csrf": mine}, headers={"Sec-Fetch-Site": "cross-site"}
    )
    assert cross.status_code == 403
    assert everything(filled.ledger) == before


def test_an_operator_changes_a_campaign_and_each_change_is_noted(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    answer = person.post(f"/ops/campaigns/{CAMPAIGN}/pause", reason="wrong script")
    assert "is paused" in person.get(answer.location).text
    (campaign,) = filled.ledger.reports.campaigns()
    assert (campaign["state"], campaign["reason"]) == ("paused", "wrong script")
    person.post(f"/ops/campaigns/{CAMPAIGN}/resume")
    person.post(f"/ops/campaigns/{CAMPAIGN}/policies", rate="3/s", max_attempts="5", on_uncertain="")
    (campaign,) = filled.ledger.reports.campaigns()
    assert (campaign["rate"], campaign["max_attempts"], campaign["on_uncertain"]) == ("3/s", 5, None)
    person.post(f"/ops/campaigns/{CAMPAIGN}/policies", rate="")
    assert filled.ledger.reports.campaigns()[0]["rate"] is None
    assert person.post(f"/ops/campaigns/{CAMPAIGN}/policies", rate="fast").status_code == 422
    assert person.post("/ops/campaigns/unknown/pause").status_code == 404
    assert filled.log() == [
        ("asha", "campaign set", None), ("asha", "campaign set", None), ("asha", "campaign resume", None),
        ("asha", "campaign pause", None),
    ]  # fmt: skip
    log = person.get("/ops/audit").text
    assert "wrong script" in log and "campaign pause" in log


def test_a_held_campaign_is_released_from_the_overview(sign: Sign, filled: Filled, valkey: redis.Redis) -> None:
    now = datetime.now(UTC)
    filled.ledger.campaigns.hold(CAMPAIGN, Hold(HoldKind.OUTAGE, "HTTP 503 five times"), probe_at=now + MINUTE, now=now)
    person = sign("asha")
    text = person.get("/ops/").text
    assert "HTTP 503 five times" in text and "the next probe is in" in text
    answer = person.post(f"/ops/campaigns/{CAMPAIGN}/resume", **{"from": "overview"})
    assert answer.location.startswith("/ops/?note=")
    assert "is active" in person.get(answer.location).text
    assert filled.ledger.reports.campaigns()[0]["state"] == "active"
    assert valkey.llen("dispatch") == 1  # a dispatcher was asked for at once


def test_a_filter_is_counted_and_then_done_once_confirmed(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    counted = person.post("/ops/leads/count", campaign=CAMPAIGN, state="rejected", action="retry")
    assert "2 leads will be queued again" in counted.text
    assert f"pipeline retry --campaign {CAMPAIGN} --state rejected" in counted.text
    assert [filled.state_of(one) for one in filled.rejected] == ["rejected", "rejected"]
    assert filled.log() == []
    fields = dict(
        re.findall(
            r'<input type="hidden" name="(\w+)" value="([^"]*)">', counted.text.partition("/ops/leads/change")[2]
        )
    )
    with filled.ledger.database.write() as connection:  # it comes to match after the count
        connection.execute(
            sa.update(lead_table)
            .where(lead_table.c.id == filled.uncertain)
            .values(state="rejected", changed_at=datetime.now(UTC) + timedelta(seconds=1))
        )
    done = person.client.post("/ops/leads/change", data=fields)
    assert "2 leads were queued again" in person.get(done.location).text
    assert [filled.state_of(one) for one in filled.rejected] == ["queued", "queued"]
    assert filled.state_of(filled.uncertain) == "rejected"
    assert filled.log() == [("asha", "retry", 2)]


@pytest.mark.parametrize(
    ("action", "becomes"), [("resolve:sent", "submitted"), ("resolve:resend", "queued"), ("resolve:drop", "cancelled")]
)
def test_an_uncertain_lead_is_resolved_from_its_page(sign: Sign, filled: Filled, action: str, becomes: str) -> None:
    person = sign("asha")
    fields = {"id": str(filled.uncertain), "action": action}
    counted = person.post("/ops/leads/count", **fields).text
    assert "1 lead will be" in counted
    counted_at = re.search(r'name="counted_at" value="([^"]+)"', counted)[1]
    done = person.post("/ops/leads/change", **fields, counted_at=counted_at)
    assert done.location.startswith(f"/ops/leads/{filled.uncertain}?")
    assert filled.state_of(filled.uncertain) == becomes
    assert filled.log() == [("asha", action.replace(":", ": "), 1)]
    assert f"Resolved as {action.partition(':')[2]}" in person.get(f"/ops/leads/{filled.uncertain}").text


def test_a_change_without_a_filter_or_a_count_is_refused(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    before = everything(filled.ledger)
    now = a_minute_ago()
    wrong: list[dict[str, Any]] = [
        {"action": "retry", "counted_at": now}, {"action": "retry", "campaign": " ", "counted_at": now},
        {"campaign": CAMPAIGN, "counted_at": now}, {"action": "erase", "campaign": CAMPAIGN, "counted_at": now},
        {"action": "retry", "campaign": CAMPAIGN}, {"action": "retry", "campaign": CAMPAIGN, "counted_at": now - 4000},
        {"action": "retry", "campaign": CAMPAIGN, "counted_at": now + 999},
        {"action": "retry", "campaign": CAMPAIGN, "counted_at": "nan"},
        {"action": "retry", "campaign": CAMPAIGN, "from": "soon", "counted_at": now},
    ]  # fmt: skip
    for fields in wrong:
        assert person.post("/ops/leads/change", **fields).status_code == 422, fields
    assert person.post("/ops/leads/count", action="cancel").status_code == 422
    assert everything(filled.ledger) == before


def test_more_leads_than_a_browser_waits_for_are_left_to_a_command(
    sign: Sign, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.web.ops.actions.MOST_AT_ONCE", 1)
    person = sign("asha")
    before = everything(filled.ledger)
    fields = {"campaign": CAMPAIGN, "action": "retry"}
    assert "/ops/leads/change" not in person.post("/ops/leads/count", **fields).text
    done = person.post("/ops/leads/change", **fields, counted_at=a_minute_ago())
    assert (done.status_code, f"pipeline retry --campaign {CAMPAIGN}" in done.text) == (422, True)
    assert everything(filled.ledger) == before


def test_an_orphan_is_linked_and_counts_as_evidence(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    assert str(filled.story) in person.get("/ops/orphans?call=stray-9999789877").text
    assert person.post("/ops/orphans/link", call="stray-9999789877", lead="nobody").status_code == 422
    assert person.post("/ops/orphans/link", call="stray-9999789877", lead=str(uuid.uuid4())).status_code == 422
    done = person.post("/ops/orphans/link", call="stray-9999789877", lead=str(filled.uncertain))
    assert done.location.startswith(f"/ops/leads/{filled.uncertain}")
    assert filled.state_of(filled.uncertain) == "called"
    assert person.post("/ops/orphans/link", call="stray-9999789877", lead=str(filled.story)).status_code == 409
    assert filled.log() == [("asha", "call link", 1)]
    assert filled.ledger.reports.overview(now=datetime.now(UTC))["orphans"] == 0


def test_a_replay_reads_what_can_be_read_now(sign: Sign, filled: Filled, settings: Settings) -> None:
    body = b'{"callSid": "late", "status": "completed"}'
    good = filled.ledger.quarantine.put("event", body, reason="an older release", now=datetime.now(UTC))
    person = sign("asha")
    answer = person.post("/ops/quarantine/replay", digest=filled.digest)
    assert "0 of 1 event read; 1 stay" in person.get(answer.location).text
    answer = person.post("/ops/quarantine/replay")
    assert "1 of 2 events read; 1 stay" in person.get(answer.location).text
    assert filled.ledger.quarantine.get(good) is None
    assert filled.log() == [("asha", "events replay", 1), ("asha", "events replay", 0)]
    del settings


def test_rows_and_messages_are_replayed_like_events(sign: Sign, filled: Filled) -> None:
    quarantine, now = filled.ledger.quarantine, datetime.now(UTC)
    row = {"campaign_id": CAMPAIGN, "lead": {"phone": "9800000042", "key": "a-row", "data": {}}}
    batch = lead_batch(CAMPAIGN, [{"phone": "9800000043", "key": "in-a-batch", "data": {}}], batch_id=uuid.uuid4())
    good = quarantine.put("lead", orjson.dumps(row), reason="an older release", now=now)
    quarantine.put("batch", orjson.dumps([[batch], {}]), reason="killed its worker", now=now)
    stays = quarantine.put("message", b"not ours", reason="unknown task name", now=now)
    person = sign("asha")

    one = person.get(person.post("/ops/quarantine/replay", digest=good).location).text
    rest = person.get(person.post("/ops/quarantine/replay").location).text

    assert "1 of 1 row taken in; 0 stay in quarantine." in one
    assert "0 of 1 event read; 1 stay in quarantine. 1 of 1 message taken in; 0 stay in quarantine." in rest
    found = {key for key in ("a-row", "in-a-batch") if filled.ledger.reports.leads(LeadFilter(key=key))}
    assert found == {"a-row", "in-a-batch"}
    assert quarantine.get(stays) is not None
    assert (
        "Nothing in quarantine can be replayed"
        in person.get(person.post("/ops/quarantine/replay", digest=stays).location).text
    )
    assert [action for _, action, _ in filled.log()] == ["events replay"] * 3


def test_a_number_is_put_on_the_do_not_call_list_and_taken_off_again(sign: Sign, filled: Filled) -> None:
    person, before = sign("asha"), everything(filled.ledger)
    for fields in ({"phone": "12"}, {"phone": NUMBER, "campaign": "no campaign"}, {}):
        assert person.post("/ops/do-not-call/add", **fields).status_code == 422, fields
        assert person.post("/ops/do-not-call/remove", **fields).status_code == 422, fields
    assert everything(filled.ledger) == before

    filled.ledger.interventions.retry(LeadFilter(ids=(filled.rejected[0],)), max_age=DAY, now=datetime.now(UTC))
    phone = filled.ledger.reports.leads(LeadFilter(ids=(filled.rejected[0],)))[0]["phone"]
    done = person.post("/ops/do-not-call/add", phone=phone, campaign=CAMPAIGN, reason="asked not to be called")
    assert "1 queued lead suppressed" in person.get(done.location).text
    assert filled.state_of(filled.rejected[0]) == "suppressed"
    (entry,) = filled.ledger.suppressions.listed(limit=9)
    assert (entry["phone"], entry["campaign_id"], entry["reason"]) == (phone, CAMPAIGN, "asked not to be called")

    person.post("/ops/do-not-call/remove", phone=phone, campaign=CAMPAIGN)
    assert filled.ledger.suppressions.listed(limit=9) == []
    assert filled.log() == [("asha", "suppress remove", 1), ("asha", "suppress add", 1)]
