"""Commands that read: `status`, `leads`, `show`."""

from __future__ import annotations

import contextlib
import uuid
from datetime import datetime
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.session import (
    Refused,
    as_json,
    console,
    filter_options,
    not_empty,
    note,
    now,
    print_json,
    printable,
    read_phone,
    the_ledger,
)
from pipeline.domain.campaign import ADVICE, HoldKind
from pipeline.ledger import LeadFilter, Ledger
from pipeline.settings import Settings

POLICIES = ("rate", "on_uncertain", "uncertain_after_seconds", "max_attempts", "lead_max_age_seconds")
STATE_COLOURS = {"called": "green", "submitted": "cyan", "uncertain": "yellow", "rejected": "red", "exhausted": "red"}
_SPEAKERS = {"agent": "bold cyan", "lead": "bold green"}


@click.command()
@as_json
def status(*, as_json: bool) -> None:
    """How the pipeline stands: leads by state, campaigns, calls, events, and what waits in this host's spool.

    \b
    pipeline status
    pipeline status --json | jq .leads.uncertain
    """
    with the_ledger() as (ledger, settings):
        report = ledger.reports.status(now=now())
    report["spool"] = _spool(settings)
    if as_json:
        print_json(report)
        return
    show_status(report, console())
    show_spool(report["spool"], settings, console())


def _spool(settings: Settings) -> dict[str, int] | None:
    """What waits in the spool that this host's processes share; None where it may not be read."""
    from pipeline.broker import Spool

    spool = Spool(settings.spool_dir, max_bytes=settings.spool_max_bytes)
    try:
        files, size = spool.size()
        return {"files": files, "bytes": size, "damaged": spool.damaged()}
    except OSError:
        return None


def show_spool(spool: dict[str, int] | None, settings: Settings, out: Console) -> None:
    """Print what waits in the spool, if there is anything to say."""
    if spool is None:
        out.print(Text(f"spool: {settings.spool_dir} may not be read by you", style="yellow"))
    elif spool["files"] or spool["damaged"]:
        told = f"spool: {spool['files']:,} files with {spool['bytes']:,} bytes wait for the broker"
        damaged = f"; {spool['damaged']:,} damaged ones want a person" if spool["damaged"] else ""
        out.print(Text(f"{told} in {settings.spool_dir}{damaged}", style="yellow"))


@click.command()
@filter_options
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="At most so many.")
@as_json
def leads(*, which: LeadFilter, limit: int, as_json: bool) -> None:
    """List leads, newest first.

    \b
    pipeline leads --state uncertain
    pipeline leads --campaign 68ecc86fd9fbecbe9431a18e --state rejected --limit 500 --json
    """
    with the_ledger() as (ledger, _):
        found = ledger.reports.leads(which, limit=limit)
    if as_json:
        for one in found:
            print_json(one)
        return
    if not found:
        note("no lead matches")
        return
    table = Table(box=None, padding=(0, 1))
    for name in ("id", "state", "phone", "campaign", "attempts", "accepted"):
        table.add_column(name, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for one in found:
        table.add_row(
            one["id"],
            Text(one["state"], style=STATE_COLOURS.get(one["state"], "")),
            one["phone"],
            one["campaign_id"],
            str(one["attempts"]),
            time_of(one["accepted_at"]),
            Text(one_line(one["reason"] or "")[:120]),
        )
    console().print(table)


@click.command()
@click.argument("lead", callback=not_empty)
@click.option("--campaign", callback=not_empty, help="The campaign, if leads of several fit.")
@as_json
def show(lead: str, *, campaign: str | None, as_json: bool) -> None:
    """One lead's whole story: accepted, every attempt, every event, the call with its transcript.

    LEAD is an id, a phone number in any spelling, or your key.

    \b
    pipeline show 9999789877
    pipeline show 1c1d3a36-0a2f-5c0e-9b0e-6f6a3d9b1c11 --json
    """
    with the_ledger() as (ledger, _):
        stories = _find(ledger, lead, campaign)
    if not stories:
        raise Refused(f"no lead has the id, number or key {printable(lead)!r}")
    for place, story in enumerate(stories):
        if as_json:
            print_json(story)
        else:
            if place:
                click.echo()
            show_story(story, console())


def _find(ledger: Ledger, text: str, campaign: str | None) -> list[dict[str, Any]]:
    """The stories that the text may mean; an id has the form of one, and so may a key."""
    filters = [LeadFilter(key=text, campaign=campaign)]
    with contextlib.suppress(ValueError):
        filters.append(LeadFilter(ids=(uuid.UUID(text),), campaign=campaign))
    with contextlib.suppress(click.BadParameter):
        filters.append(LeadFilter(phone=read_phone(text), campaign=campaign))
    found: dict[str, dict[str, Any]] = {}
    for which in filters:
        for story in ledger.reports.stories(which, limit=20):
            found.setdefault(story["id"], story)
    return list(found.values())


def show_status(report: dict[str, Any], out: Console) -> None:
    """Print a status report for a person."""
    total = sum(report["leads"].values())
    verdict = "= sum over states" if total == report["accepted"] else f"BUT the states add up to {total:,}"
    out.print(f"[bold]{report['accepted']:,}[/] leads accepted ({verdict})")
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for state, count in report["leads"].items():
        style = STATE_COLOURS.get(state, "") if count else "dim"
        table.add_row(Text(state, style=style), Text(f"{count:,}", style=style))
    out.print(table)
    for campaign in report["campaigns"]:
        show_campaign(campaign, out)
    outcomes = ", ".join(f"{name} {n:,}" for name, n in report["calls"].items() if name != "total" and n) or "none yet"
    out.print(f"calls: {report['calls']['total']:,} ({outcomes})")
    events = report["events"]
    out.print(
        f"events: {events['raw']:,} stored, {events['quarantined']:,} in quarantine; calls without a lead:"
        f" {events['orphans']:,}"
    )
    if report["oldest_due_seconds"]:
        out.print(f"the oldest due lead waits {report['oldest_due_seconds']:,.0f} s")
    if report["oldest_uncertain_seconds"]:
        age = report["oldest_uncertain_seconds"]
        out.print(f"[yellow]the oldest uncertain lead is so for {age:,.0f} s: see `pipeline resolve --help`[/]")


def show_campaign(campaign: dict[str, Any], out: Console, *, policies: bool = False) -> None:
    """Print a campaign's line, with the reason and the next probe if it is stopped, and with its policies if asked."""
    counts = {state: n for state, n in campaign["leads"].items() if n}
    listed = ", ".join(f"{state} {n:,}" for state, n in counts.items()) or "no leads"
    colour = {"active": "green", "held": "red"}.get(campaign["state"], "yellow")
    out.print(f"campaign {campaign['id']}: [{colour}]{campaign['state']}[/] ({listed})")
    if campaign["reason"]:
        out.print(Text(f"  {campaign['hold_kind'] or 'paused'}: {one_line(campaign['reason'])}"))
    if campaign["hold_kind"]:
        out.print(Text(f"  what to do: {ADVICE[HoldKind(campaign['hold_kind'])][1]}"))
    if campaign["probe_at"]:
        if campaign["leads"]["queued"] or campaign["leads"]["sending"]:
            when = f"next probe at {time_of(campaign['probe_at'])}; `pipeline campaign resume` does not wait for it"
        else:
            when = "no lead waits, so nothing probes it; `pipeline campaign resume` ends the hold"
        out.print(f"  {when}")
    if policies:
        own = ", ".join(f"{name} {campaign[name]}" for name in POLICIES if campaign[name] is not None)
        out.print(Text(f"  account {campaign['account']}; {own or 'every policy as in the settings'}"))


def show_story(story: dict[str, Any], out: Console) -> None:
    """Print a lead's journey in order: the numbers of the call's turns are those of its transcript."""
    out.print(f"[bold]lead {story['id']}[/]")
    out.print(Text(f"  {story['phone']}, campaign {story['campaign_id']}, key {one_line(story['key'])}"))
    out.print(Text(f"  {one_line(orjson.dumps(story['data']).decode())}", style="dim"))
    steps: list[tuple[datetime, Text]] = [(story["accepted_at"], Text("accepted"))]
    for attempt in story["attempts_made"]:
        code = f" (HTTP {attempt['http_status']})" if attempt["http_status"] else ""
        text = Text(f"POST: {attempt['outcome']}{code} in {attempt['duration_ms']} ms")
        text.stylize("green" if attempt["outcome"] == "accepted" else "yellow", 6, 6 + len(attempt["outcome"]))
        if attempt["excerpt"]:
            text.append(f": {one_line(attempt['excerpt'])}", style="dim")
        steps.append((attempt["started_at"], text))
    several = len(story["calls"]) > 1
    for event in story["events"]:
        whose = f" (call {event['call_sid']})" if several else ""
        steps.append((event["received_at"], Text(f"event: {one_line(event['status'] or 'without a status')}{whose}")))
    journey = Table.grid(padding=(0, 2))
    journey.add_column(no_wrap=True, style="dim")
    journey.add_column(overflow="fold")
    for moment, text in sorted(steps, key=lambda step: step[0]):
        journey.add_row(f"  {time_of(moment)}", text)
    out.print(journey)
    for call in story["calls"]:
        _show_call(call, out)
    ending = f": {one_line(story['reason'])}" if story["reason"] else ""
    out.print(Text(f"  now {story['state']}{ending} (since {time_of(story['changed_at'])})", style="bold"))


def _show_call(call: dict[str, Any], out: Console) -> None:
    seconds = "" if call["duration_seconds"] is None else f", {call['duration_seconds']:g} s"
    label = f", {one_line(call['disposition'])}" if call["disposition"] else ""
    out.print(
        Text(f"  call {one_line(call['call_sid'])}: {call['outcome']}{seconds}{label} (found by {call['linked_by']})")
    )
    details = call["details"]
    if details.get("summary"):
        out.print(Text(f"    summary: {one_line(details['summary'])}"))
    if call["callback_at"]:
        out.print(f"    asked to be called at {time_of(call['callback_at'])}")
    turns = Table.grid(padding=(0, 2))
    turns.add_column(justify="right", no_wrap=True, min_width=10)
    turns.add_column(overflow="fold")
    for turn in details.get("turns", []):
        speaker = Text(one_line(turn["speaker"])[:20], style=_SPEAKERS.get(turn["speaker"], "bold"))
        turns.add_row(speaker, Text(printable(turn["text"])))
    if turns.row_count:
        out.print(turns)


def time_of(moment: datetime) -> str:
    """A time as people read it, to the millisecond, in UTC."""
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"


def one_line(text: object) -> str:
    """A stranger's text on one line."""
    return " ".join(printable(text).split())
