"""Limbeck distils large language models: elicit what a teacher knows, train a student on it, prove what was kept."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.config.recipe import Recipe, load_recipe
    from limbeck.objectives.on_logits import divergence
    from limbeck.progress import PrintingReporter, StoppedError
    from limbeck.runs.catalogue import methods
    from limbeck.runs.preflight import check
    from limbeck.runs.public import compare, load_model, load_run, run
    from limbeck.runs.result import ComparisonResult, RunResult
    from limbeck.types import RecipeError, UserError

__version__ = "0.1.0"
__all__ = [
    "ComparisonResult",
    "PrintingReporter",
    "Recipe",
    "RecipeError",
    "RunResult",
    "StoppedError",
    "UserError",
    "check",
    "compare",
    "divergence",
    "load_model",
    "load_recipe",
    "load_run",
    "methods",
    "run",
]

_HOMES = {
    "ComparisonResult": "limbeck.runs.result",
    "PrintingReporter": "limbeck.progress",
    "Recipe": "limbeck.config.recipe",
    "RecipeError": "limbeck.types",
    "RunResult": "limbeck.runs.result",
    "StoppedError": "limbeck.progress",
    "UserError": "limbeck.types",
    "check": "limbeck.runs.preflight",
    "compare": "limbeck.runs.public",
    "divergence": "limbeck.objectives.on_logits",
    "load_model": "limbeck.runs.public",
    "load_recipe": "limbeck.config.recipe",
    "load_run": "limbeck.runs.public",
    "methods": "limbeck.runs.catalogue",
    "run": "limbeck.runs.public",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import limbeck` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
