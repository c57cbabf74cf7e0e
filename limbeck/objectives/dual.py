"""Dual-space distillation (DSKD, Zhang et al., arXiv:2406.17328): each model's last states in the other's space, under
the other's head.

L = CE(t2s) + D(q, sg[t2s]) + KL(p || s2t), with t2s the teacher's states in the student's space under the student's
head (held fixed), and s2t the student's in the teacher's space under the teacher's. D counts where the target token is
the most likely one under t2s.

With one tokenizer the projections are linear and position meets position. With two, cross-model attention mixes the
positions of a response: the query is the student's token (its embedding and that of the previous token), the key the
teacher's; values are the teacher's states and its target's embedding, as in the authors' published code. That code
divides by standard deviations over a batch; here each state is divided by its own, and embeddings by that of their
table, so that a row does not depend on its batch. A row weighs the same in both spaces.

Shapes: N response positions of the student, M of the teacher, B rows, D width of the student, E of the teacher, F of a
key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.objectives.bindable import register_bound
from limbeck.objectives.bound import BoundLoss, ModelPair
from limbeck.objectives.distribution import ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.divergence_loss import DIVERGENCES, divergence_named
from limbeck.objectives.forward import StudentForward, TeacherStates, TermSum
from limbeck.objectives.head import Block, Head, PositionEvidence, chunk_elements, chunks, fused_loss
from limbeck.objectives.parameters import Number, Range, Setting
from limbeck.objectives.supervised import PlainCrossEntropy


@dataclass(frozen=True)
class DivergenceName:
    """A setting that names a divergence."""

    default: str
    legal: str = ""

    def check(self, path: str, value: object) -> str:
        divergence_named(str(value), path)
        return str(value)


@register_bound("dual_space", "-log t2s(token) + D(t2s, q) + KL(p || s2t)", "Zhang et al. (DSKD), arXiv:2406.17328")
class DualSpace(BoundLoss):
    """The projections of both directions and the attention's queries.

    `divergence` is D, with its own defaults; `projection_rate` how many times the student's learning rate the
    projections are trained with.
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "divergence": DivergenceName("forward_kl"),
        "projection_rate": Number(2.0, Range(0, 1000, open_low=True)),
    }
    reads = frozenset({"teacher_states"})

    def __init__(self, values: Mapping[str, Any], models: ModelPair) -> None:
        super().__init__(values, models)
        ours, theirs = models.widths
        noise = torch.Generator().manual_seed(models.seed)
        self.embed = models.embed
        self.dense = models.dense
        self.to_student = _random_linear(theirs, ours, noise)
        self.to_teacher = _random_linear(ours, theirs, noise)
        self.query = _random_linear(2 * ours, 2 * theirs, noise)

    @property
    def lr_multiplier(self) -> float:
        return float(self.values["projection_rate"])

    def evaluate(self, data: StudentForward, only: str | None, scale: float) -> TermSum:
        """The weighted sum of all three parts."""
        assert data.teacher.states is not None
        weight_N = data.token_weights(only).to(data.hidden_ND.device)
        return self.three_sums(data, data.teacher.states, weight_N, scale)

    def three_sums(self, data: StudentForward, teacher: TeacherStates, weight_N: Tensor, scale: float) -> TermSum:
        """The three parts summed, every student position with its weight."""
        batch = data.batch
        hidden_ND = data.hidden_ND
        row_N, position_N = batch.response_positions()
        previous_N, target_N = (batch.tokens_BT[row_N, position_N + shift].to(hidden_ND.device) for shift in (0, 1))
        row_N = row_N.to(hidden_ND.device)
        if teacher.embedded is None:
            from_teacher_ND = self.to_student(teacher.hidden_ME)
            from_student_ME = self.to_teacher(hidden_ND)
        else:
            from_teacher_ND, from_student_ME = self._attended(hidden_ND, (previous_N, target_N), row_N, teacher)
        fixed = data.head.detached()
        correct_N = _correct(from_teacher_ND, fixed, target_N)
        weight_M = _per_row(weight_N, row_N, teacher.row_M)
        projected = fused_loss(
            from_teacher_ND,
            fixed,
            [PlainCrossEntropy()],
            [scale],
            weight_KN=weight_N[None],
            evidence=PositionEvidence(target_N),
        )
        in_student_space = fused_loss(
            hidden_ND,
            data.head,
            [_ToTeacher(DIVERGENCES[self.values["divergence"]])],
            [scale],
            weight_KN=(weight_N * correct_N)[None],
            evidence=PositionEvidence(target_N, self.dense(from_teacher_ND.detach(), fixed)),
        )
        in_teacher_space = fused_loss(
            from_student_ME,
            teacher.head,
            [_ToTeacher(DIVERGENCES["forward_kl"])],
            [scale],
            weight_KN=weight_M[None],
            evidence=PositionEvidence(torch.zeros_like(teacher.row_M), self.dense(teacher.hidden_ME, teacher.head)),
        )
        parts = (projected, in_student_space, in_teacher_space)
        loss = projected.loss + in_student_space.loss + in_teacher_space.loss
        return TermSum(loss, sum(sum(part.sums.values()) for part in parts))

    def _attended(
        self, hidden_ND: Tensor, tokens_N: tuple[Tensor, Tensor], row_N: Tensor, teacher: TeacherStates
    ) -> tuple[Tensor, Tensor]:
        """(the teacher's states at the student's positions [N, D], the student's at the teacher's [M, E])."""
        assert teacher.embedded is not None
        previous_ME, target_ME = teacher.embedded
        query_NF = self.query(torch.cat([self.embed(token_N) for token_N in tokens_N], -1))
        key_MF = torch.cat([previous_ME, target_ME], -1)
        scores_NM = query_NF @ key_MF.T / math.sqrt(key_MF.shape[-1])
        scores_NM = scores_NM.masked_fill(row_N[:, None] != teacher.row_M, -torch.inf)
        value_ME = teacher.hidden_ME / teacher.hidden_ME.std(-1, keepdim=True) + target_ME
        return scores_NM.softmax(-1) @ self.to_student(value_ME), scores_NM.T.softmax(-1) @ self.to_teacher(hidden_ND)


def _random_linear(inputs: int, outputs: int, noise: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0.0, inputs**-0.5, generator=noise)
    return layer


@torch.no_grad()
def _correct(hidden_ND: Tensor, head: Head, target_N: Tensor) -> Tensor:
    """1 where the target token is the most likely one, else 0: [N]."""
    likeliest = [
        head.logits(hidden_ND[part]).argmax(-1)
        for part in chunks(len(hidden_ND), head.vocab_size, chunk_elements(hidden_ND.device))
    ]
    return (torch.cat(likeliest) == target_N).to(hidden_ND.dtype)


def _per_row(weight_N: Tensor, row_N: Tensor, row_M: Tensor) -> Tensor:
    """Each row's weight, spread evenly over the teacher's tokens of it [M]."""
    rows = int(torch.cat([row_N, row_M]).max()) + 1
    weight_B = weight_N.new_zeros(rows).index_add_(0, row_N, weight_N)
    return (weight_B / torch.bincount(row_M, minlength=rows).clamp_min(1))[row_M]


class _ToTeacher:
    """A divergence with its defaults, for `fused_loss`."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence
        self.label = divergence.name

    def values(self, block: Block) -> ValueAndGradient:
        assert block.teacher is not None
        return self.divergence(block.teacher.p, block.q, self.divergence.defaults, block.targets_R)
