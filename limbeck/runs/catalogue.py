"""Lists what a recipe can name, for `limbeck methods`."""

from __future__ import annotations

import json
from typing import Any

from limbeck.config.builtin import evidence_file, recipe_files, task_folders
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.config.recipe_file import full_sizes
from limbeck.elicit.steps import STEPS
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.loss import Loss
from limbeck.objectives.registry import LOSSES


def methods() -> dict[str, Any]:
    """All that a recipe can name: divergences, other losses, steps of elicitation, built-in recipes and tasks."""
    recipes = {name: (load_recipe(path), full_sizes(path)) for name, path in recipe_files().items()}
    rows = _evidence()
    losses = dict(sorted(LOSSES.items()))
    return {
        "divergences": {name: _loss(loss) for name, loss in losses.items() if name in DIVERGENCES},
        "losses": {name: _loss(loss) for name, loss in losses.items() if name not in DIVERGENCES},
        "steps": {name: _step(step) for name, step in sorted(STEPS.items())},
        "recipes": {name: _recipe(*found, rows.get(name)) for name, found in recipes.items()},
        "tasks": sorted(task_folders()),
    }


def _evidence() -> dict[str, Any]:
    """What each recipe did when it last ran on real weights, by its name."""
    file = evidence_file()
    return dict(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.exists() else {}


def _recipe(recipe: Recipe, full: dict[str, Any] | None, row: dict[str, Any] | None) -> dict[str, Any]:
    """`full` is what `--scale full` sets, where that is known. `evidence` is a run of the recipe at a small size; it is
    stale where the recipe has changed since."""
    facts: dict[str, Any] = {"title": recipe.title, "paper": recipe.paper}
    if full is not None:
        facts["full"] = full
    if row is not None:
        facts["evidence"] = {key: value for key, value in row.items() if key not in ("recipe", "hash")}
        facts["evidence"]["of_this_version"] = row["hash"] == recipe.hash
    return facts


def _step(step: Any) -> dict[str, Any]:
    fields = step.model_fields.items()
    settings = {name: "required" if field.is_required() else field.default for name, field in fields}
    return {
        "kind": step.kind,
        "what": " ".join(step.__doc__.split()),
        "settings": settings,
        "needs": sorted(step.needs),
        "paper": step.paper,
    }


def _loss(loss: Loss) -> dict[str, Any]:
    needs = {"needs": loss.needs} if loss.needs else {}
    return {"formula": loss.formula, "paper": loss.paper, "parameters": dict(loss.defaults), **needs}
