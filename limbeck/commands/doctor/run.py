"""Look for faults that silently ruin a distillation, before any training: one finding per check, with its remedy.

The teacher is loaded and gets a few short texts; nothing is trained or written. If the run folder already has text and
a cache, those are checked too. Not covered: whether the teacher is any good, and faults that only longer texts show.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.commands.doctor.cache import check_cache
from limbeck.commands.doctor.patient import DoubtfulError, NothingToCheckError, Patient
from limbeck.commands.doctor.teacher import (
    check_repeatable,
    check_served_weights,
    check_server,
    check_weights,
    check_zero,
)
from limbeck.commands.doctor.text import check_bridge, check_content, check_end_of_answer, check_recipe, check_tokens
from limbeck.config.recipe import Recipe
from limbeck.runs.claim import run_folder
from limbeck.types import UserError

CHECKS: dict[str, Callable[[Patient], str]] = {
    "recipe": check_recipe,
    "weights": check_weights,
    "tokens": check_tokens,
    "bridge": check_bridge,
    "content": check_content,
    "end of an answer": check_end_of_answer,
    "repeatable": check_repeatable,
    "server": check_server,
    "served weights": check_served_weights,
    "cache": check_cache,
    "zero at the teacher": check_zero,
}
LAST_IF_FAULTY = ("recipe", "weights")  # a fault in these makes the other checks impossible


@dataclass(frozen=True)
class Finding:
    """The result of one check. `detail` says what was found, and for a warning or a fault its remedy."""

    name: str
    verdict: Literal["fine", "warning", "fault", "not looked at"]
    detail: str


def examine(
    recipe: Recipe, out: str | Path | None = None, on_check: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Run all checks; of a recipe with rounds, on the first, or on the training before them.

    Args:
        out: the run folder, whose text and cache are checked if they are there; by default runs/NAME.
        on_check: called with each check's name before it starts.
    """
    with tempfile.TemporaryDirectory(prefix="limbeck-doctor-") as scratch:
        first = recipe if recipe.rounds is None else recipe.of_round(0 if recipe.rounds.first else 1, None)
        return _findings(Patient(first, run_folder(recipe, out), Path(scratch)), on_check)


def _findings(patient: Patient, on_check: Callable[[str], None]) -> list[Finding]:
    """One finding per check, up to a fault that makes the other checks impossible."""
    findings = []
    for name, check in CHECKS.items():
        on_check(name)
        try:
            findings.append(Finding(name, "fine", check(patient)))
        except NothingToCheckError as reason:
            findings.append(Finding(name, "not looked at", str(reason)))
        except DoubtfulError as doubt:
            findings.append(Finding(name, "warning", str(doubt)))
        except UserError as error:
            findings.append(Finding(name, "fault", str(error)))
            if name in LAST_IF_FAULTY:
                break
    return findings


def as_data(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings and the number of faults as plain data."""
    rows = [{"name": finding.name, "verdict": finding.verdict, "seen": finding.detail} for finding in findings]
    return {"findings": rows, "faults": sum(finding.verdict == "fault" for finding in findings)}
