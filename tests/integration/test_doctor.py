"""The doctor finds each seeded fault, in its own line and in no other, and nothing in a healthy installation."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from werkzeug.security import generate_password_hash
from werkzeug.serving import make_server

from pipeline.broker import QUEUES
from pipeline.cli.doctor import Finding, examine
from pipeline.coordination.heartbeats import Heartbeats
from pipeline.devstack.embedded_valkey import free_port
from pipeline.domain.campaign import Hold, HoldKind
from pipeline.ledger import Ledger
from pipeline.settings import load_settings
from pipeline.web.app import create_app
from tests.conftest import CAMPAIGN

TOKEN = "hook-of-this-test"
EVERY_CHECK = [
    "settings", "limits", "versions", "key", "webhook", "intake", "futwork", "broker", "persistence", "eviction",
    "memory", "limit", "ledger", "migrations", "indexes", "durability", "campaigns", "answers", "clock",
    "workers", "beat", "web", "spool", "disk",
]  # fmt: skip


class Vendor:
    """An HTTP server that answers every POST with one status, and keeps what it was sent."""

    def __init__(self) -> None:
        self.status = 404
        self.seen: list[tuple[str, Any]] = []
        vendor = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                vendor.seen.append((self.path, body))
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                self.send_response(vendor.status)
                self.end_headers()
                self.wfile.write(b'{"status": "ok"}')

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Installation:
    """An installation whose parts are there and well, until a test spoils one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, valkey: redis.Redis, folder: Path) -> None:
        self.valkey, self.folder, self.monkeypatch = valkey, folder, monkeypatch
        self.heartbeats = Heartbeats(valkey)
        self.vendor = Vendor()
        self.off = timedelta()
        self.options: dict[str, Any] = {}

    def set(self, **variables: object) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name.upper(), str(value))

    def live(
        self, *, queues: tuple[str, ...] = QUEUES, beat: bool = True, web: bool = True, swept: bool = True
    ) -> None:
        """Let the parts note themselves, as they do."""
        self.valkey.flushdb()
        self.heartbeats.record("worker", "w@here", queues)
        if beat:
            self.heartbeats.record("beat", "beat@here")
        if web:
            self.heartbeats.record("web", "here")
        if swept:
            self.heartbeats.ran("sweep")

    @property
    def file(self) -> Path:
        return self.folder / "ledger.db"

    def sql(self, statement: str) -> None:
        ledger = Ledger(load_settings().database_url)
        with ledger.database.write() as connection:
            connection.execute(sa.text(statement))
        ledger.close()

    def examine(self) -> list[Finding]:
        return list(examine(clock=lambda: datetime.now(UTC) + self.off, **self.options))


@pytest.fixture
def installation(
    monkeypatch: pytest.MonkeyPatch, valkey: redis.Redis, valkey_url: str, tmp_path: Path, _sqlite_migrated: Path
) -> Iterator[Installation]:
    found = Installation(monkeypatch, valkey, tmp_path)
    shutil.copyfile(_sqlite_migrated, found.file)
    found.set(
        broker_url=valkey_url, database_url=f"sqlite:///{found.file}", spool_dir=tmp_path / "spool",
        spool_max_bytes=10**6, futwork_api_key="key", futwork_base_url=f"{found.vendor.url}/api", webhook_token=TOKEN,
        intake_tokens="token",
    )  # fmt: skip
    before = valkey.config_get("appendonly") | valkey.config_get("maxmemory*")
    found.live()
    yield found
    for name in ("appendonly", "maxmemory", "maxmemory-policy"):
        valkey.config_set(name, before[name])
    found.vendor.close()


def troubles(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(one.check, one.verdict) for one in findings if one.verdict != "ok"}


def test_a_healthy_installation_is_all_ok_and_nothing_is_changed(installation: Installation) -> None:
    before = sorted(installation.folder.rglob("*"))

    findings = installation.examine()

    assert [(one.check, one.verdict) for one in findings] == [(check, "ok") for check in EVERY_CHECK]
    assert sorted(installation.folder.rglob("*")) == before
    assert installation.vendor.seen == []
    assert installation.valkey.llen("intake") == 0


def spool_with(installation: Installation, name: str, size: int = 10) -> None:
    (installation.folder / "spool").mkdir()
    (installation.folder / "spool" / name).write_bytes(b"x" * size)


def spool_that_is_a_file(installation: Installation) -> None:
    (installation.folder / "spool").write_text("in the way")


def old_ledger(installation: Installation) -> None:
    installation.file.unlink()
    ledger = Ledger(f"sqlite:///{installation.file}")
    ledger.migrate("0001")
    ledger.close()


def untested_library(installation: Installation) -> None:
    about = installation.folder / "site" / "kombu-9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kombu\nVersion: 9.9\n")
    installation.monkeypatch.syspath_prepend(str(installation.folder / "site"))


def memory_nearly_used(installation: Installation) -> None:
    installation.valkey.config_set("maxmemory", int(installation.valkey.info("memory")["used_memory"] * 1.15))


def clock_ahead(seconds: float) -> Callable[[Installation], None]:
    def seed(installation: Installation) -> None:
        installation.off = timedelta(seconds=seconds)

    return seed


def setting(**variables: object) -> Callable[[Installation], None]:
    return lambda installation: installation.set(**variables)


def held_for(kind: HoldKind) -> Callable[[Installation], None]:
    def seed(installation: Installation) -> None:
        ledger, now = Ledger(load_settings().database_url), datetime.now(UTC)
        ledger.campaigns.ensure(CAMPAIGN, now=now)
        ledger.campaigns.hold(CAMPAIGN, Hold(kind, "HTTP 401"), probe_at=now, now=now)
        ledger.close()

    return seed


NOBODY = "redis://127.0.0.1:9/0"
FAULTS: dict[str, tuple[Callable[[Installation], object], set[tuple[str, str]], str]] = {
    "a key that Futwork refuses": (held_for(HoldKind.REFUSED_KEY), {("campaigns", "fail")}, "refuses the API key"),
    "a campaign that Futwork does not know": (
        held_for(HoldKind.REFUSED_CAMPAIGN), {("campaigns", "warn")}, "campaign resume"),
    "a wrong setting": (setting(account_rate="fast"), {("settings", "fail")}, "ACCOUNT_RATE"),
    "a campaign faster than its account": (
        setting(account_rate="5/s", campaign_rate="10/s"), {("limits", "warn")}, "CAMPAIGN_RATE"),
    "POSTs longer than a worker's grace": (
        setting(read_timeout_seconds=90), {("limits", "warn")}, "stop_grace_period"),
    "resent before evidence can come": (
        setting(on_uncertain="resend", uncertain_after_seconds=30), {("limits", "warn")}, "called twice"),
    "a library nobody tested": (untested_library, {("versions", "warn")}, "kombu 9.9"),
    "no key": (setting(futwork_api_key=""), {("key", "fail")}, "FUTWORK_API_KEY"),
    "no webhook token": (setting(webhook_token=""), {("webhook", "fail")}, "WEBHOOK_TOKEN"),
    "no intake token": (setting(intake_tokens=""), {("intake", "warn")}, "INTAKE_TOKENS"),
    "futwork out of reach": (setting(futwork_base_url="http://127.0.0.1:9/api"), {("futwork", "fail")}, "refused"),
    "a broker that is not there": (
        lambda here: here.set(redis_url=load_settings().broker_url, broker_url=NOBODY),
        {("broker", "fail")}, "BROKER_URL"),
    "no append-only file": (
        lambda here: here.valkey.config_set("appendonly", "no"), {("persistence", "warn")}, "appendonly yes"),
    "a broker that evicts": (
        lambda here: here.valkey.config_set("maxmemory-policy", "allkeys-lru"), {("eviction", "fail")}, "allkeys-lru"),
    "a broker near its bound": (memory_nearly_used, {("memory", "warn")}, "maxmemory"),
    "the limit's redis away": (setting(redis_url=NOBODY), {("limit", "fail"), ("workers", "fail")}, "REDIS_URL"),
    "no ledger": (lambda here: here.file.unlink(), {("ledger", "fail")}, "pipeline migrate"),
    "a file that is no ledger": (
        lambda here: here.file.write_text("nonsense " * 1000), {("ledger", "fail")}, "DATABASE_URL"),
    "a ledger of an older release": (old_ledger, {("migrations", "fail")}, "pipeline migrate"),
    "an index gone": (lambda here: here.sql("DROP INDEX ix_leads_due"), {("indexes", "fail")}, "ix_leads_due"),
    "a trigger gone": (
        lambda here: here.sql("DROP TRIGGER tally_calls_update"), {("indexes", "fail")}, "tally_calls_update"),
    "a clock a little off": (clock_ahead(3), {("clock", "warn")}, "-3.0 s off"),
    "a clock far off": (clock_ahead(-9), {("clock", "fail")}, "+9.0 s off"),
    "nobody dispatches": (
        lambda here: here.live(queues=("intake", "events", "upkeep")), {("workers", "fail")}, "-Q dispatch"),
    "no beat": (lambda here: here.live(beat=False), {("beat", "fail")}, "worker beat"),
    "sweeps that never end": (lambda here: here.live(swept=False), {("beat", "warn")}, "upkeep"),
    "no web process": (lambda here: here.live(web=False), {("web", "warn")}, "pipeline.web"),
    "a spool that cannot be written": (spool_that_is_a_file, {("spool", "fail")}, "SPOOL_DIR"),
    "a full spool": (lambda here: spool_with(here, "1.events", 10**6), {("spool", "fail")}, "full"),
    "events that wait": (lambda here: spool_with(here, "1.events"), {("spool", "warn")}, "1 files wait"),
    "a damaged file": (lambda here: spool_with(here, "1.damaged"), {("spool", "warn")}, "damaged"),
    "a disk too small": (setting(spool_max_bytes=10**17), {("disk", "warn")}, "free some space"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_doctor_finds_a_seeded_fault_in_its_own_line_and_says_what_to_do(
    installation: Installation, fault: str
) -> None:
    seed, expected, told = FAULTS[fault]
    seed(installation)

    findings = installation.examine()

    assert troubles(findings) == expected
    assert told in " ".join(one.text for one in findings if one.verdict != "ok")


def test_a_database_that_does_not_sync_is_told_on_postgresql(
    installation: Installation, postgres_ledger: Ledger
) -> None:
    """The tests' own databases are such."""
    installation.set(database_url=postgres_ledger.database.url.render_as_string(hide_password=False))
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("DROP INDEX ix_leads_claimed"))
        definition = "ON leads (claim_expires_at) WHERE state = 'sending'"
    try:
        findings = installation.examine()
    finally:
        with postgres_ledger.database.write() as connection:
            connection.execute(sa.text(f"CREATE INDEX ix_leads_claimed {definition}"))

    assert troubles(findings) == {("durability", "warn"), ("indexes", "fail")}
    assert "synchronous_commit" in next(one.text for one in findings if one.check == "durability")
    assert "PostgreSQL 1" in next(one.text for one in findings if one.check == "ledger")
    assert "the database's" in next(one.text for one in findings if one.check == "clock")


def test_rabbitmq_without_a_redis_for_the_limit_is_told_and_with_one_is_well(
    installation: Installation, rabbitmq_url: str, valkey_url: str
) -> None:
    installation.set(broker_url=rabbitmq_url)
    assert troubles(installation.examine()) == {("limit", "fail"), ("workers", "fail")}

    installation.set(redis_url=valkey_url)
    findings = installation.examine()
    assert troubles(findings) == set()
    assert "RabbitMQ" in next(one.text for one in findings if one.check == "broker")


@pytest.mark.parametrize(
    ("status", "verdict"), [(404, "ok"), (422, "ok"), (401, "fail"), (403, "fail"), (200, "warn"), (503, "warn")]
)
def test_the_key_is_checked_on_demand_with_a_request_that_can_create_no_call(
    installation: Installation, status: int, verdict: str
) -> None:
    installation.vendor.status, installation.options = status, {"check_key": True}

    [found] = [one for one in installation.examine() if one.check == "key check"]

    assert (found.verdict, f"HTTP {status}" in found.text) == (verdict, True)
    assert installation.vendor.seen == [(f"/api/campaigns/{'0' * 24}/leads", {})]


@contextlib.contextmanager
def web_process() -> Iterator[str]:
    server = make_server("127.0.0.1", 0, create_app(load_settings()), threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_that_leads_here_is_ok_and_gets_no_event(installation: Installation) -> None:
    with web_process() as root:
        for url in (f"{root}/webhooks/futwork", f"{root}/webhooks/futwork/{TOKEN}", f"{root}/webhooks/futwork/"):
            installation.options = {"webhook_url": url}
            found = installation.examine()[-1]
            assert (found.check, found.verdict) == ("webhook-url", "ok")
            assert TOKEN not in found.text
        for path in ("/webhook/futwork", "/elsewhere/webhooks/futwork"):
            installation.options = {}
            installation.set(webhook_url=f"{root}{path}")
            assert troubles(installation.examine()) == {("webhook-url", "fail")}

    assert installation.valkey.llen("events") == 0


def test_status_pages_that_ask_for_a_password_are_ok_and_those_that_a_proxy_keeps_are_told(
    installation: Installation,
) -> None:
    hashed = generate_password_hash("open-sesame", "scrypt:1024:8:1").replace(":", ".").replace("$", ".")
    installation.set(ops_users=f"asha:{hashed}:viewer", ops_secret="a-secret-of-more-than-thirty-two-letters")
    with web_process() as root:
        installation.options = {"webhook_url": f"{root}/webhooks/futwork"}
        found = installation.examine()[-1]
        assert (found.check, found.verdict) == ("ops-url", "ok")
    installation.options = {"webhook_url": f"{installation.vendor.url}/webhooks/futwork"}
    assert ("ops-url", "warn") in troubles(installation.examine())


@pytest.mark.parametrize("status", [200, 302, 404])
def test_a_webhook_that_leads_to_somebody_else_is_a_failure(installation: Installation, status: int) -> None:
    installation.vendor.status = status
    installation.options = {"webhook_url": f"{installation.vendor.url}/webhooks/futwork"}

    assert troubles(installation.examine()) == {("webhook-url", "fail")}


def test_a_webhook_that_nobody_serves_is_a_failure(installation: Installation) -> None:
    installation.options = {"webhook_url": f"http://127.0.0.1:{free_port()}/webhooks/futwork"}

    assert troubles(installation.examine()) == {("webhook-url", "fail")}
