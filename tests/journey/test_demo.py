"""`pipeline demo` as a person runs it: it proves what it says, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.cli.demo import DemoReport
from pipeline.domain.lead import LeadState
from tests.integration.cli.conftest import read_all, run
from tests.waiting import patience, until

__all__ = ["run"]

PARTS = ["beat", "dispatch", "records", "sandbox", "web"]
DEMO = [sys.executable, "-m", "pipeline.cli", "demo"]


class Started:
    """A command under way, and every process that descends from it."""

    def __init__(self, command: subprocess.Popen[str]) -> None:
        self.command = command
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """Every process seen so far; call it while they run."""
        try:
            for process in psutil.Process(self.command.pid).children(recursive=True):
                self._seen.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return list(self._seen.values())

    def left(self) -> list[psutil.Process]:
        """Those that still run, after a moment in which the system takes note of their end."""
        return psutil.wait_procs(self._seen.values(), timeout=patience())[1]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start the demo with its folder below *tmp_path*."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **more: Any) -> Started:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")} | more.pop("environment", {})
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
        started.append(subprocess.Popen([*DEMO, *arguments], env=environment, cwd=tmp_path, **more))
        return Started(started[-1])

    yield start
    for one in started:
        if one.poll() is None:
            one.send_signal(signal.SIGTERM)
            one.wait(patience())


def finish(started: Started) -> tuple[str, str]:
    """Wait for the command's end, looking for its processes on the way; return what it printed."""
    deadline = time.monotonic() + patience(120)
    while True:
        started.look()
        try:
            return started.command.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline, "it did not end"


def told(promised: int) -> DemoReport:
    """A report of a demo that accepted two leads."""
    status = {
        "accepted": 2,
        "leads": dict.fromkeys(LeadState, 0) | {LeadState.CALLED: 2},
        "calls": {"total": 2, "connected": 2},
        "events": {"raw": 4, "quarantined": 0, "orphans": 0},
    }
    return DemoReport(
        status, rows=3, refused=[{"line": "3", "reason": "phone"}], promised=promised, attempts={"accepted": 2},
        sandbox={"received": 2, "accepted": 2}, duplicates=0, story=None, seconds=1.0,
    )  # fmt: skip


def test_a_report_as_json_goes_alone_and_only_trouble_keeps_the_folder(run, monkeypatch, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr("pipeline.cli.demo.run_demo", lambda _, screen, **__: screen.say("it runs") or told(2))
    good = run("demo", "--json")
    assert (good.code, good.err, list(folder.iterdir())) == (0, "", [])
    assert (good.json["accepted"], good.json["refused"], good.json["lost"], good.json["problems"]) == (2, 1, 0, [])

    monkeypatch.setattr("pipeline.cli.demo.run_demo", lambda *_, **__: told(3))
    bad = run("demo", "--json")
    (kept,) = folder.iterdir()
    assert (bad.code, bad.err) == (1, f"ledger and logs are in {kept}\n")
    assert (bad.json["lost"], bad.json["problems"]) == (1, ["1 leads were promised and are not in the ledger"])


NOTING = """
import json
from pathlib import Path
from pipeline.cli import main
from pipeline.cli.demo import screen
from tests.waiting import patience, until

def print_report(report, out, shown=screen.print_report):
    Path("report.json").write_text(json.dumps(report.as_json(), default=str))
    shown(report, out)

screen.print_report = print_report
main()
"""


def test_on_a_wild_day_the_demo_accounts_for_every_lead_whatever_the_environment_says(demo, tmp_path, monkeypatch):
    """A terminal shows a steady view; the report adds up for a person, and as JSON, which is noted beside it."""
    (tmp_path / ".env").write_text("ACCOUNT_RATE=nonsense\nFUTWORK_BASE_URL=http://127.0.0.1:9\nMAX_ATTEMPTS=1\n")
    theirs = {"DEFAULT_REGION": "US", "BROKER_URL": "redis://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    monkeypatch.setattr("tests.journey.test_demo.DEMO", [sys.executable, "-c", NOTING, "demo"])
    ours, slave = pty.openpty()
    started = demo(
        *("--leads", "80", "--rate", "60/s", "--faults", "wild,500=0.2", "--keep"),
        stderr=slave,
        environment=theirs | {"TERM": "xterm-256color", "COLUMNS": "90", "LINES": "30"},
    )
    os.close(slave)
    until(lambda: len(started.look()) >= 8)

    shown = read_all(ours)
    out, _ = finish(started)

    assert started.command.returncode == 0, out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["lost"], report["duplicates"], report["refused"], report["problems"]) == (0, 0, 2, [])
    assert report["accepted"] == sum(report["leads"].values()) == 78
    assert set(report["leads"]) == {state.value for state in LeadState}
    assert report["leads"]["called"] > 39
    assert {"raw", "quarantined", "orphans"} == set(report["events"])
    assert re.search(r"^lost: 0   called twice: 0   ", out, re.MULTILINE)
    assert re.search(r"^every lead is accounted for", out, re.MULTILINE)
    accepted, sums = re.search(r"^accepted (\d+) = (.*)$", out, re.MULTILINE).groups()
    assert int(accepted) == sum(int(part.split()[0]) for part in sums.split(" + "))
    folder = Path(re.search(r"ledger and logs are in (\S*)", shown)[1])
    assert sorted(file.stem for file in (folder / "logs").glob("*.log")) == PARTS
    assert started.left() == []
    for part in ("latest trouble, each dealt with", "POSTs a second", " of 60", "called", "uncertain", "no_answer"):
        assert part in shown
    redrawn = [len(re.findall(r"\x1b\[1A", piece)) for piece in re.findall(r"(?:\x1b\[1A\x1b\[2K)+", shown)]
    assert len(redrawn) > 10
    assert len(set(redrawn[:-1])) == 1  # each frame is as high as the one before; the last of all is wiped away
    assert "\x1b" not in out
    assert "80 rows handed in, 2 refused:\n" in out
    assert "  line 41: phone: the phone number has too few digits for region IN\n" in out
    story = out.partition("one lead's whole story")[2].partition("\naccepted ")[0]
    assert re.search(r"Z  Sent to Futwork: accepted \(HTTP 20\d", story)
    assert re.search(r"^ +agent  ", story, re.MULTILINE)
    assert re.search(r"^ +lead  ", story, re.MULTILINE)


def test_ctrl_c_in_the_middle_leaves_no_process_and_no_folder(demo, tmp_path):
    started = demo("--leads", "500", "--rate", "20/s")
    lines = []
    for line in started.command.stderr:
        lines.append(line)
        if " accepted: " in line and "called" in line:
            break
    assert len(started.look()) >= 8

    started.command.send_signal(signal.SIGINT)
    started.command.send_signal(signal.SIGINT)  # a second one must not break off the cleaning up
    out, err = finish(started)

    assert (started.command.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.endswith("pipeline: stopped\n")
    assert started.left() == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_part_that_fails_ends_the_demo_with_its_name_and_its_log(demo, tmp_path):
    started = demo("--leads", "100", "--rate", "20/s")
    until(lambda: any("pipeline.sandbox" in " ".join(_command_line(one)) for one in started.look()))
    until(lambda: list((tmp_path / "tmp").glob("*/logs/web.log")))
    started.look()
    sandbox = next(one for one in started.look() if "pipeline.sandbox" in " ".join(_command_line(one)))

    sandbox.kill()
    out, err = finish(started)

    assert (started.command.returncode, out) == (2, "")
    assert re.search(r"^pipeline: sandbox was ended by signal 9: .* \(see .*/logs/sandbox\.log\)$", err, re.MULTILINE)
    assert re.search(r"^ledger and logs are in ", err, re.MULTILINE)
    assert started.left() == []


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
