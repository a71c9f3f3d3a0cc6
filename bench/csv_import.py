"""The peak memory of `pipeline enqueue` over a CSV file with a million rows, into a private Valkey."""

from __future__ import annotations

import os
import sys
import time

from bench import fake_leads
from bench.backends import CAMPAIGN, Backends
from bench.figures import Figure, absolute, console
from pipeline.devstack.supervisor import ROOT

ROWS = 1_000_000
_LIMIT_MB = 300


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:  # noqa: ARG001 - as every figure has it
    """The figures of this module; one round, because what is measured is a bound and not a speed."""
    number = ROWS // 10 if quick else ROWS
    file = services.folder / "leads.csv"
    fake_leads.write_csv(file, number)
    services.clean_valkey()
    environment = os.environ | services.environment(services.settings())
    started = time.perf_counter()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "pipeline.cli", "enqueue", str(file), "--campaign", CAMPAIGN],
        environment | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)],
    )
    _, status, used = os.wait4(pid, 0)
    took = time.perf_counter() - started
    waiting = services.valkey.llen("intake")
    services.clean_valkey()
    file.unlink()
    if os.waitstatus_to_exitcode(status) or waiting != -(-number // 500):
        raise RuntimeError(f"the import ended with status {status}, {waiting} batches in the broker")
    console.print(f"  {number:,} rows in {took:.0f} s", highlight=False)
    note = f"peak resident memory for {number:,} rows, {number / took:,.0f} rows/s"
    return [absolute("csv_import", [used.ru_maxrss / 1024], unit="MB", goal=_LIMIT_MB, better="lower", note=note)]
