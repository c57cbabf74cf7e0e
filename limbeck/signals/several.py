"""Several teachers as one signal: the mean of their distributions, or one or the other by how unsure the student is.

Shapes: N response positions, M teachers, C positions of a chunk, R of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.head import TeacherSignal, chunk_elements, chunks
from limbeck.signals.dense import DenseChunk, DenseRows, DenseSignal
from limbeck.types import UserError


@dataclass(frozen=True)
class MixedSignal(TeacherSignal):
    """p = sum_m w_nm p_m, with weights that add up to 1 at every position: the mean of probabilities, not of logits.

    Where one teacher has all the weight, p is that teacher's distribution. A teacher without weight in a chunk is not
    projected.
    """

    whole: ClassVar[bool] = True

    signals: Sequence[DenseSignal]
    weight_NM: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight_NM.device

    def to(self, device: torch.device | str) -> MixedSignal:
        return MixedSignal([signal.to(device) for signal in self.signals], self.weight_NM.to(device))

    def select(self, positions: slice | Tensor) -> MixedSignal:
        return MixedSignal([signal.select(positions) for signal in self.signals], self.weight_NM[positions])

    def join(self, others: Sequence[MixedSignal]) -> MixedSignal:
        by_teacher = zip(self.signals, *(other.signals for other in others), strict=True)
        weight_NM = torch.cat([signal.weight_NM for signal in (self, *others)])
        return MixedSignal([first.join(rest) for first, *rest in by_teacher], weight_NM)

    @torch.no_grad()
    def chunk(self, positions: slice) -> DenseChunk:
        weight_CM = self.weight_NM[positions]
        log_CV = None
        for number, signal in enumerate(self.signals):
            if not bool(weight_CM[:, number].any()):
                continue
            part_CV = signal.chunk(positions).logits_CV
            part_CV = part_CV - part_CV.logsumexp(-1, keepdim=True) + weight_CM[:, number, None].to(part_CV).log()
            log_CV = part_CV if log_CV is None else torch.logaddexp(log_CV, part_CV)
        assert log_CV is not None, "weights add up to 1"
        return DenseChunk(log_CV)

    def log_prob(self, targets_N: Tensor) -> Tensor:
        parts = []
        for part in chunks(len(targets_N), self.signals[0].head.vocab_size, chunk_elements(targets_N.device)):
            parts.append(self.chunk(part).rows(slice(None)).log_prob(targets_N[part]))
        return torch.cat(parts)


@dataclass(frozen=True)
class GatedSignal(TeacherSignal):
    """Dynamic KD's two teachers (arXiv:2109.11295).

    With h = H(q) / log V, the student's entropy as a share of the largest possible, the loss is h times the one to the
    `small` teacher plus 1 - h times the one to the `large`. No gradient flows through h.
    """

    small: DenseSignal
    large: DenseSignal

    @property
    def device(self) -> torch.device:
        return self.small.device

    def to(self, device: torch.device | str) -> GatedSignal:
        return GatedSignal(self.small.to(device), self.large.to(device))

    def select(self, positions: slice | Tensor) -> GatedSignal:
        return GatedSignal(self.small.select(positions), self.large.select(positions))

    def join(self, others: Sequence[GatedSignal]) -> GatedSignal:
        return GatedSignal(
            self.small.join([other.small for other in others]), self.large.join([other.large for other in others])
        )

    def chunk(self, positions: slice) -> GatedChunk:
        return GatedChunk(self.small.chunk(positions), self.large.chunk(positions))

    def log_prob(self, _: Tensor) -> Tensor:
        _refuse()


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
        _refuse()

    def log_prob(self, _: Tensor) -> Tensor:
        _refuse()

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor
    ) -> ValueAndGradient:
        share_R = (-(q.prob * q.log).sum(-1) / math.log(q.log.shape[-1])).clamp(0, 1)
        small_R, gradient_RV = self.small.compare(divergence, params, q, targets_R)
        large_R, large_RV = self.large.compare(divergence, params, q, targets_R)
        gradient_RV = gradient_RV.mul_(share_R[:, None]).add_(large_RV.mul_(1 - share_R[:, None]))
        return share_R * small_R + (1 - share_R) * large_R, gradient_RV


def _refuse() -> NoReturn:
    raise UserError(
        "which of two teachers is followed depends on the student, so there is no one distribution; use a divergence"
    )
