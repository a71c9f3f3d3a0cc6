"""What the demo shows: a live view in a terminal, plain lines elsewhere, and the report at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import ROUNDED
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.cli.queries import STATE_COLOURS, one_line, show_story
from pipeline.cli.session import console
from pipeline.settings import Rate

_LINE_SECONDS = 2.0
_SPEED_SECONDS = 2.0  # the span over which the rate is taken
_TROUBLES = 5
_FUNNEL = ("queued", "sending", "submitted", "called", "uncertain")
_OUTCOMES = ("connected", "no_answer", "busy", "failed")


class Screen:
    """The person's view; everything goes to stderr, so that stdout holds the report alone."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = console(stderr=True)
        self.console.quiet = quiet
        self._live: Live | None = None
        self._rate = ""
        self._began = time.monotonic()
        self._seen: list[tuple[float, int]] = []
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """One line of what happens now."""
        self.console.print(Text(f"· {text}", style="dim"))

    @contextmanager
    def live(self, rate: str) -> Iterator[None]:
        """Show the live view while the block runs."""
        self._rate = rate
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        with Live(console=self.console, refresh_per_second=8, transient=True, vertical_overflow="crop") as self._live:
            yield
        self._live = None

    def show(self, status: dict[str, Any], stats: dict[str, Any], troubles: list[dict[str, Any]]) -> None:
        """Show the numbers of this moment."""
        now = time.monotonic()
        self._seen = [(at, n) for at, n in self._seen if now - at <= _SPEED_SECONDS] + [(now, stats["received"])]
        span = self._seen[-1][0] - self._seen[0][0]
        speed = (self._seen[-1][1] - self._seen[0][1]) / span if span > 0.2 else 0.0
        if self._live is not None:
            self._live.update(self._view(status, troubles, speed))
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            shown = ", ".join(f"{state} {n}" for state, n in status["leads"].items() if n)
            self.say(f"{status['accepted']} accepted: {shown or 'none yet'}; {speed:.0f} POSTs/s of {self._rate}")

    def _view(self, status: dict[str, Any], troubles: list[dict[str, Any]], speed: float) -> Group:
        """The view; its height does not change, so that nothing jumps."""
        leads = Table.grid(padding=(0, 2), expand=True)
        leads.add_column(no_wrap=True, min_width=10)
        leads.add_column(justify="right", min_width=6)
        leads.add_column(ratio=1)
        total = max(1, status["accepted"])
        others = sum(n for state, n in status["leads"].items() if state not in _FUNNEL)
        for state, count in [*((state, status["leads"][state]) for state in _FUNNEL), ("other", others)]:
            colour = STATE_COLOURS.get(state, "blue")
            bar = ProgressBar(total=total, completed=count, complete_style=colour, finished_style=colour)
            leads.add_row(Text(state, style=colour if count else "dim"), f"{count:,}", bar)
        calls = Table.grid(padding=(0, 2), expand=True)
        calls.add_column(no_wrap=True)
        calls.add_column(justify="right")
        for outcome in _OUTCOMES:
            count = status["calls"].get(outcome, 0)
            calls.add_row(Text(outcome, style="" if count else "dim"), f"{count:,}")
        allowed = Rate.parse(self._rate).per_second
        calls.add_row("", "")
        calls.add_row(Text("POSTs a second", style="bold"), f"{speed:.0f} of {allowed:g}")
        problems = Table.grid(padding=(0, 2))
        for _ in range(3):
            problems.add_column(no_wrap=True, overflow="ellipsis")
        for trouble in troubles[:_TROUBLES]:
            when = trouble["started_at"].strftime("%H:%M:%S")
            problems.add_row(
                Text(when, style="dim"), Text(trouble["outcome"], style="yellow"), one_line(trouble["excerpt"])
            )
        for _ in range(_TROUBLES - len(troubles)):
            problems.add_row("", "", "")
        upper = Table.grid(expand=True)
        upper.add_column(ratio=3)
        upper.add_column(ratio=2)
        seconds = time.monotonic() - self._began
        upper.add_row(
            Panel(leads, title=f"{status['accepted']:,} leads", title_align="left", box=ROUNDED, border_style="dim"),
            Panel(calls, title=f"calls · {seconds:.0f} s", title_align="left", box=ROUNDED, border_style="dim"),
        )
        title = "latest trouble, each dealt with"
        return Group(upper, Panel(problems, title=title, title_align="left", box=ROUNDED, border_style="dim"))


def print_report(report: Any, out: Console) -> None:
    """Print the demo's report for a person."""
    status = report.status
    out.print(f"\n[bold]{report.rows} rows handed in[/], {len(report.refused)} refused:")
    for row in report.refused:
        out.print(Text(f"  line {row['line']}: {row['reason']}"))
    repeats = report.rows - len(report.refused) - status["accepted"]
    again = "row names" if repeats == 1 else "rows name"
    out.print(f"\n[bold]{status['accepted']} leads accepted[/] ({repeats} {again} a person a second time)")
    for state, count in status["leads"].items():
        if count:
            style = STATE_COLOURS.get(state, "")
            out.print(Text.assemble((f"  {state:<10}", style), f" {count:>5}  {_MEANINGS.get(state, '')}"))
    _print_line(out, "POSTs by outcome", report.attempts)
    _print_line(out, "calls by outcome", {k: v for k, v in status["calls"].items() if k != "total"})
    events = status["events"]
    out.print(f"events: {events['raw']} kept, {events['quarantined']} unreadable and in quarantine")
    if report.story is not None:
        out.print("\n[bold]one lead's whole story[/] (`pipeline show ID`):")
        show_story(report.story, out)
    out.print()
    sums = " + ".join(f"{n} {state}" for state, n in status["leads"].items() if n) or "0"
    out.print(Text(f"accepted {status['accepted']} = {sums}"))
    out.print(
        f"lost: {report.lost}   called twice: {report.duplicates}   (counted in the sandbox's journal of"
        f" {report.sandbox['received']} POSTs, {report.sandbox['accepted']} accepted)"
    )
    if report.problems:
        for problem in report.problems:
            out.print(Text(f"PROBLEM: {problem}", style="bold red"))
    else:
        out.print(f"[bold green]every lead is accounted for[/] ({report.seconds:.0f} s)")


_MEANINGS = {
    "called": "a call came back",
    "submitted": "Futwork has it, the call has not come back",
    "uncertain": "no answer and no call: never sent again blindly; see `pipeline resolve`",
    "rejected": "Futwork refused this lead",
    "exhausted": "every attempt failed",
}


def _print_line(out: Console, title: str, counts: dict[str, int]) -> None:
    listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"
    out.print(f"{title}: {listed}")
