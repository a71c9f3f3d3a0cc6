"""The chaos suite in short: each experiment once, several on one deployment: `make chaos-short`.

`make chaos` runs the long form.
"""

from __future__ import annotations

import os
import zlib

import pytest

from tests.chaos import experiments  # noqa: F401 - registers them
from tests.chaos.runner import EXPERIMENTS, perform
from tests.conftest import missing

# Those on one line share a deployment, one wait until all is quiet, and one comparison of the books.
TOGETHER = [
    ("dispatch-child", "records-child", "dispatch-worker", "records-worker", "two-beats", "many-dispatchers"),
    ("postgres-restart", "postgres-cut", "orphans", "early-webhooks", "wild-webhooks", "storm"),
    ("reset-after", "error-after", "stall", "throttled", "flapping", "holds", "quick-stop"),
    ("frozen-machine", "mixed-versions", "web-worker", "web-master", "warm-stop", "clock-skew"),
    ("valkey-kill", "broker-away", "valkey-wipe"),
    ("spool-full", "valkey-kill-always", "poison"),
    ("sqlite-locked", "sqlite-kills", "clock-jump", "hours-late"),
    ("rabbitmq-drops",),
]
FULL_ONLY = {"rabbitmq-restart"}  # a node takes ten seconds to start; in short, `rabbitmq-drops` stands for it


@pytest.mark.chaos
@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_the_promises_hold_under(names: tuple[str, ...]) -> None:
    """Nothing accepted is lost, nobody is called twice, the limit holds, and everything drains by itself."""
    seed = int(os.environ.get("CHAOS_SEED", zlib.crc32(names[0].encode()) % 1000))
    result = perform(*(EXPERIMENTS[name] for name in names), seed=seed, short=True)
    if result.skipped:
        missing("what this experiment needs", result.skipped)
    assert result.findings.problems == [], f"seed {result.seed}, logs in {result.folder}"


def test_every_experiment_has_a_short_form() -> None:
    """An experiment that is added must be run here too."""
    assert sorted(EXPERIMENTS.keys() - FULL_ONLY) == sorted(name for names in TOGETHER for name in names)
