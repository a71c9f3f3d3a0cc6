"""`pipeline top`: the state of the whole pipeline, live in a terminal.

`pipeline.status.snapshot` asks the parts, `screen` draws what they report; here is the loop that does both until the
person leaves.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console, ConsoleDimensions
from rich.live import Live

from pipeline.cli.session import console, print_json, settings_beside_up, watching
from pipeline.cli.top.screen import screen
from pipeline.coordination.heartbeats import KINDS
from pipeline.settings import Settings
from pipeline.status.attention import attention
from pipeline.status.snapshot import Snapshot, Watch

_PLAIN_COLUMNS = 100  # of a file or a pipe
_KEY_SECONDS = 0.1  # between two looks at the keyboard and at the window's size


@click.command()
@click.option(
    "--interval", metavar="SECONDS", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True,
    help="Time between two snapshots.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print it once, as without a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one snapshot as JSON.")
def top(*, interval: float, once: bool, as_json: bool) -> None:
    """Watch the pipeline: its parts, leads by state, rate against limit, calls, and what needs attention.

    q or Ctrl-C leaves. Into a file or a pipe it prints once.

    \b
    pipeline top
    pipeline top --interval 10
    pipeline top --json | jq .overview.leads
    """
    settings = settings_beside_up()
    out = console()
    if as_json or once or not out.is_terminal:
        with watching(settings) as watch:
            seen = watch.look()
        if as_json:
            print_json(as_plain(seen, settings))
        else:
            width = out.width if out.is_terminal else _PLAIN_COLUMNS
            out.print(screen(seen, settings, width=width, height=None), width=width)
        return
    with contextlib.suppress(KeyboardInterrupt), watching(settings) as watch:
        _show(watch, settings, out, interval)


def as_plain(seen: Snapshot, settings: Settings) -> dict[str, Any]:
    """The snapshot in the shape of `pipeline top --json`."""
    shared = seen.shared.value
    parts: dict[str, Any] = {}
    if shared is not None:
        parts["alive"] = {kind: len(shared.of_kind(kind)) for kind in KINDS}
        parts["silent"] = [f"{one.kind} {one.name}" for one in shared.silent]
        parts["served"] = dict(Counter(queue for one in shared.alive for queue in one.queues))
    stopped = {account: seconds for account, (seconds, _) in shared.accounts.items()} if shared else {}
    rate = settings.account_rate.per_second
    return {
        "at": seen.at,
        "overview": seen.ledger.value,
        "parts": parts,
        "queues": seen.broker.value or {},
        "limits": {
            account: {"per_second": rate, "stopped_seconds": stopped.get(account)}
            for account in settings.api_keys() or {"default": ""}
        },
        "spool": {"files": seen.spool.files, "bytes": seen.spool.bytes} if seen.spool else None,
        "away": seen.away,
        "attention": [asdict(one) for one in attention(seen, settings)],
    }


def _show(watch: Watch, settings: Settings, out: Console, interval: float) -> None:
    """Draw each snapshot as soon as it is there, and again when the window changes its size, until q."""
    snapshots = _Snapshots(watch, interval)
    hint = f"every {interval:g} s · q quits"
    drawn: tuple[object, object] | None = None
    with _single_keys() as keys, Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            if snapshots.fault is not None:
                raise snapshots.fault
            with contextlib.suppress(OSError):  # rich would believe COLUMNS, which does not follow the window
                out.size = ConsoleDimensions(*os.get_terminal_size(sys.stdout.fileno()))
            seen, size = snapshots.latest, out.size
            if seen is not None and drawn != (seen.at, size):
                drawn = (seen.at, size)
                live.update(screen(seen, settings, width=size.width, height=size.height, hint=hint), refresh=True)
            if keys(_KEY_SECONDS) in ("q", "Q", "\x03", "\x04"):
                return


class _Snapshots:
    """Takes snapshots on a thread of its own, so that keys and the window are answered while a part is slow."""

    def __init__(self, watch: Watch, interval: float) -> None:
        self.latest: Snapshot | None = None
        self.fault: Exception | None = None
        self._watch = watch
        self._interval = interval
        threading.Thread(target=self._take_for_ever, name="snapshots", daemon=True).start()

    def _take_for_ever(self) -> None:
        while True:
            started = time.monotonic()
            try:
                self.latest = self._watch.look()
            except Exception as error:  # noqa: BLE001 - it is raised where somebody sees it
                self.fault = error
                return
            time.sleep(max(0.1, self._interval - (time.monotonic() - started)))


@contextlib.contextmanager
def _single_keys() -> Iterator[Any]:
    """A function that waits some seconds for a key and returns it, or nothing; without a keyboard it only waits."""
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
