"""Names of metrics and systems, which direction is better, and how numbers are written.

A summary describes its own metrics (`summary["metrics"]`). Those of older runs don't; they get the titles below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from limbeck.config.builtin import task_folders
from limbeck.config.significance import CLEAR_ITEMS, SIGNIFICANCE

LABELS = {
    "teacher": "Teacher",
    "untouched": "Student before training",
    "prompted": "Student before training, prompted",
    "sft_control": "Fine-tuning control",
    "gold_control": "Fine-tuning on gold",
    "shuffled_control": "Fine-tuning on shuffled answers",
    "longer": "Always the longer answer",
    "student": "Student",
}
FIDELITY = "Fidelity on held-out text"
# of summaries that don't say which metric of a task is its first
TASK_HEADLINES = ("pass_rate", "acc")
# of summaries that don't describe their metrics: what they could hold. New metrics are declared in evaluate/metrics.py
OLDEST = {
    "forward_kl": ("Forward KL", "nats a token", "low"),
    "reverse_kl": ("Reverse KL", "nats a token", "low"),
    "jsd": ("Jensen-Shannon", "nats, at most 0.69", "low"),
    "top1_agreement": ("Same first choice", "share of tokens", "high"),
    "perplexity": ("Perplexity", "teacher's text", "low"),
    "nll": ("Negative log-likelihood", "nats a token", "low"),
}


@dataclass(frozen=True)
class Metric:
    """One column of a table. `better` is "low", "high", or "none" if neither is better. `leads` is true of the first
    metric of a task."""

    name: str
    title: str
    unit: str
    better: str
    group: str
    leads: bool = False

    @property
    def task(self) -> str:
        """The task that it belongs to, or ""."""
        return self.name.rpartition("/")[0]


def metrics_of(summary: dict[str, Any]) -> dict[str, Metric]:
    """Every metric of a system or a paired difference: first those that the summary describes, in its order."""
    described = summary.get("metrics", {})
    tables = [*summary["systems"].values(), *summary.get("paired", {}).values()]
    present = dict.fromkeys(name for table in tables for name in table)
    order = dict.fromkeys(
        [*(name for name in described if name in present), *(name for name in OLDEST if name in present), *present]
    )
    return {name: _described(name, described[name]) if name in described else _named(name) for name in order}


def _described(name: str, facts: dict[str, str]) -> Metric:
    return Metric(
        name=name,
        title=facts.get("title", name),
        unit=facts.get("unit", ""),
        better=facts.get("better", "none"),
        group=facts.get("group", ""),
        leads=facts.get("role") == "headline" if "role" in facts else name.rpartition("/")[2] in TASK_HEADLINES,
    )


def _named(name: str) -> Metric:
    """A metric of an older summary. Of a task's metrics only the pass rate has a better side."""
    if name in OLDEST:
        title, unit, better = OLDEST[name]
        return Metric(name, title, unit, better, group=FIDELITY)
    task, _, measure = name.rpartition("/")
    better = "high" if measure == "pass_rate" else "none"
    title = name.replace("/", " ").replace("_", " ")
    group = f"Task {task}" if task else "Other"
    return Metric(name, title, "", better=better, group=group, leads=measure in TASK_HEADLINES)


def grouped(metrics: Iterable[Metric]) -> list[tuple[str, list[Metric]]]:
    """The metrics by group, both in order of appearance."""
    groups: dict[str, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(metric.group, []).append(metric)
    return list(groups.items())


def headline(metrics: dict[str, Metric], systems: Iterable[dict[str, Any]]) -> Metric | None:
    """The metric of a table or plot of one: of a task of the user's own, else forward KL, else the first one with a
    better side; measured for all `systems`."""
    tables = list(systems)
    measured = _measured(metrics, tables)
    own = [metric for metric in task_headlines(metrics, tables) if is_own_task(metric.task)]
    kl = [metric for metric in measured if metric.name == "forward_kl"]
    return next(iter([*own, *kl, *measured]), None)


def task_headlines(metrics: dict[str, Metric], systems: Iterable[dict[str, Any]]) -> list[Metric]:
    """One metric of every task that all `systems` were measured on: tasks of the user's own first, then built-in ones,
    then tasks that are asked in another way (TASK@HOW)."""
    by_task: dict[str, list[Metric]] = {}
    for metric in _measured(metrics, list(systems)):
        if metric.task:
            by_task.setdefault(metric.task, []).append(metric)
    tasks = sorted(by_task, key=lambda task: ("@" in task, not is_own_task(task)))
    return [next((metric for metric in by_task[task] if metric.leads), by_task[task][0]) for task in tasks]


def _measured(metrics: dict[str, Metric], systems: list[dict[str, Any]]) -> list[Metric]:
    return [
        metric
        for name, metric in metrics.items()
        if metric.better != "none" and all(system.get(name) for system in systems)
    ]


def is_own_task(task: str) -> bool:
    """Whether a task is the user's own: none of those that ship with Limbeck, however it is asked."""
    return bool(task) and task.partition("@")[0] not in _built_in_tasks()


@cache
def _built_in_tasks() -> frozenset[str]:
    return frozenset(task_folders())


def is_clear(difference: dict[str, Any], comparisons: int = 1) -> bool:
    """Is a difference clear: over CLEAR_ITEMS items or more, its interval excludes 0, and its p value (if any) is below
    LEVEL?

    Args:
        comparisons: how many differences are tested together. With more than one, only a difference with a
            Holm-adjusted p value can be clear.
    """
    if difference["low"] <= 0 <= difference["high"] or difference.get("n", CLEAR_ITEMS) < CLEAR_ITEMS:
        return False
    p = difference.get("p_holm", difference.get("p") if comparisons == 1 else None)
    return bool(p < SIGNIFICANCE) if p is not None else comparisons == 1


def mark(metric: Metric, difference: dict[str, Any], comparisons: int = 1) -> str:
    """Return "better", "worse" or "unclear"; "higher" or "lower" if neither direction is better."""
    if not is_clear(difference, comparisons):
        return "unclear"
    if metric.better == "none":
        return "higher" if difference["low"] > 0 else "lower"
    return "better" if (difference["high"] < 0) == (metric.better == "low") else "worse"


def label(name: str) -> str:
    return LABELS.get(name, name)


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """Write a number with so many decimals, a small one with two significant digits at least, so that it never reads as
    0; what is below a millionth is noise. With the sign "+" every number has one."""
    if 1e-6 <= abs(value) < 0.1:
        decimals = max(decimals, 1 - math.floor(math.log10(abs(value))))
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


def number(value: float) -> str:
    """Write a number with three decimals or more if it is small, none if it is large."""
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 20 else fixed(value, 3)


def signed(value: float) -> str:
    """Write a difference, with its sign."""
    return number(value) if value < 0 or not math.isfinite(value) else f"+{number(value)}"


def percent(share: float) -> str:
    """With decimals near 0 and 100: 99.6 % is not all, nor is 99.96 %."""
    gap = min(abs(share), abs(1 - share))
    if not 1e-6 < gap < 0.02:
        return f"{100 * share:,.0f} %"
    return f"{100 * share:.{max(1, -math.floor(math.log10(100 * gap)))}f} %"


def tenths(share: float) -> str:
    """Percent with one decimal, without the sign: 0.4 % of repetition is not none."""
    return f"{100 * share:.1f}"


def p_text(p: float | None) -> str:
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
