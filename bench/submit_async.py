"""Submissions a second against the queues that people turn to for speed: taskiq with aiohttp, BullMQ with undici.

As in `submit`. Neither peer keeps a ledger, a shared limit, or a fence against a second call. taskiq runs two worker
processes, as ours does. BullMQ's guide has one process with a concurrency factor; with two, as here, it is faster, and
so it is measured with two.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial

from bench import fake_leads
from bench.backends import CAMPAIGN, Absent, Backends
from bench.figures import Figure, compare, console, interleave
from bench.install import bullmq_folder, taskiq_python
from bench.submit import LEADS, clocked, note_on, ours, peer_environment

_BULLMQ_CONCURRENCY = 64
_BULLMQ_PROCESSES = 2


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    leads = LEADS // 2 if quick else LEADS
    shares: list[float] = []
    peers: dict[str, Callable[[], float]] = {}
    for name, install, run in (
        ("taskiq, aiohttp", taskiq_python, taskiq),
        ("BullMQ, undici", bullmq_folder, bullmq),
    ):
        try:
            install()
        except Absent as absent:
            console.print(f"  [yellow]skipped: {absent} is not there")
        else:
            peers[name] = partial(run, services, leads)
    if not peers:
        return []
    numbers = interleave(rounds, {"dispatch from the ledger": lambda: ours(services, leads, shares)} | peers)
    mine, note = numbers["dispatch from the ledger"], note_on(services, leads, leads, shares)
    goals = {"taskiq, aiohttp": ("submit_taskiq", 1.5), "BullMQ, undici": ("submit_bullmq", 1.0)}
    return [
        compare(
            goals[name][0], mine, numbers[name], unit="leads/s", goal=goals[name][1], note=f"against {name}; {note}"
        )
        for name in peers
    ]


def taskiq(services: Backends, number: int, *, broker: str = "stream") -> float:
    """Submissions a second of taskiq, two worker processes."""
    services.clean_valkey()
    python, shape = str(taskiq_python()), {"TASKIQ_BROKER": broker}
    with services.sandbox() as sandbox, services.processes(peer_environment(services, sandbox) | shape) as stack:
        _fill([python, "-m", "bench.peers.taskiq_task"], stack.environment, number)
        command = ["-m", "taskiq", "worker", "bench.peers.taskiq_task:broker", "--workers", "2", "--no-parse"]
        stack.start("taskiq", [*command, "--log-level", "WARNING"], program=python)
        return clocked(sandbox, number)


def bullmq(services: Backends, number: int, *, processes: int = _BULLMQ_PROCESSES) -> float:
    """Submissions a second of BullMQ."""
    services.clean_valkey()
    folder = bullmq_folder()
    shape = {"CONCURRENCY": str(_BULLMQ_CONCURRENCY), "NODE_ENV": "production"}
    with services.sandbox() as sandbox, services.processes(peer_environment(services, sandbox) | shape) as stack:
        _fill(["node", str(folder / "fill.mjs")], stack.environment, number)
        for place in range(processes):
            stack.start(f"bullmq-{place}", [str(folder / "worker.mjs")], program="node")
        return clocked(sandbox, number)


def _fill(command: list[str], environment: dict[str, str], number: int) -> None:
    """Give a peer's own producer the leads on its standard input."""
    lines = "".join(
        json.dumps({"campaign": CAMPAIGN, "phone": row["phone"], "data": row["data"]}) + "\n"
        for row in fake_leads.rows(number)
    )
    done = subprocess.run(
        command, input=lines, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
