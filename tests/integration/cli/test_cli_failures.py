"""What goes wrong in a command: one line, an exit code, and no traceback; and the help."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline.cli import cli
from pipeline.devstack.embedded_valkey import free_port
from tests.conftest import CAMPAIGN
from tests.integration.cli.conftest import GOOD, HEADER, catches, start
from tests.waiting import patience, until

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
    assert [one for one in found if one[1] != "ok"] == [
        ("campaigns", "warn"), ("uncertain", "warn"), ("campaigns", "warn"), ("quarantine", "warn"),
        ("workers", "fail"), ("beat", "fail"), ("web", "warn"),
    ]  # fmt: skip
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
        err = command.communicate(timeout=patience())[1].decode()

    assert (command.returncode, err) == (2, "pipeline: system: No space left on device\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_without_a_traceback(tmp_path, number, code):
    command = start("enqueue", "-", "--campaign", CAMPAIGN, stdin=subprocess.PIPE, cwd=tmp_path)
    try:
        until(lambda: catches(command.pid, number) and catches(command.pid, signal.SIGTERM))
        command.send_signal(number)
        out, err = command.communicate(timeout=patience())
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
    done = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, timeout=patience())

    assert (done.returncode, done.stderr.strip()) == (143, b"pipeline: stopped")


def test_a_signal_waits_for_the_import_of_a_command(tmp_path):
    """A native module whose import is broken off by an exception may crash the process."""
    script = """\
import os, signal, sys
from pipeline import cli
def hit(_):
    os.kill(os.getpid(), signal.SIGTERM); print("imported"); return sys
cli.import_module = hit
sys.argv = ["pipeline", "enqueue"]
cli.main()
"""
    (tmp_path / "command.py").write_text(script)
    done = subprocess.run([sys.executable, "command.py"], cwd=tmp_path, capture_output=True, timeout=patience())

    assert (done.returncode, done.stdout, done.stderr.strip()) == (143, b"imported\n", b"pipeline: stopped")


def test_what_the_terminal_cannot_show_is_printed_as_its_escape(tmp_path):
    script = """\
from pipeline import cli
from pipeline.cli import session
cli.cli.main = lambda **_: session.console().print("\\u0905 done")
cli.main()
"""
    (tmp_path / "command.py").write_text(script)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "command.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=patience()
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u0905 done\n", b"")


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
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
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

    assert set(cli.list_commands(click.Context(cli))) == {*top.split(), "ops-user"}
    assert {path for path in every_command(cli) if len(path) == 2} == {
        ("campaign", "list"), ("campaign", "set"), ("campaign", "pause"), ("campaign", "resume"),
        ("events", "list"), ("events", "orphans"), ("events", "replay"), ("events", "link"),
        ("suppress", "add"), ("suppress", "list"), ("suppress", "remove"),
    }  # fmt: skip


def test_a_word_that_is_no_command_is_exit_2_with_usage(run):
    done = run("enqeue")

    assert done.code == 2
    assert "No such command 'enqeue'" in done.err
    assert run("--version").out.startswith("pipeline, version ")
    assert run().code in (0, 2)
