"""Accuracy against the tokens that it cost: a figure for every task measured at several budgets of thinking."""

from __future__ import annotations

from typing import Any

from limbeck.report.figures import SHORT, STYLES, Figure
from limbeck.report.metrics import number
from limbeck.report.plots import Label, Series, curves

QUALITIES = {"pass_rate": "pass rate", "rouge_l": "ROUGE-L"}  # the first that is there is drawn


def budget_figures(summary: dict[str, Any]) -> list[Figure]:
    """A line per system through its points, one for each budget."""
    figures = [
        _budget_figure(summary["systems"], task, thinking)
        for task, facts in (summary.get("tasks") or {}).items()
        if (thinking := (facts.get("settings") or {}).get("thinking")) and thinking.get("budgets")
    ]
    return [figure for figure in figures if figure is not None]


def _budget_figure(systems: dict[str, Any], task: str, thinking: dict[str, Any]) -> Figure | None:
    budgets = thinking["budgets"]
    for metric, title in QUALITIES.items():
        lines, words = [], []
        for system, values in systems.items():
            pairs = [(values.get(f"{task}/tokens@{most}"), values.get(f"{task}/{metric}@{most}")) for most in budgets]
            known = [(spent["value"], quality) for spent, quality in pairs if spent and quality]
            points = [(spent, quality["value"]) for spent, quality in known]
            intervals = [(quality["low"], quality["high"]) for _, quality in known]
            if points:
                name = SHORT.get(system, system)
                lines.append(Series(name, points, STYLES.get(system, "grey"), intervals))
                words.append(f"{name}: {', '.join(f'{number(x)} tokens, {number(y)}' for x, y in points)}")
        label = Label(
            key=f"budgets-{task}",
            title=f"{task}: {title} by tokens spent",
            about=(
                f"The {title} at budgets of {', '.join(map(str, budgets))} tokens of thinking, by the mean number of"
                f" tokens that a system wrote (thinking and answer). {'; '.join(words)}."
            ),
            x_title="tokens written, mean per answer",
            y_title=title,
        )
        if svg := curves(label, lines, y_limits=(0.0, 1.0)):
            waits = f" Ends of thinking were taken away {thinking['waits']} times." if thinking.get("waits") else ""
            return Figure(label.title, svg, f"A point for each budget of thinking. Bars are 95 % intervals.{waits}")
    return None
