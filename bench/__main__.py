"""`python -m bench`: measure figures, print them as a table, and write them to `bench/results.json`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from bench.backends import Absent, Backends
from bench.figures import Figure, console, keep, show
from pipeline.observability.logs import configure_logs

FIGURES = {
    "enqueue": "leads into the broker",
    "submit": "leads from the ledger to Futwork, with a worker's two processes",
    "submit_async": "the same against taskiq and BullMQ",
    "webhook": "webhook requests with a durable answer",
    "web_servers": "web servers under slow clients, stops and kills",
    "latency": "a lead's and an event's way through an idle pipeline",
    "idle": "a pipeline with nothing to do",
    "intake": "leads from the broker into the ledger",
    "events": "post-call events into calls",
    "claim_history": "the cost of a claim with ten million leads of history",
    "cost": "CPU time, transactions, Redis commands and bytes a lead",
    "memory": "a worker after a million leads",
    "ops_pages": "the status pages on a million leads",
    "ops_webhook": "the webhook while somebody looks at the status pages",
    "rate": "what the limit allows, and never more",
    "fairness": "ten leads behind a million",
    "csv_import": "the memory of a million rows",
    "startup": "the time of `pipeline --help` and of `from pipeline import enqueue` in a new process",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="figures:\n" + "\n".join(f"  {name:<14} {what}" for name, what in FIGURES.items()),
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="what to measure; everything by default")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of each figure (5; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds over less data")
    given = parser.parse_args()
    if unknown := set(given.figures) - set(FIGURES):
        parser.error(f"no such figure: {', '.join(sorted(unknown))} (there are {', '.join(FIGURES)})")
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds = given.rounds or (3 if given.quick else 5)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="pipeline-bench-") as folder, contextlib.ExitStack() as stack:
        services = Backends(Path(folder), stack)
        configure_logs(services.settings())
        for name in given.figures or FIGURES:
            load = os.getloadavg()[0]
            console.print(f"[bold]{name}[/]: {FIGURES[name]} (load before: {load:.1f} on {os.cpu_count()} cores)")
            started = time.monotonic()
            try:
                measured = import_module(f"bench.{name}").measure(services, rounds=rounds, quick=given.quick)
            except Absent as absent:
                console.print(f"  [yellow]skipped: {absent} is not there")
                continue
            keep(measured)
            figures += measured
            console.print(f"  took {time.monotonic() - started:.0f} s")
    show(figures)
    return 0 if all(one.met is not False for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
