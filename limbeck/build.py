"""From a recipe's words to concrete things: the only file that knows which class or function a name stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.builtin import recipe_files, task_folders
from limbeck.data import BEST, REST
from limbeck.elicit.prompts import Prompt, load_prompts
from limbeck.evaluate.perturb import perturbed
from limbeck.evaluate.tasks import Task, load_task
from limbeck.models.load import Model, load_model
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.match import MATCHES
from limbeck.objectives.parameters import defaults_of
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS
from limbeck.objectives.supervised import cross_entropy
from limbeck.objectives.term import CROSS_ENTROPY, Term, make_term
from limbeck.recipe import Recipe, load_recipe
from limbeck.types import NAME, RecipeError, UserError, content_hash, nearest

HELD_OUT_SHARE = 0.1
ROLLOUT_COLUMNS = {column for policy in POLICIES.values() for column in policy.reads}


def terms(recipe: Recipe) -> list[Term]:
    """The recipe's losses, their parameters checked."""
    built = [make_term(loss.name, loss.params, loss.weight, f"loss[{i}].{loss.name}") for i, loss in enumerate(recipe.loss)]
    labels = [term.label for term in built]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise RecipeError(
                f"loss[{index}]", f"{label} stands twice; give it once with the summed weight, or other text to each by `only`"
            )
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
    """The tasks named beside `fidelity`; `NAME@HOW` is the task NAME asked in another way."""
    found = []
    for name in (name for name in recipe.evaluate.metrics if name != "fidelity"):
        plain, _, how = name.partition("@")
        task = load_task(plain, recipe.evaluate.limit)
        found.append(perturbed(task, how) if how else task)
    if twice := {task.name for task in found if [other.name for other in found].count(task.name) > 1}:
        raise RecipeError("evaluate.metrics", f"the task {min(twice)} stands twice; leave one out")
    if len(found) == len(recipe.evaluate.metrics):
        raise RecipeError("evaluate.metrics", "fidelity is always measured, so list it")
    return found


def validate(recipe: Recipe) -> None:
    """Everything that can be refused before a model is loaded.

    Raises:
        RecipeError: a term that reads what no writer or teacher gives, an unknown task, prompts that aren't there.
    """
    _check_writers(recipe)
    training, _ = prompts(recipe)
    for index, term in enumerate(terms(recipe)):
        _check_evidence(recipe, term, training, f"loss[{index}].{term.name}")
    trained = {prompt.text for prompt in training}
    for task in tasks(recipe):
        if leak := [name for name, text in task.texts if text in trained]:
            raise RecipeError("evaluate.metrics", f"{len(leak)} items of the task {task.name} are training prompts too, such as {leak[0]}")
    if "gold_control" in recipe.evaluate.controls and not any(prompt.answers for prompt in training):
        raise RecipeError("evaluate.controls", "gold_control needs an answer beside the training prompts, and none has one; leave it out")
    if any(writer.by == "corpus" for writer in recipe.writer):
        for prompt in training:
            if not prompt.answers:
                raise RecipeError("writer", f"a corpus writer needs an answer beside every prompt; {prompt.id!r} has none")


def _all_answer(recipe: Recipe) -> bool:
    """Whether every prompt goes to all writers."""
    return len(recipe.writer) > 1 and all(writer.share == 1 for writer in recipe.writer)


def _check_writers(recipe: Recipe) -> None:
    """Refuse text by the untouched student alone where something needs other text."""
    others = [writer for writer in recipe.writer if writer.by != "untouched"]
    prune = recipe.student.start.prune
    if not others and prune is not None and prune.keep in ("importance", "block_influence"):
        raise RecipeError("writer", f"prune.keep: {prune.keep} is judged on others' text; add a writer, or set keep: uniform")
    none_preferred = not others or (_all_answer(recipe) and recipe.writer[0].by == "untouched")
    if {"sft_control", "shuffled_control"} & set(recipe.evaluate.controls) and none_preferred:
        raise RecipeError("evaluate.controls", "fine-tuning needs preferred text of a teacher or corpus; set controls: [untouched]")


def _check_evidence(recipe: Recipe, term: Term, training: Sequence[Prompt], path: str) -> None:
    """Refuse a term whose evidence no writer, prompt or teacher gives."""
    writers = {writer.by for writer in recipe.writer}
    several = _all_answer(recipe) or any(len(prompt.answers) > 1 for prompt in training)
    tags = writers | {prompt.task for prompt in training if prompt.task} | ({BEST, REST} if several else {BEST})
    if term.only is not None and term.only not in tags:
        raise RecipeError(f"{path}.only", f"no text is by or for {term.only!r}{nearest(term.only, tags)}")
    if rollout := sorted(term.reads & ROLLOUT_COLUMNS):
        raise RecipeError(path, f"{term.name} reads {rollout[0]} of text that the student writes while training; no writer does that yet")
    poor = "untouched" in writers or ("corpus" in writers and any(len(prompt.answers) > 1 for prompt in training))
    if term.name == CROSS_ENTROPY and term.only is None and poor:
        raise RecipeError(path, "it would also fit answers that are not preferred, or the student's own; limit it, such as {only: best}")
    if "answers" not in term.reads:
        return
    ranked = writers == {"corpus"} and all(len(prompt.answers) > 1 for prompt in training)
    if not (_all_answer(recipe) or ranked):
        raise RecipeError(
            path,
            f"{term.name} compares answers to one prompt, and here every prompt has one: let all writers answer every prompt (leave their "
            "shares out, the preferred writer first), or give a corpus with `answers` or `chosen` and `rejected`",
        )


def methods() -> dict[str, Any]:
    """What can be named in a recipe: divergences, other losses, built-in recipes and tasks."""
    recipes = {name: load_recipe(path) for name, path in recipe_files().items()}
    return {
        "divergences": _listed(DIVERGENCES),
        "losses": {
            CROSS_ENTROPY: {"formula": "-log q(token)", "paper": "", "parameters": defaults_of(cross_entropy)},
            **_listed(RANKINGS),
            **{name: {"formula": kind.formula, "paper": kind.paper, "parameters": dict(kind.defaults)} for name, kind in MATCHES.items()},
            **{name: facts | {"needs": "text that the student writes; no writer does yet"} for name, facts in _listed(POLICIES).items()},
        },
        "recipes": {name: {"title": recipe.title, "paper": recipe.paper} for name, recipe in recipes.items()},
        "tasks": sorted(task_folders()),
    }


def _listed(known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"formula": loss.formula, "paper": loss.paper, "parameters": loss.defaults} for name, loss in sorted(known.items())}


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Where a run lives: `--out`, else runs/NAME."""
    if out is None and not NAME.fullmatch(recipe.name):
        raise UserError(f"the recipe's name {recipe.name!r} can't be a folder's name; give --out")
    return Path(out) if out is not None else Path("runs") / recipe.name
