"""The status pages over Flask's test client, on a real ledger: who may see what, who may change it, what is noted."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from jinja2.bccache import Bucket, BytecodeCache
from werkzeug.security import generate_password_hash

from pipeline import wiring
from pipeline.broker import WebEvent
from pipeline.domain.campaign import Campaign, Hold, HoldKind
from pipeline.domain.lead import LeadState, Outcome, Settlement
from pipeline.events import Events
from pipeline.ledger import LeadFilter, Ledger
from pipeline.ledger.tables import leads as lead_table
from pipeline.settings import Settings
from pipeline.web import create_app
from pipeline.web.ops.access import Turnstile, check_password, hash_password
from tests.conftest import CAMPAIGN, make_answer, make_lead

SECRET = "0123456789abcdef" * 3
PASSWORDS = {"asha": "lighthouse-keeper", "kiran": "only-looks-here"}
NUMBER = "+919999789877"
SPELLINGS = ("+919999789877", "9999789877", "99997 89877", "09999-789877", "+91 99997-89877")
SPOKEN = "nine nine nine nine seven eight nine eight seven seven"
RECORDINGS = "https://recordings.futwork.com"
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)

Sign = Callable[[str], "Person"]


@cache
def users() -> str:
    """Entries with a cheap hash: what a dear one costs, each test would pay."""
    cheap = {name: generate_password_hash(password, "scrypt:1024:8:1") for name, password in PASSWORDS.items()}
    entries = {name: hashed.replace(":", ".").replace("$", ".") for name, hashed in cheap.items()}
    return f"asha:{entries['asha']}:operator,kiran:{entries['kiran']}"


class Remembered(BytecodeCache):
    """What Jinja made of the templates: else each test, with an app of its own, would compile them anew."""

    def __init__(self) -> None:
        self._made: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._made:
            bucket.bytecode_from_string(self._made[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._made[bucket.key] = bucket.bytecode_to_string()


COMPILED = Remembered()


@pytest.fixture(autouse=True)
def _remember_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Flask.jinja_options, "bytecode_cache", COMPILED)


class Person:
    """Somebody at a browser, signed in."""

    def __init__(self, client: FlaskClient) -> None:
        self.client = client

    def get(self, path: str) -> Any:
        return self.client.get(path)

    @cached_property
    def csrf(self) -> str:
        return re.search(r'name="csrf" value="([0-9a-f]{48})"', self.get("/ops/leads").text)[1]

    def post(self, path: str, *, csrf: str | None = None, **fields: Any) -> Any:
        return self.client.post(path, data={"csrf": self.csrf if csrf is None else csrf} | fields)


@pytest.fixture
def settings(make_settings: Callable[..., Settings], ledger: Ledger, valkey_url: str, valkey: redis.Redis) -> Settings:
    del valkey
    url = ledger.database.url.render_as_string(hide_password=False)
    return make_settings(broker_url=valkey_url, database_url=url, ops_users=users(), ops_secret=SECRET)


@pytest.fixture
def sign(settings: Settings) -> Iterator[Sign]:
    """Sign people in, each at a browser of their own."""
    wiring.close_services()
    app = create_app(settings)

    def make(name: str) -> Person:
        client = app.test_client()
        if name:
            assert sign_in(client, name, PASSWORDS[name]).status_code == 303
        return Person(client)

    yield make
    made = app.extensions["pipeline-ops"].__dict__.get("ledger")
    if made is not None:
        made.close()
    wiring.close_services()


def sign_in(client: FlaskClient, name: str, password: str, **more: Any) -> Any:
    form = re.search(r'name="form" value="([^"]+)"', client.get("/ops/sign-in").text)[1]
    return client.post("/ops/sign-in", data={"form": form, "name": name, "password": password}, **more)


class Filled:
    """A ledger with a lead whose number stands wherever a number can stand, and one of everything else."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self.ledger, at = ledger, datetime.now(UTC) - timedelta(minutes=30)
        known = ledger.campaigns.ensure(CAMPAIGN, now=at)
        story = make_lead(
            0, phone=NUMBER, key=f"crm-{NUMBER}", data={"alternate": 9999789877, "note": "or 99997 89877"}
        )
        given = [story, *(make_lead(number) for number in range(1, 6))]
        ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=DAY, now=at)
        claims = ledger.leads.claim(CAMPAIGN, 6, lease=MINUTE, now=at)
        by_phone = {one.phone: one for one in claims}
        mine = by_phone.pop(NUMBER)
        self.story = mine.lead_id
        settled = [
            Settlement(
                make_answer(mine, Outcome.FAILED, started_at=at, excerpt="HTTP 500 for 9999789877"),
                LeadState.QUEUED,
                at,
                1,
            )
        ]
        rest = list(by_phone.values())
        for claim, outcome, state in zip(
            rest,
            (Outcome.REJECTED, Outcome.REJECTED, Outcome.UNCERTAIN, Outcome.ACCEPTED, Outcome.FAILED),
            (LeadState.REJECTED, LeadState.REJECTED, LeadState.UNCERTAIN, LeadState.SUBMITTED, LeadState.QUEUED),
            strict=True,
        ):
            excerpt = "" if outcome is Outcome.ACCEPTED else "not for +91 99997-89877"
            settled.append(Settlement(make_answer(claim, outcome, started_at=at, excerpt=excerpt), state, at, 1))
        ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=MINUTE, now=at)
        self.rejected, self.uncertain = [one.lead_id for one in rest[:2]], rest[2].lead_id
        again = ledger.leads.claim(CAMPAIGN, 1, lease=MINUTE, now=at + MINUTE)
        assert [one.lead_id for one in again] == [self.story]
        answer = make_answer(
            again[0], Outcome.ACCEPTED, started_at=at + MINUTE, futwork_lead_id="6a0000000000000000000001"
        )
        done = Settlement(answer, LeadState.SUBMITTED, at, 2)
        ledger.leads.record(Campaign(CAMPAIGN), [done], probe_after=MINUTE, now=at + MINUTE)
        self.say(settings, "call-1", lead="6a0000000000000000000001", at=at + 2 * MINUTE)
        self.say(settings, "stray-9999789877", lead="", at=at + 3 * MINUTE)
        self.digest = ledger.quarantine.put(
            "event", b'{"urid": "9999789877", "attempts": 2}', reason="no call of 99997 89877", now=at
        )

    def say(self, settings: Settings, call: str, *, lead: str, at: datetime) -> None:
        body = {
            "callSid": call, "leadId": lead, "campaignId": "elsewhere" if not lead else CAMPAIGN, "status": "completed",
            "contextDetails": {"recipientPhoneNumber": "9999789877"}, "disposition": "Interested",
            "telephonyData": {"duration": "31.5", "toNumber": NUMBER, "recordingUrl": f"{RECORDINGS}/9999789877.mp3"},
            "transcript": f"assistant: Is 99997 89877 yours?\nuser: {SPOKEN}",
            "extractedData": {"call_summary": "Call 09999-789877 instead."},
        }  # fmt: skip
        Events(self.ledger, settings).take_in([WebEvent(json.dumps(body).encode(), at, None)])

    def log(self) -> list[tuple[str, str, Any]]:
        return [(one["who"], one["action"], one["changed"]) for one in self.ledger.audit.entries()]

    def state_of(self, id_: uuid.UUID) -> str:
        with self.ledger.database.read() as connection:
            return connection.scalar(sa.select(lead_table.c.state).where(lead_table.c.id == id_))


@pytest.fixture
def filled(ledger: Ledger, settings: Settings) -> Filled:
    return Filled(ledger, settings)


def pages(filled: Filled) -> list[str]:
    """Every page that shows something."""
    return [
        "/ops/", f"/ops/campaigns/{CAMPAIGN}", "/ops/leads", f"/ops/leads?campaign={CAMPAIGN}&state=rejected",
        f"/ops/leads/{filled.story}", f"/ops/leads/{filled.story}/raw", f"/ops/leads/{filled.uncertain}",
        "/ops/quarantine", f"/ops/quarantine/{filled.digest}", "/ops/orphans?call=stray-9999789877", "/ops/audit",
    ]  # fmt: skip


def changes(filled: Filled) -> list[tuple[str, dict[str, Any]]]:
    """Every form that changes something, or prepares to."""
    which = {"campaign": CAMPAIGN, "state": "rejected", "action": "retry"}
    return [
        (f"/ops/campaigns/{CAMPAIGN}/pause", {"reason": "wrong script"}),
        (f"/ops/campaigns/{CAMPAIGN}/resume", {}),
        (f"/ops/campaigns/{CAMPAIGN}/rate", {"rate": "3/s"}),
        ("/ops/leads/count", which),
        ("/ops/leads/change", which | {"counted_at": a_minute_ago()}),
        ("/ops/quarantine/replay", {}),
        ("/ops/orphans/link", {"call": "stray-9999789877", "lead": str(filled.story)}),
    ]


def a_minute_ago() -> float:
    """When the leads were counted; the ledger's clock may be a little behind ours."""
    return (datetime.now(UTC) - MINUTE).timestamp()


def everything(ledger: Ledger) -> Any:
    """All that a change could have changed."""
    with ledger.database.read() as connection:
        rows = connection.execute(sa.text("SELECT id, state, reason FROM leads ORDER BY id")).all()
        linked = connection.execute(sa.text("SELECT call_sid, lead_id FROM calls ORDER BY call_sid")).all()
    return rows, linked, ledger.reports.campaigns(), ledger.audit.entries()


# The door


def test_without_users_there_are_no_pages(make_settings: Callable[..., Settings]) -> None:
    client = create_app(make_settings()).test_client()
    assert client.get("/ops/").status_code == client.get("/ops/sign-in").status_code == 404


def test_whoever_is_signed_out_is_led_to_the_door_and_then_to_the_page(sign: Sign, filled: Filled) -> None:
    nobody = sign("")
    for path in pages(filled):
        answer = nobody.get(path)
        assert (answer.status_code, answer.location.partition("?")[0]) == (303, "/ops/sign-in"), path
    before = everything(filled.ledger)
    for path, fields in [*changes(filled), ("/ops/leads", {"text": NUMBER}), ("/ops/sign-out", {})]:
        assert nobody.post(path, csrf="", **fields).status_code == 401, path
    assert everything(filled.ledger) == before
    door = nobody.get(nobody.get("/ops/leads?state=rejected").location)
    form = re.search(r'name="form" value="([^"]+)"', door.text)[1]
    wanted = re.search(r'name="next" value="([^"]+)"', door.text)[1]
    given = {"form": form, "name": "asha", "password": PASSWORDS["asha"], "next": wanted}
    assert nobody.client.post("/ops/sign-in", data=given).location == "/ops/leads?state=rejected"
    assert nobody.get("/ops/leads?state=rejected").status_code == 200


def test_the_door_leads_nowhere_else(sign: Sign) -> None:
    for target in ("https://evil.test/", "//evil.test", "/ops\\@evil.test", "/opsevil", "/v1/leads"):
        client = sign("").client
        form = re.search(r'name="form" value="([^"]+)"', client.get("/ops/sign-in").text)[1]
        given = {"form": form, "name": "asha", "password": PASSWORDS["asha"], "next": target}
        assert client.post("/ops/sign-in", data=given).location == "/ops/", target


def test_the_session_cookie_is_for_our_pages_alone(sign: Sign) -> None:
    client = sign("").client
    cookie = next(
        one
        for one in sign_in(client, "asha", PASSWORDS["asha"]).headers.getlist("Set-Cookie")
        if "pipeline_ops=" in one
    )
    assert {"HttpOnly", "SameSite=Lax", "Path=/ops", "Max-Age=43200"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    tls = sign("").client
    form = re.search(r'name="form" value="([^"]+)"', tls.get("/ops/sign-in", base_url="https://pipeline.test").text)[1]
    given = {"form": form, "name": "asha", "password": PASSWORDS["asha"]}
    answer = tls.post("/ops/sign-in", data=given, base_url="https://pipeline.test")
    assert all("Secure" in one.split("; ") for one in answer.headers.getlist("Set-Cookie") if "Max-Age=0" not in one)


def test_wrong_passwords_are_refused_and_too_many_lock_the_address(sign: Sign, valkey: redis.Redis) -> None:
    client = sign("").client
    for name, password in [("asha", "wrong"), ("nobody", "wrong"), ("asha", ""), *[("asha", "x")] * 7]:
        answer = sign_in(client, name, password)
        assert (answer.status_code, "Name or password is wrong" in answer.text) == (403, True)
    answer = sign_in(client, "asha", PASSWORDS["asha"])  # right, and too late
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "600")
    assert client.get("/ops/").status_code == 303
    elsewhere = sign_in(client, "asha", PASSWORDS["asha"], environ_base={"REMOTE_ADDR": "10.1.2.3"})
    assert elsewhere.status_code == 303
    assert not any(b"wrong" in key for key in valkey.scan_iter())


@pytest.mark.parametrize(
    ("proxies", "proto", "is_secure"),
    [(0, "https", False), (1, "https", True), (1, "http", False), (1, "https, http", False), (2, "https, http", True)],
)
def test_only_the_proxies_that_are_counted_are_believed(
    settings: Settings, proxies: int, proto: str, *, is_secure: bool
) -> None:
    wiring.close_services()
    client = create_app(settings.model_copy(update={"ops_proxies": proxies})).test_client()
    cookie = client.get("/ops/sign-in", headers={"X-Forwarded-Proto": proto}).headers["Set-Cookie"]
    assert ("Secure" in cookie.split("; ")) is is_secure
    wiring.close_services()


def test_tries_are_counted_by_the_address_that_a_believed_proxy_saw(settings: Settings) -> None:
    wiring.close_services()
    client = create_app(settings.model_copy(update={"ops_proxies": 1})).test_client()

    def status(said: str) -> int:
        return sign_in(client, "asha", "wrong", headers={"X-Forwarded-For": said}).status_code

    assert [status(f"203.0.113.{number}, 198.51.100.7") for number in range(11)] == [403] * 10 + [
        429
    ]  # a made-up front
    assert status("203.0.113.1, 198.51.100.8") == 403
    wiring.close_services()


def test_a_sign_in_form_of_another_site_is_refused(sign: Sign) -> None:
    client = sign("").client
    given = {"name": "asha", "password": PASSWORDS["asha"]}
    assert client.post("/ops/sign-in", data=given).status_code == 400
    form = re.search(r'name="form" value="([^"]+)"', sign("").client.get("/ops/sign-in").text)[1]
    assert client.post("/ops/sign-in", data=given | {"form": form}).status_code == 400
    assert client.get("/ops/").status_code == 303


def test_signing_out_ends_the_session_wherever_its_cookie_is(sign: Sign) -> None:
    person, thief = sign("asha"), sign("")
    thief.client.set_cookie("pipeline_ops", person.client.get_cookie("pipeline_ops", path="/ops").value, path="/ops")
    assert thief.get("/ops/").status_code == 200
    assert person.post("/ops/sign-out").location == "/ops/sign-in"
    assert person.get("/ops/").status_code == thief.get("/ops/").status_code == 303


def test_a_session_ends_with_its_time_and_with_its_users_entry(
    sign: Sign, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = sign("asha").client.get_cookie("pipeline_ops", path="/ops").value

    def status(given: Settings) -> int:
        client = create_app(given).test_client()
        client.set_cookie("pipeline_ops", cookie, path="/ops")
        return client.get("/ops/nothing").status_code

    viewer = users().replace(":operator", "")
    assert status(settings) == 404
    assert status(settings.model_copy(update={"ops_users": type(settings.ops_users)(viewer)})) == 303
    assert status(settings.model_copy(update={"ops_secret": type(settings.ops_secret)(SECRET + "x")})) == 303
    later = datetime.now(UTC).timestamp() + settings.ops_session_seconds + 1
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: later)
    assert status(settings) == 303


def test_a_hash_of_a_password_fits_into_an_env_file() -> None:
    hashed = hash_password("lighthouse-keeper")
    assert re.fullmatch(r"[A-Za-z0-9.]+", hashed)
    assert check_password(hashed, "lighthouse-keeper")
    assert not check_password(hashed, "lighthouse-keepers")


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


def test_what_is_masked_keeps_times_and_ids() -> None:
    from pipeline.web.ops.masking import masked

    kept = ["2026-05-08T20:25:23.674Z", "2026-05-08", "1c1d3a36-0a2f-5c0e-9b0e-6f6a3d9b1c11", "HTTP 422", "31.5 s",
            "68ecc86fd9fbecbe9431a18e", "12,50,000", 31.5, 422, True, None]  # fmt: skip
    assert masked(kept[:10] + kept[10:]) == [*kept[:6], masked("12,50,000"), *kept[7:]]
    hidden = [*SPELLINGS, "crm9999789877", "९९९९७८९८७७", "(99997)\u00a089877", "99997\u200b89877",
              "9-9-9-9-7-8-9-8-7-7", SPOKEN,
              "double nine double nine seven eight nine eight", 9999789877, 9999789877.0]  # fmt: skip
    for one in hidden:
        shown = masked(one)
        assert "•••••••" in shown, one
        assert sum(letter.isdigit() for letter in shown) <= 2, one
    theirs = {"id": "9999789877", "lead": {"mobile": "9999789877"}, "digest": 9999789877, "campaign_id": "9999789877"}
    assert "9999789" not in str(masked(theirs))  # what a lead's data calls an id may be its number
    assert masked({"+919999789877": {"a": [9999789877]}}) == {"+••••••••77": {"a": ["••••••••77"]}}


def test_a_lead_is_found_by_its_number_in_any_spelling(sign: Sign, filled: Filled) -> None:
    for person in map(sign, PASSWORDS):
        for text in SPELLINGS:
            assert person.post("/ops/leads", text=text).location == f"/ops/leads/{filled.story}", text


def test_a_lead_is_found_by_id_and_key_and_a_stranger_is_not(sign: Sign, filled: Filled) -> None:
    person = sign("asha")
    for text in (str(filled.story), str(filled.story).upper(), f"crm-{NUMBER}"):
        assert person.post("/ops/leads", text=text).location == f"/ops/leads/{filled.story}"
    assert "No lead fits" in person.post("/ops/leads", text="9999700000").text
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
    person.post(f"/ops/campaigns/{CAMPAIGN}/rate", rate="3/s")
    assert filled.ledger.reports.campaigns()[0]["rate"] == "3/s"
    person.post(f"/ops/campaigns/{CAMPAIGN}/rate", rate="")
    assert filled.ledger.reports.campaigns()[0]["rate"] is None
    assert person.post(f"/ops/campaigns/{CAMPAIGN}/rate", rate="fast").status_code == 422
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
    assert "is active again" in person.get(answer.location).text
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
    assert "Done by people" in person.get(f"/ops/leads/{filled.uncertain}").text


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
    assert person.post("/ops/orphans/link", call="stray-9999789877", lead=str(uuid.uuid4())).status_code == 409
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
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)


def test_a_turn_is_given_back_whatever_becomes_of_the_page(sign: Sign) -> None:
    person = sign("asha")
    for _ in range(12):
        assert person.get("/ops/campaigns/none").status_code == 404
        assert person.post("/ops/leads/count").status_code == 422
    assert person.get("/ops/audit").status_code == 200
    assert Turnstile(at_once=1, waiting=0).enter()
