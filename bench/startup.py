"""The time of `pipeline --help` and of `from pipeline import enqueue` in a new process, against idle ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from bench.backends import Backends
from bench.figures import Figure, absolute, compare, console, interleave
from pipeline.devstack.supervisor import ROOT

_HELP = ["-m", "pipeline.cli", "--help"]
_ENQUEUE = ["-c", "from pipeline import enqueue"]
_CLICK = ["-c", "import click; click.command()(lambda: None)(['--help'])"]
_BARE = ["-c", "pass"]
_HELP_MS = 400
_HELP_RATIO = 2
_ENQUEUE_MS = 500
_TRIES = 3  # the fastest counts: what else the machine does only adds time
_SHOWN = 5
_LINE = re.compile(r"import time: +(\d+) \| +\d+ \| +(\S+)")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:  # noqa: ARG001 - as every figure has it
    """The figures of this module, in milliseconds."""
    contenders = {"pipeline --help": _HELP, "a click command's --help": _CLICK}
    contenders |= {"from pipeline import enqueue": _ENQUEUE, "python -c pass": _BARE}
    took = interleave(
        rounds, {name: lambda arguments=arguments: _run(arguments) for name, arguments in contenders.items()}
    )
    help_, click, enqueue, bare = took.values()
    return [
        compare("startup_help", help_, click, unit="ms", goal=_HELP_RATIO, better="lower", note=_imports(_HELP)),
        absolute("startup_help_ms", help_, unit="ms", goal=_HELP_MS, better="lower"),
        compare("startup_enqueue", enqueue, bare, unit="ms", goal=None, better="lower", note=_imports(_ENQUEUE)),
        absolute("startup_enqueue_ms", enqueue, unit="ms", goal=_ENQUEUE_MS, better="lower"),
    ]


def _run(arguments: list[str]) -> float:
    """The milliseconds of the fastest of a few processes."""
    return min(_once(arguments) for _ in range(_TRIES))


def _once(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=_environment(), stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - started) * 1000


def _imports(arguments: list[str]) -> str:
    """What `python -X importtime` says: how many modules, how long, and the packages that take longest."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True)
    packages: dict[str, float] = {}
    lines = _LINE.findall(done.stderr)
    for microseconds, module in lines:
        package = module.partition(".")[0]
        packages[package] = packages.get(package, 0.0) + int(microseconds) / 1000
    longest = sorted(packages.items(), key=lambda one: -one[1])[:_SHOWN]
    text = f"{len(lines)} modules in {sum(packages.values()):.0f} ms; " + ", ".join(
        f"{n} {ms:.0f}" for n, ms in longest
    )
    console.print(f"  importtime of {arguments[-1]}: {text}", highlight=False)
    return text


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}
