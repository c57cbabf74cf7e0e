"""What is known of the student before its weights are read: its learning rate, its context, and whether it has the
teacher's tokens."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from limbeck.commands.new.wishes import Wishes
from limbeck.types import UserError

SMALL, LARGE = 300_000_000, 2_000_000_000  # parameters


def learning_rate(wishes: Wishes) -> str:
    """By the student's size; a modest one where that can't be counted."""
    parameters = _parameters(wishes.student)
    if wishes.lora:
        return "1.0e-3" if parameters is not None and parameters < SMALL else "2.0e-4"
    if parameters is None:
        return "2.0e-5"
    return "5.0e-5" if parameters < SMALL else "2.0e-5" if parameters <= LARGE else "1.0e-5"


def context_of(wishes: Wishes) -> int:
    """How many tokens the student can read; a very large number where nothing says it."""
    from limbeck.models.weights import context_length

    config = _config(wishes.teacher if wishes.task == "compress" else wishes.student)
    return sys.maxsize if config is None else context_length(config)


def has_the_teachers_tokens(wishes: Wishes) -> bool:
    """Whether the student surely has the teacher's tokens, so that it can learn distributions."""
    if wishes.is_served or not wishes.has_teacher:
        return False
    return wishes.task == "compress" or wishes.student == wishes.teacher or _agree(wishes.teacher, wishes.student)


@cache
def _agree(teacher: str, student: str) -> bool:
    """Whether two models have the same tokens and template; false where one is still to be fetched."""
    from limbeck.models.compatibility import have_other_tokens
    from limbeck.models.load import is_ready, load_tokenizer

    try:
        if not is_ready(teacher) or not is_ready(student):
            return False
        return not have_other_tokens(load_tokenizer(teacher), load_tokenizer(student))
    except UserError:
        return False


@cache
def _config(model: str) -> Any:
    """The model's configuration; None where there is none."""
    from limbeck.models.load import load_config

    try:
        return load_config(model)
    except UserError:
        return None


def _parameters(model: str) -> int | None:
    from limbeck.runs.shapes import Shape

    config = _config(model)
    try:
        return None if config is None else Shape.of(config).parameters
    except UserError:
        return None
