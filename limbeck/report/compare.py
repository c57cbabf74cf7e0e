"""The content of a comparison's page, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.report import figures, grids
from limbeck.report.excerpt import read_excerpt
from limbeck.report.glance import worth_grid
from limbeck.report.metrics import LABELS, headline, label, metrics_of
from limbeck.report.rollouts import own_text_grid
from limbeck.report.table import paired_table, systems_tables
from limbeck.report.teacher import teacher_facts
from limbeck.report.verdict import against_base, compare_verdict
from limbeck.report.worth import compared_worth

MAX_COLUMNS = 6


def comparison_content(folder: Path, comparison: dict[str, Any]) -> dict[str, Any]:
    """The variables of `compare.html.jinja`.

    Args:
        folder: the comparison folder; its `evaluation` may have answers of METHOD-sSEED, teacher and untouched.
        comparison: its `comparison.json`.
    """
    names = {name: label(name) for name in comparison["systems"]}
    rows = against_base(comparison)
    metrics = metrics_of(comparison)
    metric = headline(metrics, rows.values()) or headline(metrics, comparison["systems"].values())
    base = names.get(comparison["base"], comparison["base"])
    against, differences = paired_table(comparison)
    curves = [figures.calibration_figure(comparison), figures.exposure_figure(comparison)]
    runs = _runs(comparison, names)
    excerpt = read_excerpt(folder / "evaluation", ["teacher", "untouched", *runs])
    shown = _shown(comparison, excerpt.systems if excerpt else [])
    return {
        "comparison": comparison,
        "names": names | LABELS | runs,
        "base": base,
        "verdict": compare_verdict(comparison),
        "methods": grids.methods_grid(comparison),
        "tables": systems_tables(comparison),
        "against": against,
        "differences": differences,
        "forests": figures.forest_figures(list(metrics.values()), rows, names, base),
        "pareto": figures.pareto_figures(comparison, metric, names) if metric else [],
        "robustness": grids.robustness_grid(comparison, names),
        "wording": grids.wording_grid(comparison, names),
        "curves": [figure for figure in curves if figure],
        "kinds": grids.kinds_grid(comparison, next(iter(rows), comparison["base"]), names),
        "seeds": grids.seeds_grid(comparison, metric, names),
        "spent": grids.spent_grid(comparison, names),
        "worth": worth_grid(comparison, compared_worth(folder, comparison)),
        "own_text": own_text_grid(comparison, names),
        "efficiency": grids.efficiency_grid(comparison, names),
        "held_out": comparison.get("held_out") or {},
        "cards": _cards(comparison),
        "source": grids.facts(comparison.get("machine") or {}),
        "excerpt": excerpt,
        "shown": shown,
        "subject": next(
            (name for name in shown if name in runs and not name.startswith(f"{comparison['base']}-s")), shown[-1:]
        ),
    }


def _runs(comparison: dict[str, Any], names: dict[str, str]) -> dict[str, str]:
    """The titles of the systems in the answer files, METHOD-sSEED."""
    methods = comparison.get("methods") or comparison.get("by_seed") or {}
    return {
        f"{method}-s{seed}": f"{names.get(method, method)}, seed {seed}"
        for method in methods
        for seed in comparison.get("seeds", [])
    }


def _shown(comparison: dict[str, Any], systems: list[str]) -> list[str]:
    """The columns shown at first: the teacher, and each method with its first seed."""
    endings = tuple(f"-s{seed}" for seed in comparison.get("seeds", [])[:1])
    first = [name for name in systems if name == "teacher" or name.endswith(endings)]
    return (first or systems)[:MAX_COLUMNS]


def _cards(comparison: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Cards with the settings that all methods share, the held-out text, and each task's settings."""
    settings = comparison.get("settings") or {}
    teacher = teacher_facts(settings.get("teacher"))
    rest = {key: value for key, value in settings.items() if key != "teacher" or not teacher}
    cards = [(title, facts) for title, facts in (("Teacher", teacher), ("Common settings", grids.facts(rest))) if facts]
    if comparison.get("held_out"):
        cards.append(("Held-out text", grids.facts(comparison["held_out"])))
    return cards + [(f"Task {name}", grids.facts(task)) for name, task in (comparison.get("tasks") or {}).items()]
