"""A contrastive loss on whole responses (CoDIR): the student's pooled states against the teacher's of the same row and
against those of other rows, which are kept in a bank.

Shapes: B rows, N response positions, D width of the student, E of the teacher, M rows of a bank, K negatives, P width
of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from limbeck.objectives.bindable import register_bound
from limbeck.objectives.bound import TEACHER_SIDE, BoundLoss, ModelPair, PreparationText
from limbeck.objectives.forward import Features, Positions
from limbeck.objectives.layers import linear
from limbeck.objectives.parameters import Anything, Number, Range, Setting
from limbeck.objectives.precision import full_precision
from limbeck.types import UserError


def pooled(layers: Sequence[Tensor], row_N: Tensor, position_N: Tensor) -> Tensor:
    """Per row the sum of its response positions' states over their number, layers side by side: [B, sum of widths].

    A row without response positions is all zero.
    """
    states_NW = torch.cat([full_precision(hidden_BTD[row_N, position_N]) for hidden_BTD in layers], dim=-1)
    of_row_BN = (torch.arange(layers[0].shape[0], device=row_N.device)[:, None] == row_N).to(states_NW.dtype)
    return (of_row_BN @ states_NW) / of_row_BN.sum(1, keepdim=True).clamp_min(1)


class Contrast(nn.Module):
    """-log [ e^(s t / tau) / (e^(s t / tau) + sum_k e^(s n_k / tau)) ] per row; s, t, n_k projected to P, of length 1.

    s is the student's pooled state, t the teacher's of the same row, n_k the teacher's of other rows. Both projections
    learn. Limits: near log(K + 1) by chance (above it by up to 1 / (2 P tau^2) for random directions), and at least
    log(1 + K e^(-2 / tau)).

    Differs from the paper, which (like CRD, arXiv:1910.10699) uses noise-contrastive estimation: K + 1 yes-or-no
    questions with a fixed normaliser, here one softmax (InfoNCE, arXiv:1807.03748). Its authors' code also asks from
    the teacher's side over a bank of student states, and keeps banks of projected states with momentum; here the bank
    holds unprojected teacher states, which never grow stale.
    Source: Sun et al., arXiv:2009.14167 (CoDIR).
    """

    def __init__(
        self, student_width: int, teacher_width: int, dim: int = 128, temperature: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature} of contrast must be above 0; 0.1 is usual")
        noise = torch.Generator().manual_seed(seed)
        self.student, self.teacher = (linear(width, dim, noise) for width in (student_width, teacher_width))
        self.temperature = temperature

    def forward(
        self, student_BD: Tensor, teacher_BE: Tensor, bank_ME: Tensor, negatives_BK: Tensor | None = None
    ) -> Tensor:
        """Values [B]. `negatives_BK` are rows of the bank; without them all M are used, so none may be a row of the
        batch."""
        if not len(bank_ME):
            raise UserError("contrast needs at least one negative; fill the bank with teacher states first")
        student_BP = normalize(self.student(full_precision(student_BD)), dim=-1)
        teacher_BP = normalize(self.teacher(full_precision(teacher_BE.detach())), dim=-1)
        drawn = bank_ME[None] if negatives_BK is None else bank_ME[negatives_BK]  # [1 or B, K, E]
        drawn_BKP = normalize(self.teacher(full_precision(drawn.detach())), dim=-1)
        match_B1 = (student_BP * teacher_BP).sum(-1, keepdim=True) / self.temperature
        others_BK = (drawn_BKP * student_BP[:, None]).sum(-1) / self.temperature
        return -log_softmax(torch.cat([match_B1, others_BK], dim=1), dim=1)[:, 0]


def draw_negatives(own_B: Tensor, bank: int, count: int, noise: torch.Generator) -> Tensor:
    """[B, count] rows of a bank, uniform with replacement over all but the row's own place `own_B`."""
    if bank < 2:
        raise UserError(f"a bank of {bank} rows holds no negatives; contrast needs at least 2 samples")
    steps_BK = torch.randint(1, bank, (len(own_B), count), generator=noise)
    return (own_B[:, None] + steps_BK.to(own_B.device)) % bank


@register_bound("contrast", "-log softmax of cos(s, t) / tau over the own and K other texts", "CoDIR, arXiv:2009.14167")
class ContrastiveLoss(BoundLoss):
    """`Contrast` of the pooled states of some layers, side by side, with a bank of the teacher's over all texts."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "layers": Anything("last"),
        "dim": Number(128, Range(1, 65_536)),
        "temperature": Number(0.1, Range(0, 100, open_low=True)),
        "negatives": Number(64, Range(1, 1_000_000)),
    }
    unit = "row"
    needs_all_text = "its bank holds texts that are there before the training"
    bank_ME: Tensor

    def __init__(self, values: Mapping[str, Any], models: ModelPair) -> None:
        super().__init__(values, models)
        ours, theirs = (width * len(self.pairs) for width in models.widths)
        self.learned = Contrast(ours, theirs, values["dim"], values["temperature"], seed=models.seed)
        self.register_buffer("bank_ME", torch.zeros(0, theirs))
        self.register_load_state_dict_pre_hook(_make_room_in_bank)

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        where = (positions.row_N, positions.position_N)
        student_BD = pooled([student.hidden[pair[0]] for pair in self.pairs], *where)
        teacher_BE = pooled([teacher.hidden[pair[1]] for pair in self.pairs], *where)
        negatives = [
            draw_negatives(
                row[None],
                len(self.bank_ME),
                self.values["negatives"],
                torch.Generator().manual_seed(positions.seed * 2**20 + int(row)),
            )
            for row in positions.bank_row_B
        ]
        values_B: Tensor = self.learned(
            student_BD, teacher_BE, self.bank_ME, torch.cat(negatives).to(student_BD.device)
        )
        return values_B

    @torch.no_grad()
    def prepare(self, text: PreparationText) -> None:
        """Fill the bank with the teacher's pooled states of every training text."""
        bank: dict[int, Tensor] = {}
        for batch in text.batches():
            teacher = text.features(TEACHER_SIDE, batch, self.taps(TEACHER_SIDE))
            hidden = [teacher.hidden[pair[1]] for pair in self.pairs]
            row_N, position_N = (index.to(hidden[0].device) for index in batch.response_positions())
            places = (text.bank_rows[sample_id] for sample_id in batch.sample_ids)
            bank |= dict(zip(places, pooled(hidden, row_N, position_N), strict=True))
            text.report_progress(len(bank), len(text.bank_rows))
        self.bank_ME = torch.stack([bank[place] for place in range(len(text.bank_rows))])


def _make_room_in_bank(loss: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a checkpoint is loaded: a bank of the size that it holds."""
    assert isinstance(loss, ContrastiveLoss)
    if (saved := state.get(f"{prefix}bank_ME")) is not None:
        loss.bank_ME = torch.empty_like(saved, device=loss.bank_ME.device)
