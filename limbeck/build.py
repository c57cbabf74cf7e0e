"""From a recipe's words to concrete things: the only file that knows which class or function a name stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.builtin import recipe_files, task_folders
from limbeck.elicit.prompts import Prompt, load_prompts
from limbeck.evaluate.tasks import Task, load_task
from limbeck.models.load import Model, load_model
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.term import Term, make_term
from limbeck.recipe import Recipe, load_recipe
from limbeck.types import NAME, RecipeError, UserError, content_hash

HELD_OUT_SHARE = 0.1


def terms(recipe: Recipe) -> list[Term]:
    """The recipe's losses, their parameters checked."""
    built = [make_term(loss.name, loss.params, loss.weight, f"loss[{i}].{loss.name}") for i, loss in enumerate(recipe.loss)]
    names = [term.name for term in built]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RecipeError(f"loss[{index}]", f"{name} stands twice; give it once, with the sum of the weights")
    return built


def teacher(recipe: Recipe) -> InProcessTeacher:
    return InProcessTeacher(load_model(recipe.teacher))


def model(path: Path) -> Model:
    return load_model(str(path))


def prompts(recipe: Recipe) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), the two without a common text.

    Built-in prompts come with a held-out part. Of a user's own file every tenth or so is held out (by a hash of its
    text, so that it stays held out when lines are added), unless `evaluate.prompts` names another file.

    Raises:
        RecipeError: one of the two is empty, or a held-out prompt is among the training ones.
    """
    source, settings = recipe.prompts.source, recipe.evaluate
    training = load_prompts(source)
    if settings.prompts is not None:
        held_out = load_prompts(settings.prompts, part="test", path="evaluate.prompts")
    elif source.startswith("builtin/"):
        held_out = load_prompts(source, part="test")
    else:
        apart = [int(content_hash(prompt.text)[:8], 16) < HELD_OUT_SHARE * 16**8 for prompt in training]
        held_out = [prompt for prompt, out in zip(training, apart, strict=True) if out]
        training = [prompt for prompt, out in zip(training, apart, strict=True) if not out]
    training, held_out = training[: recipe.prompts.limit], held_out[: settings.limit]
    for part, path in ((training, "prompts"), (held_out, "evaluate.prompts")):
        if not part:
            raise RecipeError(path, "no prompt is left for this part; give more prompts, or a file under evaluate.prompts")
    if both := {prompt.text for prompt in training} & {prompt.text for prompt in held_out}:
        raise RecipeError("evaluate.prompts", f"{len(both)} held-out prompts are training prompts too, such as {min(both)!r}")
    return training, held_out


def tasks(recipe: Recipe) -> list[Task]:
    """The tasks named beside `fidelity`."""
    found = [load_task(name, recipe.evaluate.limit) for name in recipe.evaluate.metrics if name != "fidelity"]
    if len(found) == len(recipe.evaluate.metrics):
        raise RecipeError("evaluate.metrics", "fidelity is always measured, so list it")
    return found


def validate(recipe: Recipe) -> None:
    """Everything that can be refused before a model is loaded.

    Raises:
        RecipeError: a term that reads what no writer or teacher gives, an unknown task, prompts that aren't there.
    """
    terms(recipe)
    training, _ = prompts(recipe)
    trained = {prompt.text for prompt in training}
    for task in tasks(recipe):
        if leak := [prompt.id for prompt in task.prompts if prompt.text in trained]:
            raise RecipeError(
                "evaluate.metrics", f"{len(leak)} prompts of the task {task.name} are training prompts too, such as {leak[0]}"
            )
    if any(writer.by == "corpus" for writer in recipe.writer):
        for prompt in training:
            if prompt.answer is None:
                raise RecipeError("writer", f"a corpus writer needs an answer beside every prompt; {prompt.id!r} has none")


def methods() -> dict[str, Any]:
    """What can be named in a recipe: divergences, other losses, built-in recipes and tasks."""
    recipes = {name: load_recipe(path) for name, path in recipe_files().items()}
    return {
        "divergences": {
            name: {"formula": d.formula, "paper": d.paper, "parameters": d.defaults} for name, d in sorted(DIVERGENCES.items())
        },
        "losses": {"cross_entropy": {"formula": "-log q(token)", "paper": "", "parameters": {}}},
        "recipes": {name: {"title": recipe.title, "paper": recipe.paper} for name, recipe in recipes.items()},
        "tasks": sorted(task_folders()),
    }


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Where a run lives: `--out`, else runs/NAME."""
    if out is None and not NAME.fullmatch(recipe.name):
        raise UserError(f"the recipe's name {recipe.name!r} can't be a folder's name; give --out")
    return Path(out) if out is not None else Path("runs") / recipe.name
