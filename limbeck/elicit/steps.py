"""The steps of elicitation, by the names that recipes call them. Importing a module registers its steps."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from limbeck.config.recipe import explain
from limbeck.config.sections import Elicit
from limbeck.elicit import (  # noqa: F401 (imported for the steps that they register)
    answer,
    ask,
    choices,
    compare,
    correct,
    critique,
    curate,
    debate,
    dialogue,
    document,
    evolve,
    expand,
    frame,
    given,
    imagine,
    in_context,
    lengthen,
    merit,
    mosaic,
    pairs,
    rate,
    rationale,
    rationalise,
    reasoning,
    referee,
    refine,
    rewrite,
    rubric,
    select,
    soft_preference,
    transform,
    verdicts,
    verified,
)
from limbeck.elicit.answer import AnswerPrompts
from limbeck.elicit.flow import Pool
from limbeck.elicit.step import REGISTRY, ElicitStep
from limbeck.elicit.verified import Vote
from limbeck.types import RecipeError, nearest

STEPS = REGISTRY


def steps_of(entries: Sequence[Elicit]) -> list[tuple[str, ElicitStep]]:
    """(name, step) for every entry of a recipe's `elicit`, settings checked.

    Raises:
        RecipeError: an unknown step, or a wrong setting, with its path.
    """
    steps: list[tuple[str, ElicitStep]] = []
    for index, entry in enumerate(entries):
        if entry.name not in STEPS:
            raise RecipeError(f"elicit[{index}]", f"there is no step {entry.name!r}{nearest(entry.name, STEPS)}")
        step = STEPS[entry.name]
        try:
            steps.append((entry.name, step.model_validate(entry.params)))
        except ValidationError as error:
            raise explain(error, step, f"elicit[{index}].{entry.name}") from None
    return steps


def columns_read(steps: Sequence[tuple[str, ElicitStep]]) -> frozenset[str]:
    """The columns of the prompts' file that templates may mean: all names that neither a sample has nor an earlier step
    writes; `*` stands for every column.

    Raises:
        RecipeError: a template that is none.
    """
    columns: set[str] = set()
    known: frozenset[str] = frozenset()
    for index, (name, step) in enumerate(steps):
        read = step.reads(f"elicit[{index}].{name}")
        columns |= {other.removeprefix("row.") for other in read - known - {"row"}} | (
            {"*"} if "row" in read else set()
        )
        known |= step.writes()
    return frozenset(columns)


def check_steps(steps: Sequence[tuple[str, ElicitStep]], pool: Pool, columns: frozenset[str] = frozenset()) -> None:
    """Refuse steps that can't work on these samples, or after each other, before anything is asked.

    Args:
        columns: those of the prompts' file.

    Raises:
        RecipeError: a step that can't, with its path.
    """
    known = columns | {f"row.{column}" for column in columns}
    scores: frozenset[str] = frozenset()
    for index, (name, step) in enumerate(steps):
        step.refuse(f"elicit[{index}].{name}", known, None if index else pool)
        step.refuse_prompts(f"elicit[{index}].{name}", pool)
        if isinstance(step, Vote) and index and _drops_repeats(steps[index - 1][1]):
            raise RecipeError(
                f"elicit[{index}].{name}",
                "the step before it leaves out an answer that is given again, and so the majority: write all: true"
                " there",
            )
        wanted = getattr(step, "score", None)
        ours = all(type(other).__module__.startswith("limbeck.") for _, other in steps[:index])
        if isinstance(wanted, str) and wanted not in scores and ours:  # another's step may give any
            cure = nearest(wanted, scores) or "; put a step before it that gives one, such as rate or pass_rate"
            raise RecipeError(f"elicit[{index}].{name}.score", f"no step before it gives a score {wanted!r}{cure}")
        known |= step.writes()
        scores |= step.gives_scores()


def _drops_repeats(step: ElicitStep) -> bool:
    """Whether it asks several times, and keeps equal answers once."""
    return isinstance(step, AnswerPrompts) and not step.all and step.n * len(step.asks()) > 1
