"""What the student is compared with: its start, and trainings from the same start, for as many steps, on other rows.

To add a control, add an entry to CONTROLS.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from limbeck.config.recipe import Recipe
from limbeck.data.batches import CHOSEN, Row
from limbeck.elicit.prompts import Prompt
from limbeck.types import STUDENTS, RecipeError, Sample, UserError, nearest

UNTOUCHED = "untouched"  # the student before training, as a control and as a writer
PROMPTED = "prompted"  # the same, shown what the teacher is shown beside the prompt
Rows = Callable[["ControlData"], list[Row]]


@dataclass(frozen=True)
class ControlData:
    """What a control's rows can be made from.

    Args:
        student_rows: the rows that the student itself is trained on; empty where it alone writes.
        prompts: the training prompts as the recipe gives them, before any step of elicitation.
        others_text: the text of others, for a student that alone writes.
        encode: samples to rows.
        seed: the text's.
        max_length: tokens of a row that the student can read.
    """

    student_rows: Sequence[Row]
    prompts: Sequence[Prompt]
    others_text: Callable[[], Sequence[Sample]]
    encode: Callable[[Sequence[Sample]], list[Row]]
    seed: int
    max_length: int

    def preferred_rows(self) -> list[Row]:
        """The preferred answer of others to every prompt."""
        return preferred(self.student_rows) if self.student_rows else self.encode(self.others_text())


@dataclass(frozen=True)
class Control:
    """One entry of `evaluate.controls`.

    Args:
        rows: what it is fine-tuned on, with cross-entropy; None for the start itself, which is not trained.
        refusal: why the recipe with its training prompts can't have it, and the remedy; None where it can.
        extra_text: (id, text) that it reads in addition to the student's training text, to be searched for test items.
        same_as_fine_tuning: it equals the student of a recipe that is plain fine-tuning, so that is not trained twice.
    """

    rows: Rows | None = None
    refusal: Callable[[Recipe, Sequence[Prompt]], str | None] = lambda recipe, prompts: None
    extra_text: Callable[[Sequence[Prompt]], list[tuple[str, str]]] = lambda prompts: []
    same_as_fine_tuning: bool = False

    @property
    def is_trained(self) -> bool:
        return self.rows is not None


def preferred(rows: Sequence[Row]) -> list[Row]:
    """The preferred answers, without those that the student before training, or of the round before, wrote."""
    return [row for row in rows if CHOSEN in row.tags and row.tags.isdisjoint(STUDENTS)]


def shuffled(rows: Sequence[Row], seed: int, max_length: int) -> list[Row]:
    """The same prompts and the same answers, each answer with a prompt that is not its own: what is learnt without
    knowing the question.

    Rows longer than `max_length` tokens are left out.

    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError("shuffled_control needs at least two answers to shuffle; give more prompts, or leave it out")
    order = list(range(len(rows)))
    random.Random(f"{seed}/shuffled").shuffle(order)  # noqa: S311 (an order, not a secret)
    source = {place: order[(at + 1) % len(order)] for at, place in enumerate(order)}  # one cycle: none keeps its own
    mixed = [
        replace(row, response_ids=rows[source[place]].response_ids, references=()) for place, row in enumerate(rows)
    ]
    return [row for row in mixed if len(row) <= max_length]


def gold_samples(prompts: Sequence[Prompt]) -> list[Sample]:
    """The prompts' own first answers."""
    return [
        Sample(
            (*prompt.messages, {"role": "assistant", "content": prompt.answers[0]}),
            "corpus",
            meta={
                "finish": "length" if 0 in prompt.cut else "ok",
                "prompt_id": prompt.id,
                "writer": "corpus",
                "task": prompt.task,
                "weight": prompt.weight,
            },
        )
        for prompt in prompts
        if prompt.answers
    ]


def _without_preferred_text(recipe: Recipe, _: Sequence[Prompt]) -> str | None:
    by_others = [writer for writer in recipe.fixed_writers if writer.by not in STUDENTS]
    others = by_others if recipe.fixed_writers else recipe.writer  # for a student alone the teacher writes their text
    if others and not (recipe.all_answer and recipe.writer[0].by in (*STUDENTS, "student")):
        return None
    return "fine-tuning needs preferred text of a teacher or corpus; set controls: [untouched]"


def _without_gold(_: Recipe, prompts: Sequence[Prompt]) -> str | None:
    if any(prompt.answers for prompt in prompts):
        return None
    return (
        "gold_control needs an answer beside the training prompts (prompts.from), and none has one: give answers, or"
        " leave it out"
    )


def _without_second_answer(recipe: Recipe, prompts: Sequence[Prompt]) -> str | None:
    if recipe.elicit is None and len(prompts) < 2:
        return "shuffled_control needs at least two answers to shuffle: give more prompts, or leave it out"
    return _without_preferred_text(recipe, prompts)


CONTROLS: dict[str, Control] = {
    UNTOUCHED: Control(),
    PROMPTED: Control(),
    "sft_control": Control(rows=ControlData.preferred_rows, refusal=_without_preferred_text, same_as_fine_tuning=True),
    "gold_control": Control(
        rows=lambda data: data.encode(gold_samples(data.prompts)),
        refusal=_without_gold,
        extra_text=lambda prompts: [(prompt.id, answer) for prompt in prompts for answer in prompt.answers],
    ),
    "shuffled_control": Control(
        rows=lambda data: shuffled(data.preferred_rows(), data.seed, data.max_length), refusal=_without_second_answer
    ),
}


def check_controls(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Refuse controls that don't exist, or that this recipe with these training prompts can't have.

    Raises:
        RecipeError: names the place, the nearest name or the remedy.
    """
    for index, name in enumerate(recipe.evaluate.controls):
        if name not in CONTROLS:
            raise RecipeError(f"evaluate.controls[{index}]", f"there is no control {name!r}{nearest(name, CONTROLS)}")
        if (reason := CONTROLS[name].refusal(recipe, prompts)) is not None:
            raise RecipeError("evaluate.controls", reason)


def trained_controls(recipe: Recipe, is_fine_tuning: bool) -> list[str]:
    """The controls that are trained; where the recipe itself is plain fine-tuning, without the same training again."""
    return [
        name
        for name in recipe.evaluate.controls
        if CONTROLS[name].is_trained and not (CONTROLS[name].same_as_fine_tuning and is_fine_tuning)
    ]
