"""The plots of a report, from the records of a run or the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config.yaml_text import read_yaml
from limbeck.report.metrics import Metric, is_clear, number, percent
from limbeck.report.plots import Label, Series, Spot, Whisker, bars, curves, forest, scatter
from limbeck.storage.files import read_jsonl

STYLES = {"student": "accent", "teacher": "ink", "sft_control": "grey", "untouched": "dash"}
SHORT = {
    "teacher": "Teacher",
    "untouched": "Before training",
    "prompted": "Prompted",
    "sft_control": "Fine-tuning",
    "gold_control": "Gold",
    "shuffled_control": "Shuffled",
    "student": "Student",
}
TRAININGS = {"student": ""} | {name: f"controls/{name}" for name in ("sft_control", "gold_control", "shuffled_control")}
COSTS = {
    "seconds": ("Training time", "minutes of training", 1 / 60),
    "teacher_tokens": ("Teacher tokens", "tokens written by the teacher", 1.0),
    "trained_tokens": ("Trained tokens", "tokens trained on", 1.0),
    "peak_memory_mib": ("Peak memory", "peak memory, MiB", 1.0),
}
MAX_CLASSES = 12


@dataclass(frozen=True)
class Figure:
    """A plot (as SVG text) with its title and caption."""

    title: str
    svg: str
    caption: str


def trainings_of(folder: Path) -> dict[str, str]:
    """The folders of the student's training and of those of its controls that the recipe names, inside the run's."""
    file = folder / "recipe.yaml"
    recipe = read_yaml(file) if file.exists() else None
    evaluate = recipe.get("evaluate") if isinstance(recipe, dict) else None
    named = evaluate.get("controls", TRAININGS) if isinstance(evaluate, dict) else TRAININGS
    return {name: place for name, place in TRAININGS.items() if name == "student" or name in named}


def loss_figures(folder: Path) -> list[Figure]:
    """The loss by step of the student and of each trained control, in separate plots: their objectives differ."""
    figures = []
    for name, place in trainings_of(folder).items():
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
        about = (
            f"{SHORT[name]}: the loss goes from {records[0]['loss']:.3f} at the first step to"
            f" {records[-1]['loss']:.3f} at step {records[-1]['step']}."
        )
        label = Label(
            key=f"loss-{name}", title=f"{SHORT[name]}: loss by step", about=about, x_title="step", y_title="loss"
        )
        figures.append(Figure(label.title, curves(label, lines), about))
    return [figure for figure in figures if figure.svg]


def calibration_figure(summary: dict[str, Any]) -> Figure | None:
    """The accuracy of next-token predictions by their confidence."""
    lines = [
        _system_line(name, [(b["confidence"], b["accuracy"]) for b in bins if b["count"]])
        for name, bins in (summary.get("calibration") or {}).items()
    ]
    label = Label(
        key="calibration",
        title="Calibration of next tokens",
        about=(
            "How often a model's top token is right, by the probability that the model gives it. A calibrated model"
            " follows the dotted diagonal."
        ),
        x_title="confidence",
        y_title="accuracy",
    )
    return _figure(label, curves(label, lines, x_limits=(0.0, 1.0), y_limits=(0.0, 1.0), diagonal=True))


def preference_figure(summary: dict[str, Any]) -> Figure | None:
    """How often the answer that a reward model prefers is the better one, by how sure it is."""
    lines = [
        _system_line(name, [(b["confidence"], b["accuracy"]) for b in bins])
        for name, bins in ((summary.get("preference") or {}).get("calibration") or {}).items()
    ]
    label = Label(
        key="preference",
        title="Calibration of preferences",
        about=(
            "How often the answer with the higher score is the better one, by the probability that the scores give"
            " (the logistic of their difference). A calibrated model follows the dotted diagonal."
        ),
        x_title="probability by the scores",
        y_title="share in the right order",
    )
    return _figure(label, curves(label, lines, x_limits=(0.5, 1.0), y_limits=(0.0, 1.0), diagonal=True))


def exposure_figure(summary: dict[str, Any]) -> Figure | None:
    """The excess accumulated error (ExAccErr) by the length of the model's own text."""
    lines = [
        _system_line(name, [(p["upto"], p["value"]) for p in points])
        for name, points in (summary.get("exposure") or {}).items()
    ]
    label = Label(
        key="exposure",
        title="Exposure bias by length",
        about=(
            "The excess error (ExAccErr) that a model accumulates when it continues its own text instead of the"
            " teacher's. At zero there is none."
        ),
        x_title="length of its own text, tokens",
        y_title="excess error, %",
    )
    return _figure(label, curves(label, lines))


def _system_line(name: str, points: Sequence[tuple[float, float]]) -> Series:
    return Series(SHORT.get(name, name), points, STYLES.get(name, "grey"))


def token_class_figure(summary: dict[str, Any]) -> Figure | None:
    """The share of the total divergence per class of tokens, the largest first."""
    classes = (summary.get("by_token_class") or {}).items()
    ranked = sorted(classes, key=lambda item: -item[1]["share_of_loss"])[:MAX_CLASSES]
    rows = [(name, facts["share_of_loss"], percent(facts["share_of_loss"])) for name, facts in ranked]
    label = Label(
        key="classes",
        title="Share of the divergence by token class",
        about="How much of the student's total divergence falls on each class of tokens.",
        x_title="",
    )
    return _figure(label, bars(label, rows))


def forest_figures(
    metrics: Sequence[Metric], rows: dict[str, dict[str, Any]], names: dict[str, str], base: str
) -> list[Figure]:
    """A plot per metric that has a better side: every method's difference from the base."""
    figures = []
    for index, metric in enumerate(metrics):
        whiskers = [
            Whisker(
                label=names.get(method, method),
                value=x["value"],
                low=x["low"],
                high=x["high"],
                clear=is_clear(x, len(rows)),
            )
            for method, differences in rows.items()
            if (x := differences.get(metric.name))
        ]
        if metric.better == "none" or not whiskers:
            continue
        side = "left" if metric.better == "low" else "right"
        unit = f", {metric.unit}" if metric.unit else ""
        label = Label(
            key=f"forest-{index}",
            title=f"{metric.group}: {metric.title}" if metric.group else metric.title,
            about=f"Difference from {base} with its 95 % interval. Better is to the {side}. Filled points are clear.",
            x_title=f"difference{unit} ({'← better' if side == 'left' else 'better →'})",
        )
        figures.append(Figure(label.title, forest(label, whiskers), ""))
    return figures


def pareto_figures(comparison: dict[str, Any], metric: Metric, names: dict[str, str]) -> list[Figure]:
    """Quality against each cost that differs between methods. A line joins the methods that no other beats on both."""
    figures = []
    better = "lower" if metric.better == "low" else "higher"
    for key, (title, unit, factor) in COSTS.items():
        spots = _pareto_spots(comparison, metric, names, (key, factor))
        if len({spot.x for spot in spots}) < 2:
            continue
        values = "; ".join(f"{spot.label}: {number(float(spot.x))} {unit}, {number(spot.y)}" for spot in spots)
        label = Label(
            key=f"pareto-{key}",
            title=f"{metric.title} by {title.lower()}",
            about=(
                f"{metric.title} ({better} is better) by {unit}. The line joins the methods that no other method beats"
                f" on both. {values}."
            ),
            x_title=unit,
            y_title=f"{metric.title}, {better} is better",
        )
        frontier = [(spot.x, spot.y) for spot in spots if spot.strong]
        caption = "The line joins the methods that no other method beats on both. Bars are 95 % intervals."
        figures.append(Figure(label.title, scatter(label, spots, frontier), caption))
    return figures


def _pareto_spots(
    comparison: dict[str, Any], metric: Metric, names: dict[str, str], cost_and_factor: tuple[str, float]
) -> list[Spot]:
    """A spot per method whose cost and quality are known; those on the Pareto frontier are strong."""
    key, factor = cost_and_factor
    methods = []
    for method, cost in (comparison.get("cost") or {}).items():
        quality = comparison["systems"].get(method, {}).get(metric.name)
        if quality and cost.get(key) is not None:
            methods.append((names.get(method, method), cost[key] * factor, quality))
    sign = 1 if metric.better == "low" else -1
    points = [(x, sign * quality["value"]) for _, x, quality in methods]
    return [
        Spot(
            label=name,
            x=x,
            y=quality["value"],
            low=quality["low"],
            high=quality["high"],
            strong=not _is_beaten((x, sign * quality["value"]), points),
        )
        for name, x, quality in methods
    ]


def _is_beaten(point: tuple[float, float], others: Iterable[tuple[float, float]]) -> bool:
    """Is another point at least as low in both numbers, and lower in one?"""
    return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in others)


def _figure(label: Label, svg: str) -> Figure | None:
    return Figure(label.title, svg, label.about) if svg else None
