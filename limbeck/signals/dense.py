"""The dense signal: the teacher's last hidden states with its own head. Exact over the whole vocabulary.

Shapes: N response positions, E width of the teacher, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.objectives.precision import full_precision


@dataclass(frozen=True)
class DenseSignal:
    """Holds N x E numbers and projects a chunk at a time; never [N, V]."""

    hidden_NE: Tensor
    head_VE: Tensor

    @torch.no_grad()
    def logits(self, positions: slice) -> Tensor:
        """Teacher logits [C, V] of these positions, in fp32 or better."""
        return full_precision(self.hidden_NE[positions] @ self.head_VE.T)
