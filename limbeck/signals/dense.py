"""The dense signal: the teacher's last hidden states with its own head. Exact over the whole vocabulary.

Shapes: N response positions, E width of the teacher, V vocabulary, C positions of a chunk, R of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.head import Buffer, Head, TeacherSignal
from limbeck.objectives.log_probs import token_log_probs


@dataclass(frozen=True)
class DenseRows:
    """The teacher's distributions at R positions, computed once for all terms."""

    p: Distribution

    def log_prob(self, targets_R: Tensor) -> Tensor:
        return self.p.log.gather(-1, targets_R[:, None])[:, 0]

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor
    ) -> ValueAndGradient:
        return divergence(self.p, q, params, targets_R)


@dataclass(frozen=True)
class DenseChunk:
    logits_CV: Tensor

    def rows(self, rows: slice) -> DenseRows:
        return DenseRows(Distribution(self.logits_CV[rows]))


@dataclass(frozen=True)
class DenseSignal(TeacherSignal):
    """Holds N x E numbers and projects one chunk at a time, so there is never an [N, V] tensor."""

    whole: ClassVar[bool] = True

    hidden_NE: Tensor
    head: Head
    buffer: Buffer = field(default_factory=Buffer, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.hidden_NE.device

    def to(self, device: torch.device | str) -> DenseSignal:
        return DenseSignal(self.hidden_NE.to(device), self.head.to(device))

    def select(self, positions: slice | Tensor) -> DenseSignal:
        return DenseSignal(self.hidden_NE[positions], self.head, self.buffer)

    def join(self, others: Sequence[DenseSignal]) -> DenseSignal:
        return DenseSignal(torch.cat([signal.hidden_NE for signal in (self, *others)]), self.head)

    @torch.no_grad()
    def chunk(self, positions: slice) -> DenseChunk:
        """Teacher logits [C, V] at these positions, in fp32 or better. The next chunk of this signal, or of one that
        was selected from it, overwrites them."""
        return DenseChunk(self.head.logits(self.hidden_NE[positions], self.buffer))

    def log_prob(self, targets_N: Tensor) -> Tensor:
        return token_log_probs(self.hidden_NE, self.head, targets_N)

    def hidden_states(self) -> tuple[Tensor, Head]:
        return self.hidden_NE, self.head
