"""Plots as plain SVG text: axes with titles, ticks, direct labels, and a title and description for screen readers.

Built as an element tree, so every label is escaped by its serialiser. Colours are classes that the page's style sheet
fills in, so that a plot follows the light or the dark theme. Lengths are in the SVG's own units, about CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

Point = tuple[float, float]

WIDTH = 460
HEIGHT = 280
LEFT = 46
TOP = 34
BOTTOM = 46
LETTER = 6.1
LINE = 14
MOST_POINTS = 400


@dataclass(frozen=True)
class Text:
    """What a plot is called: `key` makes its ids, `about` is read aloud with the title."""

    key: str
    title: str
    about: str
    x_title: str
    y_title: str = ""


@dataclass(frozen=True)
class Series:
    """One line with the label that stands at its end; style: accent, ink, grey, or dash."""

    label: str
    points: Sequence[Point]
    style: str = "ink"


@dataclass(frozen=True)
class Spot:
    """One point of a scatter, with its interval in y where there is one."""

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
    """From values to positions; `start` is where `low` stands."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside the scale, a step of 1, 2 or 5 times a power of ten apart."""
        span = (self.high - self.low) or 1.0
        power = 10 ** math.floor(math.log10(span / about))
        step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def curves(
    text: Text,
    series: Sequence[Series],
    x_limits: Point | None = None,
    y_limits: Point | None = None,
    diagonal: bool = False,
) -> str:
    """Lines over a common x axis, each labelled at its end. The y axis holds 0 unless `y_limits` says otherwise.

    Args:
        diagonal: draw the line y = x too, which a calibrated model follows.

    Returns:
        SVG, or "" where no series has two finite points.
    """
    drawn = [Series(s.label, thinned([p for p in s.points if all(map(math.isfinite, p))]), s.style) for s in series]
    drawn = [s for s in drawn if len(s.points) > 1]
    if not drawn:
        return ""
    xs, ys = zip(*(point for s in drawn for point in s.points), strict=True)
    x_low, x_high = x_limits or (min(xs), max(xs))
    y_low, y_high = y_limits or _around(ys)
    room = max(len(_short(s.label)) for s in drawn) * LETTER + 14
    x = Scale(x_low, x_high, LEFT, WIDTH - room)
    y = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    svg = _svg(text, HEIGHT)
    _axes(svg, text, x, y)
    if diagonal:
        _line(svg, x(x_low), y(x_low), x(x_high), y(x_high), "diagonal")
    ends = spread([y(s.points[-1][1]) for s in drawn], LINE)
    for one, end in zip(drawn, ends, strict=True):
        places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.points)
        ElementTree.SubElement(svg, "polyline", {"class": f"line {one.style}", "points": places})
        _text(svg, x(one.points[-1][0]) + 7, end + 4, _short(one.label), f"name {one.style}")
    return _string(svg)


def scatter(text: Text, spots: Sequence[Spot], frontier: Sequence[Point] = ()) -> str:
    """Points with vertical intervals and their names beside them; `frontier` is joined by a line from left to right."""
    if not spots:
        return ""
    x_high = max(spot.x for spot in spots) * 1.08 or 1.0
    low = min(spot.low for spot in spots)
    high = max(spot.high for spot in spots)
    rim = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    x = Scale(0.0, x_high, LEFT, WIDTH - 12)
    y = Scale(low - rim, high + rim, HEIGHT - BOTTOM, TOP)
    svg = _svg(text, HEIGHT)
    _axes(svg, text, x, y)
    if len(frontier) > 1:
        places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(frontier))
        ElementTree.SubElement(svg, "polyline", {"class": "frontier", "points": places})
    heights = spread([y(spot.y) for spot in spots], LINE)
    for spot, height in zip(spots, heights, strict=True):
        tone = "accent" if spot.strong else "grey"
        _line(svg, x(spot.x), y(spot.low), x(spot.x), y(spot.high), f"whisker {tone}")
        _dot(svg, x(spot.x), y(spot.y), f"dot {tone}")
        name = _short(spot.label)
        end = x(spot.x) + 10 + len(name) * LETTER
        hidden = any(x(spot.x) < x(other.x) < end and y(other.high) - 4 < height < y(other.low) + 4 for other in spots)
        left = end > WIDTH or hidden
        anchor, aside = ("end", -9) if left else ("start", 9)
        _text(svg, x(spot.x) + aside, height + 4, name, f"name {'accent' if spot.strong else 'ink'}", anchor)
    return _string(svg)


def forest(text: Text, rows: Sequence[Whisker]) -> str:
    """A row per difference with its interval around the line at 0; clear ones are filled, unclear ones hollow."""
    if not rows:
        return ""
    step = 26
    top = 12
    height = top + step * len(rows) + BOTTOM
    left = max(len(_short(row.label)) for row in rows) * LETTER + 16
    low = min(0.0, *(row.low for row in rows))
    high = max(0.0, *(row.high for row in rows))
    rim = (high - low) * 0.06 or 1.0
    x = Scale(low - rim, high + rim, left, WIDTH - 14)
    svg = _svg(text, height)
    bottom = height - BOTTOM
    _x_axis(svg, text, x, bottom)
    _line(svg, x(0), top - 6, x(0), bottom, "zero")
    for number, row in enumerate(rows):
        y = top + step * (number + 0.5)
        tone = "accent" if row.clear else "grey"
        _text(svg, left - 10, y + 4, _short(row.label), f"name {'ink' if row.clear else 'grey'}", "end")
        _line(svg, x(row.low), y, x(row.high), y, f"whisker {tone}")
        _dot(svg, x(row.value), y, f"dot {tone}" if row.clear else "dot hollow")
    return _string(svg)


def bars(text: Text, rows: Sequence[tuple[str, float, str]]) -> str:
    """A horizontal bar per (label, value of at least 0, the value in words)."""
    if not rows:
        return ""
    step = 26
    top = 4
    height = top + step * len(rows) + 8
    left = max(len(_short(name)) for name, _, _ in rows) * LETTER + 16
    right = max(len(words) for _, _, words in rows) * LETTER + 10
    x = Scale(0.0, max(value for _, value, _ in rows) or 1.0, left, WIDTH - right)
    svg = _svg(text, height)
    for number, (name, value, words) in enumerate(rows):
        y = top + step * number
        place = {
            "x": f"{left:.1f}",
            "y": f"{y + 4:.1f}",
            "width": f"{max(1.0, x(value) - left):.1f}",
            "height": f"{step - 9}",
        }
        ElementTree.SubElement(svg, "rect", {"class": "bar", **place})
        _text(svg, left - 10, y + 17, _short(name), "name ink", "end")
        _text(svg, x(value) + 7, y + 17, words, "tick")
    return _string(svg)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart, in their order, so that neighbours stand at least `gap` from each other."""
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
    """At most MOST_POINTS points; beyond that, means of equal runs of neighbours, the last point kept as it is."""
    if len(points) <= MOST_POINTS:
        return list(points)
    run = math.ceil(len(points) / (MOST_POINTS - 1))
    parts = [points[n : n + run] for n in range(0, len(points), run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts] + [points[-1]]


def _around(values: Sequence[float]) -> Point:
    """Limits that hold 0 and all values, with a rim beyond those on either side of 0."""
    low = min(0.0, *values)
    high = max(0.0, *values)
    rim = 0.05 * (high - low)
    return (low - rim if low else 0.0, high + rim if high else 0.0) if rim else (0.0, 1.0)


def _svg(text: Text, height: float) -> ElementTree.Element:
    names = {"role": "img", "aria-labelledby": f"{text.key}-title {text.key}-about"}
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", **names})
    ElementTree.SubElement(svg, "title", {"id": f"{text.key}-title"}).text = text.title
    ElementTree.SubElement(svg, "desc", {"id": f"{text.key}-about"}).text = text.about
    return svg


def _axes(svg: ElementTree.Element, text: Text, x: Scale, y: Scale) -> None:
    for tick in y.ticks():
        _line(svg, x.start, y(tick), x.end, y(tick), "grid")
        _text(svg, x.start - 7, y(tick) + 4, _tick(tick), "tick", "end")
    _text(svg, 2, 14, text.y_title, "axis")
    _x_axis(svg, text, x, y.start)


def _x_axis(svg: ElementTree.Element, text: Text, x: Scale, bottom: float) -> None:
    _line(svg, x.start, bottom, x.end, bottom, "base")
    for tick in x.ticks():
        _line(svg, x(tick), bottom, x(tick), bottom + 4, "base")
        _text(svg, x(tick), bottom + 18, _tick(tick), "tick", "middle")
    _text(svg, (x.start + x.end) / 2, bottom + 38, text.x_title, "axis", "middle")


def _line(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ElementTree.SubElement(
        svg, "line", {"class": kind, "x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    )


def _dot(svg: ElementTree.Element, x: float, y: float, kind: str) -> None:
    ElementTree.SubElement(svg, "circle", {"class": kind, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4"})


def _text(svg: ElementTree.Element, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
    ElementTree.SubElement(
        svg, "text", {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ).text = words


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if letter == 'k' else size):g}{letter}"
    return f"{value:g}".replace("-", "−")


def _short(label: str) -> str:
    return label if len(label) <= 24 else label[:23] + "…"


def _string(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)
