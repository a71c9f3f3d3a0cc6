"""`ops-user`: users of the status pages."""

from __future__ import annotations

import re
import secrets
import sys

import click

from pipeline.cli.session import Refused, note
from pipeline.settings import SettingsError, load_settings

_SHORTEST = 10  # characters of a password


@click.command("ops-user")
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator"]), default="viewer", show_default=True)
def ops_user(name: str, *, role: str) -> None:
    """Make an entry of OPS_USERS for a user of the status pages under /ops.

    Asks for the password, or reads it from the first line of stdin. A viewer sees everything with phone numbers masked;
    an operator sees the numbers and may change things. Put the lines that it prints into .env, and restart the web
    process.

    \b
    pipeline ops-user asha --role operator
    openssl rand -hex 12 | tee /dev/stderr | pipeline ops-user kiran
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
        raise click.BadParameter(f"{name!r} must be 1 to 64 letters, digits, and . _ @ -", param_hint="NAME")
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if len(password) < _SHORTEST:
        raise Refused(f"a password must have at least {_SHORTEST} characters")
    from pipeline.web.ops.access import hash_password

    entry = f"{name}:{hash_password(password)}" + (":operator" if role == "operator" else "")
    known, secret = _known()
    others = [one for one in known if one.partition(":")[0] != name]
    click.echo(f"OPS_USERS={','.join([*others, entry])}")
    if not secret:
        click.echo(f"OPS_SECRET={secrets.token_hex(24)}")
    kept = f", with the {len(others)} existing ones" if others else ""
    note(f"an entry for {name} as {role}{kept}: replace the line in .env, and restart web")


def _known() -> tuple[list[str], str]:
    """The present entries and secret; none if the settings cannot be read."""
    try:
        settings = load_settings()
    except SettingsError:
        return [], ""
    entries = [part.strip() for part in settings.ops_users.get_secret_value().split(",") if part.strip()]
    return entries, settings.ops_secret.get_secret_value()
