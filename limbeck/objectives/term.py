"""A loss term: which evidence it reads and its value at every response token. Terms return sums, never means.

Shapes: C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from limbeck.objectives.divergence import DIVERGENCES, checked_params
from limbeck.objectives.supervised import cross_entropy
from limbeck.types import RecipeError, nearest

Column = Literal["tokens", "teacher_distribution"]


@dataclass(frozen=True)
class Chunk:
    """The evidence beside C response positions. `teacher_logits_CV` is None where no term reads it."""

    targets_C: Tensor
    teacher_logits_CV: Tensor | None


@dataclass(frozen=True)
class Term:
    """`values(student_logits_CV, chunk) -> [C]` in nats; the loop weighs, sums and divides."""

    name: str
    reads: frozenset[Column]
    weight: float
    values: Callable[[Tensor, Chunk], Tensor]


def make_term(name: str, params: dict[str, object], weight: float, path: str = "") -> Term:
    """The term `name` with its parameters checked.

    Raises:
        RecipeError: unknown term or parameter, or a value out of range.
    """
    if name == "cross_entropy":
        if params:
            raise RecipeError(f"{path}.{min(params)}".lstrip("."), "cross_entropy has no parameters but weight")
        return Term(name, frozenset({"tokens"}), weight, lambda logits_CV, chunk: cross_entropy(logits_CV, chunk.targets_C))
    if name not in DIVERGENCES:
        raise RecipeError(path, f"no loss is named {name!r}{nearest(name, [*DIVERGENCES, 'cross_entropy'])}")
    values, fn = checked_params(name, params, path), DIVERGENCES[name].fn

    def term_values(student_logits_CV: Tensor, chunk: Chunk) -> Tensor:
        assert chunk.teacher_logits_CV is not None, f"{name} needs the teacher's distribution"
        return fn(chunk.teacher_logits_CV, student_logits_CV, **values)

    return Term(name, frozenset({"teacher_distribution"}), weight, term_values)
