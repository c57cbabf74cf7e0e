"""The divergences that a recipe can name: one function each, registered by its decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from limbeck.objectives.distribution import ValueAndGradient
from limbeck.objectives.divergence import Divergence, DivergenceFn
from limbeck.objectives.facts import TeacherFacts
from limbeck.objectives.head import Block
from limbeck.objectives.loss import Loss, LossSettings
from limbeck.objectives.parameters import Range, check_numbers
from limbeck.objectives.registry import LossesOf, register
from limbeck.types import RecipeError, nearest

TEMPERATURE = Range(0, 1000, open_low=True)
SHARE = Range(0, 1)


@dataclass(frozen=True, kw_only=True)
class DivergenceLoss(Loss):
    """A divergence between the teacher's and the student's distribution at every position."""

    divergence: Divergence

    fused: ClassVar[bool] = True

    @property
    def defaults(self) -> Mapping[str, float]:
        return self.divergence.defaults

    def check_teacher(self, settings: LossSettings, facts: TeacherFacts) -> None:
        super().check_teacher(settings, facts)
        path = settings.path
        soft = settings.softened()
        divergence = self.divergence
        if facts.bridged and not divergence.sorts and (not divergence.buckets or soft):
            raise RecipeError(
                path, f"{self.name} (or its temperature) needs one vocabulary; use forward_kl, jsd or uld"
            )
        if facts.bridged and facts.written_elsewhere and not (divergence.one_hot and divergence.buckets):
            raise RecipeError(
                path,
                f"{self.name} says nothing of the text alone, which others: written teaches; use forward_kl or jsd",
            )

    def token_values(self, block: Block, params: Mapping[str, float]) -> ValueAndGradient:
        assert block.teacher is not None, f"{self.name} needs the teacher's distribution"
        return block.teacher.compare(self.divergence, params, block.q, block.targets_R)


def register_divergence(
    formula: str,
    paper: str,
    *,
    buckets: bool = True,
    sampled: bool = False,
    one_hot: bool = True,
    targets: bool = False,
    softens: bool = True,
    sorts: bool = False,
    **ranges: Range,
) -> Callable[[DivergenceFn], DivergenceFn]:
    """Register the function below as a divergence under its own name; see `Divergence` for the flags.

    `ranges` are the legal values of its parameters, whose defaults are those of its signature.
    """

    def add(fn: DivergenceFn) -> DivergenceFn:
        legal = ranges | ({"temperature": TEMPERATURE} if softens else {})
        divergence = Divergence(
            name=fn.__name__,
            fn=fn,
            formula=formula,
            paper=paper,
            ranges=legal,
            buckets=buckets,
            sampled=sampled,
            one_hot=one_hot,
            targets=targets,
            softens=softens,
            sorts=sorts,
        )
        register(
            DivergenceLoss(
                name=fn.__name__,
                formula=formula,
                paper=paper,
                reads=frozenset({"teacher_distribution"}),
                ranges=legal,
                divergence=divergence,
            )
        )
        return fn

    return add


class _Divergences(Mapping[str, Divergence]):
    """The registered divergences, as they are now."""

    def __init__(self) -> None:
        self._losses = LossesOf(DivergenceLoss)

    def __getitem__(self, name: str) -> Divergence:
        return self._losses[name].divergence

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)


DIVERGENCES = _Divergences()


def divergence_named(name: str, path: str = "") -> Divergence:
    """The divergence of this name. RecipeError, with the place in the recipe, if there is none."""
    if name not in DIVERGENCES:
        raise RecipeError(path, f"no divergence is named {name!r}{nearest(name, DIVERGENCES)}")
    return DIVERGENCES[name]


def checked_params(name: str, params: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The divergence's parameters with defaults filled in.

    Raises:
        RecipeError: an unknown divergence or parameter, or a value outside its range; `path` is its place.
    """
    divergence = divergence_named(name, path)
    return check_numbers(name, divergence.defaults, divergence.ranges, params=params, path=path)
