"""What the pages show to whom, and how many are made at a time."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from pipeline import wiring
from pipeline.ledger import LeadFilter, Ledger
from pipeline.settings import Settings
from pipeline.web.app import create_app
from pipeline.web.ops.access import Turnstile
from tests.conftest import CAMPAIGN, make_lead
from tests.integration.ops.conftest import (
    DAY,
    NUMBER,
    PASSWORDS,
    SECRET,
    SPELLINGS,
    Filled,
    Sign,
    a_minute_ago,
    pages,
    sign_in,
    users,
)
from tests.waiting import patience

# What is shown


def test_every_page_is_made_for_both_roles_with_its_guards(sign: Sign, filled: Filled) -> None:
    for name in PASSWORDS:
        person = sign(name)
        for path in pages(filled):
            answer = person.get(path)
            assert answer.status_code == 200, (path, answer.text)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert (answer.headers["Cache-Control"], answer.headers["X-Frame-Options"]) == ("no-store", "DENY")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert not re.search(r"<script(?! src=\"/ops/static)|<style| style=| on[a-z]+=", answer.text), path


def test_a_viewer_sees_no_number_anywhere(sign: Sign, filled: Filled) -> None:
    """The ledger was filled with the number in its key, data, excerpts, reasons, transcript, summary and bodies."""
    filled.ledger.campaigns.pause(CAMPAIGN, reason=f"{NUMBER} complained", now=datetime.now(UTC))
    operator, viewer = sign("asha"), sign("kiran")
    assert operator.post("/ops/do-not-call/add", phone=NUMBER, reason=f"{NUMBER} asked").status_code == 303
    operator.post("/ops/leads/count", phone="99997 89877", action="retry")
    operator.post("/ops/leads/change", phone=NUMBER, action="retry", counted_at=a_minute_ago())
    seen = 0
    for path in pages(filled):
        mine, theirs = (_bare(one.get(path).text) for one in (viewer, operator))
        assert ("9999789877" in mine, "nineninenine" in mine) == (False, False), path
        seen += "9999789877" in theirs
    assert seen >= 7  # so that the above could fail
    for text in (NUMBER, "099997 89877"):
        found = viewer.post("/ops/leads", text=text)
        assert found.status_code == 303, text
        assert "9999789877" not in found.location
    assert "9999789877" not in viewer.get(found.location).text


def _bare(text: str) -> str:
    """Letters and digits alone, so that a number is found however it is parted."""
    return re.sub(r"[^0-9a-z]", "", text.lower())


def test_a_lead_is_found_by_its_number_in_any_spelling(sign: Sign, filled: Filled) -> None:
    for person in map(sign, PASSWORDS):
        for text in SPELLINGS:
            assert person.post("/ops/leads", text=text).location == f"/ops/leads/{filled.story}", text


def test_a_lead_is_found_by_id_and_key_and_a_stranger_is_not(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    for text in (str(filled.story), str(filled.story).upper(), f"crm-{NUMBER}"):
        assert person.post("/ops/leads", text=text).location == f"/ops/leads/{filled.story}"
    assert "No lead found" in person.post("/ops/leads", text="9999700000").text
    assert person.post("/ops/leads", text="").location == "/ops/leads"


def test_leads_are_listed_by_pages_each_lead_once(sign: Sign, ledger: Ledger) -> None:
    now = datetime.now(UTC)
    for campaign in (CAMPAIGN, "b"):
        known = ledger.campaigns.ensure(campaign, now=now)
        given = [make_lead(number) for number in range(60)]
        ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=DAY, now=now)
    ledger.interventions.cancel(LeadFilter(phone=make_lead(3).phone), now=now)
    person, path, found = sign("asha"), "/ops/leads", []
    while path:
        text = person.get(path).text
        found += re.findall(r'class="mono" href="/ops/leads/([0-9a-f-]{36})"', text)
        more = re.search(r'rel="next" href="([^"]+)"', text)
        path = more[1].replace("&amp;", "&") if more else ""
    assert (len(found), len(set(found))) == (120, 120)
    cancelled = person.get("/ops/leads?state=cancelled&campaign=b").text
    assert len(re.findall(r'class="mono" href="/ops/leads/[0-9a-f-]{36}"', cancelled)) == 1


def test_a_filter_that_cannot_be_read_is_refused_and_not_widened(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    for query in (
        "from=yesterday", "unchanged=0", "unchanged=x", "state=nothing", "id=1", "phone=12", "unchanged=99999999999",
    ):  # fmt: skip
        answer = person.get(f"/ops/leads?{query}")
        assert (answer.status_code, 'role="alert"' in answer.text) == (422, True), query
        assert str(filled.story) not in answer.text, query


def test_what_is_not_there_is_a_page_that_says_so(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    for path in ("campaigns/none", f"leads/{uuid.uuid4()}", f"leads/{uuid.uuid4()}/raw", "quarantine/none",
                 "orphans?call=none", "nothing/at/all"):  # fmt: skip
        answer = person.get(f"/ops/{path}")
        assert (answer.status_code, "<h1>Not Found</h1>".lower() in answer.text.lower()) == (404, True), path


def test_a_ledger_that_is_away_is_a_page_that_says_so(make_settings: Callable[..., Settings], valkey_url: str) -> None:
    wiring.close_services()
    away = make_settings(
        broker_url=valkey_url,
        database_url="postgresql://nobody@127.0.0.1:9/nothing",
        ops_users=users(),
        ops_secret=SECRET,
    )
    client = create_app(away).test_client()
    assert sign_in(client, "asha", PASSWORDS["asha"]).status_code == 303
    answer = client.get("/ops/")
    assert (answer.status_code, "The ledger is away" in answer.text) == (503, True)
    wiring.close_services()


# How many at a time


def test_pages_wait_a_little_for_each_other_and_the_rest_is_told_to_come_back(sign: Sign) -> None:
    person = sign("asha")
    turnstile = person.client.application.extensions["pipeline-ops"].turnstile
    for _ in range(2):
        assert turnstile.enter()
    waiting = [threading.Thread(target=turnstile.enter) for _ in range(4)]
    for thread in waiting:
        thread.start()
    while turnstile._near._value:
        threading.Event().wait(0.005)
    answer = person.get("/ops/audit")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    style = person.get("/ops/static/ops.css")
    assert style.status_code == 200
    style.close()
    for _ in range(2):
        turnstile.leave()
    for thread in waiting:
        thread.join(patience())
    assert not any(thread.is_alive() for thread in waiting)


def test_a_turn_is_given_back_whatever_becomes_of_the_page(sign: Sign) -> None:
    person = sign("asha")
    for _ in range(12):
        assert person.get("/ops/campaigns/none").status_code == 404
        assert person.post("/ops/leads/count").status_code == 422
    assert person.get("/ops/audit").status_code == 200
    assert Turnstile(at_once=1, waiting=0).enter()
