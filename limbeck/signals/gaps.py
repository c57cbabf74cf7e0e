"""A sparse signal with gaps: the teacher's top tokens where they are known, and nothing elsewhere.

At a gap every divergence and its gradient are 0. The text's column `taught` keeps gaps out of the sum and of the amount
that it is divided by, so they change no mean.

Shapes: N response positions, R of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.head import TeacherSignal, TopTokens
from limbeck.signals.sparse import PARTIAL, TopK
from limbeck.types import UserError


@dataclass(frozen=True)
class GappedSignal(TeacherSignal):
    """`top` at the positions where `known_N` is true; what it names at the others is not looked at."""

    top: TopK
    known_N: Tensor

    @property
    def device(self) -> torch.device:
        return self.top.device

    def to(self, device: torch.device | str) -> GappedSignal:
        return GappedSignal(self.top.to(device), self.known_N.to(device))

    def select(self, positions: slice | Tensor) -> GappedSignal:
        return GappedSignal(self.top.select(positions), self.known_N[positions])

    def chunk(self, positions: slice) -> GappedSignal:
        return self.select(positions)

    def rows(self, rows: slice) -> GappedSignal:
        return self.select(rows)

    def join(self, others: Sequence[GappedSignal]) -> GappedSignal:
        known_N = torch.cat([signal.known_N for signal in (self, *others)])
        return GappedSignal(self.top.join([other.top for other in others]), known_N)

    def top_tokens(self) -> TopTokens:
        return self.top.top_tokens()

    def log_prob(self, _: Tensor) -> Tensor:
        raise UserError(PARTIAL)

    @property
    def p(self) -> Distribution:
        raise UserError(PARTIAL)

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor
    ) -> ValueAndGradient:
        """The divergence over the named tokens and the bucket; 0 at gaps."""
        values_R, gradient_RV = self.top.compare(divergence, params, q, targets_R)
        gap_R = ~self.known_N
        return values_R.masked_fill(gap_R, 0), gradient_RV.masked_fill_(gap_R[:, None], 0)
