"""A pipeline of real processes, whose parts can be taken away and given back."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline import enqueue
from pipeline.broker import Broker, celery_app
from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import answers
from pipeline.settings import Settings
from tests.alerts.watch import Prometheus
from tests.journey.fleet import Fleet, Process, Sandbox, Valkey
from tests.waiting import until

TOKEN = "token-of-the-webhook"
SPOOL_BYTES = 30_000


class Rig:
    """Sandbox, two workers, beat, web and Prometheus; the broker and the limit have a Valkey each."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self._closing = ExitStack()
        try:
            self._open(folder, database_url)
        except BaseException:
            self.end()
            raise

    def _open(self, folder: Path, database_url: str) -> None:
        self.broker = self._valkey(folder / "broker")
        self.limit = self._valkey(folder / "limit")
        self.fleet = Fleet(folder, broker_url=self.broker.url, redis_url=self.limit.url, database_url=database_url)
        self._closing.callback(self.fleet.end)
        self.fleet.ledger.migrate()
        self.port = free_port()
        self.web = f"http://127.0.0.1:{self.port}"
        hook = f"{self.web}/webhooks/futwork"
        self.sandbox: Sandbox = self.fleet.sandbox("--webhook", hook, "--webhook-token", TOKEN)
        self._parts: dict[str, Process] = {}
        for name in ("web", "dispatch", "records", "beat"):
            self._spawn(name)
        for name in self._parts:
            self._await(name)
        self.prometheus = Prometheus(folder / "prometheus", f"127.0.0.1:{self.port}")
        self._closing.callback(self.prometheus.end)

    def _valkey(self, folder: Path) -> Valkey:
        valkey = Valkey(folder)
        self._closing.callback(valkey.kill)
        return valkey

    def start(self, name: str) -> None:
        """Start a part again; it works when this returns."""
        self._spawn(name)
        self._await(name)

    def _spawn(self, name: str) -> None:
        settings = self._settings()
        if name == "web":
            self._parts[name] = self.fleet.start(["-m", "pipeline.web", "--threads", "8"], name="web", **settings)
        elif name == "beat":
            self._parts[name] = self.fleet.celery("beat", "--pidfile", "", **settings)
        else:
            queues = "dispatch" if name == "dispatch" else "intake,events,upkeep"
            self._parts[name] = self.fleet.worker("-Q", queues, ready=False, **settings)

    def _await(self, name: str) -> None:
        if name == "web":
            until(lambda: answers(f"{self.web}/healthz"), what=lambda: self._parts["web"].log)
        elif name != "beat":
            self._parts[name].says("ready.")

    def stop(self, name: str) -> None:
        """End a part."""
        self._parts[name].stop()

    def post(self, body: bytes, *, token: str = TOKEN) -> int:
        """Post an event to the webhook, and return the status."""
        request = urllib.request.Request(f"{self.web}/webhooks/futwork", body, {"x-api-key": token})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def enqueue(self, campaign: str, many: int = 1, *, start: int = 0) -> None:
        """Hand leads in."""
        rows = [{"phone": f"98{start + number:08d}", "data": {}} for number in range(many)]
        settings = Settings(_env_file=None, broker_url=self.broker.url, redis_url=self.limit.url)
        assert enqueue(campaign, rows, settings=settings).accepted == many

    def pipeline(self, *arguments: str) -> None:
        """Run a command as an operator does."""
        process = self.fleet.start(["-m", "pipeline.cli", *arguments], name="command", **self._settings())
        until(lambda: not process.alive, what=lambda: process.log)

    def change(self, **options: Any) -> None:
        """Change what the simulated Futwork does."""
        url = self.sandbox.url.removesuffix("/api") + "/_control"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(options).encode()), timeout=10) as answer:
            assert answer.status == 200

    def publisher(self) -> Broker:
        """A broker to publish to."""
        return Broker(celery_app(self.fleet.settings, works=False))

    def scrape(self) -> str:
        """What `/metrics` says now."""
        with urllib.request.urlopen(f"{self.web}/metrics", timeout=20) as answer:
            text: str = answer.read().decode()
        return text

    def await_silence(self, *, seconds: float = 90) -> None:
        """Wait until no alert fires."""
        until(
            lambda: not self.prometheus.firing(),
            seconds=seconds,
            what=lambda: f"firing: {sorted(self.prometheus.firing())}\n{self.scrape()[-6000:]}",
        )

    def end(self) -> None:
        self._closing.close()

    def _settings(self) -> dict[str, object]:
        return {
            "host": "127.0.0.1", "port": self.port, "webhook_token": TOKEN, "tmpdir": self.fleet.folder,
            "futwork_base_url": self.sandbox.url, "futwork_api_key": "sandbox-key",
            "account_rate": "50/s", "campaign_rate": "50/s", "dispatch_concurrency": 8, "spool_max_bytes": SPOOL_BYTES,
            "connect_timeout_seconds": 1, "read_timeout_seconds": 2, "claim_seconds": 9,
            "backoff_base_seconds": 0.2, "backoff_cap_seconds": 1, "slice_seconds": 1, "sweep_seconds": 1,
            "uncertain_after_seconds": 3, "probe_first_seconds": 1, "probe_cap_seconds": 2,
        }  # fmt: skip
