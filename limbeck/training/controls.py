"""What the student is held against: trainings from the same start, for as many steps, on other text or with another
loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from limbeck.data.batches import CHOSEN, Row
from limbeck.elicit.prompts import Prompt
from limbeck.types import Sample, UserError

UNTOUCHED = "untouched"  # no training: the start itself


def preferred(rows: Sequence[Row]) -> list[Row]:
    """The preferred answer to every prompt, never the student's own: what `sft_control` is fine-tuned on."""
    return [row for row in rows if CHOSEN in row.tags and UNTOUCHED not in row.tags]


def shuffled(rows: Sequence[Row], seed: int, context: int) -> list[Row]:
    """The same prompts and the same answers, each answer to a prompt that is not its own: what is learnt without
    knowing the question.

    A row that would be longer than `context` tokens is left out.

    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError("shuffled_control needs at least two answers to shuffle; give more prompts, or leave it out")
    order = list(range(len(rows)))
    random.Random(f"{seed}/shuffled").shuffle(order)  # noqa: S311 (an order, not a secret)
    taken = {place: order[(at + 1) % len(order)] for at, place in enumerate(order)}  # one cycle: none keeps its own
    dealt = [
        replace(row, response_ids=rows[taken[place]].response_ids, references=()) for place, row in enumerate(rows)
    ]
    return [row for row in dealt if len(row) <= context]


def gold_samples(prompts: Sequence[Prompt]) -> list[Sample]:
    """The prompts' own first answers."""
    return [
        Sample(
            (*prompt.messages, {"role": "assistant", "content": prompt.answers[0]}),
            "corpus",
            meta={
                "finish": "ok",
                "prompt_id": prompt.id,
                "writer": "corpus",
                "task": prompt.task,
                "weight": prompt.weight,
            },
        )
        for prompt in prompts
        if prompt.answers
    ]
