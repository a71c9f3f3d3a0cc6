"""The examples of `docs/wire-contract.md`, as written there, against a real broker and a real worker."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
import redis

from pipeline.ledger import LeadFilter, Ledger
from tests.conftest import empty
from tests.waiting import patience, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.journey


def example(name: str) -> str:
    """The fenced block that follows the marker of this name in the document."""
    text = (ROOT / "docs/wire-contract.md").read_text()
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)[1]


def documented_ids() -> set[str]:
    text = (ROOT / "docs/wire-contract.md").read_text()
    return set(re.findall(r"^\| `68ecc86fd9fbecbe9431a18e` .* \| `([0-9a-f-]{36})` \|$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def running(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ledger, Callable[[], str]]]:
    """The ledger of a worker on the queue `intake`, and what says that it runs and gives its log."""
    tmp_path = tmp_path_factory.mktemp("intake")
    database = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(database)
    ledger.migrate()
    environment = os.environ | {
        "BROKER_URL": valkey_url,
        "DATABASE_URL": database,
        "SPOOL_DIR": str(tmp_path / "spool"),
    }
    arguments = ["-m", "celery", "-A", "worker", "worker", "-Q", "intake", "-c", "1"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, *arguments, "--without-gossip", "--without-mingle"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def log_of_living() -> str:
        log = (tmp_path / "worker.log").read_text()
        assert worker.poll() is None, log
        return log

    yield ledger, log_of_living
    worker.terminate()
    worker.wait(patience())
    ledger.close()


@pytest.fixture
def intake_worker(running: tuple[Ledger, Callable[[], str]], valkey: redis.Redis) -> Callable[[int], set[str]]:
    """That worker with an empty ledger; call it with a number to wait for so many leads and get their ids."""
    ledger, log = running
    empty(ledger)

    def leads(count: int) -> set[str]:
        def found() -> set[str]:
            log()
            return {str(lead["id"]) for lead in ledger.reports.leads(LeadFilter())}

        until(lambda: len(found()) >= count, what=log)
        return found()

    return leads


def test_the_envelope_pushed_onto_the_list_becomes_leads(intake_worker: Callable[[int], set[str]], valkey: redis.Redis):
    valkey.lpush("intake", example("envelope").strip())

    assert documented_ids() == intake_worker(2)


def test_a_celery_client_without_our_code_hands_leads_in(
    intake_worker: Callable[[int], set[str]], valkey_url: str, tmp_path: Path
):
    subprocess.run(
        [sys.executable, "-c", example("python")], cwd=tmp_path, env=os.environ | {"BROKER_URL": valkey_url}, check=True
    )

    assert documented_ids() == intake_worker(2)


def test_the_envelope_holds_the_batch_that_the_document_shows():
    envelope = orjson.loads(example("envelope"))

    arguments = orjson.loads(base64.b64decode(envelope["body"]))[0]
    assert [orjson.loads(example("batch"))] == arguments


def test_node_derives_the_same_id():
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not there; nothing of ours needs it")

    done = subprocess.run([node, "-e", example("node-id")], capture_output=True, text=True, check=True)

    assert uuid.UUID(done.stdout.strip()) == uuid.UUID("ce03c69a-d4e5-5cf3-996a-fc76103a9f2a")
