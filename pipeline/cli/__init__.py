"""The `pipeline` command.

Exit codes: 0 done, 1 done in part (rows were refused, or not everything could be settled), 2 wrong use or refused, and
128 + the signal's number if a signal ended it. Progress and notes go to stderr, data to stdout. No traceback reaches a
user: what cannot go on is one line that says what to do, and `PIPELINE_DEBUG=1` shows the rest.

A command's module is imported when the command is first asked for, so that none waits for what only another needs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import NoReturn

import click

_COMMANDS = {
    "campaign": "actions",
    "cancel": "actions",
    "demo": "run",
    "doctor": "run",
    "enqueue": "enqueue",
    "events": "actions",
    "leads": "queries",
    "migrate": "run",
    "ops-user": "ops_user",
    "resolve": "actions",
    "retry": "actions",
    "sandbox": "run",
    "show": "queries",
    "status": "queries",
    "suppress": "suppress",
    "top": "top",
    "up": "run",
}
"""Each command with the module of this package that defines it."""

_PATIENCE_SECONDS = 30.0  # for the cleaning up after a first Ctrl-C, which a second one must not break off


class _Ended(KeyboardInterrupt):
    """A signal asks for an end.

    One of its own, because Python ends a process by SIGINT, whatever its exit code, once a plain KeyboardInterrupt has
    passed through an `exec`, as there is in the import of every dataclass.
    """


class _Lazily(MutableMapping[str, click.Command]):
    """The commands by name, each imported when it is looked at."""

    def __init__(self) -> None:
        self._added: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._added:
            module = import_module(f"pipeline.cli.{_COMMANDS[name]}")
            self._added[name] = getattr(module, name.replace("-", "_"))
        return self._added[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._added[name] = command

    def __delitem__(self, name: str) -> None:
        del self._added[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS | self._added)

    def __len__(self) -> int:
        return len(_COMMANDS | self._added)

    def __contains__(self, name: object) -> bool:
        return name in _COMMANDS or name in self._added


@click.group(commands=_Lazily(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="futwork-lead-pipeline", prog_name="pipeline")
def cli() -> None:
    """Leads in, calls out: the pipeline between your backend and the Futwork AI Platform.

    \b
    pipeline demo                                    watch it work, with a simulated Futwork
    pipeline up --sandbox                            run every part in this terminal
    pipeline enqueue leads.csv --campaign 68ecc86f…  hand leads in
    pipeline status                                  how it stands
    pipeline top                                     the same, live
    pipeline show 9999789877                         one lead's whole story
    pipeline doctor                                  what is wrong with this installation

    Settings are environment variables or a .env file; .env.example explains each.
    """


def main() -> None:
    """The console script."""
    ended_by = _end_orderly_on_signals()
    try:
        code = cli.main(prog_name="pipeline", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        with contextlib.suppress(OSError):
            error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _stop("stopped", code=128 + (ended_by[0] if ended_by else signal.SIGINT))
    except Exception as error:
        if _is_an_end(error):
            _stop("stopped", code=128 + ended_by[0])
        if os.environ.get("PIPELINE_DEBUG") == "1":
            raise
        _stop(_explain(error))


def _end_orderly_on_signals() -> list[int]:
    """Let SIGTERM and a closed terminal end a command as Ctrl-C does, so that what it started ends with it.

    Signals that follow the first are ignored for a while: they must not break off the cleaning up. Returns a list that
    will hold the signal, should one come.
    """
    came: list[int] = []
    came_at = 0.0

    def end(number: int, _frame: object) -> None:
        nonlocal came_at
        if not came or time.monotonic() - came_at > _PATIENCE_SECONDS:
            came.append(number)
            came_at = time.monotonic()
            raise _Ended

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` wants it so
            signal.signal(number, end)
    return came


def _is_an_end(error: BaseException) -> bool:
    """Whether a signal became this error; Python 3.11 makes a RuntimeError of what is raised in a `__set_name__`."""
    return isinstance(error, _Ended) or (error.__cause__ is not None and _is_an_end(error.__cause__))


def _stop(message: str, *, code: int = 2) -> NoReturn:
    with contextlib.suppress(OSError):
        click.echo(f"pipeline: {message}", err=True)
    sys.exit(code)


def _explain(error: Exception) -> str:
    """One line that says what is wrong and, where that is known, what to do."""
    from pipeline.broker import BrokerUnavailable
    from pipeline.devstack.embedded_valkey import NoEmbeddedBroker
    from pipeline.devstack.supervisor import ProcessFailed
    from pipeline.domain.campaign import InvalidCampaignId
    from pipeline.ledger import EmptyFilter, MigrationBlocked, SchemaMismatch, ledger_is_at_fault
    from pipeline.settings import SettingsError

    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(
        error,
        SettingsError
        | SchemaMismatch
        | MigrationBlocked
        | NoEmbeddedBroker
        | EmptyFilter
        | InvalidCampaignId
        | ProcessFailed
        | UnicodeError,
    ):
        return str(error)
    if isinstance(error, BrokerUnavailable):
        return f"{error}: check BROKER_URL, or run `pipeline doctor`"
    if ledger_is_at_fault(error):
        return f"the ledger cannot be used ({_cause(error)}): check DATABASE_URL, or run `pipeline doctor`"
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    return f"unexpected {type(error).__name__}: {_cause(error)} (PIPELINE_DEBUG=1 shows where)"


def _cause(error: BaseException) -> str:
    inner = getattr(error, "orig", None) or error
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0][:200]
