"""The elicitation section of a report: what each step read, produced and left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.grids import Grid
from limbeck.report.metrics import number, percent
from limbeck.storage.metrics_log import read_json
from limbeck.types import ANSWER_ENDS

MAX_REASONS = 12


@dataclass(frozen=True)
class ElicitationSection:
    """A summary, a table with a row per step, what each step left out as (step, [(reason, count, examples)]), and
    other numbers per step."""

    summary: str
    grid: Grid
    left_out: list[tuple[str, list[tuple[str, str, list[str]]]]]
    facts: list[tuple[str, list[tuple[str, str]]]]


def elicitation_section(folder: Path) -> ElicitationSection | None:
    """The section on `elicitation.json`; None if the recipe has no elicitation steps."""
    elicitation = read_json(folder / "elicitation.json")
    steps: list[dict[str, Any]] = elicitation["steps"] if elicitation else []
    if not steps:
        return None
    answers = {finish: sum(step["answers"].get(finish, 0) for step in steps) for finish in ANSWER_ENDS}
    total = sum(answers.values())
    kinds = ", ".join(f"{count:,} {ANSWER_ENDS[finish]}" for finish, count in answers.items() if count)
    models = (elicitation or {}).get("models") or {}
    asked = f"The writer{' and '.join(['', *models])} were" if models else "The writer was"
    summary = f"{asked} asked for {total:,} answers ({kinds})." if total else "No model was asked to write anything."
    summary += f" The steps turned {steps[0]['taken']:,} prompts into {steps[-1]['given']:,} samples."
    columns = [("Kind", ""), ("In", "samples"), ("Out", "samples"), ("Left out", ""), ("Answers", "requested")]
    rows = [
        (
            step["step"],
            [
                step["kind"],
                f"{step['taken']:,}",
                f"{step['given']:,}",
                _count(step["dropped"]),
                _count(step["answers"]),
            ],
        )
        for step in steps
    ]
    left_out = [(step["step"], _reasons(step)) for step in steps if step["dropped"]]
    facts = [
        (step["step"], [(name.replace("_", " "), number(value)) for name, value in step["facts"].items()])
        for step in steps
        if step["facts"]
    ]
    return ElicitationSection(summary, Grid("Step", columns, rows), left_out, facts)


def _count(counts: dict[str, int]) -> str:
    return f"{sum(counts.values()):,}"


def _reasons(step: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """A step's most frequent reasons, each with its share of everything the step left out."""
    total = sum(step["dropped"].values())
    ranked = sorted(step["dropped"].items(), key=lambda entry: (-entry[1], entry[0]))
    return [
        (reason, f"{count:,} ({percent(count / total)})", step.get("examples", {}).get(reason, []))
        for reason, count in ranked[:MAX_REASONS]
    ]
