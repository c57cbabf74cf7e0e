"""What a recipe can name: `limbeck methods`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.config.builtin import recipe_files, task_folders
from limbeck.config.recipe import load_recipe
from limbeck.elicit.steps import STEPS
from limbeck.objectives import consistency, dual
from limbeck.objectives.consistency import CONSISTENCY
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.match import MATCHES
from limbeck.objectives.parameters import defaults_of
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS
from limbeck.objectives.supervised import cross_entropy
from limbeck.objectives.term import CROSS_ENTROPY, make_term


def methods() -> dict[str, Any]:
    """What can be named in a recipe: divergences, other losses, steps of elicitation, built-in recipes and tasks."""
    recipes = {name: load_recipe(path) for name, path in recipe_files().items()}
    return {
        "divergences": _listed(DIVERGENCES),
        "losses": {
            CROSS_ENTROPY: {"formula": "-log q(token)", "paper": "", "parameters": defaults_of(cross_entropy)},
            **_listed(RANKINGS),
            CONSISTENCY: {
                "formula": consistency.FORMULA,
                "paper": consistency.PAPER,
                "parameters": consistency.DEFAULTS,
            },
            dual.DUAL_SPACE: {"formula": dual.FORMULA, "paper": dual.PAPER, "parameters": dual.DEFAULTS},
            **{
                name: {"formula": kind.formula, "paper": kind.paper, "parameters": dict(kind.defaults)}
                for name, kind in MATCHES.items()
            },
            **{name: facts | {"needs": _needs(name)} for name, facts in _listed(POLICIES).items()},
        },
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


def _needs(policy: str) -> str:
    """What must be there for a policy gradient."""
    gradient = make_term(policy, {})
    unmet = gradient.reads & {"advantage", "reference_log_prob", "importance_weight"}
    return "rewards, which nothing gives yet" if unmet else "text that the student writes: a writer {by: student}"


def _listed(known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"formula": loss.formula, "paper": loss.paper, "parameters": loss.defaults}
        for name, loss in sorted(known.items())
    }
