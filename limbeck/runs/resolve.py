"""Resolves a recipe once: its losses, steps of elicitation, prompts, tasks and prompt context.

Later stages are given the `Method`; none parses a recipe's parts or reads the prompt file again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from limbeck.config.recipe import Recipe
from limbeck.config.rounds import Rounds, asked_for
from limbeck.config.sections import Rollout
from limbeck.elicit.prompts import Prompt, split_prompts
from limbeck.elicit.run import prompt_sample
from limbeck.elicit.step import AskingStep, ElicitStep
from limbeck.elicit.step_prompt import StepPrompt
from limbeck.elicit.steps import check_steps, columns_read, steps_of
from limbeck.evaluate.metrics import METRICS
from limbeck.evaluate.task import Task
from limbeck.evaluate.tasks import tasks_of
from limbeck.models.context import PromptContext, conversation_key
from limbeck.models.teacher_interface import TeacherKind, TeacherUse
from limbeck.models.teachers import kind
from limbeck.objectives.parameters import Range
from limbeck.objectives.schedule import Schedule, make_schedule
from limbeck.objectives.term import Term, make_term
from limbeck.runs.at_once import at_once
from limbeck.runs.cost import trained_controls
from limbeck.runs.validate import check_parts
from limbeck.runs.validate_scores import check_scores
from limbeck.storage.rounds import round_folder
from limbeck.training.controls import PROMPTED
from limbeck.training.rewards import Rewards, rewards_of
from limbeck.types import RecipeError, list_hash, nearest

SHARE_SHAPES = ("constant", "linear", "cosine", "step", "plateau")


@dataclass(frozen=True)
class Method:
    """A resolved recipe, checked as far as possible without loading a model.

    Args:
        prompt_context: what the teacher is shown beside the prompts.
        share: the student's share of the text, if it writes.
        fresh: the part of the student's text that is not replayed.
        step_prompt: what the step that wrote the training answers showed the teacher, where that is not the plain
            prompt.
        rewards: what judges the student's answers.
        prompt_notes: what was read from each file of prompts.
        rounds: how many rounds its recipe has, of which this is the first.
        at_once: how many of them a control stands for.
        stages: the recipes of what is trained before each round, by name.
    """

    recipe: Recipe
    terms: tuple[Term, ...]
    steps: tuple[tuple[str, ElicitStep], ...]
    training_prompts: tuple[Prompt, ...]
    held_out_prompts: tuple[Prompt, ...]
    tasks: tuple[Task, ...]
    prompt_context: PromptContext | None
    share: Schedule | None
    fresh: Schedule | None
    step_prompt: StepPrompt | None = None
    rewards: Rewards | None = None
    prompt_notes: tuple[str, ...] = ()
    rounds: int = 1
    at_once: int = 0
    stages: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def measured_context(self) -> PromptContext | None:
        """What the teacher is shown beside a held-out prompt or a task's: what it was shown when it taught."""
        if self.fixed_step_prompt is None:
            return self.prompt_context
        return replace(self.prompt_context or PromptContext(), step=self.fixed_step_prompt)

    @property
    def fixed_step_prompt(self) -> StepPrompt | None:
        """The step's prompt, where it is the same for every prompt."""
        return None if self.step_prompt is None or self.step_prompt.varies else self.step_prompt

    @property
    def teacher_kind(self) -> TeacherKind:
        return kind(self.recipe.teacher)

    @property
    def teacher_use(self) -> TeacherUse:
        return TeacherUse(self.recipe, self.terms, self.training_prompts)

    @property
    def teacher_reads_rows(self) -> bool:
        """Whether the training needs more of the teacher than its text."""
        return self.teacher_use.needs_common_tokens

    @property
    def holds_out_answers(self) -> bool:
        """Whether the held-out text is the data's own answers: the training text is, and the student has nothing of a
        teacher's."""
        by_data = all(writer.by == "corpus" for writer in self.recipe.writer) and not self.teacher_reads_rows
        made_of_teacher = self.recipe.student.start.pretrained is None
        return by_data and not made_of_teacher and all(prompt.answers for prompt in self.held_out_prompts)

    @property
    def is_prompted(self) -> bool:
        """Whether the untouched student is measured with what the teacher is shown."""
        return PROMPTED in self.recipe.evaluate.controls

    @property
    def prompts_key(self) -> str:
        """A hash of all prompts with their facts."""
        return list_hash((prompt.facts for prompt in part) for part in (self.training_prompts, self.held_out_prompts))

    @property
    def training_prompts_key(self) -> str:
        """A hash of the training prompts with their facts."""
        return list_hash([(prompt.facts for prompt in self.training_prompts)])

    @property
    def held_out_prompts_key(self) -> str:
        """A hash of the held-out prompts with their facts."""
        return list_hash([(prompt.facts for prompt in self.held_out_prompts)])

    @cached_property
    def controls(self) -> list[str]:
        """The controls that are trained."""
        return trained_controls(self.recipe, self.terms)


def resolve(recipe: Recipe) -> Method:
    """Resolve all that a recipe names and refuse what can't work together; no model is loaded. Of a recipe with rounds,
    the first one is resolved, and what a later one couldn't do is refused, too.

    Raises:
        RecipeError: an unknown name, a value out of range, prompts that aren't there, or parts that don't fit, with the
            place in the recipe and the remedy.
    """
    if recipe.rounds is not None:
        return _resolve_rounds(recipe, recipe.rounds)
    evaluate = recipe.evaluate
    steps = tuple(steps_of(recipe.elicit or ()))
    prompts = split_prompts(recipe.prompts, evaluate, recipe.train.turns, columns_read(steps))
    training, held_out = prompts.training, prompts.held_out
    share, fresh = _shares(recipe)
    method = Method(
        recipe=recipe,
        terms=tuple(terms_of(recipe)),
        steps=steps,
        training_prompts=tuple(training),
        held_out_prompts=tuple(held_out),
        tasks=() if recipe.student.scores else tuple(tasks_of(evaluate.metrics, evaluate.limits)),
        prompt_context=context_of(recipe, [*training, *held_out]),
        share=share,
        fresh=fresh,
        rewards=_rewards(recipe, training),
        prompt_notes=tuple(prompts.notes),
    )
    check_scores(method.teacher_use, held_out)
    check_parts(
        method.teacher_use,
        steps=method.steps,
        tasks=method.tasks,
        share=share,
        judges=() if method.rewards is None else method.rewards.judges,
    )
    if method.steps:
        check_steps(method.steps, [prompt_sample(prompt) for prompt in training], prompts.columns)
        method = replace(method, step_prompt=_step_prompt(recipe, method.steps))
    if method.is_prompted and method.measured_context is None:
        raise RecipeError(
            "evaluate.controls",
            "prompted is the untouched student with the prompt that the teacher alone is shown, and here it is shown"
            " none: give teacher.context, or leave it out",
        )
    return method


def _rewards(recipe: Recipe, training: Sequence[Prompt]) -> Rewards | None:
    """The rewards of the student's answers, if there are any."""
    rollout, writer = recipe.rollout, recipe.student_writer
    if rollout is None or rollout.rewards is None:
        return None
    assert writer is not None
    return rewards_of(rollout.rewards, rollout.advantage, training, writer.max_tokens)


def _resolve_rounds(recipe: Recipe, rounds: Rounds) -> Method:
    """The first round of a recipe, once a later one is known to be possible, too."""
    if rounds.first is not None:
        try:
            resolve(recipe.of_round(0, None))
        except RecipeError as error:
            raise RecipeError(f"rounds.first.{error.path}", str(error).removeprefix(f"{error.path}: ")) from error
    first = _first_round(recipe, rounds)
    if rounds.stop is not None:
        sided = {name for name, metric in METRICS.items() if metric.better != "none"}
        sided |= {f"{task.name}/{name}" for task in first.tasks for name in task.metrics if task.better(name) != "none"}
        if rounds.stop not in sided:
            raise RecipeError(
                "rounds.stop", f"evaluate measures no {rounds.stop!r} that can be better{nearest(rounds.stop, sided)}"
            )
        if "untouched" not in recipe.evaluate.controls:
            raise RecipeError(
                "rounds.stop", "the first round is compared with its start: add untouched to evaluate.controls"
            )
    if rounds.n > 1:
        try:
            base, student = (str(round_folder(Path(), number) / "student") for number in (0, 1))
            resolve(recipe.of_round(2, student, None if rounds.first is None else base))
        except RecipeError as error:
            words = str(error).removeprefix(f"{error.path}: ")
            raise RecipeError(error.path, f"{words} (in round 2, which the student of round 1 is part of)") from error
    if rounds.at_once:
        before = None if rounds.first is None else str(round_folder(Path(), 0) / "student")
        resolve(at_once(recipe, rounds.n, 1, before))
    first = replace(first, stages=_stages(recipe, rounds, first))
    return replace(first, rounds=len(rounds.numbers), at_once=rounds.n if rounds.at_once and rounds.n > 1 else 0)


def _first_round(recipe: Recipe, rounds: Rounds) -> Method:
    """Round 1, resolved. Where a training before the rounds makes its start, it is refused or not as a round from
    there; costs are told by the recipe's own start, whose sizes are known before."""
    if rounds.first is None:
        return resolve(recipe.of_round(1, None))
    base = str(round_folder(Path(), 0) / "student")
    return replace(resolve(recipe.of_round(1, base, base)), recipe=recipe.of_round(1, None))


def _stages(recipe: Recipe, rounds: Rounds, first: Method) -> dict[str, Recipe]:
    """The stages of the first round, resolved; each must be a reward of the rounds, or a model that they ask."""
    stages = {}
    resolved = recipe.resolved()
    for name in rounds.stages or {}:
        trains_a_named = name in (recipe.models or {})
        if trains_a_named and not asked_for(resolved, name):
            raise RecipeError(f"rounds.stages.{name}", "no step of the rounds asks it: name it in a step's `by`")
        if not trains_a_named and name not in (first.rewards.models if first.rewards is not None else ()):
            raise RecipeError(
                f"rounds.stages.{name}", f"no reward reads it: name it in rollout.rewards, as {{model: {name}}}"
            )
        before = None if rounds.first is None else str(round_folder(Path(), 0) / "student")
        try:
            stages[name] = resolve(recipe.of_stage(name, before)).recipe
        except RecipeError as error:
            if error.path.startswith("rounds."):
                raise
            raise RecipeError(
                f"rounds.stages.{name}.{error.path}", str(error).removeprefix(f"{error.path}: ")
            ) from error
    return stages


def _step_prompt(recipe: Recipe, steps: Sequence[tuple[str, ElicitStep]]) -> StepPrompt | None:
    """What the last step that writes answers shows the teacher, if the training text is those answers and it shows more
    than the student sees."""
    writers = {writer.by for writer in recipe.writer}
    if "elicited" not in writers or "teacher" in writers:
        return None
    for _, step in reversed(steps):
        shown = step.shows() if isinstance(step, AskingStep) else None
        if shown is not None:
            return None if shown.is_plain else shown
    return None


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


def context_of(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptContext | None:
    """What the teacher is shown beside the prompts."""
    context = recipe.teacher.context
    if context is None:
        return None
    fields: dict[str, dict[str, str]] = {}
    for prompt in prompts:
        of_prompt = {"answer": prompt.answers[0] if prompt.answers else "", "feedback": prompt.feedback}
        shown = {name: text for name, text in of_prompt.items() if text and name in context.reads}
        if fields.setdefault(conversation_key(prompt.messages), shown) != shown:
            raise RecipeError(
                "prompts.from",
                f"the prompt of {prompt.id!r} stands twice with other things to show the teacher; leave one out",
            )
    return PromptContext(context.system, context.user, fields)


def _shares(recipe: Recipe) -> tuple[Schedule | None, Schedule | None]:
    """The schedules of (the student's share of the text, the part of that which is not replayed), if it writes."""
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
