"""What can be refused before anything is spent: combinations that can't work, and what the rest will cost."""

from __future__ import annotations

from limbeck.config.recipe import Recipe
from limbeck.elicit.step import Estimate
from limbeck.models.load import (
    check_same_template,
    check_same_vocabulary,
    check_takes_system,
    is_ready,
    load_config,
    load_tokenizer,
)
from limbeck.models.start import scratch_config
from limbeck.runs import build
from limbeck.runs.cost import Plan, Shape, make_plan
from limbeck.runs.validate import validate
from limbeck.types import RecipeError, UserError


def check(recipe: Recipe) -> Plan:
    """Refuse what can't work and say what the rest will cost; no weights are loaded.

    Raises:
        RecipeError: an impossible combination, with its place in the recipe.
    """
    validate(recipe)
    config = load_config(recipe.speaker)
    teacher = None if recipe.teacher.model is None else Shape.of(config)
    student = Shape.of(config)
    start = recipe.student.start
    context = config.max_position_embeddings
    if start.prune is not None:
        kept = start.prune.keep if isinstance(start.prune.keep, list) else None
        layers = start.prune.layers if kept is None else len(kept)
        assert layers is not None
        if layers > student.layers or (kept and kept[-1] >= student.layers):
            raise RecipeError("student.start.prune", f"the teacher has only {student.layers} layers, numbered from 0")
        student = student.with_layers(layers)
    elif start.pretrained is not None and recipe.teacher.model is not None:
        other = load_config(start.pretrained)
        student, context = Shape.of(other), min(context, other.max_position_embeddings)
        speaking = load_tokenizer(recipe.speaker), load_tokenizer(start.pretrained)
        if recipe.teacher.bridge is None:
            check_same_vocabulary(*speaking)
            check_same_template(*speaking)
    elif start.scratch is not None:
        student = Shape.of(scratch_config(start.scratch, config))
    for path, tokens in (
        ("writer.max_tokens", max(w.max_tokens for w in recipe.writer)),
        ("evaluate.max_tokens", recipe.evaluate.max_tokens),
    ):
        if tokens >= context:
            raise RecipeError(path, f"{tokens} leaves no room for a prompt in a context of {context}")
    if recipe.teacher.context is not None and recipe.teacher.context.system is not None:
        check_takes_system(load_tokenizer(recipe.speaker))
    others = [_beside(recipe, n) for n in range(len(recipe.teacher.beside))]
    training, held_out = build.prompts(recipe)
    for term in build.terms(recipe):
        if term.match is not None and teacher is not None:
            term.match.check(student, teacher)
    judge = None if recipe.evaluate.judge is None else _judge_shape(recipe.evaluate.judge)
    return make_plan(
        recipe, build.terms(recipe), training, held_out, teacher, student, judge, _bills(recipe, len(training)), others
    )


def _beside(recipe: Recipe, number: int) -> Shape:
    """A teacher beside the first: it reads the same tokens, so they must mean the same to it."""
    source = recipe.teacher.beside[number].model
    try:
        first = load_tokenizer(recipe.speaker)
        other = load_tokenizer(source)
        check_same_vocabulary(first, other)
        check_same_template(first, other)
        return Shape.of(load_config(source))
    except UserError as error:
        raise RecipeError(f"teacher.beside[{number}].model", str(error)) from error


def _bills(recipe: Recipe, prompts: int) -> list[Estimate]:
    """What the steps of elicitation will ask for, each after the one before."""
    bills: list[Estimate] = []
    for _, step in build.steps(recipe):
        bills.append(step.estimate(bills[-1].samples if bills else prompts))
    return bills


def _judge_shape(source: str) -> Shape:
    """A judge that is no model, or none that can be asked, is refused here: the evaluation, hours later, would be too
    late."""
    try:
        shape = Shape.of(load_config(source))
        if is_ready(source):
            load_tokenizer(source)
        return shape
    except UserError as error:
        raise RecipeError("evaluate.judge", str(error)) from error
