"""The table of a run: as it grows on a terminal, and as Markdown for `docs/reliability.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.chaos.runner import Result

EXPERIMENTS, MECHANISMS = "experiments", "mechanisms"
_COLUMNS = ("rounds", "faults", "kills", "leads", "events", "lost", "twice", "over", "uncertain", "seconds")

HEAD = f"{'experiment':<22}" + "".join(f"{name:>{max(6, len(name)) + 2}}" for name in _COLUMNS)


def line(result: Result) -> str:
    """A result for a terminal."""
    if result.skipped:
        return f"{result.name:<22}skipped: {result.skipped}"
    numbers = zip(_COLUMNS, _numbers(result), strict=True)
    notes = "".join(f"  {name}={value}" for name, value in result.notes.items())
    return f"{result.name:<22}" + "".join(f"{text:>{max(6, len(name)) + 2}}" for name, text in numbers) + notes


def total(results: Sequence[Result], *, seconds: float) -> str:
    """The last line: the sums, and how long it all took."""
    return f"{'total':<22}" + "".join(
        f"{text:>{max(6, len(name)) + 2}}" for name, text in zip(_COLUMNS, _sums(results, seconds), strict=True)
    )


def write(lines: Iterable[str], file: Path, *, what: str) -> None:
    """Write lines into *file*: between the marks that say *what*, if it has them, else they become the whole file."""
    before = file.read_text() if file.exists() else ""
    begin, end = f"<!-- {what}, written by a run: -->", f"<!-- end of {what} -->"
    text = "\n".join(lines)
    if begin in before and end in before:
        text = f"{before.split(begin)[0]}{begin}\n\n{text}\n\n{end}{before.split(end)[1]}"
    file.write_text(text.rstrip("\n") + "\n")


def markdown(results: Sequence[Result], *, command: str, seconds: float) -> Iterable[str]:
    """The table of a run's results, with the command that makes it."""
    yield f"`{command}`, {seconds / 60:.1f} minutes:"
    yield ""
    yield f"| experiment | {' | '.join(_COLUMNS)} |"
    yield "|---" * (len(_COLUMNS) + 1) + "|"
    for result in results:
        if not result.skipped:
            yield f"| `{result.name}` | {' | '.join(_numbers(result))} |"
    yield f"| **total** | {' | '.join(_sums(results, seconds))} |"
    for result in results:
        if result.skipped:
            yield f"\n`{result.name}` was skipped: {result.skipped}."


def _numbers(result: Result) -> list[str]:
    found = result.findings
    counts = (result.rounds, result.faults, result.kills, found.leads, found.events)
    broken = (found.lost, found.duplicated, found.over_limit, found.uncertain)
    return [f"{number:,}" for number in (*counts, *broken)] + [f"{result.seconds:.0f}"]


def _sums(results: Sequence[Result], seconds: float) -> list[str]:
    rows = [_numbers(result) for result in results if not result.skipped]
    sums = [sum(int(row[column].replace(",", "")) for row in rows) for column in range(len(_COLUMNS) - 1)]
    return [f"{number:,}" for number in sums] + [f"{seconds:.0f}"]
