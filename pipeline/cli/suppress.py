"""The do-not-call list: `suppress add`, `suppress list`, `suppress remove`."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from pipeline.cli.queries import one_line, time_of
from pipeline.cli.rows import phone_of
from pipeline.cli.session import Refused, as_json, not_empty, note, now, operator, print_json, read_phone, the_ledger
from pipeline.domain.campaign import check_campaign_id
from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.status.actions import explained

_SHOWN = 20  # refused lines; all usually have the same fault as the first
_NUMBER = re.compile(r"[+(]?[0-9][0-9 ().+-]*")

_numbers = click.argument("numbers", nargs=-1, required=True, metavar="FILE|NUMBER…")
_campaign = click.option("--campaign", callback=not_empty, help="Only in this campaign; without it, in all of them.")
_dry_run = click.option("--dry-run", is_flag=True, help="Only count what would change.")


@click.group()
def suppress() -> None:
    """Do-not-call numbers: add, list and remove them.

    \b
    pipeline suppress add 9999789877 --reason "asked not to be called"
    pipeline suppress add dnd-registry.csv --reason "DND registry"
    """


@suppress.command()
@_numbers
@_campaign
@click.option("--reason", default="do not call", show_default=True, callback=not_empty, help="Why; kept with the lead.")
@_dry_run
@as_json
@explained("suppress add")
def add(numbers: Sequence[str], *, campaign: str | None, reason: str, dry_run: bool, as_json: bool) -> None:
    """Each FILE is a CSV with a phone column, or one number a line; - is stdin. Safe to repeat.

    \b
    pipeline suppress add 9999789877 9999789878 --campaign 68ecc86fd9fbecbe9431a18e
    pipeline suppress add dnd-registry.csv --reason "DND registry" --dry-run

    Exit: 0 every number was taken, 1 some of them, 2 none.
    """
    _check(campaign)
    found, refused = _read_all(numbers)
    entries = leads = 0
    with the_ledger() as (ledger, _):
        told = {"campaign": campaign, "reason": reason, "from": [source for source, _ in found]}
        noted = None if dry_run else ledger.audit.begin(operator(), "suppress add", details=told, now=now())
        for source, phones in found:
            done = ledger.suppressions.add(
                phones, campaign=campaign, reason=reason, source=source, now=now(), dry_run=dry_run
            )
            entries, leads = entries + done.entries, leads + done.leads
        if noted is not None:
            ledger.audit.end(noted, changed=entries)
    given = sum(len(phones) for _, phones in found)
    if as_json:
        print_json({"numbers": given, "added": entries, "leads": leads, "refused": refused, "dry_run": dry_run})
    else:
        would = "would be " if dry_run else ""
        click.echo(f"{entries:,} of {given:,} numbers {would}added; {leads:,} queued leads {would}suppressed")
    sys.exit(0 if not refused else 1 if given else 2)


@suppress.command("list")
@click.option("--campaign", callback=not_empty, help="What applies to this campaign, including what applies to all.")
@click.option("--phone", callback=not_empty, help="The entries of this number, in any spelling.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000_000), help="At most so many.")
@as_json
def list_(*, campaign: str | None, phone: str | None, limit: int, as_json: bool) -> None:
    """List the numbers that are suppressed, newest first.

    \b
    pipeline suppress list --phone 9999789877
    pipeline suppress list --limit 1000000 --json > list.jsonl
    """
    _check(campaign)
    number = None if phone is None else read_phone(phone)
    with the_ledger() as (ledger, _):
        found = ledger.suppressions.listed(phone=number, campaign=campaign, limit=limit)
    for one in found:
        if as_json:
            print_json(one)
        else:
            where = one["campaign_id"] or "all campaigns"
            told = f"{one_line(one['reason'])} ({one_line(one['source'])})"
            click.echo(f"{time_of(one['since'])}  {one['phone']:<16} {where:<24}  {told}")
    if not found:
        note("no number is suppressed" if number is None and campaign is None else "no entry matches")


@suppress.command()
@_numbers
@_campaign
@_dry_run
@as_json
@explained("suppress remove")
def remove(numbers: Sequence[str], *, campaign: str | None, dry_run: bool, as_json: bool) -> None:
    """Without --campaign the entries for all campaigns are removed, and those for a single one stay.

    \b
    pipeline suppress remove 9999789877
    pipeline retry --phone 9999789877 --state suppressed

    Exit: 0 every number was read, 1 some of them, 2 none.
    """
    _check(campaign)
    found, refused = _read_all(numbers)
    phones = [phone for _, some in found for phone in some]
    with the_ledger() as (ledger, _):
        told = {"campaign": campaign, "from": [source for source, _ in found]}
        noted = None if dry_run else ledger.audit.begin(operator(), "suppress remove", details=told, now=now())
        removed = ledger.suppressions.remove(phones, campaign=campaign, dry_run=dry_run)
        if noted is not None:
            ledger.audit.end(noted, changed=removed)
    if as_json:
        print_json({"numbers": len(phones), "removed": removed, "refused": refused, "dry_run": dry_run})
    else:
        click.echo(f"{removed:,} of {len(phones):,} entries {'would be ' if dry_run else ''}removed")
    sys.exit(0 if not refused else 1 if phones else 2)


def _check(campaign: str | None) -> None:
    if campaign is not None:
        check_campaign_id(campaign)


def _read_all(arguments: Sequence[str]) -> tuple[list[tuple[str, list[str]]], int]:
    """The numbers in E.164 by their source, and how many lines hold none; the first of these are printed."""
    from pipeline.settings import load_settings

    region = load_settings().default_region
    found: list[tuple[str, list[str]]] = []
    refused = 0
    for argument in arguments:
        phones: list[str] = []
        typed = _NUMBER.fullmatch(argument) and not Path(argument).exists()
        name = "command line" if typed else "stdin" if argument == "-" else Path(argument).name
        for line, text in [(0, argument)] if typed else _lines(argument):
            try:
                phones.append(to_e164(text, region))
            except InvalidPhone as error:
                refused += 1
                if refused <= _SHOWN:
                    note(f"{name if line else argument}{f', line {line}' if line else ''}: {error}")
        found.append((name, phones))
    if refused > _SHOWN:
        note(f"and {refused - _SHOWN:,} more")
    return found, refused


def _lines(argument: str) -> Iterator[tuple[int, str]]:
    """The numbers of a file with their lines: its phone column, or without a header the first field of each line."""
    if argument == "-":
        yield from _fields(sys.stdin, "stdin")
        return
    try:
        with Path(argument).open(encoding="utf-8-sig", errors="replace", newline="") as file:
            yield from _fields(file, argument)
    except OSError as error:
        raise Refused(f"{argument} is no phone number, and no file that can be read: {error.strerror}") from None


def _fields(file: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
    reader = csv.reader(line.replace("\0", "\ufffd") for line in file)
    column, first = 0, True
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if first:
                first = False
                named = phone_of(fields)
                if named is not None:
                    column = fields.index(named)
                    continue
            yield reader.line_num, fields[column] if column < len(fields) else ""
    except csv.Error as error:
        raise Refused(f"{name}, line {reader.line_num}: not CSV: {error}") from None
