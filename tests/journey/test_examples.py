"""The files of `examples/`, each run as its README says: all hand in the same leads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Supervisor, answers
from pipeline.domain.lead import lead_id
from tests.conftest import CAMPAIGN, missing

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERS = ["+919999789877", "+919811122334"]
IDS = [str(lead_id(CAMPAIGN, number)) for number in NUMBERS]


@pytest.fixture(scope="module")
def web(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a web server over the private Valkey."""
    folder, port = tmp_path_factory.mktemp("web"), free_port()
    environment = {"BROKER_URL": valkey_url, "SPOOL_DIR": str(folder / "spool"), "INTAKE_TOKENS": "example-token"}
    with Supervisor(folder, environment) as stack:
        stack.start("web", ["-m", "flask", "--app", "web:app", "run", "--port", str(port)])
        stack.await_ready(lambda: answers(f"http://127.0.0.1:{port}/healthz"), "the web server")
        yield f"http://127.0.0.1:{port}"


def handed_in(valkey: redis.Redis) -> list[tuple[str, Any]]:
    """Number and data of the leads in the broker, which holds one batch."""
    (message,) = valkey.lrange("intake", 0, -1)
    ((batch,), _, _) = json.loads(b64decode(json.loads(message)["body"]))
    assert batch["campaign_id"] == CAMPAIGN
    return [(lead["phone"], lead["data"]) for lead in batch["leads"]]


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        missing(command[0], "no such program")
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "enqueue.py"], ["node", "enqueue.mjs"], ["sh", "enqueue.sh"]],
    ids=["python", "node", "curl"],
)
def test_a_program_hands_its_leads_in(command: list[str], web: str, valkey_url: str, valkey: redis.Redis) -> None:
    if command[0] == "sh" and shutil.which("curl") is None:
        missing("curl", "no such program")
    done = run(command, EXAMPLES, BROKER_URL=valkey_url, PIPELINE_URL=web, INTAKE_TOKEN="example-token")

    assert done.returncode == 0, done.stderr
    assert [done.stdout.index(one) for one in IDS] == sorted(done.stdout.index(one) for one in IDS)
    assert "the phone number holds letters" in done.stdout
    assert handed_in(valkey) == [
        (NUMBERS[0], {"customer_name": "Asha", "place": "Pune"}),
        (NUMBERS[1], {"customer_name": "Ravi", "place": "Jaipur"}),
    ]


@pytest.mark.parametrize("command", [["node", "enqueue.mjs"], ["sh", "enqueue.sh"]], ids=["node", "curl"])
def test_a_wrong_token_ends_a_program_with_the_answer(command: list[str], web: str, valkey: redis.Redis) -> None:
    done = run(command, EXAMPLES, PIPELINE_URL=web, INTAKE_TOKEN="wrong")

    assert done.returncode != 0
    assert "401" in done.stderr
    assert valkey.llen("intake") == 0


def test_the_command_hands_the_file_in(tmp_path: Path, valkey_url: str, valkey: redis.Redis) -> None:
    shutil.copy(EXAMPLES / "leads.csv", tmp_path)

    done = run(
        [sys.executable, "-m", "pipeline.cli", "enqueue", "leads.csv", "--campaign", CAMPAIGN],
        tmp_path,
        BROKER_URL=valkey_url,
    )

    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("2 of 3 rows accepted")
    assert [number for number, _ in handed_in(valkey)] == NUMBERS
