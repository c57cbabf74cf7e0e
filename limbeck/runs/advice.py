"""What `check` says beside its figures: a server's time, a judge that is the student, and what speaks against so short
or so long a training. And what a comparison says of settings that it does not use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe
from limbeck.config.significance import LEAST_STEPS
from limbeck.elicit.step import AskingStep, ElicitStep
from limbeck.types import STUDENTS

LEAST_EPOCHS = 0.8  # the estimate of the text's length may be off by so much
MOST_EPOCHS = 10
LITTLE_TEXT = 100_000  # tokens
JUDGING = ("compare", "rate", "referee", "rubric", "soft_preference")  # steps whose model says what answers are worth


def served_time(recipe: Recipe, requests: int, tokens: int) -> dict[str, str]:
    """What can be said of the time that the teacher's server takes: what its rates allow at best."""
    server = recipe.teacher.server
    if server is None:
        return {}
    if server.batch:
        return {"elicit": "unknown: a batch may take the provider a day"}
    rates = [
        amount / rate
        for amount, rate in ((requests, server.requests_per_minute), (tokens, server.tokens_per_minute))
        if rate is not None
    ]
    if rates:
        return {"elicit": f"at least {max(rates):.1f} min by teacher.server's rates; the rest depends on the server"}
    each = requests / server.concurrency
    return {
        "elicit": f"unknown: depends on the server ({requests:,} requests, {server.concurrency} at once: {each:,.0f}"
        " times what one takes there)"
    }


def judge_cautions(
    recipe: Recipe, steps: Sequence[tuple[str, ElicitStep]], judges: Sequence[tuple[str, AskingStep]]
) -> tuple[str, ...]:
    """That a judge is the student itself, with its place in the recipe.

    Args:
        steps: of the elicitation, by name.
        judges: (its place, the step that it judges by) of each reward by a judge.
    """
    placed = [(f"elicit[{number}].{name}", step) for number, (name, step) in enumerate(steps) if name in JUDGING]
    return tuple(
        f"{place}: {by} is the student itself, and a judge favours its own manner of writing: look at the lengths on"
        " the page, and at how many of the answers are its own, or name another model"
        for place, step in (*placed, *judges)
        for by in step.asks()
        if _is_student(recipe, by)
    )


def _is_student(recipe: Recipe, by: str) -> bool:
    """Whether a model, by its name in the recipe, has the weights that the student starts with or had before."""
    model = (
        recipe.teacher.model
        if by == TEACHER
        else (recipe.models or {})[by].model
        if by in (recipe.models or {})
        else None
    )
    return by in STUDENTS or (model is not None and model in (recipe.student.start.pretrained, recipe.previous))


def training_cautions(recipe: Recipe, steps: int, epochs: float, tokens: int) -> tuple[str, ...]:
    """What speaks against so short, or so long, a training, with the numbers and the remedy."""
    settings = recipe.train
    found = []
    if steps < LEAST_STEPS:
        counted = f"{steps} step" if steps == 1 else f"{steps} steps"
        found.append(
            f"about {counted}: in fewer than {LEAST_STEPS} a student hardly leaves its start; give more prompts,"
            f" more train.epochs, or less train.tokens_per_step than {settings.tokens_per_step:,}"
        )
    if recipe.written_share >= 0.5:  # the student writes anew at every step, so no text is read again
        return tuple(found)
    if epochs < LEAST_EPOCHS:
        found.append(
            f"the steps read about {epochs:.0%} of the text: the rest is paid for and never trained on; set"
            " train.epochs: 1, or more train.steps"
        )
    if epochs > MOST_EPOCHS and tokens < LITTLE_TEXT:
        found.append(
            f"about {tokens:,} tokens are read {epochs:.0f} times: so little text is learnt by heart; give more"
            f" prompts, or {'fewer train.steps' if settings.steps else 'fewer train.epochs'}"
        )
    return tuple(found)


def replaced_settings(recipe: Recipe, like: Recipe) -> list[str]:
    """A recipe's own settings of student and training that a comparison does not use, and what of `like` it uses."""
    own, common = (
        {name: part for name, part in of.resolved().items() if name in ("student", "train")} for of in (recipe, like)
    )
    used = dict(_leaves(common))
    return [
        f"{recipe.name}: {place} {value} is not used" + (f", {used[place]} of {like.name} is" if place in used else "")
        for place, value in _leaves(own)
        if used.get(place) != value
    ]


def _leaves(settings: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of every setting that has no settings of its own."""
    if not isinstance(settings, dict):
        yield place, settings
        return
    for key, part in settings.items():
        yield from _leaves(part, f"{place}.{key}" if place else key)
