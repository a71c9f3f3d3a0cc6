"""How `pipeline top` shows what it saw, in as many lines and columns as there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cli.queries import STATE_COLOURS, one_line

_BARS = " ▁▂▃▄▅▆▇█"
_OUTCOMES = {"connected": "green", "failed": "red", "accepted": "green", "uncertain": "yellow", "rejected": "red"}
_NARROW = 100  # columns; from there on leads, submissions and calls stand side by side
_FRAME_LINES = 3  # title, parts, queues


def screen(seen: dict[str, Any], *, width: int, height: int | None, hint: str = "") -> RenderableType:
    """The whole screen; with *height* no more lines than that."""
    overview = seen["overview"]
    top = [_title(seen, hint), _parts(seen), _queues(seen)]
    if overview is None:
        return Group(*top, Text(""), *(_away(seen)))
    needs = needs_a_person(seen)
    body, lines = _side_by_side(overview, seen, width) if width >= _NARROW else _stacked(overview, seen, width)
    room = None if height is None else max(2, height - _FRAME_LINES - lines - 2)  # and two headings
    shown_needs = needs or [Text("nothing needs a person", style="green")]
    most_needs = len(shown_needs) if room is None else max(1, min(len(shown_needs), room - min(3, room // 2)))
    most_campaigns = None if room is None else max(0, room - most_needs)
    return Group(
        *top,
        *body,
        _heading(f"needs a person ({len(needs)})" if needs else "needs a person"),
        *_cut(shown_needs, most_needs),
        *([] if most_campaigns == 0 else [_heading("campaigns")]),
        *_cut(_campaigns(overview), most_campaigns),
    )


def needs_a_person(seen: dict[str, Any]) -> list[Text]:
    """What does not mend itself, the most urgent first, each with the command that tells more."""
    return [*_needs_of_parts(seen), *_needs_of_leads(seen["overview"] or {})]


def _needs_of_parts(seen: dict[str, Any]) -> Iterator[Text]:
    for name, why in seen["away"].items():
        yield _need(f"{name} is away: {why}", "pipeline doctor")
    alive = seen["parts"].get("alive")
    if alive is None:
        return
    unserved = [queue for queue in seen["queues"] if not seen["parts"]["served"].get(queue)]
    if not alive["worker"]:
        yield _need("no worker lives", "pipeline doctor")
    elif unserved:
        yield _need(f"nobody works on {', '.join(unserved)}", "pipeline doctor")
    if not alive["beat"]:
        yield _need("no beat: retries and probes wait", "pipeline doctor")


def _needs_of_leads(overview: dict[str, Any]) -> Iterator[Text]:
    campaigns, uncertain = overview.get("campaigns", []), overview.get("uncertain", {})
    if not overview.get("adds_up", True):
        yield _need("accepted is not the sum over states", "pipeline status")
    for one in campaigns:
        if one["state"] == "held":
            yield _need(f"{one['id']} held ({one['hold_kind']}): {one['reason']}", "pipeline campaign list")
    if uncertain.get("total"):
        age = duration(uncertain["oldest_seconds"])
        text = f"{uncertain['total']:,} uncertain, the oldest for {age}"
        yield _need(text, "pipeline leads --state uncertain", style="yellow")
    if overview.get("quarantined"):
        yield _need(f"{overview['quarantined']:,} in quarantine", "pipeline events list", style="yellow")
    if overview.get("orphans"):
        yield _need(f"{overview['orphans']:,} calls without a lead", "pipeline events orphans", style="yellow")
    for one in campaigns:
        if one["state"] == "paused" and one["leads"]["queued"]:
            text = f"{one['id']} paused with {one['leads']['queued']:,} queued"
            yield _need(text, "pipeline campaign resume", style="yellow")


def _need(text: str, command: str, *, style: str = "red") -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    return line.append(command, style="dim").append("  ").append(one_line(text), style=style)


def _title(seen: dict[str, Any], hint: str) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(Text(f"pipeline  {seen['at']:%Y-%m-%d %H:%M:%S} UTC", style="bold"), Text(hint, style="dim"))
    return line


def _parts(seen: dict[str, Any]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for name in ("broker", "limit", "ledger"):
        well = name not in seen["away"]
        line.append("● ", style="green" if well else "bold red").append(f"{name}  ", style="" if well else "bold red")
    for kind, count in seen["parts"].get("alive", {}).items():
        gone = sum(one.startswith(f"{kind} ") for one in seen["parts"]["silent"])
        line.append("● ", style="green" if count and not gone else "yellow" if count else "bold red")
        line.append(f"{kind} {count}" + (f" ({gone} silent)" if gone else "") + "  ")
    spool = seen["spool"]
    if spool is None or spool["files"]:
        line.append("● ", style="yellow").append("spool ?" if spool is None else f"spool {spool['files']:,} files")
    return line


def _queues(seen: dict[str, Any]) -> Text:
    waiting = "  ".join(f"{name} {count:,}" for name, count in seen["queues"].items()) or "unknown"
    return Text(f"queues: {waiting}", style="dim", no_wrap=True, overflow="ellipsis")


def _away(seen: dict[str, Any]) -> Iterable[Text]:
    return [*needs_a_person(seen), Text("looking again …", style="dim")]


def _side_by_side(overview: dict[str, Any], seen: dict[str, Any], width: int) -> tuple[list[RenderableType], int]:
    """Three columns, leads, submissions of the last hour, calls, and how many lines they take."""
    line = Table.grid(expand=True, padding=(0, 3))
    for _ in range(3):
        line.add_column(ratio=1)
    narrow = width // 3 - 3
    posts, ended = _hour(overview, "posts"), _hour(overview, "calls")
    calls = {name: n for name, n in overview["calls"].items() if name != "total"}
    columns = [
        [_heading(f"leads: {overview['accepted']:,} accepted"), *_counts(overview["leads"], STATE_COLOURS, all_=True)],
        [_heading("submissions, last hour"), *_rate(overview, seen, narrow), *_counts(posts, _OUTCOMES)],
        [
            _heading(f"calls: {overview['calls']['total']:,}"),
            *_counts(calls, _OUTCOMES),
            Text(f"last hour: {sum(ended.values()):,}", style="dim"),
            _bars(overview, "calls", narrow),
        ],
    ]
    line.add_row(*(Group(*column) for column in columns))
    return [line], max(len(column) for column in columns)


def _stacked(overview: dict[str, Any], seen: dict[str, Any], width: int) -> tuple[list[RenderableType], int]:
    """For a narrow terminal: everything in lines, the counts that are nought left out."""
    calls = {name: n for name, n in overview["calls"].items() if name != "total"}
    lines: list[RenderableType] = [
        _heading(f"leads: {overview['accepted']:,} accepted"),
        *_flowing(overview["leads"], STATE_COLOURS, width),
        _heading("submissions, last hour"),
        *_rate(overview, seen, width),
        *_flowing(_hour(overview, "posts"), _OUTCOMES, width),
        _heading(f"calls: {overview['calls']['total']:,}"),
        *_flowing(calls, _OUTCOMES, width),
    ]
    return lines, len(lines)


def _rate(overview: dict[str, Any], seen: dict[str, Any], width: int) -> list[Text]:
    """The last whole minute's rate against the accounts' limits together, and each minute of the hour."""
    minutes = _per_minute(overview, "posts")
    rate = (minutes[-2] if len(minutes) > 1 else 0) / 60
    limits = seen["limits"].values()
    limit = sum(one["per_second"] for one in limits)
    share = min(1.0, rate / limit) if limit else 0.0
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{rate:.1f}/s", style="bold").append(f" of {limit:g}/s ")
    line.append("█" * round(share * 10), style="green").append("░" * (10 - round(share * 10)), style="dim")
    line.append(f" {share:.0%}")
    stopped = max((one["stopped_seconds"] or 0 for one in limits), default=0)
    if stopped > 0:
        line.append(f"  throttled for {duration(stopped)}", style="yellow")
    elif overview["oldest_due_seconds"]:
        line.append(f"  oldest due waits {duration(overview['oldest_due_seconds'])}", style="dim")
    return [line, _bars(overview, "posts", width)]


def _bars(overview: dict[str, Any], what: str, width: int) -> Text:
    """The last hour, a bar a minute, or one for two or three minutes where the room is narrow; the latest last."""
    minutes = _per_minute(overview, what)
    step = max(1, -(-len(minutes) // max(1, width)))
    bars = [sum(minutes[start : start + step]) for start in range(0, len(minutes), step)]
    return Text(sparkline(bars), no_wrap=True, overflow="crop", style="cyan")


def _campaigns(overview: dict[str, Any]) -> list[Text]:
    """A line a campaign, those with work first."""

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
    """Name and number after each other, in as many lines as that takes."""
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
    """No more lines than that; the last says how many are left out."""
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
    """A bar for each value, as high as its share of the highest; what is above nought shows."""
    highest = max(values, default=0)
    if not highest:
        return "·" * len(values)
    return "".join(_BARS[max(1, round(value / highest * 8))] if value else "·" for value in values)


def duration(seconds: float | None) -> str:
    """A time as people say it: `45 s`, `12 min`, `3.5 h`, `2.1 d`."""
    seconds = seconds or 0.0
    for unit, length in (("d", 86_400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
