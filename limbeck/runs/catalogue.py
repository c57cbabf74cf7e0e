"""Lists what a recipe can name, for `limbeck methods`."""

from __future__ import annotations

from typing import Any

from limbeck.config.builtin import recipe_files, task_folders
from limbeck.config.recipe import load_recipe
from limbeck.elicit.steps import STEPS
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.loss import Loss
from limbeck.objectives.registry import LOSSES


def methods() -> dict[str, Any]:
    """All that a recipe can name: divergences, other losses, steps of elicitation, built-in recipes and tasks."""
    recipes = {name: load_recipe(path) for name, path in recipe_files().items()}
    losses = dict(sorted(LOSSES.items()))
    return {
        "divergences": {name: _loss(loss) for name, loss in losses.items() if name in DIVERGENCES},
        "losses": {name: _loss(loss) for name, loss in losses.items() if name not in DIVERGENCES},
        "steps": {name: _step(step) for name, step in sorted(STEPS.items())},
        "recipes": {name: {"title": recipe.title, "paper": recipe.paper} for name, recipe in recipes.items()},
        "tasks": sorted(task_folders()),
    }


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
