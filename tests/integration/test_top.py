"""`pipeline top`: what it shows of parts, leads and troubles, that it fits the window, and that it ends when asked."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from rich.console import Console

from pipeline.broker import QUEUES
from pipeline.cli.session import watching
from pipeline.cli.top.screen import screen, sparkline
from pipeline.coordination.heartbeats import Heartbeats
from pipeline.domain.campaign import Hold, HoldKind
from pipeline.ledger import Ledger
from pipeline.settings import load_settings
from pipeline.status.attention import attention
from pipeline.status.snapshot import Snapshot
from pipeline.status.text import span
from tests.conftest import CAMPAIGN, make_lead
from tests.integration.cli.conftest import Result, run
from tests.waiting import patience, until

__all__ = ["run"]

TOP = [sys.executable, "-m", "pipeline.cli", "top"]
IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a Ctrl-C becomes a signal
sys.argv = ["pipeline", "top", "--interval", "0.2"]
from pipeline.cli import main
main()
"""
HELD = "68ecc86fd9fbecbe9431a1ff"


@pytest.fixture
def installation(
    monkeypatch: pytest.MonkeyPatch, valkey: redis.Redis, valkey_url: str, tmp_path: Path, _sqlite_migrated: Path
) -> Iterator[Ledger]:
    """A ledger with two campaigns, one of them held, and parts that live."""
    shutil.copyfile(_sqlite_migrated, tmp_path / "ledger.db")
    for name, value in {"BROKER_URL": valkey_url, "DATABASE_URL": f"sqlite:///{tmp_path / 'ledger.db'}",
                        "FUTWORK_API_KEY": "k", "SPOOL_DIR": str(tmp_path / "spool")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    heartbeats = Heartbeats(valkey)
    heartbeats.record("worker", "w@here", QUEUES)
    heartbeats.record("beat", "beat@here")
    heartbeats.record("web", "here")
    heartbeats.ran("sweep")
    ledger = Ledger(load_settings().database_url)
    now = datetime.now(UTC)
    for id_, count in ((CAMPAIGN, 12), (HELD, 3)):
        campaign = ledger.campaigns.ensure(id_, now=now)
        leads = [make_lead(number) for number in range(count)]
        ledger.leads.take_in(campaign, leads, batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=now)
    ledger.campaigns.hold(HELD, Hold(HoldKind.REFUSED_CAMPAIGN, "HTTP 404 gone"), probe_at=now, now=now)
    yield ledger
    ledger.close()


def look() -> Snapshot:
    with watching(load_settings()) as watch:
        return watch.look()


def drawn(seen: Snapshot, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(screen(seen, load_settings(), width=width, height=height))
    return console.export_text().rstrip("\n").split("\n")


@pytest.mark.usefixtures("installation")
@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 50), (100, 21), (200, 70)])
def test_it_fits_the_window_and_shows_parts_leads_rate_calls_and_needs(width: int, height: int) -> None:
    lines = drawn(look(), width, height)

    text = "\n".join(lines)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert "● broker  ● limit  ● ledger  ● worker 1  ● beat 1  ● web 1" in text
    assert "leads: 15 accepted" in text
    assert re.search(r"queued +15", text)
    assert "0.0/s of 20/s" in text
    assert "calls: 0" in text
    assert "needs attention (1)" in text
    assert f"pipeline campaign resume {HELD}  Campaign {HELD}"[: width - 1] in text
    assert re.search(rf"{CAMPAIGN} +active .* queued 12", text)


@pytest.mark.usefixtures("installation")
def test_the_number_of_lines_never_passes_the_window_however_much_there_is_to_say() -> None:
    seen = look()
    seen.ledger.get()["campaigns"] = [seen.ledger.get()["campaigns"][1]] * 40

    for height in (16, 24, 40):
        lines = drawn(seen, 80, height)
        assert len(lines) <= height
        assert any("more" in line for line in lines)


def test_what_needs_attention_has_its_level_and_its_command(
    installation: Ledger, valkey: redis.Redis, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    installation.leads.claim(CAMPAIGN, 2, lease=timedelta(seconds=1), now=now - timedelta(hours=3))
    assert installation.leads.claim(CAMPAIGN, 2, lease=timedelta(seconds=1), now=now)
    installation.leads.settle_lost_claims(now=now + timedelta(minutes=1))
    installation.quarantine.put("event", b"[]", reason="no object", now=now)
    valkey.delete("{futwork:pulse}:beat:times")
    Heartbeats(valkey).record("worker", "w@here", ("intake",))
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "1.events").write_bytes(b"x")

    items = attention(look(), load_settings())

    assert [(one.level, one.code, one.command) for one in items] == [
        ("stopped", "queue_unserved", "pipeline doctor"),
        ("stopped", "no_beat", "pipeline doctor"),
        ("stopped", "held_refused_campaign", f"pipeline campaign resume {HELD}"),
        ("check", "spool_waiting", "pipeline doctor"),
        ("check", "quarantine", "pipeline events list"),
        ("info", "uncertain", f"pipeline leads --state uncertain --campaign {CAMPAIGN}"),
    ]
    assert items[0].title == "No worker serves the queues dispatch, events, upkeep"
    assert items[5].title == f"2 leads are uncertain in {CAMPAIGN}"
    assert any("spool 1 files" in line for line in drawn(look(), 140, 40))


def test_parts_that_are_away_are_named_and_the_others_are_shown(
    installation: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:9/0")
    seen = look()
    assert set(seen.away) == {"limit"}
    assert seen.ledger.get()["accepted"] == 15

    monkeypatch.setenv("BROKER_URL", "redis://127.0.0.1:9/0")
    monkeypatch.setenv("DATABASE_URL", "sqlite:///none.db")
    seen = look()
    assert set(seen.away) == {"broker", "limit", "ledger"}
    assert seen.away["ledger"] == "there is no ledger at none.db"
    assert any("The ledger does not answer" in line for line in drawn(seen, 80, 24))
    assert not Path("none.db").exists()


@pytest.mark.usefixtures("installation")
def test_into_a_pipe_it_prints_once(run: Callable[..., Result]) -> None:
    done = subprocess.run(TOP, capture_output=True, text=True, timeout=patience())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pipeline  ")
    assert "leads: 15 accepted" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert "\x1b" not in done.stdout

    seen = run("top", "--json").json
    assert seen["overview"]["leads"]["queued"] == 15
    assert seen["parts"]["alive"] == {"worker": 1, "beat": 1, "web": 1}
    assert set(seen["queues"]) == set(QUEUES)
    assert [one["code"] for one in seen["attention"]] == ["held_refused_campaign"]
    assert {"at", "overview", "parts", "queues", "limits", "spool", "away"} <= set(seen)


class Terminal:
    """A terminal with `pipeline top` in it."""

    def __init__(self, *, columns: int, lines: int) -> None:
        self.master, slave = pty.openpty()
        self.size(columns, lines)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        self.shown = ""

    def size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> None:
        while select.select([self.master], [], [], 0.02)[0]:
            with contextlib.suppress(OSError):
                self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
                continue
            return

    def await_text(self, text: str) -> None:
        def there() -> bool:
            self.read()
            return text in self.shown

        until(there)

    def type(self, text: str) -> int:
        os.write(self.master, text.encode())

        def ended() -> bool:
            self.read()
            return self.process.poll() is not None

        until(ended)
        self.read()
        return int(self.process.returncode)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    found = Terminal(columns=80, lines=24)
    yield found
    found.close()


@pytest.mark.usefixtures("installation")
@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "ctrl-c"])
def test_it_follows_the_window_and_a_key_ends_it_with_the_terminal_as_it_was(key: str, request: Any) -> None:
    terminal: Terminal = request.getfixturevalue("terminal")
    terminal.await_text("leads: 15 accepted")
    terminal.shown = ""
    terminal.size(160, 40)
    terminal.await_text("suppressed")  # the wide form counts every state

    assert terminal.type(key) == 0
    assert "Traceback" not in terminal.shown
    assert terminal.shown.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in terminal.shown
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.25, "250 ms"),
        (4.2, "4.2 s"),
        (45, "45 s"),
        (720, "12 min"),
        (12_600, "3 h 30 min"),
        (181_440, "2 d 2 h"),
    ],
)
def test_a_span_has_its_two_largest_units(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


def test_a_sparkline_shows_whatever_is_above_zero() -> None:
    assert sparkline([0, 1, 50, 100]) == "·▁▄█"
    assert sparkline([0, 0]) == "··"
