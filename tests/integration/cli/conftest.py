"""Commands run as their console script runs them, over a ledger that has a story."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from pipeline.broker import WebEvent
from pipeline.cli import main
from pipeline.domain.lead import Outcome, Retry, lead_id, settle
from pipeline.events import Events
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead

PIPELINE = [sys.executable, "-m", "pipeline.cli"]


OTHER = "68ecc86fd9fbecbe9431a18f"


HEADER = "phone,customer_name\n"


GOOD = "9999789877,Asha\n"


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, one JSON value."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Its output, JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Run a command in this process as its console script does."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def command(*arguments: str, stdin: bytes = b"", **environment: str) -> Result:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["pipeline", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    yield command
    for number, handler in signals.items():
        signal.signal(number, handler)


def start(*arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    """Run a command as a process of its own."""
    more.setdefault("stdout", subprocess.PIPE)
    more.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen([*PIPELINE, *arguments], **more)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[0], 16) & 1 << (number - 1))


def batches(client: redis.Redis) -> list[Any]:
    """The batches of leads that wait in the broker, in order."""
    messages = [json.loads(one) for one in reversed(client.lrange("intake", 0, -1))]
    return [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]


def refused(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_all(descriptor: int) -> str:
    """What a pseudo-terminal shows until its other end is closed."""
    pieces = []
    with contextlib.suppress(OSError):
        while select.select([descriptor], [], [], 30)[0]:
            piece = os.read(descriptor, 65_536)
            if not piece:
                break
            pieces.append(piece)
    os.close(descriptor)
    return b"".join(pieces).decode("utf-8", "replace")


# Looking


@dataclass
class Story:
    """A ledger with six leads, one of them with a whole journey."""

    ledger: Ledger
    called: str
    rejected: str
    uncertain: str


@pytest.fixture
def story(tmp_path: Path, _story_told: Path) -> Iterator[Story]:
    """The ledger at the place where commands look for it without settings."""
    (tmp_path / "var").mkdir()
    shutil.copyfile(_story_told, tmp_path / "var/pipeline.db")
    ledger = Ledger(f"sqlite:///{tmp_path}/var/pipeline.db")
    yield Story(ledger, *(str(lead_id(CAMPAIGN, f"crm-{n}")) for n in range(3)))
    ledger.close()


@pytest.fixture(scope="module")
def _story_told(tmp_path_factory: pytest.TempPathFactory, _sqlite_migrated: Path) -> Path:
    file = tmp_path_factory.mktemp("story") / "pipeline.db"
    shutil.copyfile(_sqlite_migrated, file)
    ledger = Ledger(f"sqlite:///{file}")
    for campaign_id, numbers in ((CAMPAIGN, range(5)), (OTHER, [9])):
        campaign = ledger.campaigns.ensure(campaign_id, now=NOW)
        rows = [make_lead(n, key=f"crm-{n}") for n in numbers]
        ledger.leads.take_in(campaign, rows, batch_id=uuid.uuid4(), max_age=timedelta(days=9000), now=NOW)
    ids = [str(lead_id(CAMPAIGN, f"crm-{n}")) for n in range(5)]
    _record(ledger, NOW + timedelta(minutes=1), {ids[0]: Outcome.BUSY})
    _record(
        ledger,
        NOW + timedelta(minutes=2),
        {ids[0]: Outcome.ACCEPTED, ids[1]: Outcome.REJECTED, ids[2]: Outcome.UNCERTAIN},
    )
    events = Events(ledger, Settings(_env_file=None))
    for minute, more in (
        (3, {"status": "ringing"}),
        (
            4,
            {
                "status": "completed",
                "transcript": "assistant: Hello Asha\nuser: \x1b[31mhello\nassistant: Bye",
                "telephonyData": {"duration": "42", "direction": "outbound", "toNumber": "+919800000000"},
            },
        ),
    ):
        body = {"callSid": "sid-1", "campaignId": CAMPAIGN, "leadId": "f1"} | more
        body["contextDetails"] = {"recipientPhoneNumber": "+919800000000"}
        event = WebEvent(json.dumps(body).encode(), NOW + timedelta(minutes=minute))
        events.take_in([event, WebEvent(b"[]", NOW, fault="the body is not a JSON object")])
    ledger.close()
    return file


def _record(ledger: Ledger, now: datetime, outcomes: dict[str, Outcome]) -> None:
    """Claim every due lead of the campaign and record these outcomes; the claims of the others are given back."""
    campaign = ledger.campaigns.get(CAMPAIGN)
    assert campaign is not None
    retry = Retry(timedelta(), timedelta(), 8)
    claims = ledger.leads.claim(CAMPAIGN, 10, lease=timedelta(minutes=1), now=now)
    answers = [
        make_answer(claim, outcomes.get(str(claim.lead_id), Outcome.THROTTLED), started_at=now) for claim in claims
    ]
    settled = [settle(answer, retry, now=now, jitter=random.Random(1)) for answer in answers]
    ledger.leads.record(campaign, settled, probe_after=timedelta(minutes=1), now=now)
