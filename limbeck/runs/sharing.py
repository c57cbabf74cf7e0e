"""What several ranks can't do, and what divided weights can't."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.config.recipe import Recipe
from limbeck.config.server import Limits
from limbeck.config.teacher import LocalTeacher, ServedTeacher
from limbeck.models.teacher_interface import TEACHER_EVIDENCE
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError


def check(recipe: Recipe) -> None:
    """Refuse what several ranks can't do, before anything is spent.

    Raises:
        RecipeError: with the place in the recipe and what to write instead.
    """
    served = isinstance(recipe.teacher, ServedTeacher) and recipe.teacher.cache is None
    if served and any(term.loss.spans_responses and term.reads & TEACHER_EVIDENCE for term in resolve(recipe).terms):
        raise RecipeError(
            "teacher.server",
            "with several ranks each would ask the server about every answer: run it on one, or choose a loss that is"
            " no policy gradient on the teacher",
        )
    if served and _has_ceilings(recipe) and any(term.reads & TEACHER_EVIDENCE for term in resolve(recipe).terms):
        raise RecipeError(
            "teacher.server",
            "with several ranks each asks the server for itself, and would have its limits and rates for itself, too:"
            " leave limits, requests_per_minute and tokens_per_minute out, keep the answers in a teacher.cache first"
            " (limbeck elicit), or run it on one rank",
        )
    if recipe.machine.shard == "full":
        for path, what in _undivided(recipe):
            raise RecipeError(
                path, f"{what} under machine.shard: full; leave that out: each rank holds all weights then"
            )


def _has_ceilings(recipe: Recipe) -> bool:
    server = recipe.teacher.server
    assert server is not None
    if server.logprobs is not None:  # they came with its text, which rank 0 has asked for
        return False
    return bool(server.limits != Limits() or server.requests_per_minute or server.tokens_per_minute)


def _undivided(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What needs whole weights: (place, words)."""
    if recipe.student_writer is not None:
        yield "writer", "the student can't write while it trains"
    if recipe.student.scores:
        yield "student.head", "reward models are not trained"
    if recipe.student.lora is not None and recipe.student.lora.base in ("int8", "int4"):
        yield "student.lora.base", f"{recipe.student.lora.base} weights can't be divided"
    if recipe.train.mixup is not None:
        yield "train.mixup", "mixed texts can't be read"
    terms = resolve(recipe).terms
    for term in terms:
        if term.loss.binds:
            yield f"loss.{term.label}", "losses with parameters of their own or on inner layers can't be trained"
    reads = {evidence for term in terms for evidence in term.reads} & TEACHER_EVIDENCE
    teacher = recipe.teacher
    if not reads or teacher.cache is not None or (isinstance(teacher, ServedTeacher) and teacher.gives_states):
        return
    if not isinstance(teacher, LocalTeacher):
        yield "teacher", "only one teacher with weights of its own in process, hidden states or a cache can be asked"
    elif teacher.quantise is not None:
        yield "teacher.quantise", f"{teacher.quantise} weights can't be divided"
