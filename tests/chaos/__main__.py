"""`python -m tests.chaos`: run experiments and print the table; exit 1 if an invariant broke.

Each experiment runs in a process of its own, two at a time, for most of their time they wait.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import click

from tests.chaos import (
    experiments,  # noqa: F401 - registers them
    table,
)
from tests.chaos.mechanisms import MECHANISMS
from tests.chaos.runner import EXPERIMENTS, Result
from tests.chaos.side_by_side import Job, as_they_come, in_order


def main() -> int:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help="which to run (all)")
    parser.add_argument("--seed", type=int, default=None, help="repeats the moments of a run's faults")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each experiment")
    parser.add_argument("--short", action="store_true", help="one small round of each")
    parser.add_argument("--list", action="store_true", help="say what each experiment proves, and end")
    parser.add_argument("--keep", action="store_true", help="keep the folders of logs also where nothing broke")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="experiments at the same time (2)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown, too")
    parser.add_argument(
        "--without", action="append", default=[], metavar="MECHANISM",
        help="switch a mechanism off, and expect its experiment to break; `all` for each in turn, `list` to see them",
    )  # fmt: skip
    options = parser.parse_args()
    unknown = set(options.names) - EXPERIMENTS.keys()
    if unknown:
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}; --list shows them")
    if options.list:
        for one in EXPERIMENTS.values():
            click.echo(f"{one.name:<22}{one.proves}")
        return 0
    if options.without == ["list"]:
        for mechanism in MECHANISMS.values():
            click.echo(f"{mechanism.name:<22}{mechanism.experiment:<20}{mechanism.keeps}")
        return 0
    if unknown := set(options.without) - MECHANISMS.keys() - {"all"}:
        parser.error(f"no such mechanism: {', '.join(sorted(unknown))}; --without list shows them")
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    click.echo(f"seed {seed}")
    return _without(options, seed) if options.without else _with_everything(options, seed)


def _with_everything(options: argparse.Namespace, seed: int) -> int:
    """Run the experiments as they are; none may break."""
    click.echo(table.HEAD)
    began = time.monotonic()
    names = options.names or list(EXPERIMENTS)
    longest_first = sorted(names, key=lambda name: -EXPERIMENTS[name].takes_seconds)
    found: dict[str, Result] = {}
    for result in as_they_come([_job(name, seed, options) for name in longest_first], options.at_once):
        found[result.name] = result
        click.echo(table.line(result))
        for problem in result.findings.problems[:12]:
            click.echo(f"    BROKEN: {problem}")
        if result.broken:
            click.echo(f"    repeat: python -m tests.chaos {result.name} --seed {seed}; logs: {result.folder}")
    results, seconds = [found[name] for name in names], time.monotonic() - began
    click.echo(table.total(results, seconds=seconds))
    if options.write:
        how = [f"--seed {seed}", f"--at-once {options.at_once}"]
        asked = " ".join(["python -m tests.chaos", *options.names, *how])
        written = table.markdown(results, command=asked, seconds=seconds)
        table.write(written, options.write, what=table.EXPERIMENTS)
    broken = [result.name for result in results if result.broken]
    if broken:
        click.echo(f"broken: {', '.join(broken)}")
    return 1 if broken else 0


def _without(options: argparse.Namespace, seed: int) -> int:
    """Run each mechanism's experiment with the mechanism switched off; each must break."""
    wanted = [one for one in MECHANISMS.values() if one.name in options.without or "all" in options.without]
    jobs = [_job(one.experiment, seed, options, one.name) for one in wanted]
    unproven = []
    rows = ["| switched off | what it keeps | experiment | what broke first |", "|---|---|---|---|"]
    for mechanism, result in zip(wanted, in_order(jobs, options.at_once), strict=True):
        found = [problem for problem in result.findings.problems if mechanism.says in problem]
        if not found:
            unproven.append(mechanism.name)
        what = _short(found[0]) if found else f"NOT PROVEN: {_otherwise(result)}"
        rows.append(f"| `{mechanism.name}` | {mechanism.keeps} | `{mechanism.experiment}` | {what} |")
        click.echo(rows[-1])
    if options.write:
        table.write(rows, options.write, what=table.MECHANISMS)
    if unproven:
        click.echo(f"not proven: {', '.join(unproven)}")
    return 1 if unproven else 0


def _job(name: str, seed: int, options: argparse.Namespace, *without: str) -> Job:
    return Job(name, seed, options.rounds, options.short, options.keep, without)


def _otherwise(result: Result) -> str:
    return _short(result.skipped or next(iter(result.findings.problems), "nothing broke"))


def _short(text: str) -> str:
    """A problem on one line of a table, without what differs from run to run."""
    return " ".join(text.split()).replace("|", "/")[:160]


if __name__ == "__main__":
    sys.exit(main())
