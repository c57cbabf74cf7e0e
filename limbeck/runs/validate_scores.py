"""Refuses what a student with a scalar head can't do: it gives a score of a conversation, and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.elicit.prompt import Prompt
from limbeck.evaluate.preference import PREFERENCE
from limbeck.models.teacher_interface import TeacherUse
from limbeck.types import RecipeError

UNTOUCHED = "untouched"


def check_scores(use: TeacherUse, held_out: Sequence[Prompt]) -> None:
    """Refuse a student with a scalar head whose recipe has it write or compares its text; and what is measured of
    scores alone for any other.

    Raises:
        RecipeError: the place in the recipe, and the remedy.
    """
    recipe = use.recipe
    evaluate = recipe.evaluate
    if not recipe.student.scores:
        if PREFERENCE in evaluate.metrics:
            raise RecipeError(
                "evaluate.metrics", f"{PREFERENCE} is measured of a student that gives scores: set student.head: scalar"
            )
        return
    if writers := [writer.by for writer in recipe.writer if writer.by in ("student", UNTOUCHED)]:
        raise RecipeError("writer", f"a student with a scalar head writes nothing; leave {writers[0]} out")
    if others := [name for name in evaluate.metrics if name != PREFERENCE]:
        raise RecipeError(
            "evaluate.metrics",
            f"{others[0]} is measured of a student that writes, and this one gives scores: metrics: [{PREFERENCE}]",
        )
    if others := [name for name in evaluate.controls if name != UNTOUCHED]:
        raise RecipeError(
            "evaluate.controls", f"{others[0]} is a control of a student that writes: controls: [{UNTOUCHED}]"
        )
    if not recipe.all_answer and not any(len(prompt.answers) > 1 for prompt in held_out):
        raise RecipeError(
            "evaluate.prompts",
            f"none of the {len(held_out)} held-out prompts has two answers, which scores are measured on: give `chosen`"
            " and `rejected`, or `answers`, the preferred one first",
        )
    if evaluate.judge is not None:
        raise RecipeError("evaluate.judge", "a student with a scalar head writes no answers to judge; leave it out")
    if recipe.teacher.cache is not None:
        raise RecipeError("teacher.cache", "a student with a scalar head reads no teacher; leave the cache out")
    if recipe.teacher.context is not None and {writer.by for writer in recipe.writer} == {"corpus"}:
        raise RecipeError("teacher.context", "no teacher writes here or is read, so nobody is shown it; leave it out")
