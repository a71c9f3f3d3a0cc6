"""What Sentry is told of our faults, by the real library over real HTTP: where and what, and nothing of any person."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.observability import error_reporting
from pipeline.settings import SettingsError
from tests.waiting import patience

pytest.importorskip("sentry_sdk", reason="Sentry's library is not installed")

ROOT = Path(__file__).parents[2]
SECRETS = ("9800000001", "Asha", "hook-of-mine", "key-of-mine", "I am not at home", "very-secret")
PROGRAM = """
import sys
sys.argv.append("+919800000001")
from flask import request
from pipeline.worker.app import build_app
from pipeline.worker.guard import StageFailed, plain
from pipeline.observability import error_reporting
from pipeline.observability.logs import configure_logs, logger
from pipeline.settings import load_settings
from pipeline.web.app import create_app

settings = load_settings()
error_reporting.begin(settings, part="web")
configure_logs(settings)
app = create_app(settings)

@app.post("/broken/<token>")
def broken(token):
    phone = "9800000001"
    raise ValueError(f"a row was refused: (+91{phone}, Asha)")

app.test_client().post(
    "/broken/hook-of-mine?phone=9800000001", json={"transcript": "I am not at home"},
    headers={"x-api-key": "key-of-mine", "Authorization": "Bearer very-secret"},
)

log = logger("pipeline.test")
log.error("a stage failed", error="ValueError", where="intake.py:3 take_in", leads=["l-1", "l-2"], campaign="c-1",
          phone="9800000001", reason="Asha said: I am not at home")
log.warning("only a warning", lead="l-9")

app = build_app(settings)
@app.task(name="pipeline.broken")
def broken_task(message):
    person = message
    raise KeyError(f"{message}")
app.conf.task_always_eager = True
broken_task.delay({"phone": "9800000001", "data": {"name": "Asha"}})

def stage(mine):
    raise OSError("of +919800000001")
try:
    app.task(plain(stage), name="pipeline.stage", bind=True).delay()
except StageFailed:
    pass

import sentry_sdk
sentry_sdk.flush(10)
"""


class Ingest:
    """Where Sentry's library sends to."""

    def __init__(self) -> None:
        self.raw = b""
        self.events: list[dict[str, Any]] = []
        ingest = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                ingest.raw += body
                lines = [json.loads(line) for line in body.splitlines() if line]
                ingest.events += [line for line in lines if "platform" in line]
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.dsn = f"http://public@127.0.0.1:{self.server.server_port}/1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def ingest() -> Iterator[Ingest]:
    found = Ingest()
    yield found
    found.server.shutdown()
    found.server.server_close()


def run(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True, text=True, timeout=patience(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sentry_is_told_where_something_failed_and_nothing_of_any_person(ingest: Ingest, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SENTRY_ENVIRONMENT=of-this-test\n")
    run(PROGRAM, SENTRY_DSN=ingest.dsn, BROKER_URL="redis://127.0.0.1:9/0", WEBHOOK_TOKEN="hook-of-mine",
        FUTWORK_API_KEY="key-of-mine", INTAKE_TOKENS="very-secret")  # fmt: skip

    told = ingest.raw.decode()
    assert [secret for secret in SECRETS if secret in told] == []
    request, line, task, stage = ingest.events
    assert {one["environment"] for one in ingest.events} == {"of-this-test"}
    assert [one["level"] for one in ingest.events] == ["error"] * 4
    assert request["logentry"]["message"] == "a request failed"
    [raised] = request["exception"]["values"]
    assert (raised["type"], raised.get("value")) == ("ValueError", None)
    assert raised["stacktrace"]["frames"][-1]["function"] == "broken"
    assert not [frame for frame in raised["stacktrace"]["frames"] if "vars" in frame or "context_line" in frame]
    assert line["logentry"]["message"] == "a stage failed"
    assert line["fingerprint"] == ["a stage failed", "ValueError"]
    assert line["extra"] == {
        "level": "error", "logger": "pipeline.test", "campaign": "c-1", "error": "ValueError",
        "where": "intake.py:3 take_in", "leads": ["l-1", "l-2"],
    }  # fmt: skip
    assert task["exception"]["values"][0]["type"] == "KeyError"
    assert (stage["logentry"]["message"], stage["extra"]["error"]) == ("a stage failed", "OSError")
    assert "<string>:" in stage["extra"]["where"]
    assert {"request", "user", "breadcrumbs", "modules"}.isdisjoint(request | line | task | stage)


def test_without_their_settings_neither_sentry_nor_instrumentations_are_imported(tmp_path: Path) -> None:
    program = (
        "import sys, worker; from pipeline.web import wsgi; from pipeline.observability import tracing;"
        "tracing.begin(wsgi.settings, part='worker');"
        "ours = ('sentry_sdk', 'opentelemetry.instrumentation', 'opentelemetry.exporter');"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    assert run(program, BROKER_URL="redis://127.0.0.1:9/0").strip() == "[]"


def test_a_dsn_that_is_none_is_one_clear_line(make_settings: Any) -> None:
    with pytest.raises(SettingsError, match="SENTRY_DSN: must be the address"):
        error_reporting.begin(make_settings(sentry_dsn="nonsense"), part="web")
