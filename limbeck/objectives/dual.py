"""Dual-space distillation (DSKD, Zhang et al., arXiv:2406.17328): each model's last states in the other's space, under
the other's head.

L = CE(t2s) + D(q, sg[t2s]) + KL(p || s2t), with t2s the teacher's states in the student's space under the student's
head (held fixed), and s2t the student's in the teacher's space under the teacher's. D counts where t2s finds the
written token (its largest probability).

With one tokenizer the projections are linear and position meets position. With two, cross-model attention mixes
positions of a response: the student's token (its embedding and the one before) asks, the teacher's answers; values are
the teacher's states and its target's embedding, as the authors' published code has it. That code divides by standard
deviations over a batch; here each state is divided by its own, and embeddings by that of their table, so that no batch
changes a row. A row weighs the same in both spaces.

Shapes: N response positions of the student, M of the teacher, B rows, D width of the student, E of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.objectives.divergence import DIVERGENCES, ValueAndGradient
from limbeck.objectives.head import CHUNK_ELEMENTS, Block, Head, PositionEvidence, TeacherSignal, chunks, fused_loss
from limbeck.objectives.supervised import cross_entropy
from limbeck.types import Batch

DUAL_SPACE = "dual_space"
DEFAULTS: dict[str, Any] = {"divergence": "forward_kl", "projection_rate": 2.0}
FORMULA = "-log t2s(token) + D(t2s, q) + KL(p || s2t)"
PAPER = "Zhang et al. (DSKD), arXiv:2406.17328"


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's last hidden states at its own response positions, its head, and each position's row. Where its
    tokens are not the student's, `embedded` are the token before and the written one, over the standard deviation of
    its embeddings."""

    hidden_ME: Tensor
    head: Head
    row_M: Tensor
    embedded: tuple[Tensor, Tensor] | None = None


class DualSpace(nn.Module):
    """The projections of both directions and the attention's queries.

    Args:
        widths: of student and teacher.
        divergence: D, by its name, with its own defaults.
        times: how many times as fast as the student the projections are trained.
        embed: the student's embeddings of tokens, without gradient.
        dense: a signal from states and a head.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        divergence: str,
        times: float,
        seed: int,
        embed: Callable[[Tensor], Tensor],
        dense: Callable[[Tensor, Head], TeacherSignal],
    ) -> None:
        super().__init__()
        ours, theirs = widths
        noise = torch.Generator().manual_seed(seed)
        self.divergence = divergence
        self.times = times
        self.embed = embed
        self.dense = dense
        self.to_student = _linear(theirs, ours, noise)
        self.to_teacher = _linear(ours, theirs, noise)
        self.query = _linear(2 * ours, 2 * theirs, noise)

    def taps(self, _: int, /) -> tuple[set[int], set[int]]:
        """It reads no inner layers."""
        return set(), set()

    def forward(
        self, batch: Batch, hidden_ND: Tensor, head: Head, teacher: TeacherStates, weight_N: Tensor, scale: float
    ) -> tuple[Tensor, float]:
        """The weighted sum of all three parts: (scaled and ready for `backward`, plain)."""
        row_N, position_N = batch.response_positions()
        before_N, said_N = (batch.tokens_BT[row_N, position_N + shift].to(hidden_ND.device) for shift in (0, 1))
        row_N = row_N.to(hidden_ND.device)
        if teacher.embedded is None:
            from_teacher_ND = self.to_student(teacher.hidden_ME)
            from_student_ME = self.to_teacher(hidden_ND)
        else:
            states = teacher.hidden_ME, teacher.row_M, *teacher.embedded
            from_teacher_ND, from_student_ME = self._attended(hidden_ND, (before_N, said_N), row_N, *states)
        fixed = head.detached()
        right_N = _right(from_teacher_ND, fixed, said_N)
        weight_M = _per_row(weight_N, row_N, teacher.row_M)
        ce = fused_loss(from_teacher_ND, fixed, [_CrossEntropy()], [scale], weight_N[None], PositionEvidence(said_N))
        target = self.dense(from_teacher_ND.detach(), fixed)
        apart = fused_loss(
            hidden_ND,
            head,
            [_Divergence(self.divergence)],
            [scale],
            (weight_N * right_N)[None],
            PositionEvidence(said_N, target),
        )
        truth = self.dense(teacher.hidden_ME, teacher.head)
        nothing = torch.zeros_like(teacher.row_M)
        back = fused_loss(
            from_student_ME,
            teacher.head,
            [_Divergence("forward_kl")],
            [scale],
            weight_M[None],
            PositionEvidence(nothing, truth),
        )
        return ce.loss + apart.loss + back.loss, sum(sum(part.sums.values()) for part in (ce, apart, back))

    def _attended(
        self,
        hidden_ND: Tensor,
        tokens_N: tuple[Tensor, Tensor],
        row_N: Tensor,
        theirs_ME: Tensor,
        row_M: Tensor,
        before_ME: Tensor,
        said_ME: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(the teacher's states at the student's positions [N, D], the student's at the teacher's [M, E])."""
        query_NF = self.query(torch.cat([self.embed(token_N) for token_N in tokens_N], -1))
        key_MF = torch.cat([before_ME, said_ME], -1)
        scores_NM = query_NF @ key_MF.T / math.sqrt(key_MF.shape[-1])
        scores_NM = scores_NM.masked_fill(row_N[:, None] != row_M, -torch.inf)
        own_ME = theirs_ME / theirs_ME.std(-1, keepdim=True) + said_ME
        return scores_NM.softmax(-1) @ self.to_student(own_ME), scores_NM.T.softmax(-1) @ self.to_teacher(hidden_ND)


def _linear(inner: int, outer: int, noise: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0.0, inner**-0.5, generator=noise)
    return layer


@torch.no_grad()
def _right(hidden_ND: Tensor, head: Head, said_N: Tensor) -> Tensor:
    """1 where the written token is the likeliest, else 0: [N]."""
    found = [
        head.logits(hidden_ND[part]).argmax(-1) for part in chunks(len(hidden_ND), head.vocab_size, CHUNK_ELEMENTS)
    ]
    return (torch.cat(found) == said_N).to(hidden_ND.dtype)


def _per_row(weight_N: Tensor, row_N: Tensor, row_M: Tensor) -> Tensor:
    """Each row's weight, spread evenly over the teacher's tokens of it [M]."""
    rows = int(torch.cat([row_N, row_M]).max()) + 1
    whole_B = weight_N.new_zeros(rows).index_add_(0, row_N, weight_N)
    return (whole_B / torch.bincount(row_M, minlength=rows).clamp_min(1))[row_M]


class _CrossEntropy:
    label = "projected"

    def values(self, block: Block) -> ValueAndGradient:
        return cross_entropy(block.q, block.targets_R)


class _Divergence:
    def __init__(self, name: str) -> None:
        self.name = self.label = name

    def values(self, block: Block) -> ValueAndGradient:
        assert block.teacher is not None
        known = DIVERGENCES[self.name]
        return known(block.teacher.p, block.q, known.defaults, block.targets_R)
