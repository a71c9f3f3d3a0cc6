"""What can be seen of a lead from outside: its id in every log, its trace in a collector, its tasks in Flower."""

from __future__ import annotations

import base64
import gzip
import http.server
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.devstack.embedded_valkey import free_port
from pipeline.domain.lead import lead_id
from tests.conftest import CAMPAIGN
from tests.journey.conftest import phones_in
from tests.journey.fleet import Fleet, Process, Valkey
from tests.waiting import patience, until

HOOK, INTAKE = "hook-of-this-test", "intake-of-this-test"
PHONES = ("9800000001", "9800000002")


class Collector:
    """A collector of OTLP over HTTP that keeps every span."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.raw = b""
        self.spans: list[dict[str, Any]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                collector.raw += body
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    resource = {one.key: one.value.string_value for one in group.resource.attributes}
                    for scope in group.scope_spans:
                        collector.spans += [_plain_span(span, resource) for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]


def _plain_span(span: Any, resource: dict[str, str]) -> dict[str, Any]:
    return {
        "name": span.name,
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "links": [link.trace_id.hex() for link in span.links],
        "part": resource["pipeline.part"],
        "attributes": {
            one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value") for one in span.attributes
        },
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    valkey = Valkey(tmp_path / "valkey")
    fleet = Fleet(
        tmp_path, broker_url=valkey.url, redis_url=valkey.url, database_url=f"sqlite:///{tmp_path / 'ledger.db'}"
    )
    fleet.ledger.migrate()
    yield fleet
    fleet.end()
    valkey.kill()


def start_web(fleet: Fleet, port: int, **variables: object) -> Process:
    arguments = ["-m", "pipeline.web"]
    web = fleet.start(arguments, name="web", host="127.0.0.1", port=port, web_concurrency=1, **variables)
    until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), what=lambda: web.log)
    return web


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=patience()):
            return True
    except OSError:
        return False


def post(url: str, body: object, token: str) -> int:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=patience()) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def story_of(id_: uuid.UUID, process: Process) -> list[str]:
    """The event names of a process' lines that name a lead, in order, each as often as it follows another."""
    lines = [one["event"] for one in process.records() if str(id_) in json.dumps(one)]
    return [name for before, name in zip([None, *lines], lines, strict=False) if name != before]


def test_a_lead_can_be_followed_by_its_id_through_three_processes_and_by_its_trace(
    fleet: Fleet, collector: Collector
) -> None:
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    sandbox = fleet.sandbox(
        "--call-seconds", "1", "--lifecycle", "full", "--webhook", f"{root}/webhooks/futwork/{HOOK}"
    )
    own = {
        "futwork_base_url": sandbox.url, "futwork_api_key": "sandbox-key", "webhook_token": HOOK,
        "intake_tokens": INTAKE, "otel_exporter_otlp_endpoint": collector.url, "otel_bsp_schedule_delay": 100,
        "log_level": "info",
    }  # fmt: skip
    web = start_web(fleet, port, **own)
    sending = fleet.worker("-Q", "dispatch", processes=1, **own)
    records = fleet.worker("-Q", "intake,events,upkeep", processes=1, **own)
    beat = fleet.celery("beat", sweep_seconds=0.5, **own)
    ids = [lead_id(CAMPAIGN, f"+91{phone}") for phone in PHONES]
    for phone in PHONES:
        row = {"phone": phone, "data": {"name": "Asha"}}
        assert post(f"{root}/v1/campaigns/{CAMPAIGN}/leads", row, INTAKE) == 202
    assert post(f"{root}/webhooks/futwork/{HOOK}x?phone={PHONES[0]}", {}, INTAKE) == 401
    until(lambda: fleet.states() == {"called": 2}, what=fleet.logs)

    for id_ in ids:
        assert story_of(id_, web) == ["leads accepted"]
        # An event that is quicker than the record of its POST adds a line of its own.
        assert [name for name in story_of(id_, sending) if "after" not in name] == ["leads claimed", "posts answered"]
        until(lambda id_=id_: "calls merged" in story_of(id_, records), what=lambda: records.log)
        assert [name for name in story_of(id_, records) if name != "call linked"] == ["batch taken in", "calls merged"]
    assert beat.alive
    for worker, task in ((sending, "pipeline.dispatch"), (records, "pipeline.intake")):
        lines = [one for one in worker.records() if one.get("task") == task and "leads" in one]
        assert lines
        assert all(one["campaign"] == CAMPAIGN and uuid.UUID(one["task_id"]) and one["trace_id"] for one in lines)
    assert phones_in(fleet.logs()) == []

    for id_ in ids:
        own_spans = {"lead": str(id_)}
        until(
            lambda own=own_spans: [s for s in collector.named("call merged") if own.items() <= s["attributes"].items()]
        )
        [sent] = [s for s in collector.named("POST lead") if own_spans.items() <= s["attributes"].items()]
        assert (sent["attributes"]["outcome"], sent["attributes"]["http.response.status_code"]) == ("accepted", 200)
        merged = [s for s in collector.named("call merged") if s["attributes"].get("lead") == str(id_)]
        assert {one["trace"] for one in merged} == {sent["trace"]}
        until(lambda sent=sent: [s for s in collector.named("POST /v1/campaigns/<campaign_id>/leads")
                                 if s["trace"] == sent["trace"]])  # fmt: skip
        whole = {(span["name"], span["part"]) for span in collector.spans if span["trace"] == sent["trace"]}
        assert whole >= {
            ("POST /v1/campaigns/<campaign_id>/leads", "web"),
            ("send pipeline.intake", "web"),
            ("run pipeline.intake", "worker"),
            ("POST lead", "worker"),
            ("call merged", "worker"),
        }
        [slice_] = sent["links"]
        assert slice_ in {span["trace"] for span in collector.named("run pipeline.dispatch")}
        hooks = {span["trace"] for span in collector.named("run pipeline.events")}
        assert {link for one in merged for link in one["links"]} <= hooks
    assert len({span["trace"] for span in collector.named("POST lead")}) == 2
    doctor = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "doctor", "--check-key", "--webhook-url", f"{root}/webhooks/futwork"],
        env=fleet.environment(**own), cwd=fleet.folder, capture_output=True, text=True, timeout=patience(),
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout
    assert [line for line in doctor.stdout.splitlines() if not line.startswith("ok ")] == []
    web.stop()
    told = collector.raw.decode("latin-1")
    for secret in (HOOK, INTAKE, "sandbox-key", "Asha", *PHONES):
        assert secret not in told
    assert "pipeline.sweep" not in told
    assert [span for span in collector.spans if "SELECT" in str(span["attributes"]) and not span["parent"]] == []


def test_flower_shows_workers_and_tasks_to_those_with_the_password_and_no_lead_to_anybody(fleet: Fleet) -> None:
    pytest.importorskip("flower", reason="Flower is not installed")
    port = free_port()
    fleet.worker("-Q", "dispatch", processes=1, futwork_api_key="k")
    fleet.worker("-Q", "intake,events,upkeep", processes=1)
    flower = fleet.celery("flower", f"--port={port}", "--address=127.0.0.1", flower_basic_auth="operator:open-sesame")

    def api(path: str, password: str = "open-sesame") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}")
        if password:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"operator:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=patience()) as answer:
                return json.load(answer) if path.startswith("api") else answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return {}

    until(lambda: len(api("api/workers?refresh=1")) == 2, what=lambda: flower.log)
    for path in ("api/workers", "api/tasks", "tasks", ""):
        assert (api(path, password=""), api(path, password="wrong")) == (401, 401)
    row = {"phone": PHONES[0], "data": {"name": "Asha"}}
    fleet.broker.publish("pipeline.intake", {"campaign_id": CAMPAIGN, "leads": [row]}, about="(as its producer says)")

    def done() -> dict[str, Any]:
        return {one["name"]: one for one in api("api/tasks").values() if one["state"] == "SUCCESS"}

    until(lambda: {"pipeline.intake", "pipeline.dispatch"} <= set(done()), what=lambda: flower.log)
    assert {name: task["args"] for name, task in done().items()} == {
        "pipeline.intake": f"({CAMPAIGN}, 1 leads)",
        "pipeline.dispatch": f"({CAMPAIGN})",
    }
    queues = {queue["name"] for one in api("api/workers?refresh=1").values() for queue in one["active_queues"]}
    assert queues == {"intake", "dispatch", "events", "upkeep"}
    shown = json.dumps(api("api/tasks")) + json.dumps(api("api/workers?refresh=1")) + str(api("tasks"))
    assert "Asha" not in shown
    assert phones_in(shown) == []
