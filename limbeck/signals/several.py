"""Several teachers as one signal: the mean of their distributions, or the one or the other by how unsure the student
is.

Shapes: N response positions, M teachers, C positions of a chunk, R of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.signals.dense import DenseChunk, DenseRows, DenseSignal
from limbeck.types import UserError


@dataclass(frozen=True)
class MixedSignal:
    """p = sum_m w_nm p_m, with weights that add up to 1 at every position: the mean of probabilities, never of logits.

    Where one teacher has all the weight it is that teacher's distribution; teachers without any in a chunk are not
    projected.
    """

    signals: Sequence[DenseSignal]
    weight_NM: Tensor

    @torch.no_grad()
    def chunk(self, positions: slice) -> DenseChunk:
        weight_CM = self.weight_NM[positions]
        log_CV = None
        for number, signal in enumerate(self.signals):
            if not bool(weight_CM[:, number].any()):
                continue
            own_CV = signal.chunk(positions).logits_CV
            own_CV = own_CV - own_CV.logsumexp(-1, keepdim=True) + weight_CM[:, number, None].to(own_CV).log()
            log_CV = own_CV if log_CV is None else torch.logaddexp(log_CV, own_CV)
        assert log_CV is not None, "weights add up to 1"
        return DenseChunk(log_CV)


@dataclass(frozen=True)
class GatedSignal:
    """Dynamic KD's two teachers (arXiv:2109.11295): with h = H(q) / log V, the student's entropy as a share of the
    largest, the loss is h times the one to the `small` teacher and 1 - h times the one to the `large`. No gradient
    flows through h.
    """

    small: DenseSignal
    large: DenseSignal

    def chunk(self, positions: slice) -> GatedChunk:
        return GatedChunk(self.small.chunk(positions), self.large.chunk(positions))


@dataclass(frozen=True)
class GatedChunk:
    small: DenseChunk
    large: DenseChunk

    def rows(self, rows: slice) -> GatedRows:
        return GatedRows(self.small.rows(rows), self.large.rows(rows))


@dataclass(frozen=True)
class GatedRows:
    small: DenseRows
    large: DenseRows

    @property
    def p(self) -> Distribution:
        raise UserError(
            "which of two teachers is followed depends on the student, so there is no one distribution; use a"
            " divergence"
        )

    def log_prob(self, _: Tensor) -> Tensor:
        return self.p.log  # which is refused

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor
    ) -> ValueAndGradient:
        share_R = (-(q.prob * q.log).sum(-1) / math.log(q.log.shape[-1])).clamp(0, 1)
        values_R, gradient_RV = self.small.compare(divergence, params, q, targets_R)
        other_R, other_RV = self.large.compare(divergence, params, q, targets_R)
        gradient_RV = gradient_RV.mul_(share_R[:, None]).add_(other_RV.mul_(1 - share_R[:, None]))
        return share_R * values_R + (1 - share_R) * other_R, gradient_RV
