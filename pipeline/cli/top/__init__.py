"""`pipeline top`: how the whole pipeline stands, live in a terminal.

`look` asks the parts, `screen` draws what they said; here is the loop that does both until a person leaves.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console, ConsoleDimensions
from rich.live import Live

from pipeline.cli.session import console, print_json, settings_beside_up
from pipeline.cli.top.look import Looker
from pipeline.cli.top.screen import screen
from pipeline.settings import Settings

_PLAIN_COLUMNS = 100  # of a file or a pipe
_KEY_SECONDS = 0.1  # between two looks at the keyboard and at the window's size


@click.command()
@click.option(
    "--interval", metavar="SECONDS", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True,
    help="Time between two looks.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print it once, as without a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print what is seen once, as JSON.")
def top(*, interval: float, once: bool, as_json: bool) -> None:
    """Watch the pipeline: its parts, leads by state, rate against limit, calls, and what needs a person.

    q or Ctrl-C leaves. Into a file or a pipe it prints once.

    \b
    pipeline top
    pipeline top --interval 10
    pipeline top --json | jq .overview.leads
    """
    settings = settings_beside_up()
    out = console()
    if as_json or once or not out.is_terminal:
        looker = Looker(settings)
        try:
            seen = looker.look()
        finally:
            looker.close()
        if as_json:
            print_json(seen)
        else:
            width = out.width if out.is_terminal else _PLAIN_COLUMNS
            out.print(screen(seen, width=width, height=None), width=width)
        return
    with contextlib.suppress(KeyboardInterrupt):
        _watch(settings, out, interval)


def _watch(settings: Settings, out: Console, interval: float) -> None:
    """Draw what the looks see, as soon as one has ended or the window has another size, until q."""
    looks = _Looks(settings, interval)
    hint = f"every {interval:g} s · q leaves"
    drawn: tuple[object, object] | None = None
    with _single_keys() as keys, Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            if looks.fault is not None:
                raise looks.fault
            with contextlib.suppress(OSError):  # rich would believe COLUMNS, which does not follow the window
                out.size = ConsoleDimensions(*os.get_terminal_size(sys.stdout.fileno()))
            seen, size = looks.seen, out.size
            if seen is not None and drawn != (seen["at"], size):
                drawn = (seen["at"], size)
                live.update(screen(seen, width=size.width, height=size.height, hint=hint), refresh=True)
            if keys(_KEY_SECONDS) in ("q", "Q", "\x03", "\x04"):
                return


class _Looks:
    """Looks on a thread of its own, so that keys and the window are answered while a part keeps us waiting."""

    def __init__(self, settings: Settings, interval: float) -> None:
        self.seen: dict[str, Any] | None = None
        self.fault: Exception | None = None
        self._settings = settings
        self._interval = interval
        threading.Thread(target=self._look_for_ever, name="looks", daemon=True).start()

    def _look_for_ever(self) -> None:
        looker = Looker(self._settings)
        while True:
            started = time.monotonic()
            try:
                self.seen = looker.look()
            except Exception as error:  # noqa: BLE001 - it is raised where somebody sees it
                self.fault = error
                return
            time.sleep(max(0.1, self._interval - (time.monotonic() - started)))


@contextlib.contextmanager
def _single_keys() -> Iterator[Any]:
    """A function that waits for a key for some seconds and returns it, or nothing; without a keyboard it only waits."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)

    def read(seconds: float) -> str:
        ready, _, _ = select.select([number], [], [], seconds)
        return os.read(number, 1).decode("utf-8", "replace") if ready else ""

    try:
        tty.setcbreak(number)
        yield read
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
