"""Commands that change: `campaign`, `retry`, `cancel`, `resolve`, `events`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import click

from pipeline.cli.queries import one_line, show_campaign
from pipeline.cli.session import Refused, as_json, console, filter_options, note, operator, print_json, the_ledger
from pipeline.domain.campaign import check_campaign_id
from pipeline.ledger import LeadFilter
from pipeline.settings import Rate

_DEFAULT = "default"
_TEN_YEARS_SECONDS = 10 * 365 * 24 * 3600  # the bound of the settings, too


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
    """List every campaign with its state, its leads and its policies; one that is held says why.

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
        note("no campaign yet: the first lead creates one, or `pipeline campaign set ID`")


def _rate(_context: Any, _parameter: Any, value: str | None) -> Any:
    if value is None or value == _DEFAULT:
        return value
    try:
        return Rate.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"{value}: {error}") from None


def _number(kind: Callable[[str], float], most: int) -> Callable[[Any, Any, str | None], Any]:
    def read(_context: Any, _parameter: Any, value: str | None) -> Any:
        if value is None or value == _DEFAULT:
            return value
        try:
            number = kind(value)
        except ValueError:
            raise click.BadParameter(f"{value} is not a number, nor `{_DEFAULT}`") from None
        if not 0 < number <= most:  # false for NaN as well
            raise click.BadParameter(f"{value} is not above 0 and at most {most:,}")
        return number

    return read


@campaign.command("set")
@click.argument("campaign_id")
@click.option("--rate", callback=_rate, help="Submissions allowed, such as 20/s or 600/m.")
@click.option("--account", help="The Futwork account whose key it uses (FUTWORK_API_KEYS).")
@click.option("--on-uncertain", type=click.Choice(["hold", "resend", "drop", _DEFAULT]), help="What ends uncertainty.")
@click.option(
    "--uncertain-after-seconds", callback=_number(float, _TEN_YEARS_SECONDS), help="How long evidence is waited for."
)
@click.option("--max-attempts", callback=_number(int, 1_000_000), help="POSTs that a lead may cost.")
@click.option(
    "--lead-max-age-seconds",
    callback=_number(int, _TEN_YEARS_SECONDS),
    help="How old a lead may grow before it is sent.",
)
@as_json
def set_(campaign_id: str, *, as_json: bool, **policies: Any) -> None:
    """Set a campaign's policies; `default` sets one back to the environment's.

    \b
    pipeline campaign set 68ecc86fd9fbecbe9431a18e --rate 10/s --on-uncertain resend
    pipeline campaign set 68ecc86fd9fbecbe9431a18e --rate default
    """
    check_campaign_id(campaign_id)
    given = {name: value for name, value in policies.items() if value is not None}
    if not given:
        raise click.UsageError("name at least one policy to set, such as --rate 10/s")
    changes = {name: None if value == _DEFAULT else value for name, value in given.items()}
    if changes.get("account", "") is None:
        changes["account"] = _DEFAULT
    with the_ledger() as (ledger, settings):
        account = changes.get("account")
        if account is not None and account not in settings.api_keys():
            raise click.BadParameter(f"no key is configured for {account!r} (FUTWORK_API_KEYS)", param_hint="--account")
        ledger.campaigns.change(campaign_id, changes, now=ledger.now(), by=operator())
        after = next(one for one in ledger.reports.campaigns() if one["id"] == campaign_id)
    if as_json:
        print_json(after)
        return
    shown = {name: "as in the settings" if after[name] is None else after[name] for name in given}
    click.echo(f"campaign {campaign_id}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))


@campaign.command()
@click.argument("campaign_id")
@click.option("--reason", default="paused by an operator", help="Why, for those who look later.")
def pause(campaign_id: str, *, reason: str) -> None:
    """Stop a campaign until `resume`; what is out at this moment still comes back.

    \b
    pipeline campaign pause 68ecc86fd9fbecbe9431a18e --reason "wrong script"
    """
    _known(campaign_id)
    with the_ledger() as (ledger, _):
        changed = ledger.campaigns.pause(campaign_id, reason=reason, now=ledger.now(), by=operator())
    click.echo(f"campaign {campaign_id} {'is paused' if changed else 'was paused already'}")


@campaign.command()
@click.argument("campaign_id")
def resume(campaign_id: str) -> None:
    """Make a paused or held campaign active again, without waiting for a probe.

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
def retry(*, which: LeadFilter, dry_run: bool) -> None:
    """Queue rejected, exhausted, expired, cancelled or suppressed leads again, with fresh attempts.

    Uncertain leads are not touched: see `pipeline resolve`. Nor is a lead whose number is on the do-not-call list.

    \b
    pipeline retry --campaign 68ecc86fd9fbecbe9431a18e --state rejected --dry-run
    """
    with the_ledger() as (ledger, settings):
        age = timedelta(seconds=settings.lead_max_age_seconds)
        changed = ledger.interventions.retry(which, max_age=age, now=ledger.now(), dry_run=dry_run, by=operator())
    _told(changed, "queued again", dry_run=dry_run)


@click.command()
@filter_options
@dry_run_option
def cancel(*, which: LeadFilter, dry_run: bool) -> None:
    """Take queued leads out; leads that are being sent or were sent are not touched.

    \b
    pipeline cancel --campaign 68ecc86fd9fbecbe9431a18e --dry-run
    pipeline cancel --phone 9999789877
    """
    with the_ledger() as (ledger, _):
        changed = ledger.interventions.cancel(which, now=ledger.now(), dry_run=dry_run, by=operator())
    _told(changed, "cancelled", dry_run=dry_run)


@click.command()
@filter_options
@click.option("--sent", "verdict", flag_value="sent", help="Futwork has them (seen in its console): submitted.")
@click.option("--resend", "verdict", flag_value="resend", help="Futwork does not have them: send again.")
@click.option("--drop", "verdict", flag_value="drop", help="Give them up: cancelled.")
@dry_run_option
def resolve(*, which: LeadFilter, verdict: str | None, dry_run: bool) -> None:
    """Settle uncertain leads by hand: those whose POST got no answer and for which no call came back.

    --resend calls a person twice if Futwork had the lead after all: look into its console first.

    \b
    pipeline resolve --campaign 68ecc86fd9fbecbe9431a18e --unchanged-for 7200 --resend --dry-run
    pipeline resolve --phone 9999789877 --sent
    """
    if verdict is None:
        raise click.UsageError("say what became of them: --sent, --resend or --drop")
    with the_ledger() as (ledger, settings):
        age = timedelta(seconds=settings.lead_max_age_seconds)
        changed = ledger.interventions.resolve(
            which, verdict, max_age=age, now=ledger.now(), dry_run=dry_run, by=operator()
        )
    _told(changed, {"sent": "submitted", "resend": "queued again", "drop": "cancelled"}[verdict], dry_run=dry_run)


def _told(changed: int, what: str, *, dry_run: bool) -> None:
    click.echo(f"{changed:,} {'lead' if changed == 1 else 'leads'} {'would be ' if dry_run else ''}{what}")


@click.group()
def events() -> None:
    """Post-call events that could not be read, or that fit no lead: look at them, replay them after a fix.

    \b
    pipeline events list
    pipeline events orphans
    pipeline events replay
    """


@events.command("list")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000))
@as_json
def list_events(*, limit: int, as_json: bool) -> None:
    """List what waits in quarantine, newest first, with the reason.

    \b
    pipeline events list --limit 5
    pipeline events list --json | jq -r .body
    """
    with the_ledger() as (ledger, _):
        found = ledger.quarantine.waiting(limit=limit)
    for one in found:
        if as_json:
            print_json(
                {
                    "digest": one.digest,
                    "kind": one.kind,
                    "reason": one.reason,
                    "received_at": one.received_at,
                    "body": one.body.decode("utf-8", "replace"),
                }
            )
        else:
            click.echo(f"{one.received_at:%Y-%m-%d %H:%M:%S}Z  {one.kind:8} {one.digest[:12]}  {one_line(one.reason)}")
    if not found:
        note("the quarantine is empty")


@events.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000))
@as_json
def orphans(*, limit: int, as_json: bool) -> None:
    """List the calls that no lead was found for, newest first; the worker looks again until one fits.

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
        note("every call has its lead")


@events.command()
@as_json
def replay(*, as_json: bool) -> None:
    """Try everything in quarantine again, such as after a fix: events, rows of leads, messages. Safe to repeat.

    What can be read now is taken in and leaves the quarantine. A row that is no lead stays until its producer sends a
    better one; something on our queues that is no task of ours is not tried.

    \b
    pipeline events replay

    Exit: 0 all were read, 1 some still cannot be.
    """
    from pipeline.cli.replay import replay_all

    with the_ledger() as (ledger, settings):
        done = replay_all(ledger, settings, by=operator())
    if as_json:
        print_json(asdict(done))
    else:
        read = done.events - done.quarantined
        click.echo(f"{read:,} of {done.events:,} events read; {done.quarantined:,} stay in quarantine")
        for what, tried, kept in (
            ("rows", done.rows, done.rows_kept),
            ("messages", done.messages, done.messages_kept),
        ):
            if tried:
                click.echo(f"{tried - kept:,} of {tried:,} {what} taken in; {kept:,} stay in quarantine")
    sys.exit(1 if done.kept else 0)
