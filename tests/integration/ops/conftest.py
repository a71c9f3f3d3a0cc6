"""Signed-in people, and a ledger with something of everything to show."""

from __future__ import annotations

import json
import re
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
from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import LeadState, Outcome, Settlement
from pipeline.events import Events
from pipeline.ledger import Ledger
from pipeline.ledger.tables import leads as lead_table
from pipeline.settings import Settings
from pipeline.web.app import create_app
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
        "/ops/quarantine", f"/ops/quarantine/{filled.digest}", "/ops/orphans?call=stray-9999789877",
        "/ops/do-not-call", "/ops/audit",
    ]  # fmt: skip


def changes(filled: Filled) -> list[tuple[str, dict[str, Any]]]:
    """Every form that changes something, or prepares to."""
    which = {"campaign": CAMPAIGN, "state": "rejected", "action": "retry"}
    return [
        (f"/ops/campaigns/{CAMPAIGN}/pause", {"reason": "wrong script"}),
        (f"/ops/campaigns/{CAMPAIGN}/resume", {}),
        (f"/ops/campaigns/{CAMPAIGN}/policies", {"rate": "3/s"}),
        ("/ops/leads/count", which),
        ("/ops/leads/change", which | {"counted_at": a_minute_ago()}),
        ("/ops/quarantine/replay", {}),
        ("/ops/orphans/link", {"call": "stray-9999789877", "lead": str(filled.story)}),
        ("/ops/do-not-call/add", {"phone": NUMBER}),
        ("/ops/do-not-call/remove", {"phone": NUMBER}),
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
