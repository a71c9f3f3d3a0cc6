"""Charts as SVG, drawn on the server by pygal and coloured by the pages' own style sheet.

Pygal puts styles and a script into each chart. The pages' Content-Security-Policy forbids both, and they do not support
a dark page; so they are removed, and `ops.css` styles the classes that are left.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

import pygal
from markupsafe import Markup

# Pygal adds a hook to every import of the process, for plugins, by an interface that Python has removed.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

_WIDTH, _HEIGHT = 760, 240
_EVERY = 10  # minutes between labels
_HEADROOM = 4  # a limit this many times above the highest value would flatten the chart, and is not drawn
_NUMBERS = itertools.count()
_DROPPED = frozenset({"script", "style", "desc", "title"})
_OVERLAYS = frozenset({"tooltip", "text-overlay", "tooltip-overlay"})


def by_minute(
    title: str,
    minutes: Sequence[Mapping[str, Any]],
    series: Mapping[str, Sequence[float]],
    *,
    limit: float | None = None,
) -> Markup:
    """A line for each of the series over the minutes; *limit* is a dashed one.

    The SVG has a title and a description with the totals, for screen readers.
    """
    chart = pygal.Line(
        width=_WIDTH, height=_HEIGHT, css=[], js=[], show_legend=False, show_dots=False, margin=4, margin_left=2,
        truncate_label=-1, include_x_axis=True, range=(0, _top(series, limit)), show_minor_x_labels=False,
        formatter=lambda value: f"{value:,.0f}", y_labels_major_count=3, show_minor_y_labels=False, no_data_text="",
    )  # fmt: skip
    times: list[datetime] = [one["at"] for one in minutes]
    chart.x_labels = [f"{at:%H:%M}" for at in times]
    chart.x_labels_major = [f"{at:%H:%M}" for at in times if at.minute % _EVERY == 0]
    for name, values in series.items():
        chart.add(name, list(values))
    if limit is not None and limit <= _HEADROOM * max(_highest(series), 1):
        chart.add("limit", [limit] * len(times))
    total = "; ".join(
        f"{name}: {sum(values):,.0f} in total, at most {max(values, default=0):,.0f} per minute"
        for name, values in series.items()
    )
    return _svg(chart, title, f"{times[0]:%H:%M} to {times[-1]:%H:%M} UTC. {total}.")


def _top(series: Mapping[str, Sequence[float]], limit: float | None) -> float:
    highest = _highest(series)
    if limit is not None and limit <= _HEADROOM * max(highest, 1):
        highest = max(highest, limit)
    return max(highest * 1.08, 5)


def _highest(series: Mapping[str, Sequence[float]]) -> float:
    return max((max(values, default=0) for values in series.values()), default=0)


def _svg(chart: Any, title: str, description: str) -> Markup:
    root: ET.Element = chart.render_tree()
    _strip(root)
    number = next(_NUMBERS)
    for name in ("id", "width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"chart-{number}-title chart-{number}-text")
    root.set("class", "chart")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        node = ET.Element(tag, {"id": f"chart-{number}-{'title' if tag == 'title' else 'text'}"})
        node.text = text
        root.insert(place, node)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 - of pygal's own making, text escaped


def _strip(node: ET.Element) -> None:
    for child in list(node):
        tag = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else ""
        if (
            not tag
            or tag in _DROPPED
            or tag == "title"
            or child.get("class") in ("tooltip", "text-overlay", "tooltip-overlay")
        ):
            node.remove(child)
            continue
        child.attrib.pop("style", None)
        _strip(child)
