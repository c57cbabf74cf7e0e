"""A recipe's words to what they stand for, once: losses, steps, prompts, tasks, and what the teacher is shown.

Everything after this is handed the `Method`; nothing parses a recipe's parts or reads the prompt file again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from pydantic import ValidationError

from limbeck.config.recipe import Recipe, explain
from limbeck.config.sections import Rollout
from limbeck.elicit.flow import Step
from limbeck.elicit.prompts import Prompt, load_prompts
from limbeck.elicit.steps import STEPS
from limbeck.evaluate.task import Task
from limbeck.evaluate.tasks import tasks_of
from limbeck.models.context import PromptContext
from limbeck.models.teacher_interface import TeacherKind, TeacherUse
from limbeck.models.teachers import kind
from limbeck.objectives.parameters import Range
from limbeck.objectives.schedule import Schedule, make_schedule
from limbeck.objectives.term import Term, make_term
from limbeck.runs.cost import trained_controls
from limbeck.runs.validate import check_parts
from limbeck.types import RecipeError, content_hash, nearest

HELD_OUT_SHARE = 0.1
SHARE_SHAPES = ("constant", "linear", "cosine", "step", "plateau")


@dataclass(frozen=True)
class Method:
    """A recipe with all that its words stand for, checked as far as can be without loading a model.

    `share` is the student's share of the text and `fresh` how much of that is written anew, where the student writes;
    `prompt_context` is what the teacher is shown beside the prompts.
    """

    recipe: Recipe
    terms: tuple[Term, ...]
    steps: tuple[tuple[str, Step], ...]
    training_prompts: tuple[Prompt, ...]
    held_out_prompts: tuple[Prompt, ...]
    tasks: tuple[Task, ...]
    prompt_context: PromptContext | None
    share: Schedule | None
    fresh: Schedule | None

    @property
    def teacher_kind(self) -> TeacherKind:
        return kind(self.recipe.teacher)

    @property
    def teacher_use(self) -> TeacherUse:
        return TeacherUse(self.recipe, self.terms, self.training_prompts)

    @property
    def prompts_key(self) -> str:
        """A hash of all prompts, with what is known of each."""
        parts = (self.training_prompts, self.held_out_prompts)
        return content_hash([[prompt.facts for prompt in part] for part in parts])

    @cached_property
    def controls(self) -> list[str]:
        """The trainings beside the student's."""
        return trained_controls(self.recipe, self.terms)


def resolve(recipe: Recipe) -> Method:
    """Everything that a recipe names, and the refusal of what can't work together; no model is loaded.

    Raises:
        RecipeError: an unknown name, a value out of range, prompts that aren't there, or parts that don't fit, with the
            place in the recipe and the cure.
    """
    training, held_out = split_prompts(recipe)
    share, fresh = _shares(recipe)
    method = Method(
        recipe=recipe,
        terms=tuple(terms_of(recipe)),
        steps=tuple(_steps(recipe)),
        training_prompts=tuple(training),
        held_out_prompts=tuple(held_out),
        tasks=tuple(tasks_of(recipe.evaluate.metrics, recipe.evaluate.limit)),
        prompt_context=_prompt_context(recipe, [*training, *held_out]),
        share=share,
        fresh=fresh,
    )
    check_parts(
        method.teacher_use,
        steps=method.steps,
        tasks=method.tasks,
        share=share,
    )
    return method


def terms_of(recipe: Recipe) -> list[Term]:
    """The recipe's losses, their parameters checked."""
    terms = [
        make_term(loss.name, loss.params, loss.weight, f"loss[{i}].{loss.name}") for i, loss in enumerate(recipe.loss)
    ]
    labels = [term.label for term in terms]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise RecipeError(
                f"loss[{index}]",
                f"{label} stands twice; give it once with the summed weight, or other text to each by `only`",
            )
    return terms


def _steps(recipe: Recipe) -> list[tuple[str, Step]]:
    """The recipe's steps of elicitation by name, their settings checked."""
    steps = []
    for index, entry in enumerate(recipe.elicit or ()):
        if entry.name not in STEPS:
            raise RecipeError(f"elicit[{index}]", f"there is no step {entry.name!r}{nearest(entry.name, STEPS)}")
        step = STEPS[entry.name]
        try:
            steps.append((entry.name, cast(Step, step.model_validate(entry.params))))
        except ValidationError as error:
            raise explain(error, step, f"elicit[{index}].{entry.name}") from None
    return steps


def split_prompts(recipe: Recipe) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), the two without a common text.

    Built-in prompts come with a held-out part. Of a user's own file every tenth or so is held out (by a hash of its
    text, so that it stays held out when lines are added), unless `evaluate.prompts` names another file.

    Raises:
        RecipeError: one of the two is empty, or a held-out prompt is among the training ones.
    """
    source = recipe.prompts.source
    settings = recipe.evaluate
    training = load_prompts(source)
    if settings.prompts is not None:
        held_out = load_prompts(settings.prompts, part="test", path="evaluate.prompts")
    elif source.startswith("builtin/"):
        held_out = load_prompts(source, part="test")
    else:
        apart = [int(content_hash(prompt.text)[:8], 16) < HELD_OUT_SHARE * 16**8 for prompt in training]
        held_out = [prompt for prompt, out in zip(training, apart, strict=True) if out]
        training = [prompt for prompt, out in zip(training, apart, strict=True) if not out]
    training = training[: recipe.prompts.limit]
    held_out = held_out[: settings.limit]
    for part, path in ((training, "prompts"), (held_out, "evaluate.prompts")):
        if not part:
            raise RecipeError(
                path, "no prompt is left for this part; give more prompts, or a file under evaluate.prompts"
            )
    if both := {prompt.text for prompt in training} & {prompt.text for prompt in held_out}:
        raise RecipeError(
            "evaluate.prompts", f"{len(both)} held-out prompts are training prompts too, such as {min(both)!r}"
        )
    return training, held_out


def _prompt_context(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptContext | None:
    """What the teacher is shown beside the prompts."""
    context = recipe.teacher.context
    if context is None:
        return None
    fields: dict[str, dict[str, str]] = {}
    for prompt in prompts:
        of_prompt = {"answer": prompt.answers[0] if prompt.answers else "", "feedback": prompt.feedback}
        shown = {name: text for name, text in of_prompt.items() if text and name in context.reads}
        if fields.setdefault(prompt.text, shown) != shown:
            raise RecipeError(
                "prompts.from",
                f"the prompt of {prompt.id!r} stands twice with other things to show the teacher; leave one out",
            )
    return PromptContext(context.system, context.user, fields)


def _shares(recipe: Recipe) -> tuple[Schedule | None, Schedule | None]:
    """(the student's share of the text, how much of that is written anew) as schedules, where the student writes."""
    writer = recipe.student_writer
    if writer is None:
        return None, None
    replay = (recipe.rollout or Rollout()).replay
    at = f"writer[{recipe.writer.index(writer)}].share"
    share = make_schedule(writer.share, at, Range(0, 1).check)
    fresh = make_schedule(replay.fresh if replay else 1.0, "rollout.replay.fresh", Range(0, 1).check)
    for path, schedule, shapes in ((at, share, SHARE_SHAPES), ("rollout.replay.fresh", fresh, SHARE_SHAPES[:-1])):
        if schedule.shape not in shapes:
            raise RecipeError(f"{path}.shape", f"{schedule.shape} is not possible here; legal: {', '.join(shapes[1:])}")
    return share, fresh
