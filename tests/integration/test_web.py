"""The web app as it is deployed: `python -m pipeline.web` with several processes, over a real broker or none."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from pipeline.broker import decode_events
from pipeline.devstack.embedded_valkey import free_port, valkey_server
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN
from tests.waiting import patience, until

ROOT = Path(__file__).parents[2]
TOKEN = "hook-3f19eab8c425495f"
INTAKE_TOKEN = "intake-a343268c44d5631a"


@dataclass
class Answer:
    """What came back."""

    status: int
    text: str
    seconds: float

    @property
    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.text)


@dataclass
class Server:
    """A web server that serves."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    folder: Path

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own."""
        began = time.monotonic()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience())) as connection:
            connection.request(method, path, body, names, encode_chunked=names.get("Transfer-Encoding") == "chunked")
            answer = connection.getresponse()
            text = answer.read().decode()
        return Answer(answer.status, text, time.monotonic() - began)

    def post_event(self, number: int = 0, **headers: str) -> Answer:
        """One event, with the token in a header."""
        return self.ask("POST", "/webhooks/futwork", event(number), x_api_key=TOKEN, **headers)

    def spooled(self) -> int:
        """Files in the spool."""
        return len(list((self.folder / "spool").glob("*.events")))


def event(number: int) -> bytes:
    return json.dumps({"callSid": f"call-{number}", "status": "ringing"}).encode()


@contextlib.contextmanager
def servers(parent: Path) -> Iterator[Callable[..., Server]]:
    """Start the web server as the Procfile does, with these settings and further arguments."""
    started: list[Server] = []

    def start(*arguments: str, app: str = "pipeline.web.wsgi:app", **settings: str) -> Server:
        folder = parent / f"web-{len(started)}"
        (folder / "tmp").mkdir(parents=True)
        inherited = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
        environment = inherited | {
            "BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
            "DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:9/nothing",
            "SPOOL_DIR": str(folder / "spool"),
            "WEBHOOK_TOKEN": TOKEN,
            "INTAKE_TOKENS": INTAKE_TOKEN,
            "WEB_CONCURRENCY": "2",
            "TMPDIR": str(folder / "tmp"),
            "LOG_FORMAT": "json",
            **settings,
        }
        port = free_port()
        log = folder / "web.log"
        command = [sys.executable, "-m", "pipeline.web", app, "--host", "127.0.0.1", "--port", str(port), *arguments]
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        server = Server(port, process, log, folder)
        started.append(server)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return server.ask("GET", "/healthz").status == 200
            return False

        until(ready)
        return server

    yield start
    for server in started:
        server.process.send_signal(signal.SIGTERM)
    for server in started:
        try:
            server.process.wait(patience())
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a web server of the test's own, which ends with it."""
    with servers(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Server]:
    """A web server with all that it needs, which takes small bodies only, for the tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("running")
    url = f"sqlite:///{folder / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.migrate()
    ledger.close()
    with servers(folder) as start:
        yield start(BROKER_URL=valkey_url, DATABASE_URL=url, WEBHOOK_MAX_BYTES="5000", INTAKE_MAX_BYTES="5000")


def published(valkey: redis.Redis, queue: str) -> list[Any]:
    """The payloads of the tasks that wait in a queue."""
    messages = [json.loads(one) for one in valkey.lrange(queue, 0, -1)]
    return [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]


def events_in(valkey: redis.Redis) -> list[bytes]:
    """The bodies of the events in the broker, sorted."""
    return sorted(one.body for message in published(valkey, "events") for one in decode_events(message))


def test_events_that_come_at_once_are_all_in_the_broker_when_they_are_answered(running, valkey):
    with ThreadPoolExecutor(24) as senders:
        found = list(senders.map(running.post_event, range(240)))

    assert {answer.status for answer in found} == {200}
    assert events_in(valkey) == sorted(event(number) for number in range(240))
    assert valkey.llen("events") <= 240  # those that came together share a message


def test_counters_add_up_over_workers_no_webhook_asks_the_database_and_sigterm_ends_it_all(serve, valkey, valkey_url):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"postgresql://nobody:secret@127.0.0.1:{silent.getsockname()[1]}/nothing"
        server = serve(BROKER_URL=valkey_url, DATABASE_URL=url)
        until(lambda: len(psutil.Process(server.process.pid).children()) == 2)
        workers = psutil.Process(server.process.pid).children()
        assert len(workers) == 2

        with ThreadPoolExecutor(16) as senders:
            found = list(senders.map(server.post_event, range(200)))
        assert {answer.status for answer in found} == {200}
        silent.settimeout(0.01)
        with pytest.raises(TimeoutError):
            silent.accept()  # nobody even knocked
    assert server.ask("POST", "/webhooks/futwork", b"{").status == 401
    counted = server.ask("GET", "/metrics")

    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(counted.text)
        for sample in family.samples
    }
    assert samples["pipeline_webhook_answers_total", "200"] == 200
    assert samples["pipeline_webhook_answers_total", "401"] == 1
    assert samples["pipeline_webhook_handoff_seconds_count",] == 200
    assert samples["pipeline_ledger_up",] == 0
    assert samples["pipeline_broker_up",] == 1
    assert samples["pipeline_queue_messages", "events"] == valkey.llen("events")

    workers[0].kill()  # what a dead worker counted still counts
    until(lambda: {one.pid for one in psutil.Process(server.process.pid).children()} - {one.pid for one in workers})
    assert 'pipeline_webhook_answers_total{status="200"} 200.0' in server.ask("GET", "/metrics").text

    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(list((server.folder / "tmp").glob("pipeline-metrics-*"))) == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(patience()) == 0
    assert psutil.wait_procs(processes, timeout=patience())[1] == []
    assert list((server.folder / "tmp").glob("pipeline-metrics-*")) == []


def test_chunked_bodies_are_taken_and_bounded_like_others(running, valkey):
    chunked = {"Transfer-Encoding": "chunked"}
    lead = json.dumps({"phone": "9999789877", "data": {}}).encode()
    leads, bearer = f"/v1/campaigns/{CAMPAIGN}/leads", f"Bearer {INTAKE_TOKEN}"
    json_body = {"Content-Type": "application/json", "Authorization": bearer}

    small = running.ask("POST", "/webhooks/futwork", iter([event(1)]), x_api_key=TOKEN, **chunked)
    large = running.ask("POST", "/webhooks/futwork", iter([b"x" * 1000] * 6), x_api_key=TOKEN, **chunked)
    few = running.ask("POST", leads, iter([lead]), **json_body, **chunked)
    many = running.ask("POST", leads, iter([lead * 100] * 6), **json_body, **chunked)

    assert (small.status, large.status, few.status, many.status) == (200, 413, 202, 413)
    assert large.json == {"error": "an event may have 5,000 bytes (WEBHOOK_MAX_BYTES)"}
    assert many.json == {"error": "a request may have 5,000 bytes (INTAKE_MAX_BYTES); send several"}
    assert events_in(valkey) == [event(1)]
    assert len(published(valkey, "intake")) == 1


@pytest.mark.parametrize("path", ["/webhooks/futwork", f"/v1/campaigns/{CAMPAIGN}/leads"])
def test_a_client_that_sends_far_too_much_reads_its_413(running, path):
    answer = running.ask(
        "POST",
        path,
        b"x" * 20_000_000,
        x_api_key=TOKEN,
        Authorization=f"Bearer {INTAKE_TOKEN}",
        Content_Type="application/json",
    )

    assert answer.status == 413


def test_with_the_broker_away_events_are_spooled_and_reach_it_when_it_is_back(serve, tmp_path):
    port = free_port()
    server = serve(BROKER_URL=f"redis://127.0.0.1:{port}/0")

    found = [server.post_event(number) for number in range(30)]

    assert {answer.status for answer in found} == {200}
    assert max(answer.seconds for answer in found) < patience(5)
    assert sorted(answer.seconds for answer in found)[-3] < patience(1)  # each worker finds out once
    assert server.spooled() >= 1
    assert server.ask("GET", "/readyz").json["broker"] == "away"
    folder = tmp_path / "valkey"
    folder.mkdir()
    command = [valkey_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    broker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(lambda: server.spooled() == 0)
        with contextlib.closing(redis.Redis(port=port)) as client:
            assert events_in(client) == sorted(event(number) for number in range(30))
    finally:
        broker.terminate()
        broker.wait()


def test_with_broker_and_spool_away_an_event_is_503_within_five_seconds(serve, tmp_path):
    (tmp_path / "file").write_text("no folder")
    server = serve(SPOOL_DIR=str(tmp_path / "file"), WEB_CONCURRENCY="1")

    answer = server.post_event()

    assert (answer.status, answer.json) == (503, {"error": "the event could not be kept; send it again"})
    assert answer.seconds < patience(5)
    leads = server.ask(
        "POST",
        f"/v1/campaigns/{CAMPAIGN}/leads",
        b'{"phone": "9999789877", "data": {}}',
        Authorization=f"Bearer {INTAKE_TOKEN}",
        Content_Type="application/json",
    )
    assert leads.status == 503
    assert leads.seconds < patience(5)


def test_no_log_ever_holds_a_token(serve):
    server = serve("--access-log", LOG_LEVEL="debug", WEB_CONCURRENCY="1")

    hook = "/webhooks/futwork"
    for path in (f"{hook}/{TOKEN}", f"//webhooks//futwork/{TOKEN}?a={TOKEN}", f"{hook}?t={TOKEN}"):
        server.ask("POST", path, event(1))
        server.ask("GET", path)
    server.post_event(2, x_webhook_secret=TOKEN)
    server.ask("GET", "/v1/leads/1", Authorization=f"Bearer {INTAKE_TOKEN}")
    for line in (f"POST /webhooks/futwork/{TOKEN} NONSENSE\r\n\r\n", f"POST /webhooks/futwork/{TOKEN}\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=patience()) as wire:
            wire.sendall(line.encode())
            wire.recv(1000)
    until(lambda: "healthz" in server.log.read_text())
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(patience())

    text = server.log.read_text()
    assert text.count("futwork/***") >= 4
    assert TOKEN not in text
    assert INTAKE_TOKEN not in text


def test_it_serves_again_however_often_its_processes_are_killed(serve):
    server = serve(WEB_CONCURRENCY="1")
    main = psutil.Process(server.process.pid)
    for _ in range(3):
        until(main.children)
        for child in main.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait(10)

    def serves() -> bool:
        with contextlib.suppress(OSError):
            return server.post_event().status == 200
        return False

    until(serves)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def test_its_processes_end_when_the_main_one_was_killed(serve):
    server = serve()
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 2

    server.process.kill()

    until(lambda: not any(child.is_running() for child in children))
    assert "main process is gone" in server.log.read_text()


def test_an_app_that_does_not_start_stops_the_server_with_the_reason():
    environment = os.environ | {"BROKER_URL": "redis://127.0.0.1:9/0", "PORT": str(free_port())}

    done = subprocess.run(
        [sys.executable, "-m", "pipeline.web", "pipeline.web.wsgi:nothing"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 1
    assert "has no attribute 'nothing'" in done.stderr
    assert "do not start; the reason is above" in done.stderr


def test_wrong_settings_stop_the_start_with_one_line():
    environment = os.environ | {"BROKER_URL": "redis://127.0.0.1:9/0", "CAMPAIGN_RATE": "fast"}

    done = subprocess.run(
        [sys.executable, "-m", "pipeline.web"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(),
    )

    assert done.returncode == 1
    assert done.stderr == "pipeline: CAMPAIGN_RATE: must be a positive rate such as 20/s, 600/m or 5000/h\n"


def test_the_ledger_is_read_where_it_is_there(running, valkey):
    assert running.ask("GET", "/readyz").json == {"status": "ok", "broker": "ok", "ledger": "ok"}
    assert re.search(r"^pipeline_ledger_up 1\.0$", running.ask("GET", "/metrics").text, re.MULTILINE)
