"""The `pipeline` command.

Exit codes: 0 done, 1 done in part (rows were refused, or not everything could be settled), 2 wrong use or refused, and
128 + the signal's number if a signal ended it. Progress and notes go to stderr, data to stdout. No traceback reaches a
user: what cannot go on is one line that says what to do, and `PIPELINE_DEBUG=1` shows the rest.

A command's module is imported when the command is called. The list of commands needs none of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from typing import NoReturn

import click

from pipeline.extras import require

_COMMANDS = {
    "campaign": ("actions", "server cli", "List campaigns, set their policies, pause and resume them."),
    "cancel": ("actions", "server cli", "Take queued leads out."),
    "demo": ("demo", "server cli embedded", "Watch leads travel to a simulated Futwork and back."),
    "doctor": ("run", "server cli", "Check the whole installation."),
    "enqueue": ("enqueue", "", "Hand in a file of leads (CSV or JSON lines)."),
    "events": ("actions", "server cli", "List and replay events that were unreadable or not matched."),
    "leads": ("queries", "server cli", "List leads."),
    "migrate": ("run", "server", "Bring the tables of the database to this release."),
    "ops-user": ("ops_user", "server", "Make an account for the status pages."),
    "resolve": ("actions", "server cli", "Settle uncertain leads."),
    "retry": ("actions", "server cli", "Queue failed, expired or cancelled leads again."),
    "sandbox": ("run", "", "Run the simulated Futwork alone."),
    "show": ("queries", "server cli", "Show the whole journey of one lead."),
    "status": ("queries", "server cli", "Count leads, calls and events."),
    "suppress": ("suppress", "server cli", "Edit the do-not-call list."),
    "top": ("top", "server cli", "Watch the pipeline live."),
    "up": ("up", "server", "Run every process in this terminal."),
}
"""Each command: the module of this package that defines it, the extras that it needs, and its line in the list."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_SECONDS = 30.0  # for the cleaning up after a first Ctrl-C, which a second one must not break off


class _Ended(KeyboardInterrupt):
    """A signal asks for an end.

    One of its own, because Python ends a process by SIGINT, whatever its exit code, once a plain KeyboardInterrupt has
    passed through an `exec`, as there is in the import of every dataclass.
    """


class _Commands(click.Group):
    """The commands by name, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """All names, in the order of the alphabet."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """The command of this name, or None; raises `MissingExtra` if it needs an extra that is not installed."""
        if cmd_name not in _COMMANDS:
            return None
        module, extras, _ = _COMMANDS[cmd_name]
        require(*extras.split())
        with _signals_wait():
            found = import_module(f"pipeline.cli.{module}")
        command: click.Command = getattr(found, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in sorted(_COMMANDS.items())])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
    _print_what_the_terminal_lacks()
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


def _print_what_the_terminal_lacks() -> None:
    """Print a character that the terminal's encoding lacks as its escape, such as `\\u0915`: no output ends halfway."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back the signals that end a command: an exception in the import of a native module may crash the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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

    for number in _ENDING:
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
    """One line that says what is wrong and, where that is known, what to do; our own exceptions say both."""
    from pipeline.broker import BrokerUnavailable

    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, BrokerUnavailable):
        return f"{error}: check BROKER_URL, or run `pipeline doctor`"
    if type(error).__module__.startswith("pipeline.") or isinstance(error, UnicodeError):
        return str(error)
    if "pipeline.ledger" in sys.modules and sys.modules["pipeline.ledger"].ledger_is_at_fault(error):
        return f"the ledger cannot be used ({_cause(error)}): check DATABASE_URL, or run `pipeline doctor`"
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    return f"unexpected {type(error).__name__}: {_cause(error)} (PIPELINE_DEBUG=1 shows where)"


def _cause(error: BaseException) -> str:
    inner = getattr(error, "orig", None) or error
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0][:200]
