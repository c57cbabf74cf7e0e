"""What the steps of elicitation took, gave and left out, as a report shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.grids import Grid
from limbeck.report.metrics import number, percent
from limbeck.storage.metrics_log import read_json

FINISHES = {
    "ok": "whole",
    "length": "cut off",
    "empty": "empty",
    "filtered": "filtered by the server",
    "malformed": "malformed",
    "refused": "refused",
    "error": "failed",
}
MOST_REASONS = 12


@dataclass(frozen=True)
class Elicited:
    """A sentence, a row per step, and what was left out: (step, [(reason, how many, examples)])."""

    told: str
    grid: Grid
    left_out: list[tuple[str, list[tuple[str, str, list[str]]]]]
    facts: list[tuple[str, list[tuple[str, str]]]]


def elicited(folder: Path) -> Elicited | None:
    """What `elicitation.json` says; None where the recipe has no steps."""
    account = read_json(folder / "elicitation.json")
    steps: list[dict[str, Any]] = account["steps"] if account else []
    if not steps:
        return None
    answers = {finish: sum(step["answers"].get(finish, 0) for step in steps) for finish in FINISHES}
    asked = sum(answers.values())
    kinds = ", ".join(f"{count:,} {FINISHES[finish]}" for finish, count in answers.items() if count)
    told = f"{asked:,} answers were asked of the writer ({kinds})." if asked else "Nothing was asked of a model."
    told += f" Of {steps[0]['taken']:,} given prompts the steps made {steps[-1]['given']:,} samples."
    columns = [("Kind", ""), ("In", "samples"), ("Out", "samples"), ("Left out", ""), ("Answers", "asked for")]
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
    return Elicited(told, Grid("Step", columns, rows), left_out, facts)


def _count(counts: dict[str, int]) -> str:
    return f"{sum(counts.values()):,}"


def _reasons(step: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """The reasons of one step, the most frequent first, each with its share of all that was left out there."""
    total = sum(step["dropped"].values())
    ranked = sorted(step["dropped"].items(), key=lambda entry: (-entry[1], entry[0]))
    return [
        (reason, f"{count:,} ({percent(count / total)})", step.get("examples", {}).get(reason, []))
        for reason, count in ranked[:MOST_REASONS]
    ]
