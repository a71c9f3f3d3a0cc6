"""`migrate`, `doctor`, `sandbox`, and the option `--faults` of the commands that start a sandbox."""

from __future__ import annotations

import sys
from typing import Any

import click

from pipeline.cli.session import console, print_json
from pipeline.sandbox.__main__ import command as sandbox
from pipeline.sandbox.options import OptionsError, checked
from pipeline.settings import load_settings

__all__ = ["doctor", "faults_option", "migrate", "sandbox"]


def _check_faults(_context: Any, _parameter: Any, value: str) -> str:
    try:
        checked({"faults": value})
    except OptionsError as error:
        raise click.BadParameter(str(error).removeprefix("faults: ")) from None
    return value


faults_option = click.option(
    "--faults",
    default="mild",
    show_default=True,
    callback=_check_faults,
    help="The sandbox's faults: none, mild, wild or a list such as wild,stall=0.",
)


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
    """Check the whole installation; each line is ok, warn or fail, and says what to do.

    Settings and versions, broker, limit, ledger with its tables and indexes, clocks, workers by queue, beat, web,
    spool, disk, the connection to Futwork. Nothing is changed and nothing is sent to Futwork. With a webhook URL it
    also checks that the URL leads to this installation, and leaves no event. --check-key sends Futwork an empty object
    for a campaign that cannot exist: an answer 401 or 403 proves that the key is wrong, any other only that the key was
    not refused.

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
