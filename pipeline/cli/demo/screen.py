"""What the demo shows: a live view in a terminal, plain lines elsewhere, and the report at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.cli.queries import STATE_COLOURS, one_line, show_story, time_of
from pipeline.cli.session import console
from pipeline.settings import Rate

_LINE_SECONDS = 2.0
_SPEED_SECONDS = 2.0  # over which the rate is measured
_TROUBLES = 5
_FUNNEL = ("queued", "sending", "submitted", "called", "uncertain")
_OUTCOMES = ("connected", "no_answer", "busy", "failed")


class Screen:
    """The progress for a person; it goes to stderr, so that stdout holds the report alone."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = console(stderr=True)
        self.console.quiet = quiet
        self._live: Live | None = None
        self._rate = ""
        self._began = time.monotonic()
        self._seen: list[tuple[float, int]] = []
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Say in one line what happens now."""
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
        """The view; its height is always the same, so that nothing jumps."""
        leads = Table.grid(padding=(0, 2), expand=True)
        leads.add_column(no_wrap=True, min_width=10)
        leads.add_column(justify="right", min_width=6)
        leads.add_column(ratio=1)
        others = sum(n for state, n in status["leads"].items() if state not in _FUNNEL)
        for state, count in [*((state, status["leads"][state]) for state in _FUNNEL), ("other", others)]:
            colour = STATE_COLOURS.get(state, "blue")
            bar = ProgressBar(
                total=max(1, status["accepted"]), completed=count, complete_style=colour, finished_style=colour
            )
            leads.add_row(Text(state, style=colour if count else "dim"), f"{count:,}", bar)
        calls = "   ".join(f"{outcome} {status['calls'].get(outcome, 0):,}" for outcome in _OUTCOMES)
        lines = [
            _line(time_of(one["started_at"]), one["outcome"], one["excerpt"], style="yellow")
            for one in troubles[:_TROUBLES]
        ]
        return Group(
            Text(f"{status['accepted']:,} leads · {time.monotonic() - self._began:.0f} s", style="bold"),
            leads,
            _line("calls", calls),
            _line("POSTs a second", f"{speed:.0f} of {Rate.parse(self._rate).per_second:g}"),
            Text("latest trouble, each dealt with", style="bold"),
            *lines,
            *[Text("")] * (_TROUBLES - len(lines)),
        )


def _line(name: str, *words: object, style: str = "") -> Text:
    """One line that is cut where the terminal ends."""
    text = Text(f"{name}  ", style="dim", no_wrap=True, overflow="ellipsis")
    return text.append("  ".join(one_line(word) for word in words), style=style)


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
