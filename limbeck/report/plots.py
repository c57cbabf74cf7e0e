"""Plots as SVG text, with axis titles, ticks, labels beside the lines, and a description for screen readers.

Plots are built as element trees, whose serialiser escapes every label. Colours are classes that the page's style sheet
defines, so that plots follow the light or dark theme. Lengths are in the SVG's own units, about CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from xml.etree import ElementTree

Point = tuple[float, float]

WIDTH = 460
HEIGHT = 280
LEFT = 46
TOP = 34
BOTTOM = 46
LETTER = 6.1  # the mean width of a letter
LINE = 14  # the height of a line of text
MAX_POINTS = 400
MAX_LABEL = 24


@dataclass(frozen=True)
class Label:
    """A plot's titles. `key` is the prefix of its element ids; screen readers read `about` with the title."""

    key: str
    title: str
    about: str
    x_title: str
    y_title: str = ""


@dataclass(frozen=True)
class Series:
    """One line, labelled at its end. The style is accent, ink, grey or dash. `intervals` are (low, high) of every
    point, if any, and drawn where no points had to be left out."""

    label: str
    points: Sequence[Point]
    style: str = "ink"
    intervals: Sequence[Point] = ()


@dataclass(frozen=True)
class Spot:
    """One point of a scatter plot, with its interval in y."""

    label: str
    x: float
    y: float
    low: float
    high: float
    strong: bool = False


@dataclass(frozen=True)
class Whisker:
    """One row of a forest plot."""

    label: str
    value: float
    low: float
    high: float
    clear: bool


@dataclass(frozen=True)
class Scale:
    """Maps values to positions, `low` to `start` and `high` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        """About this many round numbers inside the scale: multiples of 1, 2 or 5 times a power of ten."""
        span = (self.high - self.low) or 1.0
        power = 10 ** math.floor(math.log10(span / about))
        step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def curves(
    label: Label,
    series: Sequence[Series],
    *,
    x_limits: Point | None = None,
    y_limits: Point | None = None,
    diagonal: bool = False,
) -> str:
    """Draw lines over a common x axis, labelled at their ends. The y axis includes 0 unless `y_limits` says otherwise.

    Args:
        diagonal: also draw the line y = x, which a calibrated model follows.

    Returns:
        SVG, or "" if no series has two finite points.
    """
    drawn = [replace(s, points=thinned([p for p in s.points if all(map(math.isfinite, p))])) for s in series]
    drawn = [s for s in drawn if len(s.points) > 1]
    if not drawn:
        return ""
    xs, ys = zip(*(point for s in drawn for point in s.points), strict=True)
    x_low, x_high = x_limits or (min(xs), max(xs))
    y_low, y_high = y_limits or _around(ys)
    room = max(len(_short(s.label)) for s in drawn) * LETTER + 14
    x = Scale(x_low, x_high, LEFT, WIDTH - room)
    y = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    svg = _svg(label, HEIGHT)
    _axes(svg, label, x, y)
    if diagonal:
        _line(svg, (x(x_low), y(x_low)), (x(x_high), y(x_high)), "diagonal")
    ends = spread([y(s.points[-1][1]) for s in drawn], LINE)
    for line, end in zip(drawn, ends, strict=True):
        if len(line.intervals) == len(line.points):
            for (at, _), (low, high) in zip(line.points, line.intervals, strict=True):
                tone = "accent" if line.style == "accent" else "grey"
                _line(svg, (x(at), y(low)), (x(at), y(high)), f"whisker {tone}")
        places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        ElementTree.SubElement(svg, "polyline", {"class": f"line {line.style}", "points": places})
        _text(svg, (x(line.points[-1][0]) + 7, end + 4), _short(line.label), f"name {line.style}")
    return _string(svg)


def scatter(label: Label, spots: Sequence[Spot], frontier: Sequence[Point] = ()) -> str:
    """Draw named points with vertical intervals, and a line through `frontier` from left to right."""
    if not spots:
        return ""
    x_high = max(spot.x for spot in spots) * 1.08 or 1.0
    low = min(spot.low for spot in spots)
    high = max(spot.high for spot in spots)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    x = Scale(0.0, x_high, LEFT, WIDTH - 12)
    y = Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    svg = _svg(label, HEIGHT)
    _axes(svg, label, x, y)
    if len(frontier) > 1:
        places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(frontier))
        ElementTree.SubElement(svg, "polyline", {"class": "frontier", "points": places})
    heights = spread([y(spot.y) for spot in spots], LINE)
    for spot, height in zip(spots, heights, strict=True):
        tone = "accent" if spot.strong else "grey"
        _line(svg, (x(spot.x), y(spot.low)), (x(spot.x), y(spot.high)), f"whisker {tone}")
        _dot(svg, (x(spot.x), y(spot.y)), f"dot {tone}")
        name = _short(spot.label)
        end = x(spot.x) + 10 + len(name) * LETTER
        hidden = any(x(spot.x) < x(other.x) < end and y(other.high) - 4 < height < y(other.low) + 4 for other in spots)
        left = end > WIDTH or hidden
        anchor, offset = ("end", -9) if left else ("start", 9)
        style = f"name {'accent' if spot.strong else 'ink'}"
        _text(svg, (x(spot.x) + offset, height + 4), name, style, anchor=anchor)
    return _string(svg)


def forest(label: Label, rows: Sequence[Whisker]) -> str:
    """Draw a row per difference with its interval and a line at 0. Clear differences are filled, the others hollow."""
    if not rows:
        return ""
    step = 26
    top = 12
    height = top + step * len(rows) + BOTTOM
    left = max(len(_short(row.label)) for row in rows) * LETTER + 16
    low = min(0.0, *(row.low for row in rows))
    high = max(0.0, *(row.high for row in rows))
    margin = (high - low) * 0.06 or 1.0
    x = Scale(low - margin, high + margin, left, WIDTH - 14)
    svg = _svg(label, height)
    bottom = height - BOTTOM
    _x_axis(svg, label, x, bottom)
    _line(svg, (x(0), top - 6), (x(0), bottom), "zero")
    for number, row in enumerate(rows):
        y = top + step * (number + 0.5)
        tone = "accent" if row.clear else "grey"
        style = f"name {'ink' if row.clear else 'grey'}"
        _text(svg, (left - 10, y + 4), _short(row.label), style, anchor="end")
        _line(svg, (x(row.low), y), (x(row.high), y), f"whisker {tone}")
        _dot(svg, (x(row.value), y), f"dot {tone}" if row.clear else "dot hollow")
    return _string(svg)


def bars(label: Label, rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw a horizontal bar per (label, value of at least 0, value as text)."""
    if not rows:
        return ""
    step = 26
    top = 4
    height = top + step * len(rows) + 8
    left = max(len(_short(name)) for name, _, _ in rows) * LETTER + 16
    right = max(len(text) for _, _, text in rows) * LETTER + 10
    x = Scale(0.0, max(value for _, value, _ in rows) or 1.0, left, WIDTH - right)
    svg = _svg(label, height)
    for number, (name, value, text) in enumerate(rows):
        y = top + step * number
        place = {
            "x": f"{left:.1f}",
            "y": f"{y + 4:.1f}",
            "width": f"{max(1.0, x(value) - left):.1f}",
            "height": f"{step - 9}",
        }
        ElementTree.SubElement(svg, "rect", {"class": "bar", **place})
        _text(svg, (left - 10, y + 17), _short(name), "name ink", anchor="end")
        _text(svg, (x(value) + 7, y + 17), text, "tick")
    return _string(svg)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart, keeping their order, until neighbours are about `gap` apart."""
    order = sorted(range(len(places)), key=lambda n: places[n])
    moved = list(places)
    for _ in range(len(places)):
        for above, below in pairwise(order):
            lack = gap - (moved[below] - moved[above])
            if lack > 0:
                moved[above] -= lack / 2
                moved[below] += lack / 2
    return moved


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points and the last one; longer series become means of equally many neighbours."""
    if len(points) <= MAX_POINTS:
        return list(points)
    run = math.ceil(len(points) / (MAX_POINTS - 1))
    parts = [points[n : n + run] for n in range(0, len(points), run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts] + [points[-1]]


def _around(values: Sequence[float]) -> Point:
    """Limits that include 0 and all values, with a margin on each side that has values."""
    low = min(0.0, *values)
    high = max(0.0, *values)
    margin = 0.05 * (high - low)
    return (low - margin if low else 0.0, high + margin if high else 0.0) if margin else (0.0, 1.0)


def _svg(label: Label, height: float) -> ElementTree.Element:
    names = {"role": "img", "aria-labelledby": f"{label.key}-title {label.key}-about"}
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", **names})
    ElementTree.SubElement(svg, "title", {"id": f"{label.key}-title"}).text = label.title
    ElementTree.SubElement(svg, "desc", {"id": f"{label.key}-about"}).text = label.about
    return svg


def _axes(svg: ElementTree.Element, label: Label, x: Scale, y: Scale) -> None:
    for tick in y.ticks():
        _line(svg, (x.start, y(tick)), (x.end, y(tick)), "grid")
        _text(svg, (x.start - 7, y(tick) + 4), _tick(tick), "tick", anchor="end")
    _text(svg, (2, 14), label.y_title, "axis")
    _x_axis(svg, label, x, y.start)


def _x_axis(svg: ElementTree.Element, label: Label, x: Scale, bottom: float) -> None:
    _line(svg, (x.start, bottom), (x.end, bottom), "base")
    for tick in x.ticks():
        _line(svg, (x(tick), bottom), (x(tick), bottom + 4), "base")
        _text(svg, (x(tick), bottom + 18), _tick(tick), "tick", anchor="middle")
    _text(svg, ((x.start + x.end) / 2, bottom + 38), label.x_title, "axis", anchor="middle")


def _line(svg: ElementTree.Element, start: Point, end: Point, style: str) -> None:
    places = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    attributes = {name: f"{place:.1f}" for name, place in places.items()}
    ElementTree.SubElement(svg, "line", {"class": style, **attributes})


def _dot(svg: ElementTree.Element, centre: Point, style: str) -> None:
    ElementTree.SubElement(
        svg, "circle", {"class": style, "cx": f"{centre[0]:.1f}", "cy": f"{centre[1]:.1f}", "r": "4"}
    )


def _text(svg: ElementTree.Element, place: Point, text: str, style: str, *, anchor: str = "start") -> None:
    attributes = {"class": style, "x": f"{place[0]:.1f}", "y": f"{place[1]:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", attributes).text = text


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if letter == 'k' else size):g}{letter}"
    return f"{value:g}".replace("-", "−")


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


def _string(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)
