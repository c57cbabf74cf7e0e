"""The dense signal: the teacher's last hidden states with its own head. Exact over the whole vocabulary.

Shapes: N response positions, E width of the teacher, V vocabulary, C positions of a chunk, R of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.head import Buffer, Head


@dataclass(frozen=True)
class DenseRows:
    """Distributions of the teacher, computed once for all terms."""

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
class DenseSignal:
    """Holds N x E numbers and projects a chunk at a time; never [N, V]."""

    hidden_NE: Tensor
    head: Head
    buffer: Buffer = field(default_factory=Buffer, repr=False, compare=False)

    @torch.no_grad()
    def chunk(self, positions: slice) -> DenseChunk:
        """Teacher logits [C, V] of these positions, in fp32 or better; valid until the next chunk."""
        return DenseChunk(self.head.logits(self.hidden_NE[positions], self.buffer))
