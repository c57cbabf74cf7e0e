"""Which plots a report shows, from the records of a run or the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.metrics import Metric, is_clear, number, percent
from limbeck.report.plots import Series, Spot, Text, Whisker, bars, curves, forest, scatter
from limbeck.storage.files import read_jsonl

STYLES = {"student": "accent", "teacher": "ink", "sft_control": "grey", "untouched": "dash"}
SHORT = {
    "teacher": "Teacher",
    "untouched": "Before training",
    "sft_control": "Fine-tuning",
    "gold_control": "Gold",
    "shuffled_control": "Shuffled",
    "student": "Student",
}
TRAININGS = {"student": ""} | {name: f"controls/{name}" for name in ("sft_control", "gold_control", "shuffled_control")}
COSTS = {
    "seconds": ("Training time", "minutes of training", 1 / 60),
    "teacher_tokens": ("Teacher tokens", "tokens that the teacher wrote", 1.0),
    "trained_tokens": ("Trained tokens", "tokens trained on", 1.0),
    "peak_memory_mib": ("Peak memory", "peak memory, MiB", 1.0),
}


@dataclass(frozen=True)
class Figure:
    """A plot (SVG text), what stands over it, and the sentence under it."""

    title: str
    svg: str
    caption: str


def loss_figures(folder: Path) -> list[Figure]:
    """The loss by step of the student and of the fine-tuning control, each on its own axis: each has its own
    objective."""
    found = []
    for name, place in TRAININGS.items():
        records = read_jsonl(folder / place / "metrics.jsonl")
        if len(records) < 2:
            continue
        lines = [Series("loss", [(r["step"], r["loss"]) for r in records], STYLES.get(name, "grey"))]
        terms = records[-1].get("terms", {})
        if len(terms) > 1:
            parts = [
                Series(term, [(r["step"], r["terms"][term]) for r in records if term in r.get("terms", {})], "dash")
                for term in terms
            ]
            lines = parts + lines
        first = records[0]["loss"]
        last = records[-1]["loss"]
        about = (
            f"{SHORT[name]}: the loss goes from {first:.3f} at the first step to {last:.3f} at step"
            f" {records[-1]['step']}."
        )
        text = Text(f"loss-{name}", f"{SHORT[name]}: loss by step", about, "step", "loss")
        found.append(Figure(text.title, curves(text, lines), about))
    return [figure for figure in found if figure.svg]


def calibration_figure(summary: dict[str, Any]) -> Figure | None:
    """Accuracy of the next token by confidence. A model on the diagonal is right as often as it says."""
    lines = [
        _system_line(name, [(b["confidence"], b["accuracy"]) for b in bins if b["count"]])
        for name, bins in (summary.get("calibration") or {}).items()
    ]
    about = (
        "How often the first choice is right, by how sure the model is of it. On the thin diagonal the two are equal."
    )
    text = Text("calibration", "Calibration on next tokens", about, "confidence", "accuracy")
    return _figure(text, curves(text, lines, (0.0, 1.0), (0.0, 1.0), diagonal=True))


def exposure_figure(summary: dict[str, Any]) -> Figure | None:
    """The excess accumulated error (ExAccErr) by the length of the model's own text."""
    lines = [
        _system_line(name, [(p["upto"], p["value"]) for p in points])
        for name, points in (summary.get("exposure") or {}).items()
    ]
    about = (
        "Excess error that builds up when a model continues its own text instead of the teacher's (ExAccErr). Zero: no"
        " such error."
    )
    text = Text(
        "exposure", "Exposure bias by length", about, "up to this many tokens of its own text", "excess error, %"
    )
    return _figure(text, curves(text, lines))


def _system_line(name: str, points: Sequence[tuple[float, float]]) -> Series:
    return Series(SHORT.get(name, name), points, STYLES.get(name, "grey"))


def token_class_figure(summary: dict[str, Any]) -> Figure | None:
    """The share of the whole divergence that each class of tokens holds, the largest first."""
    classes = (summary.get("by_token_class") or {}).items()
    ranked = sorted(classes, key=lambda item: -item[1]["share_of_loss"])[:12]
    rows = [(name, facts["share_of_loss"], percent(facts["share_of_loss"])) for name, facts in ranked]
    about = "The share of the student's whole divergence that falls on each class of tokens."
    text = Text("classes", "Share of the divergence by class of token", about, "")
    return _figure(text, bars(text, rows))


def forest_figures(
    metrics: Sequence[Metric], rows: dict[str, dict[str, Any]], names: dict[str, str], base: str
) -> list[Figure]:
    """One plot per metric with a better side: every method's difference to the base."""
    found = []
    for place, metric in enumerate(metrics):
        whiskers = [
            Whisker(names.get(method, method), x["value"], x["low"], x["high"], is_clear(x, len(rows)))
            for method, differences in rows.items()
            if (x := differences.get(metric.name))
        ]
        if metric.better == "none" or not whiskers:
            continue
        side = "left" if metric.better == "low" else "right"
        unit = f", {metric.unit}" if metric.unit else ""
        about = f"Difference to {base} with its 95 % interval. Better is to the {side}; filled points are clear."
        title = f"{metric.group}: {metric.title}" if metric.group else metric.title
        text = Text(
            f"forest-{place}", title, about, f"difference{unit} ({'← better' if side == 'left' else 'better →'})"
        )
        found.append(Figure(title, forest(text, whiskers), ""))
    return found


def pareto_figures(comparison: dict[str, Any], metric: Metric, names: dict[str, str]) -> list[Figure]:
    """Quality against each cost in which the methods differ. The line joins methods that no other beats on both."""
    found = []
    for key, (title, words, factor) in COSTS.items():
        spots = []
        for method, cost in (comparison.get("cost") or {}).items():
            quality = comparison["systems"].get(method, {}).get(metric.name)
            if quality and cost.get(key) is not None:
                spots.append((names.get(method, method), cost[key] * factor, quality))
        if len({cost for _, cost, _ in spots}) < 2:
            continue
        sign = 1 if metric.better == "low" else -1
        best = {
            name
            for name, x, q in spots
            if not any(_beats((a, sign * b["value"]), (x, sign * q["value"])) for _, a, b in spots)
        }
        drawn = [Spot(name, x, q["value"], q["low"], q["high"], name in best) for name, x, q in spots]
        better = "lower" if metric.better == "low" else "higher"
        listed = "; ".join(f"{spot.label}: {number(float(spot.x))} {words}, {number(spot.y)}" for spot in drawn)
        about = (
            f"{metric.title} ({better} is better) by {words}. The line joins the methods that no other beats on both."
            f" {listed}."
        )
        text = Text(
            f"pareto-{key}", f"{metric.title} by {title.lower()}", about, words, f"{metric.title}, {better} is better"
        )
        caption = "The line joins the methods that no other beats on both; bars are 95 % intervals."
        found.append(
            Figure(text.title, scatter(text, drawn, [(spot.x, spot.y) for spot in drawn if spot.strong]), caption)
        )
    return found


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Is `one` at least as low in both numbers, and lower in one?"""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def _figure(text: Text, svg: str) -> Figure | None:
    return Figure(text.title, svg, text.about) if svg else None
