"""`pipeline up`: the whole stack in one terminal, other commands beside it, and nothing left when it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from pipeline.devstack.embedded_valkey import free_port
from pipeline.ledger import Ledger
from tests.conftest import CAMPAIGN
from tests.waiting import patience, until

PIPELINE = [sys.executable, "-m", "pipeline.cli"]


class Up:
    """A `pipeline up` that runs."""

    def __init__(self, folder: Path, port: int, *arguments: str, **environment: str) -> None:
        self.folder = folder
        self.port = port
        self._log = folder / "up.log"
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [*PIPELINE, "up", "--port", str(port), *arguments],
                cwd=folder,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=out,
                start_new_session=True,
            )
        self.seen: list[psutil.Process] = []

    @property
    def shown(self) -> str:
        """What it wrote to the terminal."""
        return self._log.read_text("utf-8", "replace")

    def await_ready(self) -> None:
        """Wait until it says that it is up."""

        def ready() -> bool:
            assert self.process.poll() is None, self.shown
            return "Ctrl-C ends everything" in self.shown

        until(ready)
        self.seen = psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command in a second terminal in the same folder, without settings."""
        return subprocess.run(
            [*PIPELINE, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=patience(), check=False
        )

    def status(self) -> Any:
        """The status as another terminal sees it."""
        return json.loads(self.run("status", "--json").stdout)

    def get(self, path: str) -> int:
        """The HTTP status of a GET."""
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=patience()).status_code

    def signs_in(self, name: str, password: str) -> int:
        """The HTTP status that answers the form of the status pages."""
        url = f"http://127.0.0.1:{self.port}/ops/sign-in"
        with requests.Session() as browser:
            form = re.search(r'name="form" value="([^"]+)"', browser.get(url, timeout=patience()).text)[1]
            given = {"form": form, "name": name, "password": password}
            return browser.post(url, data=given, allow_redirects=False, timeout=patience()).status_code


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str, **environment: str) -> Up:
        started.append(Up(tmp_path, free_port(), *arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            one.process.wait(patience())


def test_leads_travel_and_the_stack_comes_back_after_a_sigkill_and_ctrl_c_ends_it_all(up, tmp_path):
    (tmp_path / ".env").write_text(
        "DEFAULT_REGION=IN\nINTAKE_TOKENS=intake-token-of-mine\nWEBHOOK_TOKEN=hook-of-mine\n"
    )
    (tmp_path / "worker.py").write_text("raise SystemExit('the file of another program')\n")
    (tmp_path / "leads.csv").write_text("phone,customer_name\n" + "".join(f"98111{i:05d},Asha\n" for i in range(40)))
    (tmp_path / "later.csv").write_text("phone\n9811122334\n")
    running = up("--sandbox", "--faults", "none", "--workers", "1")
    running.await_ready()

    done = running.run("enqueue", "leads.csv", "--campaign", CAMPAIGN)
    until(lambda: called(tmp_path) == 40)

    assert done.returncode == 0
    assert done.stdout == f"40 of 40 rows accepted for campaign {CAMPAIGN}\n"
    status = running.status()
    assert (status["accepted"], status["leads"]["called"], sum(status["leads"].values())) == (40, 40, 40)
    user = re.search(r"^pages     http://127\.0\.0\.1:\d+/   user (\S+)   password (\S+)$", running.shown, re.MULTILINE)
    assert [running.signs_in(user[1], password) for password in (user[2], user[2] + "x")] == [303, 403]
    assert {path: running.get(path) for path in ("/healthz", "/readyz", "/metrics")} == dict.fromkeys(
        ("/healthz", "/readyz", "/metrics"), 200
    )
    doctor = [json.loads(line) for line in running.run("doctor", "--json").stdout.splitlines()]
    assert {one["check"] for one in doctor if one["verdict"] != "ok"} <= {"settings", "key", "futwork"}
    assert ["not of those that `pipeline up` gives" in one["text"] for one in doctor if one["check"] == "settings"] == [
        False,
        True,
    ]
    assert "intake-token-of-mine" not in running.shown
    assert "hook-of-mine" not in running.shown
    assert not [one for one in running.seen if "hook-of-mine" in " ".join(one.cmdline())]
    assert "Traceback" not in running.shown

    parts = [one for one in running.seen if "valkey" not in one.name()]
    running.process.kill()
    running.process.wait()
    assert psutil.wait_procs(parts, timeout=patience())[1] == []
    (broker,) = (one for one in running.seen if one not in parts)

    again = up("--sandbox", "--faults", "none")
    again.await_ready()
    assert again.run("enqueue", "later.csv", "--campaign", CAMPAIGN).returncode == 0
    until(lambda: called(tmp_path) == 41)

    os.killpg(again.process.pid, signal.SIGINT)  # as a terminal does

    assert again.process.wait(patience()) == 0
    assert psutil.wait_procs([broker, *again.seen], timeout=patience())[1] == []
    assert len(again.seen) >= 6  # one for each part; how many children of workers were seen is a matter of timing
    assert again.shown.rstrip().endswith("everything has ended")
    assert "Traceback" not in again.shown
    assert again.status()["accepted"] == 41


def called(folder: Path) -> int:
    """How many leads the ledger of `pipeline up` says were called."""
    ledger = Ledger(f"sqlite:///{folder}/var/pipeline.db")
    try:
        return int(ledger.reports.status(now=datetime.now(UTC))["leads"]["called"])
    finally:
        ledger.close()


SMALL = """
import sys
from pipeline.cli import main
from pipeline.devstack.supervisor import Supervisor
from tests.waiting import patience, until

def start_pipeline(stack, *, web, workers):
    stack.start("beat", ["-c", "import time; time.sleep(600)", "beat"])
    stack.start("web", ["-m", "http.server", "--bind", *web.split(":")])

Supervisor.start_pipeline = start_pipeline
main()
"""


@pytest.fixture
def up_small(up, tmp_path, monkeypatch) -> Callable[..., Up]:
    """`pipeline up` with the real broker and sandbox, and in the place of the pipeline's own parts two that do nothing.

    How it watches and ends its parts does not depend on what they are.
    """
    (tmp_path / "readyz").touch()
    monkeypatch.setattr("tests.journey.test_up.PIPELINE", [sys.executable, "-c", SMALL])

    def start() -> Up:
        running = up("--sandbox")
        running.await_ready()
        assert len(running.seen) >= 4
        return running

    return start


def test_sigterm_ends_it_all(up_small):
    running = up_small()

    running.process.send_signal(signal.SIGTERM)

    assert running.process.wait(patience()) == 0
    assert psutil.wait_procs(running.seen, timeout=patience())[1] == []
    assert running.shown.rstrip().endswith("everything has ended")


def test_a_part_that_ends_ends_the_others_with_one_line(up_small):
    running = up_small()
    beat = next(one for one in running.seen if "beat" in one.cmdline())

    beat.kill()

    assert running.process.wait(patience()) == 2
    assert re.search(
        r"^pipeline: beat was ended by signal 9: .*\(see .*/var/logs/beat\.log\)$", running.shown, re.MULTILINE
    )
    assert psutil.wait_procs(running.seen, timeout=patience())[1] == []
