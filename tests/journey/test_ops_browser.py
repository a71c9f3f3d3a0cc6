"""The status pages in a real Chromium, over a real ledger: what an operator does, by mouse and by keyboard.

`OPS_SCREENSHOTS=folder` keeps pictures of the pages as they are in the end.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.broker import WebEvent
from pipeline.coordination.connection import connect
from pipeline.coordination.heartbeats import Heartbeats, HeartbeatSender
from pipeline.devstack.embedded_valkey import free_port
from pipeline.domain.campaign import Campaign, Hold, HoldKind
from pipeline.domain.lead import Answer, LeadState, Outcome, Settlement
from pipeline.events import Events
from pipeline.ledger import LeadFilter, Ledger
from pipeline.web.ops.access import hash_password
from tests.conftest import CAMPAIGN, make_lead, missing
from tests.journey.fleet import Fleet
from tests.waiting import patience, until

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HELD = "68f1d2b09c7a4e5512ab0c77"
NUMBER = "+919999789877"
PASSWORD = "lighthouse-keeper"
SAID = ["Hello, am I speaking with Asha Rao?", "Yes, speaking. What is the interest rate?", "It starts at 8.4 percent."]
TRANSCRIPT = "".join(f"{'user' if place % 2 else 'assistant'}: {text}\n" for place, text in enumerate(SAID))
MISSING = 'HTTP 422 {"error":"place is required"}'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium."""
    if not Path(CHROMIUM).exists():
        missing("Chromium", f"{CHROMIUM} does not exist")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def site(ledger: Ledger, valkey_url: str, valkey: Any, tmp_path: Path) -> Iterator[str]:
    """The address of a server that serves the pages over a ledger with something to see."""
    del valkey
    url = ledger.database.url.render_as_string(hide_password=False)
    fill(ledger)
    fleet = Fleet(tmp_path, broker_url=valkey_url, redis_url=valkey_url, database_url=url)
    over = threading.Event()
    noting = threading.Thread(target=_note_parts, args=(valkey_url, over))
    noting.start()
    port = free_port()
    users = f"asha:{hash_password(PASSWORD)}:operator,kiran:{hash_password(PASSWORD)}"
    fleet.start(
        ["-m", "pipeline.web", "--host", "127.0.0.1", "--port", str(port), "--processes", "1", "--threads", "8"],
        name="web", ops_users=users, ops_secret="s" * 40, account_rate="2/s", campaign_rate="2/s",
    )  # fmt: skip
    until(lambda: _listens(port), what=fleet.logs)
    yield f"http://127.0.0.1:{port}/ops/"
    over.set()
    noting.join()
    fleet.end()
    assert '"level":"error"' not in fleet.logs()


def _note_parts(url: str, over: threading.Event) -> None:
    """Send the heartbeats of two workers, a beat and a web process until the test is over."""
    parts = [
        HeartbeatSender(url, "worker", "intake@host", ("intake", "events", "upkeep")),
        HeartbeatSender(url, "worker", "dispatch@host", ("dispatch",)),
        HeartbeatSender(url, "beat", "beat@host"),
        HeartbeatSender(url, "web", "web@host"),
    ]
    with connect(url) as client:
        Heartbeats(client).ran("sweep")
    while not over.is_set():
        for part in parts:
            part.send()
        over.wait(0.5)


def fill(ledger: Ledger) -> None:
    """An hour of a campaign that goes, one that is held, and the lead that somebody asks about."""
    now = datetime.now(UTC)
    began = now - timedelta(minutes=50)
    for campaign, many, start in ((CAMPAIGN, 1300, 0), (HELD, 200, 50_000)):
        known = ledger.campaigns.ensure(campaign, now=began)
        if campaign == CAMPAIGN:
            person = make_lead(0, phone=NUMBER, data={"customer_name": "Asha Rao", "place": "Pune"})
            first = began - timedelta(minutes=1)
            ledger.leads.take_in(known, [person], batch_id=uuid.uuid4(), max_age=timedelta(days=2), now=first)
        given = [make_lead(start + number) for number in range(many)]
        ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=timedelta(days=2), now=began)
    for minute in range(44):
        _send(ledger, began + timedelta(minutes=minute + 1), 20 + minute * 7 % 11, first=minute == 0)
    _tell(ledger, now)
    ledger.campaigns.hold(
        HELD,
        Hold(
            HoldKind.REJECTIONS,
            '20 leads in a row were rejected, the last with: HTTP 422 {"error":"place is required"}',
        ),
        probe_at=now + timedelta(minutes=8),
        now=now - timedelta(minutes=12),
    )
    ledger.quarantine.put(
        "event", b'{"urid": "x"}', reason="the event has no callSid, so it belongs to no call", now=now
    )
    ledger.rollups.verify(now=now)


def _send(ledger: Ledger, at: datetime, many: int, *, first: bool) -> None:
    claims = ledger.leads.claim(CAMPAIGN, many, lease=timedelta(minutes=2), now=at)
    settled = []
    for place, claim in enumerate(claims):
        outcome, state, status, excerpt = Outcome.ACCEPTED, LeadState.SUBMITTED, 200, ""
        if place == 7 and not first:
            outcome, state, status, excerpt = Outcome.FAILED, LeadState.QUEUED, 500, "HTTP 500 Internal server error"
        elif place == 3 and at.minute % 9 == 0:
            outcome, state, status, excerpt = Outcome.REJECTED, LeadState.REJECTED, 422, MISSING
        elif place == 5 and at.minute % 13 == 0:
            outcome, state, status, excerpt = Outcome.UNCERTAIN, LeadState.UNCERTAIN, None, "no answer within 30 s"
        answer = Answer(claim, outcome, at, timedelta(milliseconds=83), status, claim.lead_id.hex[:24], excerpt)
        settled.append(Settlement(answer, state, at + timedelta(hours=1), claim.attempts + 1))
    ledger.leads.record(Campaign(CAMPAIGN), settled, probe_after=timedelta(minutes=1), now=at)


def _tell(ledger: Ledger, now: datetime) -> None:
    """Calls come back, the one that is asked about with a transcript."""
    from pipeline.settings import Settings

    settings, sent = (
        Settings(_env_file=None),
        ledger.reports.page_of_leads(LeadFilter(states=(LeadState.SUBMITTED,)), limit=400),
    )
    ends = [("completed", "Interested", "84.5"), ("no-answer", "No Answer", "0"), ("completed", "Not interested", "41"),
            ("busy", "Busy", "0"), ("completed", "Callback", "63")]  # fmt: skip
    events = []
    mine = next(one for one in ledger.reports.page_of_leads(LeadFilter(phone=NUMBER), limit=1))
    for number, lead in enumerate([mine, *(one for one in sent if one["id"] != mine["id"])][:350]):
        status, disposition, seconds = ends[number % 5]
        at = lead["submitted_at"] + timedelta(seconds=30 + number % 60)
        body = {
            "callSid": f"call-{number}", "leadId": lead["futwork_lead_id"], "campaignId": CAMPAIGN, "status": status,
            "disposition": disposition, "contextDetails": {"recipientPhoneNumber": lead["phone"]},
            "telephonyData": {"duration": seconds, "recordingUrl": "https://recordings.futwork.com/one.mp3"},
        }  # fmt: skip
        if seconds != "0":
            said = {"call_summary": "Wants the details of the home loan on WhatsApp."}
            body |= {"transcript": TRANSCRIPT, "extractedData": said}
        events.append(WebEvent(json.dumps(body).encode(), min(at, now), None))
    for start in range(0, len(events), 200):
        Events(ledger, settings).take_in(events[start : start + 200])


class Page:
    """A page of the browser that holds what must hold of every page against it."""

    def __init__(self, browser: Any, site: str, **options: Any) -> None:
        from axe_playwright_python.sync_playwright import Axe

        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.context.set_default_timeout(1000 * patience())
        self.page, self.site = self.context.new_page(), site
        self.complaints: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._stays_at_home)
        self._axe = Axe()

    def _stays_at_home(self, request: Any) -> None:
        if not request.url.startswith(self.site):
            self.complaints.append(f"asked for {request.url}")

    def sign_in(self, name: str = "asha") -> None:
        self.page.goto(self.site)
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(PASSWORD)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("button", name="Sign out").wait_for()

    def check(self, picture: str = "") -> None:
        """No page is wider than the window, complains, or fails axe."""
        found = self._axe.run(self.page).response["violations"]
        assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found] == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert self.complaints == []
        if picture and (folder := os.environ.get("OPS_SCREENSHOTS")):
            self.page.screenshot(path=Path(folder) / f"{picture}.png", full_page="overview" not in picture)

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def open_page(browser: Any, site: str) -> Iterator[Callable[..., Page]]:
    """Open pages in windows of their own."""
    opened: list[Page] = []

    def open_(**options: Any) -> Page:
        opened.append(Page(browser, site, **options))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


@pytest.mark.parametrize("ledger", ["postgres"], indirect=True)
def test_an_operator_at_work(open_page: Callable[..., Page], ledger: Ledger) -> None:
    """Sign in, release a held campaign from the overview, find a person, pause a campaign, retry a filter."""
    window = open_page()
    window.page.goto(window.site)
    window.check("sign-in")
    window.sign_in()
    page = window.page
    assert "1 campaign is stopped" in page.get_by_role("heading", level=1).inner_text()
    assert page.get_by_text("place is required").is_visible()  # why it stopped, without a click
    window.check("overview")
    page.get_by_role("button", name=f"Resume campaign {HELD}").click()  # and released with one
    page.get_by_role("status").get_by_text("is active").wait_for()
    assert ledger.campaigns.get(HELD).state == "active"

    page.get_by_label("Find a lead by phone number").fill("099997-89877")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=NUMBER).wait_for()
    assert NUMBER[3:] not in page.url
    journey = page.get_by_role("list").filter(has_text="Sent to Futwork: accepted")
    assert "Futwork reports: completed" in journey.inner_text()
    assert page.get_by_text(SAID[1]).is_visible()
    window.check("lead")

    page.get_by_role("link", name=CAMPAIGN).click()
    page.get_by_label("Reason, for those who read it later").fill("wrong script")
    window.check("campaign")
    page.get_by_role("button", name="Pause", exact=True).click()
    page.get_by_role("heading", name="Paused by an operator").wait_for()
    assert ledger.campaigns.get(CAMPAIGN).state == "paused"

    before = ledger.reports.overview(now=datetime.now(UTC))["leads"]
    assert before["rejected"] > 0
    page.get_by_role("link", name="Leads", exact=True).click()
    page.get_by_label("Campaign").fill(CAMPAIGN)
    page.get_by_label("State").select_option("rejected")
    page.get_by_role("button", name="Show").click()
    window.check("leads")
    page.get_by_role("button", name="Retry…").click()
    assert f"{before['rejected']} lead" in page.get_by_role("heading", level=1).inner_text()
    window.check("confirm")
    page.get_by_role("button", name=f"Retry: {before['rejected']}").click()
    page.get_by_role("status").get_by_text("queued again").wait_for()
    assert ledger.reports.overview(now=datetime.now(UTC))["leads"]["rejected"] == 0

    page.get_by_role("link", name="Quarantine").click()
    window.check("quarantine")
    page.get_by_role("link", name="Audit log").click()
    assert page.get_by_role("row").filter(has_text="campaign pause").is_visible()
    window.check("audit")
    actions = {one["action"] for one in ledger.audit.entries()}
    assert actions == {"campaign resume", "campaign pause", "retry"}
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()


@pytest.mark.parametrize("ledger", ["sqlite"], indirect=True)
def test_the_pages_on_a_phone_in_the_dark_by_keyboard_and_without_a_script(
    open_page: Callable[..., Page], ledger: Ledger
) -> None:
    phone = open_page(viewport={"width": 390, "height": 844}, color_scheme="dark", reduced_motion="reduce")
    phone.sign_in("kiran")
    for place, path in enumerate(["", f"campaigns/{CAMPAIGN}", "leads", "quarantine"]):
        phone.page.goto(phone.site + path)
        assert phone.page.get_by_role("button", name="Resume").count() == 0  # a viewer's
        phone.check(("phone-overview", "phone-campaign", "phone-leads", "")[place])
    phone.page.get_by_label("Find a lead").fill(NUMBER)
    phone.page.keyboard.press("Enter")
    phone.page.get_by_role("heading", name="+••••••••77").wait_for()
    phone.check("phone-lead")

    dark = open_page(color_scheme="dark")
    dark.sign_in()
    dark.check("dark-overview")
    dark.page.keyboard.press("Tab")
    assert dark.page.evaluate("document.activeElement.className") == "skip"
    dark.page.keyboard.press("Enter")
    assert dark.page.evaluate("document.activeElement.id") == "main"
    dark.page.goto(f"{dark.site}campaigns/{CAMPAIGN}")
    dark.check("dark-campaign")

    plain = open_page(java_script_enabled=False)
    plain.sign_in()
    plain.page.get_by_role("button", name=f"Resume campaign {HELD}").click()
    plain.page.get_by_role("status").get_by_text("is active").wait_for()
    assert ledger.campaigns.get(HELD).state == "active"


@pytest.mark.parametrize("ledger", ["sqlite"], indirect=True)
def test_what_changes_is_refreshed_in_its_place(open_page: Callable[..., Page], ledger: Ledger) -> None:
    window = open_page()
    window.page.clock.install()
    window.sign_in()
    page = window.page
    page.evaluate("window.here = true")
    page.get_by_text("As numbers").click()
    page.get_by_text("As numbers").focus()
    ledger.campaigns.pause(CAMPAIGN, reason="somebody else did", now=datetime.now(UTC))
    page.clock.run_for(10_000)
    page.get_by_text("somebody else did").wait_for()
    assert page.evaluate("window.here && document.activeElement.textContent") == "As numbers"
    assert page.locator("details").get_attribute("open") is not None
    window.check()

    page.get_by_role("button", name="Pause refreshing").click()
    ledger.campaigns.resume(CAMPAIGN)
    page.clock.run_for(60_000)
    assert page.get_by_text("somebody else did").is_visible()
    page.get_by_role("button", name="Resume refreshing").click()
    page.get_by_text("somebody else did").wait_for(state="hidden")
    window.check()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
