"""Commands that read: `status`, `leads`, `show`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

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
    settings_beside_up,
    the_ledger,
    watching,
)
from pipeline.domain.campaign import ADVICE, HoldKind
from pipeline.ledger import LeadFilter
from pipeline.status.journey import journey
from pipeline.status.policies import POLICIES
from pipeline.status.search import find_leads
from pipeline.status.text import span, unclear

if TYPE_CHECKING:
    from pipeline.status.attention import Attention

STATE_COLOURS = {"called": "green", "submitted": "cyan", "uncertain": "yellow", "rejected": "red", "exhausted": "red"}
_STEPS = {"good": "green", "trouble": "yellow", "person": "cyan"}
_SPEAKERS = {"agent": "bold cyan", "lead": "bold green"}


@click.command()
@as_json
def status(*, as_json: bool) -> None:
    """The state of the pipeline: leads by state, campaigns, calls, events, this host's spool, and what needs attention.

    Every lead is counted again, which takes a while among millions; `pipeline top` is faster.

    \b
    pipeline status
    pipeline status --json | jq .leads.uncertain
    """
    from pipeline.status.attention import attention, of_ledger

    settings = settings_beside_up()
    with the_ledger() as (ledger, _):
        report = ledger.reports.status(now=now())
    with watching(settings) as watch:
        seen = watch.look()
    items = attention(seen, settings) if settings.broker_url else list(of_ledger(seen.ledger.get()))
    report["spool"] = asdict(seen.spool) if seen.spool else None
    report["attention"] = [asdict(one) for one in items]
    if as_json:
        print_json(report)
        return
    out = console()
    show_status(report, out)
    if seen.spool is None:
        out.print(Text(f"spool: you may not read {settings.spool_dir}", style="yellow"))
    for one in attention_lines(items):
        out.print(one)


def attention_lines(items: Sequence[Attention]) -> list[Text]:
    """What needs attention, a line each, with the command that shows more."""
    lines = []
    for one in items:
        line = Text(no_wrap=True, overflow="ellipsis").append(f"{one.command}  ", style="dim")
        colour = {"stopped": "red", "check": "yellow"}.get(one.level, "")
        lines.append(line.append(one_line(one.line), style=colour))
    return lines


@click.command()
@filter_options
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="The most leads to list.")
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
@click.option("--campaign", callback=not_empty, help="Only leads of this campaign.")
@as_json
def show(lead: str, *, campaign: str | None, as_json: bool) -> None:
    """One lead's whole story: accepted, every POST, every event, what operators did, the call with its transcript.

    LEAD is an id or a phone number in any spelling, your key, Futwork's lead id, or a call's callSid.

    \b
    pipeline show 9999789877
    pipeline show 1c1d3a36-0a2f-5c0e-9b0e-6f6a3d9b1c11 --json
    """
    with the_ledger() as (ledger, settings):
        found = find_leads(ledger, lead, region=settings.default_region, campaign=campaign, limit=20)
        stories = [story for one in found if (story := ledger.reports.story(uuid.UUID(one["id"])))]
    if not stories:
        raise Refused(f"no lead found for {printable(lead)!r}: give an id, a phone number, a key or a call's callSid")
    for place, story in enumerate(stories):
        if as_json:
            print_json(story)
        else:
            if place:
                click.echo()
            show_story(story, console())


def show_status(report: dict[str, Any], out: Console) -> None:
    """Print a status report."""
    total = sum(report["leads"].values())
    matches = total == report["accepted"]
    verdict = "matches the states below" if matches else f"but the states below contain {total:,}"
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
    if report["unclear_answers"]:
        out.print(f"answers that proved nothing: {'; '.join(map(unclear, report['unclear_answers']))}")
    if report["oldest_due_seconds"]:
        out.print(f"the oldest due lead has waited for {span(report['oldest_due_seconds'])}")


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
            when = "no lead waits, so there is no probe; `pipeline campaign resume` ends the hold"
        out.print(f"  {when}")
    if policies:
        named = [name for name in POLICIES if name != "account" and campaign[name] is not None]
        own = ", ".join(f"{name} {campaign[name]}" for name in named)
        out.print(Text(f"  account {campaign['account']}; {own or 'every policy as in the settings'}"))


def show_story(story: dict[str, Any], out: Console) -> None:
    """Print a lead's journey in order, then its calls with their transcripts."""
    out.print(f"[bold]lead {story['id']}[/]")
    out.print(Text(f"  {story['phone']}, campaign {story['campaign_id']}, key {one_line(story['key'])}"))
    out.print(Text(f"  {one_line(orjson.dumps(story['data']).decode())}", style="dim"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for step in journey(story):
        text = Text(one_line(step.title), style=_STEPS.get(step.kind, ""))
        text.append(f" ({one_line(step.text)})" if step.text else "")
        text.append(f": {one_line(step.quote)}" if step.quote else "", style="dim")
        table.add_row(f"  {time_of(step.at)}", text)
    out.print(table)
    for call in story["calls"]:
        _show_call(call, out)
    ending = f": {one_line(story['reason'])}" if story["reason"] else ""
    out.print(Text(f"  now {story['state']}{ending} (since {time_of(story['changed_at'])})", style="bold"))


def _show_call(call: dict[str, Any], out: Console) -> None:
    seconds = "" if call["duration_seconds"] is None else f", {call['duration_seconds']:g} s"
    label = f", {one_line(call['disposition'])}" if call["disposition"] else ""
    out.print(
        Text(f"  call {one_line(call['call_sid'])}: {call['outcome']}{seconds}{label} (matched by {call['linked_by']})")
    )
    details = call["details"]
    if details.get("summary"):
        out.print(Text(f"    summary: {one_line(details['summary'])}"))
    if call["callback_at"]:
        out.print(f"    callback requested for {time_of(call['callback_at'])}")
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
    """Foreign text on one line."""
    return " ".join(printable(text).split())
