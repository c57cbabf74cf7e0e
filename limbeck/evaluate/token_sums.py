"""Quantities at single response tokens, from the system's and the teacher's next-token distributions.

Shapes: R response positions of a block, V vocabulary, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence import TINY

CHOICES = 5


@dataclass(frozen=True)
class TokenBlock:
    """The distributions at some response tokens: `q` of the system, `p` of the teacher (None where its weights are not
    here; `p is q` where the system is the teacher itself)."""

    q: Distribution
    p: Distribution | None
    targets_R1: Tensor

    @property
    def teacher(self) -> Distribution:
        assert self.p is not None
        return self.p

    @property
    def targets(self) -> Tensor:
        return self.targets_R1[:, 0]

    @cached_property
    def choices(self) -> tuple[Tensor, Tensor]:
        """(probabilities, tokens) [R, K] of the system's likeliest tokens."""
        shares_RK, tokens_RK = self.q.prob.topk(min(CHOICES, self.q.prob.shape[-1]))
        return shares_RK, tokens_RK

    @cached_property
    def teacher_choices(self) -> tuple[Tensor, Tensor]:
        if self.p is self.q:
            return self.choices
        shares_RK, tokens_RK = self.teacher.prob.topk(min(CHOICES, self.teacher.prob.shape[-1]))
        return shares_RK, tokens_RK

    @property
    def first(self) -> Tensor:
        """[R]: the system's likeliest token."""
        return self.choices[1][:, 0]

    @property
    def teacher_first(self) -> Tensor:
        return self.teacher_choices[1][:, 0]

    @property
    def is_wrong(self) -> Tensor:
        """[R]: whether the system's likeliest token is not the text's."""
        return self.first != self.targets

    @cached_property
    def log_ratio(self) -> Tensor:
        """[R, V]: log p - log q."""
        return self.teacher.log - self.q.log

    @cached_property
    def log_mixture(self) -> Tensor:
        """[R, V]: log((p + q) / 2)."""
        return (0.5 * (self.teacher.prob + self.q.prob)).clamp_min_(TINY).log_()


@dataclass(frozen=True)
class TokenSum:
    """A quantity at every response token, added up over each answer and kept in its record under `name`.

    Args:
        value: the quantity of a block, [R].
        reads_teacher: left out where the teacher's distribution is not known.
        is_distance: between the two distributions, so exactly 0 where the system is the teacher.
    """

    name: str
    value: Callable[[TokenBlock], Tensor]
    reads_teacher: bool = True
    is_distance: bool = False

    def of(self, block: TokenBlock) -> Tensor:
        if self.is_distance and block.p is block.q:
            return torch.zeros_like(block.choices[0][:, 0])
        return self.value(block)


def dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    """[R]: the sum over the vocabulary of a * b."""
    return (a_RV * b_RV).sum(-1)
