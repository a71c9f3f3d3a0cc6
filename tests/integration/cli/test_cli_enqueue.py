"""`pipeline enqueue`: what is handed in, what is refused, and how it says so."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import redis

from pipeline.devstack.embedded_valkey import embedded_broker, free_port
from tests.conftest import CAMPAIGN
from tests.integration.cli.conftest import GOOD, HEADER, OTHER, PIPELINE, batches, read_all, refused, start
from tests.waiting import patience, until

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

    assert time.monotonic() - began < patience(5)
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

    assert time.monotonic() - began < patience(5)
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
    out, err = command.communicate(b"9822200000,x\n" * 600, timeout=patience())

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
    out, err = command.communicate(timeout=patience())

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
    first.communicate(timeout=patience())
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
    out = command.communicate(timeout=patience())[0].decode()

    assert re.search(r"[\d,]+ rows, 0 refused", shown)
    assert "%" in shown
    assert out == f"10,000 of 10,000 rows would be accepted for campaign {CAMPAIGN}\n"
