"""The `pipeline` command: what it prints where, its exit codes, and that no traceback ever reaches a person."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import redis

from pipeline.broker import WebEvent
from pipeline.cli import cli, main
from pipeline.devstack.embedded_valkey import embedded_broker, free_port
from pipeline.domain.campaign import ADVICE, Hold, HoldKind
from pipeline.domain.lead import LeadState, Outcome, Retry, lead_id, settle
from pipeline.events import Events
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead
from tests.waiting import until

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


# enqueue


def test_enqueue_publishes_every_good_row_and_writes_the_others_down(run, valkey, valkey_url, tmp_path):
    file = tmp_path / "leads.csv"
    rows = [f"98111{i:05d},Lead {i}\n" for i in range(1200)]
    rows[3] = "12,Bad Phone\n"
    rows[700] = "9811122334\n"
    file.write_text(HEADER + "".join(rows))

    done = run("enqueue", str(file), "--campaign", CAMPAIGN, BROKER_URL=valkey_url)

    assert (done.code, done.err) == (1, "")
    assert done.out == (f"1,198 of 1,200 rows accepted for campaign {CAMPAIGN}\n2 refused: see {file}.refused.csv\n")
    assert [len(batch["leads"]) for batch in batches(valkey)] == [500, 500, 198]
    assert {batch["campaign_id"] for batch in batches(valkey)} == {CAMPAIGN}
    assert batches(valkey)[0]["leads"][0] == {
        "phone": "+919811100000",
        "data": {"customer_name": "Lead 0"},
        "key": "+919811100000",
    }
    assert (tmp_path / "leads.csv.refused.csv").read_text().splitlines() == [
        "line,reason,phone,customer_name",
        "5,phone: the phone number has too few digits for region IN,12,Bad Phone",
        '702,"1 fields, but the header names 2",9811122334',
    ]


def test_the_same_file_twice_publishes_the_same_batches(run, valkey, valkey_url, tmp_path):
    file = tmp_path / "leads.csv"
    file.write_text(HEADER + GOOD)

    for _ in range(2):
        assert run("enqueue", str(file), "--campaign", CAMPAIGN, BROKER_URL=valkey_url).code == 0

    first, second = batches(valkey)
    assert first == second


def test_a_summary_as_json_has_every_count(run, valkey, valkey_url, tmp_path):
    file = tmp_path / "leads.csv"
    file.write_text("phone,id\n9999789877,7\n12,8\n")

    done = run("enqueue", str(file), "--campaign", CAMPAIGN, "--key-column", "id", "--json", BROKER_URL=valkey_url)

    assert done.json == {
        "campaign_id": CAMPAIGN,
        "rows": 2,
        "accepted": 1,
        "refused": 1,
        "refused_file": f"{file}.refused.csv",
        "dry_run": False,
        "stopped": None,
        "not_accepted_from_line": None,
    }
    assert batches(valkey)[0]["leads"][0]["key"] == "7"


def test_json_lines_come_from_stdin(run, valkey, valkey_url, tmp_path):
    rows = [
        {"phone": "9999789877", "data": {"customer_name": "Asha"}},
        {"phone": "9999789878", "data": {"x": "x" * 64 * 1024}},
        {"phone": "9999789879"},
        {"phone": "9999789880", "data": [1]},
        ["no object"],
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"phone": "9999789881", "data": {"n": NaN}}\n'

    done = run("enqueue", "-", "--campaign", CAMPAIGN, stdin=text.encode(), BROKER_URL=valkey_url)

    assert done.code == 1
    assert [len(batch["leads"]) for batch in batches(valkey)] == [1]
    reasons = {row["line"]: row["reason"] for row in refused(tmp_path / "stdin.refused.csv")}
    assert reasons == {
        "2": "data: 65,544 bytes of JSON are more than the 32,768 allowed",
        "3": "data: missing",
        "4": "data: Input should be a valid dictionary",
        "5": "not a JSON object",
        "6": reasons["6"],
    }
    assert reasons["6"].endswith("NaN and Infinity are no JSON")


def test_a_dry_run_counts_and_sends_nothing_even_without_a_broker(run, tmp_path):
    file = tmp_path / "leads.csv"
    file.write_text(HEADER + GOOD + "12,x\n")

    done = run("enqueue", str(file), "--campaign", CAMPAIGN, "--dry-run", BROKER_URL="redis://127.0.0.1:9/0")

    assert (done.code, done.err) == (1, "")
    assert done.out.startswith(f"1 of 2 rows would be accepted for campaign {CAMPAIGN}\n")
    assert not (tmp_path / "var").exists()


def test_what_an_earlier_run_refused_is_forgotten_once_it_is_mended(run, tmp_path):
    file = tmp_path / "leads.csv"
    file.write_text(HEADER + "12,x\n")
    assert run("enqueue", str(file), "--campaign", CAMPAIGN, "--dry-run").code == 2
    assert (tmp_path / "leads.csv.refused.csv").exists()

    file.write_text(HEADER + GOOD)
    done = run("enqueue", str(file), "--campaign", CAMPAIGN, "--dry-run")

    assert done.code == 0
    assert not (tmp_path / "leads.csv.refused.csv").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "line"),
    [
        (None, [], "leads.csv does not exist"),
        ("", [], "leads.csv is empty: there is nothing to enqueue"),
        (HEADER, [], "leads.csv has a header but no rows: there is nothing to enqueue"),
        ("\x00\x01\x02binary", [], "leads.csv is no text: give CSV or JSON lines (for UTF-16 without a mark,"),
        (HEADER + GOOD, ["--phone-column", "Mobile"], "leads.csv has no column 'Mobile' (--phone-column); it has:"),
        (HEADER + GOOD, ["--key-column", ""], "leads.csv has no column '' (--key-column); it has:"),
        ("name,place\nAsha,Pune\n", [], "leads.csv has no phone column; name one of its columns with"),
        (HEADER + GOOD, ["--campaign", "not a campaign"], "campaign id 'not a campaign' is wrong: it must be"),
        (HEADER + GOOD, ["--refused", "nowhere/x.csv"], "refused rows cannot be written to nowhere/x.csv: name"),
        (HEADER + GOOD, ["--refused", "leads.csv"], "--refused leads.csv is the file of leads itself"),
        (HEADER + GOOD, ["--refused", "."], "refused rows cannot be written to .: name another place"),
    ],
)
def test_a_file_that_cannot_be_handed_in_is_one_line_and_nothing_sent(
    run, valkey, valkey_url, tmp_path, content, arguments, line
):
    if content is not None:
        (tmp_path / "leads.csv").write_text(content)

    done = run("enqueue", "leads.csv", "--campaign", CAMPAIGN, *arguments, BROKER_URL=valkey_url)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"pipeline: {line}")
    assert done.err.count("\n") == 1
    assert valkey.keys("*") == []
    assert content is None or (tmp_path / "leads.csv").read_text() == content


def test_a_folder_and_a_file_that_may_not_be_read_are_told_apart(run, tmp_path):
    (tmp_path / "folder").mkdir()
    assert run("enqueue", "folder", "--campaign", CAMPAIGN).err == "pipeline: folder is a folder: name a file\n"
    if os.geteuid() != 0:
        (tmp_path / "secret.csv").write_text(GOOD)
        (tmp_path / "secret.csv").chmod(0)
        done = run("enqueue", "secret.csv", "--campaign", CAMPAIGN)
        assert (done.code, done.err) == (2, "pipeline: secret.csv may not be read\n")


def test_a_broker_that_is_away_is_told_within_five_seconds_with_the_line(run, tmp_path):
    (tmp_path / "leads.csv").write_text(HEADER + "12,bad\n" + GOOD)
    began = time.monotonic()

    done = run("enqueue", "leads.csv", "--campaign", CAMPAIGN, "--json", BROKER_URL="redis://127.0.0.1:9/0")

    assert time.monotonic() - began < 5
    assert done.code == 2
    assert "the broker took no message" in done.err
    assert "check BROKER_URL. Nothing was accepted; line 3 and those after it were not." in done.err
    assert done.json["accepted"] == 0
    assert done.json["not_accepted_from_line"] == 3


def test_a_broker_that_never_answers_is_told_within_five_seconds(run, tmp_path):
    (tmp_path / "leads.csv").write_text(HEADER + GOOD)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        done = run(
            "enqueue", "leads.csv", "--campaign", CAMPAIGN,
            BROKER_URL=f"redis://127.0.0.1:{silent.getsockname()[1]}/0",
        )  # fmt: skip

    assert time.monotonic() - began < 5
    assert (done.code, done.out) == (2, "")


def test_a_broker_that_goes_away_half_way_is_exit_1_with_the_first_line_that_is_not_accepted(tmp_path):
    with contextlib.ExitStack() as broker:
        url = broker.enter_context(embedded_broker(tmp_path / "valkey"))
        command = start(
            "enqueue", "-", "--campaign", CAMPAIGN, "--json",
            stdin=subprocess.PIPE, env=os.environ | {"BROKER_URL": url}, cwd=tmp_path,
        )  # fmt: skip
        command.stdin.write((HEADER + "12,bad\n" + "".join(f"98111{i:05d},x\n" for i in range(12_000))).encode())
        command.stdin.flush()
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            until(lambda: client.llen("intake") >= 10)
            waiting = 0

            def settled() -> bool:
                nonlocal waiting
                before, waiting = waiting, sum(len(batch["leads"]) for batch in batches(client))
                return before == waiting

            until(settled)
    out, err = command.communicate((f"98222{i:05d},x\n" for i in range(1)).__next__().encode() * 600, timeout=30)

    summary = json.loads(out)
    assert command.returncode == 1
    assert (summary["accepted"], summary["refused"]) == (waiting, 1)
    # The header is line 1 and the bad row line 2, so the lead number n stands in line n + 3.
    assert summary["not_accepted_from_line"] == waiting + 3
    assert f"{waiting:,} leads were accepted; line {waiting + 3:,} and those after it were not." in err.decode()


def test_ctrl_c_says_what_was_accepted(valkey, valkey_url, tmp_path):
    command = start(
        "enqueue", "-", "--campaign", CAMPAIGN, "--json",
        stdin=subprocess.PIPE, env=os.environ | {"BROKER_URL": valkey_url}, cwd=tmp_path,
    )  # fmt: skip
    command.stdin.write((HEADER + "".join(f"98111{i:05d},x\n" for i in range(30_000))).encode())
    command.stdin.flush()
    until(lambda: valkey.llen("intake") >= 3)

    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=30)

    summary = json.loads(out)
    assert command.returncode == 1
    in_broker = sum(len(batch["leads"]) for batch in batches(valkey))
    # The batch on its way when the signal came may have arrived. It is not counted, and sending it again is harmless.
    assert in_broker - 500 <= summary["accepted"] <= in_broker
    assert summary["not_accepted_from_line"] == summary["accepted"] + 2
    assert err.decode().startswith("pipeline: stopped by a signal. ")
    assert "Traceback" not in err.decode()


def test_without_settings_leads_go_to_the_private_broker_and_stay_there(run, tmp_path):
    (tmp_path / "leads.csv").write_text(HEADER + GOOD)

    done = run("enqueue", "leads.csv", "--campaign", CAMPAIGN)

    assert done.code == 0
    assert done.err == "note: BROKER_URL is not set: leads go to the private broker under ./var\n"
    with embedded_broker(tmp_path / "var/valkey") as url, contextlib.closing(redis.Redis.from_url(url)) as client:
        assert [len(batch["leads"]) for batch in batches(client)] == [1]


def test_two_commands_share_the_private_broker_rather_than_spoil_its_file(run, tmp_path):
    (tmp_path / "leads.csv").write_text(HEADER + GOOD)
    first = start("enqueue", "-", "--campaign", CAMPAIGN, stdin=subprocess.PIPE, cwd=tmp_path)
    first.stdin.write((HEADER + "".join(f"98111{i:05d},x\n" for i in range(6000))).encode())
    first.stdin.flush()
    address = tmp_path / "var/valkey/broker.url"
    until(address.exists)
    url = address.read_text()

    assert run("enqueue", "leads.csv", "--campaign", OTHER).code == 0
    assert address.read_text() == url
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        assert OTHER in [batch["campaign_id"] for batch in batches(client)]
    done = run("up", "--sandbox", "--port", str(free_port()))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"pipeline: another pipeline command runs the private broker in {tmp_path}/var/valkey")
    first.communicate(timeout=30)
    assert first.returncode == 0


def test_a_large_file_is_read_in_constant_memory(tmp_path):
    def peak(rows: int) -> int:
        rng = random.Random(1)
        file = tmp_path / f"{rows}.csv"
        with file.open("w") as out:
            out.write("phone,customer_name,note\n")
            out.writelines(f"{9 * 10**9 + rng.randrange(10**9)},Asha Sharma,{'x' * 60}\n" for _ in range(rows))
        # Through a small process: a child of this one would be charged with the memory that it shares before it begins.
        peak_of_child = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
        command = [*PIPELINE, "enqueue", str(file), "--campaign", CAMPAIGN, "--dry-run"]
        done = subprocess.run(
            [sys.executable, "-c", peak_of_child, *command], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    small, large = peak(5_000), peak(40_000)

    assert large < 200_000  # KiB
    assert large - small < 20_000


def test_a_terminal_shows_a_progress_bar_and_keeps_it_off_stdout(tmp_path):
    file = tmp_path / "leads.csv"
    file.write_text(HEADER + "".join(f"98111{i:05d},x\n" for i in range(10_000)))
    ours, theirs = pty.openpty()
    command = start(
        "enqueue", str(file), "--campaign", CAMPAIGN, "--dry-run",
        stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)

    shown = read_all(ours)
    out = command.communicate(timeout=30)[0].decode()

    assert re.search(r"[\d,]+ rows, 0 refused", shown)
    assert "%" in shown
    assert out == f"10,000 of 10,000 rows would be accepted for campaign {CAMPAIGN}\n"


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
    _record(ledger, NOW + timedelta(minutes=1), {ids[0]: Outcome.FAILED})
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


def test_status_as_json_has_every_part_and_adds_up(run, story):
    report = run("status", "--json").json

    assert report["accepted"] == 6
    assert report["leads"] == dict.fromkeys(LeadState, 0) | {"called": 1, "rejected": 1, "uncertain": 1, "queued": 3}
    assert sum(report["leads"].values()) == report["accepted"]
    assert [(one["id"], one["state"]) for one in report["campaigns"]] == [(CAMPAIGN, "active"), (OTHER, "active")]
    assert report["calls"] == {"total": 1, "open": 0, "connected": 1}
    assert report["events"] == {"raw": 2, "quarantined": 1, "orphans": 0}


def test_status_for_a_person_has_the_same_numbers(run, story):
    out = run("status").out

    assert out.startswith("6 leads accepted (= sum over states)\n")
    assert re.search(r"^ +uncertain +1$", out, re.MULTILINE)
    assert f"campaign {OTHER}: active (queued 1)\n" in out
    assert "calls: 1 (connected 1)\nevents: 2 stored, 1 in quarantine; calls without a lead: 0\n" in out


def test_leads_are_listed_by_filter_as_json_lines(run, story):
    everything = run("leads", "--json").lines
    rejected = run("leads", "--state", "rejected", "--campaign", CAMPAIGN, "--json").lines

    assert len(everything) == 6
    assert [(one["id"], one["reason"]) for one in rejected] == [(story.rejected, "rejected: it was rejected")]
    assert len(run("leads", "--limit", "2", "--json").lines) == 2
    assert [one["id"] for one in run("leads", "--phone", "098000-00000", "--json").lines] == [story.called]
    assert [one["key"] for one in run("leads", "--key", "crm-9", "--json").lines] == ["crm-9"]
    assert run("leads", "--unchanged-for", "300000000", "--json").out == ""


def test_leads_for_a_person_stay_one_line_each_where_no_terminal_wraps_them(run, story):
    out = run("leads").out

    assert len(out.splitlines()) == 7
    assert all(line == line.rstrip() for line in out.splitlines())
    assert re.search(
        rf"^ {story.rejected} +rejected +\+919800000001 +{CAMPAIGN} +1 .* it was rejected$", out, re.MULTILINE
    )


def test_an_empty_list_says_so_beside_the_data(run, story):
    done = run("leads", "--state", "expired")

    assert (done.code, done.out, done.err) == (0, "", "no lead matches\n")


@pytest.mark.parametrize("how", ["id", "98000 00000", "+919800000000", "crm-0"])
def test_show_tells_a_leads_journey_in_order(run, story, how):
    out = run("show", story.called if how == "id" else how).out

    lines = [line.strip() for line in out.splitlines()]
    assert lines == [
        f"lead {story.called}",
        f"+919800000000, campaign {CAMPAIGN}, key crm-0",
        '{"customer_name":"Lead 0"}',
        f"{_at(0)}  accepted",
        f"{_at(1)}  POST: failed in 12 ms: it was failed",
        f"{_at(2)}  POST: accepted in 12 ms",
        f"{_at(3)}  event: ringing",
        f"{_at(4)}  event: completed",
        "call sid-1: connected, 42 s (found by phone)",
        "agent  Hello Asha",
        "lead  \N{REPLACEMENT CHARACTER}[31mhello",
        "agent  Bye",
        lines[-1],
    ]
    assert lines[-1].startswith("now called (since ")


def _at(minute: int) -> str:
    return (NOW + timedelta(minutes=minute)).strftime("%Y-%m-%d %H:%M:%S.000Z")


def test_show_as_json_has_attempts_events_and_calls(run, story):
    told = run("show", "crm-0", "--json").json

    assert (told["id"], told["state"]) == (story.called, "called")
    assert [attempt["outcome"] for attempt in told["attempts_made"]] == ["failed", "accepted"]
    assert [event["status"] for event in told["events"]] == ["ringing", "completed"]
    assert [turn["speaker"] for turn in told["calls"][0]["details"]["turns"]] == ["agent", "lead", "agent"]


def test_show_finds_a_key_that_has_the_form_of_an_id(run, story):
    key = "d41d8cd98f00b204e9800998ecf8427e"
    campaign = story.ledger.campaigns.get(CAMPAIGN)
    story.ledger.leads.take_in(
        campaign, [make_lead(77, key=key)], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW
    )

    assert run("show", key, "--json").json["key"] == key


@pytest.mark.parametrize("what", ["11111111-1111-1111-1111-111111111111", "9811122334", "no such key", "\x1b[31m"])
def test_a_lead_that_nobody_knows_is_exit_2(run, story, what):
    done = run("show", what)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("pipeline: no lead has the id, number or key ")
    assert "\x1b" not in done.err


# Acting


def test_campaigns_are_listed_with_their_leads_policies_and_reasons(run, story):
    story.ledger.campaigns.hold(
        OTHER, Hold(HoldKind.REFUSED_CAMPAIGN, "404"), probe_at=NOW + timedelta(hours=1), now=NOW
    )
    run("campaign", "set", CAMPAIGN, "--rate", "10/s", "--on-uncertain", "resend")

    listed = {one["id"]: one for one in run("campaign", "list", "--json").lines}
    out = run("campaign", "list").out

    assert (listed[CAMPAIGN]["rate"], listed[CAMPAIGN]["on_uncertain"]) == ("10/s", "resend")
    assert (listed[OTHER]["state"], listed[OTHER]["hold_kind"], listed[OTHER]["reason"]) == (
        "held",
        "refused_campaign",
        "404",
    )
    assert out == (
        f"campaign {CAMPAIGN}: active (queued 2, called 1, uncertain 1, rejected 1)\n"
        "  account default; rate 10/s, on_uncertain resend\n"
        f"campaign {OTHER}: held (queued 1)\n"
        "  refused_campaign: 404\n"
        f"  what to do: {ADVICE[HoldKind.REFUSED_CAMPAIGN][1]}\n"
        "  next probe at 2026-05-08 13:00:00.000Z; `pipeline campaign resume` does not wait for it\n"
        "  account default; every policy as in the settings\n"
    )


def test_a_held_campaign_without_waiting_leads_is_not_said_to_be_probed(run, story):
    story.ledger.campaigns.hold(
        OTHER, Hold(HoldKind.REFUSED_CAMPAIGN, "404"), probe_at=NOW + timedelta(hours=1), now=NOW
    )
    run("cancel", "--campaign", OTHER)

    out = run("campaign", "list").out

    assert "no lead waits, so nothing probes it; `pipeline campaign resume` ends the hold" in out
    assert "next probe" not in out


def test_a_policy_is_set_and_set_back(run, story):
    assert run("campaign", "set", OTHER, "--max-attempts", "3").out == f"campaign {OTHER}: max_attempts 3\n"
    assert run("campaign", "set", OTHER, "--max-attempts", "default", "--json").json["max_attempts"] is None


@pytest.mark.parametrize(
    "policy",
    [
        [],
        ["--rate", "fast"],
        ["--rate", "0/s"],
        ["--account", "nobody"],
        ["--on-uncertain", "maybe"],
        ["--uncertain-after-seconds", "nan"],
        ["--uncertain-after-seconds", "inf"],
        ["--uncertain-after-seconds", "0"],
        ["--max-attempts", "-1"],
        ["--max-attempts", "1.5"],
        ["--lead-max-age-seconds", "99999999999999999999"],
    ],
)
def test_a_wrong_policy_changes_nothing(run, story, policy):
    before = run("campaign", "list", "--json").out

    assert run("campaign", "set", CAMPAIGN, *policy).code == 2
    assert run("campaign", "list", "--json").out == before


def test_a_campaign_is_paused_and_resumed(run, story):
    assert run("campaign", "pause", OTHER, "--reason", "script").out == f"campaign {OTHER} is paused\n"
    assert run("campaign", "pause", OTHER).out == f"campaign {OTHER} was paused already\n"
    assert "  paused: script\n" in run("status").out
    assert run("campaign", "resume", OTHER).out == f"campaign {OTHER} is active\n"
    assert run("campaign", "resume", OTHER).out == f"campaign {OTHER} was active already\n"
    unknown = run("campaign", "pause", "nobody")
    assert (unknown.code, unknown.err) == (2, "pipeline: no campaign nobody; see `pipeline campaign list`\n")


BULK = {
    "retry": (["retry"], "rejected", "queued again", "queued"),
    "cancel": (["cancel"], "queued", "cancelled", "cancelled"),
    "resolve": (["resolve", "--drop"], "uncertain", "cancelled", "cancelled"),
}


@pytest.mark.parametrize("command", BULK)
def test_a_bulk_change_counts_first_and_then_changes_what_the_filter_says(run, story, command):
    arguments, before, done, after = BULK[command]
    count = {"retry": 1, "cancel": 2, "resolve": 1}[command]
    leads = f"{count} {'lead' if count == 1 else 'leads'}"

    assert run(*arguments, "--campaign", CAMPAIGN, "--dry-run").out == f"{leads} would be {done}\n"
    assert len(run("leads", "--campaign", CAMPAIGN, "--state", before, "--json").lines) == count
    was = len(run("leads", "--campaign", CAMPAIGN, "--state", after, "--json").lines)
    assert run(*arguments, "--campaign", CAMPAIGN).out == f"{leads} {done}\n"
    assert run("leads", "--campaign", CAMPAIGN, "--state", before, "--json").lines == []
    assert len(run("leads", "--campaign", CAMPAIGN, "--state", after, "--json").lines) == was + count
    assert run("leads", "--campaign", OTHER, "--json").lines[0]["state"] == "queued"


@pytest.mark.parametrize("command", BULK)
@pytest.mark.parametrize(
    "filters",
    [
        [],
        ["--phone", ""],
        ["--campaign", CAMPAIGN, "--phone", ""],
        ["--campaign", CAMPAIGN, "--key", " "],
        ["--state", "queued", "--state", "uncertain", "--state", "rejected", "--campaign", ""],
        ["--unchanged-for", "0"],
        ["--unchanged-for", "1e300"],
        ["--id", "nonsense"],
        ["--phone", "12"],
    ],
)
def test_a_bulk_change_refuses_a_filter_that_is_empty_or_wrong(run, story, command, filters):
    before = run("leads", "--json").out

    done = run(*BULK[command][0], *filters)

    assert (done.code, done.out) == (2, "")
    assert run("leads", "--json").out == before


def test_resolve_wants_to_know_what_became_of_the_leads(run, story):
    done = run("resolve", "--id", story.uncertain)

    assert done.code == 2
    assert "say what became of them: --sent, --resend or --drop" in done.err
    assert run("resolve", "--id", story.uncertain, "--sent").out == "1 lead submitted\n"
    assert run("show", story.uncertain, "--json").json["state"] == "submitted"


def test_quarantined_events_are_listed_and_replayed(run, story):
    (listed,) = run("events", "list", "--json").lines
    assert (listed["kind"], listed["reason"], listed["body"]) == ("event", "the body is not a JSON object", "[]")

    replayed = run("events", "replay")

    assert (replayed.code, replayed.out) == (1, "0 of 1 events read; 1 stay in quarantine\n")


# What goes wrong


@pytest.mark.parametrize("arguments", [["status"], ["leads"], ["show", "1"], ["campaign", "list"], ["events", "list"]])
def test_a_ledger_that_is_not_there_is_told_and_not_made(run, tmp_path, arguments):
    done = run(*arguments)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(
        "pipeline: there is no ledger at var/pipeline.db: run `pipeline up` or `pipeline migrate`"
    )
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("sqlite:///empty.db", "the database sqlite:///empty.db has no tables yet: run `pipeline migrate`"),
        ("sqlite:///text.db", "the ledger cannot be used (file is not a database): check DATABASE_URL"),
        ("sqlite:///folder", "the ledger cannot be used (unable to open database file): check DATABASE_URL"),
        ("sqlite:///text.db/below.db", "there is no ledger at text.db/below.db: run `pipeline up`"),
        ("postgresql://u:secret@127.0.0.1:9/x", "the ledger cannot be used (connection "),
        ("mysql://127.0.0.1/x", "DATABASE_URL: must be sqlite:///path or postgresql://"),
        ("nonsense", "DATABASE_URL: must be sqlite:///path or postgresql://"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(run, tmp_path, url, line):
    (tmp_path / "empty.db").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("this is no database " * 100)

    done = run("status", DATABASE_URL=url)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"pipeline: {line}")
    assert done.err.count("\n") == 1
    assert "secret" not in done.err


def test_a_wrong_database_password_is_one_line_without_it(run, postgres_url):
    url = re.sub(r"//[^@]*@", "//nobody_here:secret@", postgres_url)

    done = run("status", DATABASE_URL=url)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("pipeline: the ledger cannot be used (")
    assert "secret" not in done.err


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ("ACCOUNT_RATE=fast", "ACCOUNT_RATE: must be a positive rate such as 20/s, 600/m or 5000/h"),
        ("MAX_ATTEMPTS=many", "MAX_ATTEMPTS: Input should be a valid integer"),
        ("BROKER_URL=localhost", "BROKER_URL: must be the URL of a Redis, Valkey or RabbitMQ"),
        (b"\xff\xfe\x00", ".env cannot be read: it must be UTF-8 text (UnicodeDecodeError)"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(run, tmp_path, env, line):
    (tmp_path / ".env").write_bytes(env if isinstance(env, bytes) else env.encode())

    for command in (["status"], ["enqueue", "x.csv", "--campaign", CAMPAIGN, "--dry-run"], ["migrate"], ["up"]):
        (tmp_path / "x.csv").write_text(HEADER + GOOD)
        done = run(*command)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"pipeline: {line}")
        assert done.err.count("\n") == 1


def test_migrate_prepares_the_ledger_and_may_be_repeated(run, tmp_path):
    first, second = run("migrate"), run("migrate")

    assert first.out.startswith("sqlite:///var/pipeline.db: at revision ")
    assert first.out.endswith(", was empty\n")
    assert second.out.endswith(" already\n")
    assert run("status", "--json").json["accepted"] == 0
    assert run("migrate", "--to", "nonsense").code == 2


def test_doctor_finds_what_is_missing_and_goes_on(run, tmp_path):
    done = run("doctor", "--json", FUTWORK_BASE_URL="http://127.0.0.1:9/api")

    verdicts = {one["check"]: one["verdict"] for one in done.lines}
    assert done.code == 2
    assert verdicts == {
        "settings": "ok", "limits": "ok", "versions": "ok", "key": "fail", "webhook": "fail", "intake": "warn",
        "futwork": "fail", "broker": "fail", "ledger": "fail", "spool": "ok", "disk": "ok",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_each_thing_in_a_line_and_that_nobody_works(run, valkey, valkey_url, story):
    known = {"BROKER_URL": valkey_url, "FUTWORK_API_KEY": "k", "WEBHOOK_TOKEN": "t", "INTAKE_TOKENS": "t"}
    here = known | {"FUTWORK_BASE_URL": valkey_url.replace("redis", "http").removesuffix("/0")}
    done, shown = run("doctor", "--json", **here), run("doctor", **here)

    found = [(one["check"], one["verdict"]) for one in done.lines]
    assert (done.code, shown.code) == (2, 2)
    assert [one for one in found if one[1] != "ok"] == [("workers", "fail")] * 4 + [("beat", "fail"), ("web", "warn")]
    assert [line.split(maxsplit=2)[:2] for line in shown.out.splitlines()] == [list(one[::-1]) for one in found]
    assert shown.out.startswith("ok   settings    read; submissions go to ")


@pytest.mark.parametrize("arguments", [["leads", "--json"], ["status"], ["--help"]])  # each writes in its own way
def test_a_reader_that_goes_away_is_no_fault_to_talk_about(story, tmp_path, arguments):
    with start(*arguments, cwd=tmp_path) as command:
        command.stdout.close()
        err = command.stderr.read().decode()

    assert err == ""
    assert command.returncode in (0, 1)


@pytest.mark.parametrize("arguments", [["leads", "--json"], ["status"], ["--help"]])  # each writes in its own way
def test_a_full_disk_behind_stdout_is_one_line(story, tmp_path, arguments):
    with Path("/dev/full").open("wb") as full:
        command = start(*arguments, cwd=tmp_path, stdout=full)
        err = command.communicate(timeout=30)[1].decode()

    assert (command.returncode, err) == (2, "pipeline: system: No space left on device\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_without_a_traceback(tmp_path, number, code):
    command = start("enqueue", "-", "--campaign", CAMPAIGN, stdin=subprocess.PIPE, cwd=tmp_path)
    try:
        until(lambda: catches(command.pid, number) and catches(command.pid, signal.SIGTERM))
        command.send_signal(number)
        out, err = command.communicate(timeout=30)
    finally:
        command.kill()
        command.communicate()

    assert (command.returncode, out, err.strip()) == (code, b"", b"pipeline: stopped")


@pytest.mark.parametrize(
    "where",
    [
        "exec('hit()', globals())",
        "type('Cached', (), {'name': type('Property', (), {'__set_name__': hit})()})",
    ],
    ids=["in-an-exec", "while-a-class-is-made"],
)
def test_a_signal_during_an_import_ends_a_command_with_the_same_code(tmp_path, where):
    """Python ends a process by SIGINT if a KeyboardInterrupt passed through an `exec`, as that of a dataclass; and it
    makes a RuntimeError of what is raised where a class is made, as that of a cached property."""
    script = f"""
import os, signal
from pipeline import cli
def hit(*_):
    os.kill(os.getpid(), signal.SIGTERM); signal.pause()
cli.cli.main = lambda **_: {where}
cli.main()
"""
    (tmp_path / "command.py").write_text(script)
    done = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, timeout=30)

    assert (done.returncode, done.stderr.strip()) == (143, b"pipeline: stopped")


def test_a_fault_of_ours_is_one_line_and_a_traceback_only_on_demand(run, monkeypatch, story):
    monkeypatch.setattr("pipeline.ledger.reports.Reports.status", None)

    done = run("status")

    assert done.code == 2
    assert done.err.startswith("pipeline: unexpected TypeError: ")
    assert done.err.endswith("(PIPELINE_DEBUG=1 shows where)\n")


@pytest.mark.parametrize(
    "flag", [["--faults", "nonsense"], ["--faults", "500=2"], ["--rate", "fast"], ["--leads", "0"]]
)
def test_a_wrong_flag_of_the_demo_is_refused_before_anything_starts(run, tmp_path, flag):
    done = run("demo", *flag, TMPDIR=str(tmp_path))

    assert (done.code, done.out) == (2, "")
    assert f"Invalid value for '{flag[0]}'" in done.err
    assert list(tmp_path.iterdir()) == []


def test_up_refuses_a_port_in_use_before_it_starts_anything(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("up", "--sandbox", "--port", str(port))

    assert (done.code, done.out) == (2, "")
    assert done.err == f"pipeline: port {port} is in use: choose another with --port\n"
    assert list(tmp_path.iterdir()) == []


def test_up_without_a_key_starts_nothing_that_could_not_send(run, tmp_path):
    done = run("up", "--port", str(free_port()))

    assert (done.code, done.out) == (2, "")
    assert done.err == "pipeline: FUTWORK_API_KEY is not set: set it, or use --sandbox, which calls nobody\n"
    assert list(tmp_path.iterdir()) == []


# Help


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in group.commands:
        command = group.commands[name]
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


@pytest.mark.parametrize("path", list(every_command(cli)), ids=" ".join)
def test_every_command_helps_with_an_example(run, path):
    done = run(*path, "--help")

    assert (done.code, done.err) == (0, "")
    assert (
        f"\n  pipeline {' '.join(path)}" in done.out or f" pipeline {' '.join(path)}" in done.out.split("Options:")[0]
    )


def test_the_contracts_commands_are_all_there():
    top = "demo up sandbox enqueue top status leads show campaign retry resolve cancel events suppress migrate doctor"

    assert set(cli.commands) == {*top.split(), "ops-user"}
    assert {path for path in every_command(cli) if len(path) == 2} == {
        ("campaign", "list"), ("campaign", "set"), ("campaign", "pause"), ("campaign", "resume"),
        ("events", "list"), ("events", "orphans"), ("events", "replay"),
        ("suppress", "add"), ("suppress", "list"), ("suppress", "remove"),
    }  # fmt: skip


def test_a_word_that_is_no_command_is_exit_2_with_usage(run):
    done = run("enqeue")

    assert done.code == 2
    assert "No such command 'enqeue'" in done.err
    assert run("--version").out.startswith("pipeline, version ")
    assert run().code in (0, 2)
