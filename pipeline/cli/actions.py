"""Commands that change: `campaign`, `retry`, `cancel`, `resolve`, `events`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from pipeline.cli.queries import one_line, show_campaign
from pipeline.cli.session import (
    Refused,
    as_json,
    console,
    filter_options,
    not_empty,
    note,
    operator,
    print_json,
    printable,
    the_ledger,
)
from pipeline.domain.campaign import check_campaign_id
from pipeline.ledger import LeadFilter
from pipeline.status.actions import ACTIONS, change_leads, changed_text, explained
from pipeline.status.policies import POLICIES, InvalidPolicy, read_policies
from pipeline.status.search import find_lead


@click.group()
def campaign() -> None:
    """Campaigns: list them, set their policies, pause and resume them.

    \b
    pipeline campaign list
    pipeline campaign pause 68ecc86fd9fbecbe9431a18e --reason "wrong script"
    """


@campaign.command("list")
@as_json
def list_(*, as_json: bool) -> None:
    """List every campaign with its state, leads and policies, and the reason if it is held.

    \b
    pipeline campaign list
    pipeline campaign list --json | jq 'select(.state == "held") | .reason'
    """
    with the_ledger() as (ledger, _):
        found = ledger.reports.status(now=ledger.now())["campaigns"]
    for one in found:
        if as_json:
            print_json(one)
        else:
            show_campaign(one, console(), policies=True)
    if not found and not as_json:
        note("no campaign yet: the first lead creates one, and so does `pipeline campaign set ID`")


def _policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each policy of a campaign."""
    for name, policy in reversed(POLICIES.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar="VALUE", help=policy.help)(command)
    return command


@campaign.command("set")
@click.argument("campaign_id")
@_policy_options
@as_json
@explained("campaign set")
def set_(campaign_id: str, *, as_json: bool, **policies: str | None) -> None:
    """The value `default` sets a policy back to the settings.

    \b
    pipeline campaign set 68ecc86fd9fbecbe9431a18e --rate 10/s --on-uncertain resend
    pipeline campaign set 68ecc86fd9fbecbe9431a18e --rate default
    """
    check_campaign_id(campaign_id)
    given = {name: value for name, value in policies.items() if value is not None}
    if not given:
        raise click.UsageError("name at least one policy to set, such as --rate 10/s")
    with the_ledger() as (ledger, settings):
        try:
            changes = read_policies(given, settings)
        except InvalidPolicy as error:
            raise click.BadParameter(str(error), param_hint=f"--{error.name.replace('_', '-')}") from None
        ledger.campaigns.change(campaign_id, changes, now=ledger.now(), by=operator())
        after = next(one for one in ledger.reports.campaigns() if one["id"] == campaign_id)
    if as_json:
        print_json(after)
        return
    shown = {name: "as in the settings" if after[name] is None else after[name] for name in given}
    click.echo(f"campaign {campaign_id}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))


@campaign.command()
@click.argument("campaign_id")
@click.option("--reason", default="paused by an operator", help="Why, for those who read it later.")
@explained("campaign pause")
def pause(campaign_id: str, *, reason: str) -> None:
    """
    \b
    pipeline campaign pause 68ecc86fd9fbecbe9431a18e --reason "wrong script"
    """
    _known(campaign_id)
    with the_ledger() as (ledger, _):
        changed = ledger.campaigns.pause(campaign_id, reason=reason, now=ledger.now(), by=operator())
    click.echo(f"campaign {campaign_id} {'is paused' if changed else 'was paused already'}")


@campaign.command()
@click.argument("campaign_id")
@explained("campaign resume")
def resume(campaign_id: str) -> None:
    """
    \b
    pipeline campaign resume 68ecc86fd9fbecbe9431a18e
    """
    _known(campaign_id)
    with the_ledger() as (ledger, _):
        changed = ledger.campaigns.resume(campaign_id, now=ledger.now(), by=operator())
    click.echo(f"campaign {campaign_id} {'is active' if changed else 'was active already'}")


def _known(campaign_id: str) -> None:
    check_campaign_id(campaign_id)
    with the_ledger() as (ledger, _):
        if ledger.campaigns.get(campaign_id) is None:
            raise Refused(f"no campaign {campaign_id}; see `pipeline campaign list`")


dry_run_option = click.option("--dry-run", is_flag=True, help="Only count what would change.")


@click.command()
@filter_options
@dry_run_option
@explained("retry")
def retry(*, which: LeadFilter, dry_run: bool) -> None:
    """
    \b
    pipeline retry --campaign 68ecc86fd9fbecbe9431a18e --state rejected --dry-run
    """
    _change("retry", which, dry_run=dry_run)


@click.command()
@filter_options
@dry_run_option
@explained("cancel")
def cancel(*, which: LeadFilter, dry_run: bool) -> None:
    """
    \b
    pipeline cancel --campaign 68ecc86fd9fbecbe9431a18e --dry-run
    pipeline cancel --phone 9999789877
    """
    _change("cancel", which, dry_run=dry_run)


def _verdict_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for each way to resolve uncertain leads."""
    for name in ("resolve:drop", "resolve:resend", "resolve:sent"):
        flag, about = name.partition(":")[2], f"{ACTIONS[name].summary} {ACTIONS[name].note}".strip()
        command = click.option(f"--{flag}", "action", flag_value=name, help=about)(command)
    return command


@click.command()
@filter_options
@_verdict_options
@dry_run_option
def resolve(*, which: LeadFilter, action: str | None, dry_run: bool) -> None:
    """Settle uncertain leads by hand: those whose POST got no answer and for which no call came back.

    Look for them in Futwork's console first.

    \b
    pipeline resolve --campaign 68ecc86fd9fbecbe9431a18e --unchanged-for 7200 --resend --dry-run
    pipeline resolve --phone 9999789877 --sent
    """
    if action is None:
        raise click.UsageError("say what became of them: --sent, --resend or --drop")
    _change(action, which, dry_run=dry_run)


def _change(name: str, which: LeadFilter, *, dry_run: bool) -> None:
    with the_ledger() as (ledger, settings):
        now, by = ledger.now(), operator()
        changed = change_leads(ledger, settings, name, which, now=now, by=by, dry_run=dry_run)
    click.echo(changed_text(name, changed, dry_run=dry_run))


@click.group()
def events() -> None:
    """Messages in quarantine, and calls without a lead: list them, replay them after a fix, link them.

    \b
    pipeline events list
    pipeline events orphans
    pipeline events replay
    """


@events.command("list")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000))
@as_json
def list_events(*, limit: int, as_json: bool) -> None:
    """List what is in quarantine, newest first, with the reason.

    \b
    pipeline events list --limit 5
    pipeline events list --json | jq -r .body
    """
    with the_ledger() as (ledger, _):
        found = ledger.quarantine.waiting(limit=limit)
    for one in found:
        if as_json:
            print_json(asdict(one) | {"body": one.body.decode("utf-8", "replace")})
        else:
            click.echo(f"{one.received_at:%Y-%m-%d %H:%M:%S}Z  {one.kind:8} {one.digest[:12]}  {one_line(one.reason)}")
    if not found:
        note("the quarantine is empty")


@events.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000))
@as_json
def orphans(*, limit: int, as_json: bool) -> None:
    """List the calls without a lead, newest first; they are checked again every 15 seconds.

    \b
    pipeline events orphans --limit 5
    pipeline events orphans --json | jq -r .call_sid
    """
    with the_ledger() as (ledger, _):
        found = ledger.reports.orphans(limit=limit)
    for one in found:
        if as_json:
            print_json(one)
        else:
            what = [one["phone"] or "no number", one["campaign_id"] or "no campaign", one["status"]]
            shown = "  ".join(one_line(text) for text in (*what, one["call_sid"]))
            click.echo(f"{one['last_event_at']:%Y-%m-%d %H:%M:%S}Z  {shown}")
    if not found:
        note("every call has a lead")


@events.command()
@as_json
@explained("events replay")
def replay(*, as_json: bool) -> None:
    """A row that is not a valid lead stays until its producer sends a better one; a message on our queues that is not
    a task of ours is not tried.

    \b
    pipeline events replay

    Exit: 0 everything was read, 1 something stays in quarantine.
    """
    from pipeline.replay import replay_all

    with the_ledger() as (ledger, settings):
        done = replay_all(ledger, settings, by=operator())
    if as_json:
        print_json(asdict(done))
    else:
        click.echo("\n".join(done.texts()))
    sys.exit(1 if done.kept else 0)


@events.command()
@click.argument("call_sid", callback=not_empty)
@click.argument("lead", callback=not_empty)
@explained("events link")
def link(call_sid: str, lead: str) -> None:
    """LEAD is whatever one lead alone has: an id, a phone number, your key, or Futwork's lead id.

    \b
    pipeline events orphans
    pipeline events link 8a1f4c0d 9999789877
    """
    with the_ledger() as (ledger, settings):
        found = find_lead(ledger, lead, region=settings.default_region)
        if found is None:
            raise Refused(f"{printable(lead)!r} is not one lead: see `pipeline show`")
        if not ledger.calls.link(call_sid, found, now=ledger.now(), by=operator()):
            raise Refused(f"there is no call {printable(call_sid)!r} without a lead: see `pipeline events orphans`")
    click.echo(f"call {printable(call_sid)} is linked to lead {found}")
