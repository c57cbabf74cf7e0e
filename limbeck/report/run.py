"""The content of a run's page, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.config.yaml_text import dump_yaml, read_yaml
from limbeck.report import figures, grids
from limbeck.report.budgets import budget_figures
from limbeck.report.elicited import elicitation_section
from limbeck.report.excerpt import read_excerpt
from limbeck.report.glance import example, glance_grid, price_note, worth_facts, worth_figure, worth_grid
from limbeck.report.judge import judge_section
from limbeck.report.labels import label_sections
from limbeck.report.metrics import LABELS, label
from limbeck.report.rollouts import own_texts
from limbeck.report.table import paired_table, systems_tables
from limbeck.report.teacher import teacher_aside, teacher_facts, teacher_name
from limbeck.report.verdict import verdict
from limbeck.report.worth import worth
from limbeck.storage.files import read_object
from limbeck.types import ANSWER_ENDS


def run_content(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The variables of `run.html.jinja`. Missing files and keys make a shorter page, not an error.

    Args:
        folder: the run folder, with `recipe.yaml`.
        summary: its `evaluation/summary.json`.
    """
    recipe = read_yaml(folder / "recipe.yaml")
    against, differences = paired_table(summary)
    curves = [make(summary) for make in (figures.calibration_figure, figures.exposure_figure)]
    curves.append(figures.preference_figure(summary))
    sizes = {
        name: size
        for name, size in (summary.get("efficiency") or summary.get("sizes") or {}).items()
        if size.get("parameters")
    }
    return _worth(folder, summary, recipe) | {
        "recipe": recipe,
        "recipe_text": dump_yaml(recipe),
        "teacher": teacher_name(recipe.get("teacher")),
        "teacher_aside": teacher_aside(recipe.get("teacher")),
        "summary": summary,
        "names": {name: label(name) for name in summary["systems"]} | LABELS,
        "sizes": sizes,
        "verdict": verdict(summary),
        "labels": label_sections(folder, summary),
        "pairs": grids.pairs_grid(summary),
        "tables": systems_tables(summary),
        "against": against,
        "differences": differences,
        "judge": judge_section(summary),
        "robustness": grids.robustness_grid(summary, {}),
        "wording": grids.wording_grid(summary, {}),
        "curves": [figure for figure in curves if figure],
        "budgets": budget_figures(summary),
        "kinds": grids.kinds_grid(summary, "student", {}),
        "classes": grids.classes_grid(summary),
        "class_figure": figures.token_class_figure(summary),
        "elicited": elicitation_section(folder),
        "losses": figures.loss_figures(folder),
        "training": grids.training_grid(folder),
        "own_texts": own_texts(folder),
        "drops": _json(folder / "start.json").get("drops", []),
        "efficiency": grids.efficiency_grid(summary, {}),
        "held_out": summary.get("held_out") or {},
        "cards": _cards(folder, summary, recipe),
        "source": _source(folder, summary),
        "excerpt": (excerpt := read_excerpt(folder / "evaluation", list(LABELS), summary["systems"])),
        "shown": (
            [name for name in LABELS if excerpt and name in excerpt.systems] or (excerpt.systems[:4] if excerpt else [])
        ),
        "subject": "student",
    }


def _worth(folder: Path, summary: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The first screen and the part on worth."""
    found = worth(folder, summary, recipe)
    figure = worth_figure(found)
    return {
        "glance": glance_grid(summary, found),
        "example": example(folder, summary),
        "worth": worth_grid(summary, found),
        "worth_facts": worth_facts(found),
        "worth_figures": [figure] if figure else [],
        "price_note": price_note(found),
    }


def _cards(folder: Path, summary: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Cards about the teacher, the training prompts, how answers ended, the bridge, what the server said of its
    text, its bill, the held-out text and each task."""
    cards = [("Teacher", facts)] if (facts := teacher_facts(recipe.get("teacher"))) else []
    for name, model in (recipe.get("models") or {}).items():
        cards.append((f"Model {name}", grids.facts(model)))
    if isinstance(recipe.get("prompts"), dict):
        cards.append(("Training prompts", grids.facts(recipe["prompts"])))
    if notes := _json(folder / "prompts.json").get("notes"):
        cards.append(("Files of prompts", [(f"file {number}", note) for number, note in enumerate(notes, 1)]))
    for part, ends in _json(folder / "answers.json").items():
        cards.append((f"Answers: {part}", [(ANSWER_ENDS.get(end, end), f"{count:,}") for end, count in ends.items()]))
    if bridge := _json(folder / "bridge.json"):
        cards.append(("Bridge between the vocabularies", grids.facts(bridge)))
    if told := _json(folder / "logprobs.json"):
        cards.append(("Log-probabilities that came with the server's text", grids.facts(told)))
    if summary.get("bill"):
        cards.append(("Bill of the teacher's server", grids.facts(summary["bill"])))
    for name, costs in (summary.get("bills") or {}).items():
        cards.append((f"Bill of the server of {name}", grids.facts(costs)))
    if summary.get("held_out"):
        cards.append(("Held-out text", grids.facts(summary["held_out"])))
    return cards + [(f"Task {name}", grids.facts(task)) for name, task in (summary.get("tasks") or {}).items()]


def _source(folder: Path, summary: dict[str, Any]) -> list[tuple[str, str]]:
    inputs = [(f"input: {name}", value) for name, value in grids.facts(_json(folder / "inputs.json"))]
    return [("recipe hash", str(summary.get("recipe", ""))), *inputs, *grids.facts(summary.get("machine") or {})]


def _json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}
