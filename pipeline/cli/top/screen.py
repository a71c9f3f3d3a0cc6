"""How `pipeline top` shows a snapshot, in as many lines and columns as there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cli.queries import STATE_COLOURS, attention_lines
from pipeline.coordination.heartbeats import KINDS
from pipeline.settings import Settings
from pipeline.status.attention import attention
from pipeline.status.snapshot import Snapshot
from pipeline.status.text import span

_BARS = " ▁▂▃▄▅▆▇█"
_OUTCOMES = {"connected": "green", "failed": "red", "accepted": "green", "uncertain": "yellow", "rejected": "red"}
_NARROW = 100  # columns; from there on leads, submissions and calls stand side by side
_FRAME_LINES = 3  # title, parts, queues


def screen(seen: Snapshot, settings: Settings, *, width: int, height: int | None, hint: str = "") -> RenderableType:
    """The whole screen; with *height* no more lines than that."""
    overview = seen.ledger.value
    items = attention_lines(attention(seen, settings))
    top = [_title(seen, hint), _parts(seen), _queues(seen)]
    if overview is None:
        return Group(*top, Text(""), *_cut(items, None if height is None else max(1, height - len(top) - 1)))
    rate = _rate(seen, overview, settings)
    body, lines = _side_by_side(overview, rate, width) if width >= _NARROW else _stacked(overview, rate, width)
    room = None if height is None else max(2, height - _FRAME_LINES - lines - 2)  # and two headings
    shown = items or [Text("nothing needs attention", style="green")]
    most = len(shown) if room is None else max(1, min(len(shown), room - min(3, room // 2)))
    most_campaigns = None if room is None else max(0, room - most)
    return Group(
        *top,
        *body,
        _heading(f"needs attention ({len(items)})" if items else "needs attention"),
        *_cut(shown, most),
        *([] if most_campaigns == 0 else [_heading("campaigns")]),
        *_cut(_campaigns(overview), most_campaigns),
    )


def _title(seen: Snapshot, hint: str) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(Text(f"pipeline  {seen.at:%Y-%m-%d %H:%M:%S} UTC", style="bold"), Text(hint, style="dim"))
    return line


def _parts(seen: Snapshot) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for name in ("broker", "limit", "ledger"):
        well = name not in seen.away
        line.append("● ", style="green" if well else "bold red").append(f"{name}  ", style="" if well else "bold red")
    if shared := seen.shared.value:
        for kind in KINDS:
            count, gone = len(shared.of_kind(kind)), sum(one.kind == kind for one in shared.silent)
            line.append("● ", style="green" if count and not gone else "yellow" if count else "bold red")
            line.append(f"{kind} {count}" + (f" ({gone} silent)" if gone else "") + "  ")
    if seen.spool is None or seen.spool.files:
        files = "spool ?" if seen.spool is None else f"spool {seen.spool.files:,} files"
        line.append("● ", style="yellow").append(files)
    return line


def _queues(seen: Snapshot) -> Text:
    waiting = "  ".join(f"{name} {n:,}" for name, n in (seen.broker.value or {}).items()) or "unknown"
    return Text(f"queues: {waiting}", style="dim", no_wrap=True, overflow="ellipsis")


def _side_by_side(overview: dict[str, Any], rate: Text, width: int) -> tuple[list[RenderableType], int]:
    """Three columns, leads, submissions of the last hour, calls, and how many lines they take."""
    line = Table.grid(expand=True, padding=(0, 3))
    for _ in range(3):
        line.add_column(ratio=1)
    narrow = width // 3 - 3
    posts, ended = _hour(overview, "posts"), _hour(overview, "calls")
    calls = {name: n for name, n in overview["calls"].items() if name != "total"}
    columns = [
        [_heading(f"leads: {overview['accepted']:,} accepted"), *_counts(overview["leads"], STATE_COLOURS, all_=True)],
        [_heading("submissions, last hour"), rate, _bars(overview, "posts", narrow), *_counts(posts, _OUTCOMES)],
        [
            _heading(f"calls: {overview['calls']['total']:,}"),
            *_counts(calls, _OUTCOMES),
            Text(f"last hour: {sum(ended.values()):,}", style="dim"),
            _bars(overview, "calls", narrow),
        ],
    ]
    line.add_row(*(Group(*column) for column in columns))
    return [line], max(len(column) for column in columns)


def _stacked(overview: dict[str, Any], rate: Text, width: int) -> tuple[list[RenderableType], int]:
    """For a narrow terminal: everything in lines, without the counts that are zero."""
    calls = {name: n for name, n in overview["calls"].items() if name != "total"}
    lines: list[RenderableType] = [
        _heading(f"leads: {overview['accepted']:,} accepted"),
        *_flowing(overview["leads"], STATE_COLOURS, width),
        _heading("submissions, last hour"),
        rate,
        _bars(overview, "posts", width),
        *_flowing(_hour(overview, "posts"), _OUTCOMES, width),
        _heading(f"calls: {overview['calls']['total']:,}"),
        *_flowing(calls, _OUTCOMES, width),
    ]
    return lines, len(lines)


def _rate(seen: Snapshot, overview: dict[str, Any], settings: Settings) -> Text:
    """The last whole minute's rate against the accounts' limits together."""
    minutes = _per_minute(overview, "posts")
    rate = (minutes[-2] if len(minutes) > 1 else 0) / 60
    limit = settings.account_rate.per_second * (len(settings.api_keys()) or 1)
    share = min(1.0, rate / limit) if limit else 0.0
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{rate:.1f}/s", style="bold").append(f" of {limit:g}/s ")
    line.append("█" * round(share * 10), style="green").append("░" * (10 - round(share * 10)), style="dim")
    line.append(f" {share:.0%}")
    stopped = (
        max((seconds for seconds, _ in seen.shared.value.accounts.values()), default=0) if seen.shared.value else 0
    )
    if stopped > 0:
        line.append(f"  throttled for {span(stopped)}", style="yellow")
    elif overview["oldest_due_seconds"]:
        line.append(f"  oldest due waits {span(overview['oldest_due_seconds'])}", style="dim")
    return line


def _bars(overview: dict[str, Any], what: str, width: int) -> Text:
    """The last hour, one bar a minute, or for two or three minutes if there is little room; the latest is last."""
    minutes = _per_minute(overview, what)
    step = max(1, -(-len(minutes) // max(1, width)))
    bars = [sum(minutes[start : start + step]) for start in range(0, len(minutes), step)]
    return Text(sparkline(bars), no_wrap=True, overflow="crop", style="cyan")


def _campaigns(overview: dict[str, Any]) -> list[Text]:
    """One line for each campaign, those with work first."""

    def busy(one: dict[str, Any]) -> tuple[bool, int]:
        return one["state"] != "held", -(one["leads"]["queued"] + one["leads"]["sending"])

    lines = []
    for one in sorted(overview["campaigns"], key=busy):
        colour = {"active": "green", "held": "red"}.get(one["state"], "yellow")
        recent = sum(one["posts_last_minutes"].values())
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{one['id'][:24]:<24} ").append(f"{one['state']:<7}", style=colour)
        counts = [f"{state} {n:,}" for state, n in one["leads"].items() if n]
        line.append(f" {recent / 600:5.1f}/s  ").append(", ".join(counts), style="dim")
        lines.append(line)
    return lines or [Text("none yet", style="dim")]


def _counts(counts: dict[str, int], colours: dict[str, str], *, all_: bool = False) -> list[Text]:
    lines = []
    for name, n in counts.items():
        if n or all_:
            lines.append(Text(f"{name:<12}{n:>12,}", style=colours.get(name, "") if n else "dim"))
    return lines or [Text("none yet", style="dim")]


def _flowing(counts: dict[str, int], colours: dict[str, str], width: int) -> list[Text]:
    """Names with their numbers, in as many lines as needed."""
    lines = [Text()]
    for name, n in counts.items():
        if not n:
            continue
        piece = Text(f"{name} {n:,}   ", style=colours.get(name, ""))
        if len(lines[-1]) + len(piece) > width:
            lines.append(Text())
        lines[-1].append_text(piece)
    return lines if len(lines[0]) else [Text("none yet", style="dim")]


def _heading(text: str) -> Text:
    return Text(text, style="bold underline", no_wrap=True, overflow="ellipsis")


def _cut(lines: Sequence[Text], most: int | None) -> list[Text]:
    """At most that many lines; the last one says how many are left out."""
    if most is None or len(lines) <= most:
        return list(lines)
    kept = max(0, most - 1)
    return [*lines[:kept], Text(f"… and {len(lines) - kept} more", style="dim")] if most else []


def _per_minute(overview: dict[str, Any], what: str) -> list[int]:
    return [sum(minute[what].values()) for minute in overview["minutes"]]


def _hour(overview: dict[str, Any], what: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for minute in overview["minutes"]:
        for name, n in minute[what].items():
            total[name] = total.get(name, 0) + n
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def sparkline(values: Sequence[int]) -> str:
    """A bar for each value, as high as its share of the highest; what is above zero shows."""
    highest = max(values, default=0)
    if not highest:
        return "·" * len(values)
    return "".join(_BARS[max(1, round(value / highest * 8))] if value else "·" for value in values)
