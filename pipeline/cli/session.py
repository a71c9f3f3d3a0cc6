"""What every command needs: settings with the embedded default, the ledger, the filter options, and plain output."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from pipeline.devstack.embedded_valkey import NoEmbeddedBroker, embedded_broker, running_broker, stop_broker
from pipeline.domain.lead import LeadState
from pipeline.domain.phone import InvalidPhone, to_e164
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.ledger import Actor, Ledger
    from pipeline.status.snapshot import Watch

VAR = Path("var")
"""Where development commands keep their private broker and ledger."""

_STATEMENT_SECONDS = 5.0  # after which a statement for a snapshot is given up
_OWNER_SECONDS = 15.0  # longer than a private broker takes to start, or to end
_BLANKS_AT_END = re.compile(r" +\n")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Refused(click.ClickException):
    """The command cannot do what it was asked; the message is one line that says why."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the line as `main` does."""
        click.echo(f"pipeline: {self.format_message()}", file=file, err=file is None)


@contextlib.contextmanager
def settings_with_broker() -> Iterator[Settings]:
    """The settings; without `BROKER_URL`, those of the private broker under ./var."""
    settings = load_settings()
    if settings.broker_url:
        yield settings
        return
    with private_broker() as url:
        note("note: BROKER_URL is not set: leads go to the private broker under ./var")
        yield load_settings(broker_url=url)


def settings_beside_up() -> Settings:
    """The settings; without `BROKER_URL`, those of the private broker under ./var if one runs. Starts nothing."""
    settings = load_settings()
    url = None if settings.broker_url else running_broker(VAR / "valkey")
    return load_settings(broker_url=url) if url else settings


@contextlib.contextmanager
def private_broker(*, alone: bool = False) -> Iterator[str]:
    """The URL of the private broker under ./var: the one that runs, or one that ends with this block.

    Two servers over one folder would damage each other's file, so the process that starts one holds a lock. With
    *alone* it is an error if another command runs it, because the broker would end with that command.
    """
    folder = VAR / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _OWNER_SECONDS
    with (folder / "owner.lock").open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if alone:
                    raise Refused(
                        f"another pipeline command runs the private broker in {folder.resolve()}: stop it first,"
                        " or wait until it has ended"
                    ) from None
                url = running_broker(folder)
            else:
                with _own_broker(folder) as url:
                    yield url
                return
            if url is not None:
                yield url
                return
            if time.monotonic() > deadline:
                raise NoEmbeddedBroker(f"another command holds {folder}/owner.lock, and its broker does not answer")
            time.sleep(0.05)


@contextlib.contextmanager
def _own_broker(folder: Path) -> Iterator[str]:
    """The broker of the process that holds the lock. One that runs already outlived a killed command, and is used."""
    orphan = running_broker(folder)
    if orphan is None:
        with embedded_broker(folder) as url:
            yield url
        return
    try:
        yield orphan
    finally:
        stop_broker(orphan)


@contextlib.contextmanager
def the_ledger() -> Iterator[tuple[Ledger, Settings]]:
    """The ledger of the settings, its tables checked."""
    settings = load_settings()
    try:
        ledger = existing_ledger(settings)
    except FileNotFoundError as error:
        raise Refused(f"{error}: run `pipeline up` or `pipeline migrate`, or set DATABASE_URL") from None
    try:
        yield ledger, settings
    finally:
        ledger.close()


def existing_ledger(settings: Settings) -> Ledger:
    """The ledger, its tables checked; raises `FileNotFoundError` in place of creating an SQLite file."""
    from pipeline.ledger import open_ledger

    file = sqlite_file(settings.database_url)
    if file is not None and not file.exists():
        raise FileNotFoundError(f"there is no ledger at {file}")
    return open_ledger(settings.database_url)


@contextlib.contextmanager
def watching(settings: Settings) -> Iterator[Watch]:
    """What takes snapshots for a command. A ledger file that does not exist is away, and is not created."""
    from pipeline.status.snapshot import Watch
    from pipeline.wiring import Services

    parts, seconds = Services(settings), _STATEMENT_SECONDS

    def ledger() -> Ledger:
        if "ledger" not in parts.__dict__:
            parts.__dict__["ledger"] = existing_ledger(settings)
        return parts.ledger

    try:
        yield Watch(parts, ledger=ledger, statement_seconds=seconds, patience_seconds=seconds + 1)
    finally:
        if "ledger" in parts.__dict__:
            parts.ledger.close()


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for another database."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", url)
    return Path(match[1]) if match else None


def now() -> datetime:
    """The time of a command."""
    return datetime.now(UTC)


def operator() -> Actor:
    """Who runs the command, for the audit log: the system's user."""
    from pipeline.ledger import Actor

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        name = f"uid {os.getuid()}"
    return Actor(name, "cli")


def note(text: str) -> None:
    """Print something for the person to stderr, beside the data."""
    click.echo(text, err=True)


def print_json(value: object) -> None:
    """One JSON value on one line of stdout."""
    click.echo(orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS, default=str).decode())


def console(*, stderr: bool = False) -> Console:
    """A console for people: a terminal's width in a terminal; elsewhere a line stays a line, however long."""
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False)
    if found.is_terminal:
        return found
    trimmed: Any = _Trimmed(sys.stderr if stderr else sys.stdout)
    return Console(file=trimmed, highlight=False, width=10_000, no_color=True)


class _Trimmed:
    """A stream that removes the blanks at the ends of a table's lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without those blanks."""
        self._stream.write(_BLANKS_AT_END.sub("\n", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(text: object) -> str:
    """Foreign text without control characters: none moves the cursor, sets a colour or reverses the line."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(text))


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON (a list as JSON lines) to stdout.")


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose leads, and hand them to the command as one `LeadFilter` named *which*."""
    states = click.Choice([state.value for state in LeadState])
    ten_years = click.FloatRange(0, 10 * 365 * 24 * 3600, min_open=True)
    options = {
        "ids": click.option("--id", "ids", multiple=True, type=click.UUID, help="A lead's id; repeatable."),
        "campaign": click.option("--campaign", callback=not_empty, help="Leads of this campaign."),
        "states": click.option("--state", "states", multiple=True, type=states, callback=_states,
                               help="Leads in this state; repeatable."),
        "phone": click.option("--phone", callback=_phone, help="Leads with this number, in any spelling."),
        "key": click.option("--key", callback=not_empty, help="Leads with this idempotency key."),
        "accepted_after": click.option("--accepted-after", type=click.DateTime(), callback=_utc,
                                       help="Accepted at or after this time (UTC)."),
        "accepted_before": click.option("--accepted-before", type=click.DateTime(), callback=_utc,
                                        help="Accepted before this time (UTC)."),
        "changed_before": click.option("--unchanged-for", "changed_before", metavar="SECONDS", type=ten_years,
                                       callback=_ago, help="In their state for at least this long."),
    }  # fmt: skip

    @wraps(command)
    def run(**given: Any) -> Any:
        from pipeline.ledger import LeadFilter

        return command(which=LeadFilter(**{name: given.pop(name) for name in options}), **given)

    for option in reversed(options.values()):
        run = option(run)
    return run


def _states(_context: Any, _parameter: Any, values: tuple[str, ...]) -> tuple[LeadState, ...]:
    return tuple(LeadState(value) for value in values)


def _phone(context: Any, parameter: Any, value: str | None) -> str | None:
    return None if not_empty(context, parameter, value) is None else read_phone(str(value))


def _utc(_context: Any, _parameter: Any, value: datetime | None) -> datetime | None:
    return None if value is None else value.replace(tzinfo=UTC)


def _ago(_context: Any, _parameter: Any, seconds: float | None) -> datetime | None:
    return None if seconds is None else now() - timedelta(seconds=seconds)


def not_empty(_context: Any, _parameter: Any, value: str | None) -> str | None:
    """Refuse an empty value: usually a variable that a script did not set, and it would match more than meant."""
    if value is not None and not value.strip():
        raise click.BadParameter("is empty; leave the option out if you do not need it")
    return value


def read_phone(text: str) -> str:
    """A phone number of the command line in E.164."""
    try:
        return to_e164(text, load_settings().default_region)
    except InvalidPhone as error:
        raise click.BadParameter(f"{text}: {error}", param_hint="--phone") from None
