"""What a figure is, how rounds are interleaved, and how the results are shown and kept."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results.json"

console = Console(stderr=True, width=140 if not os.isatty(2) else None)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: our number, the baseline's, their ratio, and what it should be."""

    name: str
    unit: str
    ours: float
    baseline: float | None
    ratio: float | None
    """Median over the rounds of ours / baseline; None where the figure is an absolute with a limit."""
    goal: float | None
    """What the ratio (or, without one, `ours`) must reach; None for a figure that only informs."""
    better: Literal["higher", "lower"]
    met: bool | None
    rounds: int
    spread: tuple[float, float] | None
    """The lowest and the highest of the rounds' ratios."""
    note: str


def compare(
    name: str,
    ours: list[float],
    baseline: list[float],
    *,
    unit: str,
    goal: float | None,
    better: Literal["higher", "lower"] = "higher",
    note: str = "",
) -> Figure:
    """A figure from the numbers of interleaved rounds: the median of the rounds' ratios."""
    ratios = [mine / other for mine, other in zip(ours, baseline, strict=True)]
    ratio = statistics.median(ratios)
    return Figure(
        name=name,
        unit=unit,
        ours=_rounded(statistics.median(ours)),
        baseline=_rounded(statistics.median(baseline)),
        ratio=_rounded(ratio),
        goal=goal,
        better=better,
        met=_met(ratio, goal, better),
        rounds=len(ratios),
        spread=(_rounded(min(ratios)), _rounded(max(ratios))),
        note=note,
    )


def absolute(
    name: str,
    ours: list[float],
    *,
    unit: str,
    goal: float | None,
    better: Literal["higher", "lower"],
    note: str = "",
) -> Figure:
    """A figure that is held against a limit instead of a baseline: the worst of its rounds counts."""
    worst = min(ours) if better == "higher" else max(ours)
    return Figure(
        name=name,
        unit=unit,
        ours=_rounded(worst),
        baseline=None,
        ratio=None,
        goal=goal,
        better=better,
        met=_met(worst, goal, better),
        rounds=len(ours),
        spread=(_rounded(min(ours)), _rounded(max(ours))),
        note=note,
    )


def interleave(rounds: int, contenders: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Let the contenders take turns for *rounds* rounds; each round starts with another, so none is always first."""
    numbers: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            value = contenders[name]()
            numbers[name].append(value)
            console.print(f"  round {number + 1}/{rounds}  {name:<32} {value:>12,.1f}", highlight=False)
    return numbers


def keep(figures: Iterable[Figure]) -> None:
    """Write the figures to `bench/results.json`; figures of earlier runs that were not measured again stay."""
    fresh = {figure.name: asdict(figure) for figure in figures}
    known = {one["name"]: one for one in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(list((known | fresh).values()), indent=2) + "\n")


def show(figures: Iterable[Figure]) -> None:
    """Print the figures as a table to stdout."""
    table = Table("figure", "ours", "baseline", "unit", "ratio", "spread", "goal", "met", "rounds")
    for one in figures:
        sign = "≥" if one.better == "higher" else "≤"
        table.add_row(
            one.name,
            f"{one.ours:,}",
            "" if one.baseline is None else f"{one.baseline:,}",
            one.unit,
            "" if one.ratio is None else f"{one.ratio:g}",
            "" if one.spread is None else f"{one.spread[0]:g} … {one.spread[1]:g}",
            "" if one.goal is None else f"{sign} {one.goal:g}",
            {True: "yes", False: "no", None: ""}[one.met],
            str(one.rounds),
        )
    Console(width=None if os.isatty(1) else 140).print(table)


def _met(value: float, goal: float | None, better: str) -> bool | None:
    if goal is None:
        return None
    return value >= goal if better == "higher" else value <= goal


def _rounded(value: float) -> float:
    """Four significant digits, and whole numbers from a hundred on: the machine is not more exact than that."""
    return round(value) if abs(value) >= 100 else float(f"{value:.4g}")
