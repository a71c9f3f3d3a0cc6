"""Commands that run things: `demo`, `up`, `sandbox`, `migrate`, `doctor`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from pipeline.cli.session import console, note, print_json
from pipeline.sandbox.__main__ import command as sandbox
from pipeline.sandbox.options import OptionsError, checked
from pipeline.settings import Rate, load_settings

__all__ = ["demo", "doctor", "migrate", "sandbox", "up"]


def _check_rate(_context: Any, _parameter: Any, value: str) -> str:
    try:
        return str(Rate.parse(value))
    except ValueError as error:
        raise click.BadParameter(f"{value}: {error}") from None


def _check_faults(_context: Any, _parameter: Any, value: str) -> str:
    try:
        checked({"faults": value})
    except OptionsError as error:
        raise click.BadParameter(str(error).removeprefix("faults: ")) from None
    return value


@click.command()
@click.option("--leads", default=300, show_default=True, type=click.IntRange(1, 100_000), help="Rows to hand in.")
@click.option("--rate", default="40/s", show_default=True, callback=_check_rate, help="The limit to keep to.")
@click.option(
    "--faults",
    default="mild",
    show_default=True,
    callback=_check_faults,
    help="The sandbox's faults: none, mild, wild or a list such as wild,stall=0.",
)
@click.option("--seed", default=7, show_default=True, type=int, help="Another seed is another day at Futwork.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--keep", is_flag=True, help="Keep the folder with ledger and logs, and say where it is.")
def demo(*, leads: int, rate: str, faults: str, seed: int, as_json: bool, keep: bool) -> None:
    """Watch leads travel from a file to a simulated Futwork and back as calls, on real parts (about 20 seconds).

    Everything runs in a temporary folder and has ended when the command returns, also on Ctrl-C. Exit 0 only if no
    lead was lost, nobody would have been called twice, and accepted is the sum over states.

    \b
    pipeline demo
    pipeline demo --leads 1000 --rate 200/s --faults wild --seed 42
    pipeline demo --json | jq .leads
    """
    from pipeline.cli.demo import DemoOptions, run_demo
    from pipeline.cli.demo.screen import Screen, print_report

    folder = Path(tempfile.mkdtemp(prefix="pipeline-demo-"))
    wanted = True
    try:
        report = run_demo(
            DemoOptions(leads=leads, rate=rate, faults=faults, seed=seed, folder=folder), Screen(quiet=as_json)
        )
        wanted = bool(report.problems)
    except KeyboardInterrupt:
        wanted = False
        raise
    finally:
        if keep or wanted:
            note(f"ledger and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json(report.as_json())
    else:
        print_report(report, console())
    sys.exit(1 if report.problems else 0)


@click.command()
@click.option("--sandbox", "with_sandbox", is_flag=True, help="Call nobody: run the simulator and send to it.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="The web server's port.")
@click.option("--faults", default="mild", show_default=True, callback=_check_faults, help="The sandbox's faults.")
@click.option("--flower", is_flag=True, help="Run Flower as well, on port 5555.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes of each worker.")
def up(*, with_sandbox: bool, port: int, faults: str, flower: bool, workers: int) -> None:
    """Run every part in this terminal until Ctrl-C; without BROKER_URL with a private broker, all under ./var.

    \b
    pipeline up --sandbox
    FUTWORK_API_KEY=… pipeline up
    """
    from pipeline.cli.up import run_up

    run_up(with_sandbox=with_sandbox, port=port, faults=faults, flower=flower, workers=workers)


@click.command()
@click.option("--to", "revision", default="head", show_default=True, help="A revision of the tables.")
def migrate(*, revision: str) -> None:
    """Bring the database's tables to this release; safe to run again, and from several hosts at once.

    \b
    pipeline migrate
    DATABASE_URL=postgresql://pipeline@db/pipeline pipeline migrate
    """
    from pipeline.ledger import Ledger

    ledger = Ledger(load_settings().database_url)
    try:
        before, after = ledger.migrate(revision)
        where = ledger.describe()
    finally:
        ledger.close()
    click.echo(f"{where}: at revision {after}" + (" already" if before == after else f", was {before or 'empty'}"))


@click.command()
@click.option(
    "--webhook-url", metavar="URL", default="", help="Where Futwork reaches the webhook [default: WEBHOOK_URL]."
)
@click.option("--check-key", is_flag=True, help="Ask Futwork about the key with a request that can create no call.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def doctor(*, webhook_url: str, check_key: bool, as_json: bool) -> None:
    """Check the whole installation; each line ok, warn or fail, with what to do.

    Settings and versions, broker, limit, ledger with its tables and indexes, clocks, workers by queue, beat, web,
    spool, disk, the way to Futwork. Nothing is changed and nothing is sent to Futwork. With a webhook URL it also looks
    whether that leads here, and leaves no event. --check-key sends Futwork an empty object for a campaign that cannot
    exist: an answer 401 or 403 proves that the key is wrong, any other only that it was not refused.

    \b
    pipeline doctor
    pipeline doctor --webhook-url https://leads.example.com/webhooks/futwork --check-key
    pipeline doctor --json | jq 'select(.verdict != "ok")'

    Exit: 0 nothing fails, 2 something does.
    """
    from pipeline.cli.doctor import examine

    signs = {"ok": "green", "warn": "yellow", "fail": "red"}
    worst = "ok"
    out = console()
    for finding in examine(webhook_url=webhook_url, check_key=check_key):
        worst = max(worst, finding.verdict, key=list(signs).index)
        if as_json:
            print_json({"check": finding.check, "verdict": finding.verdict, "text": finding.text})
        else:
            out.print(f"[{signs[finding.verdict]}]{finding.verdict:<4}[/] {finding.check:<11} ", end="")
            out.print(finding.text, markup=False)
    sys.exit(2 if worst == "fail" else 0)
