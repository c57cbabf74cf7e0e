"""Losses on hidden states: matched through learned projections or filters, or compared by their geometry (CKA).

A loss function gives one value per response position, or one per row where its docstring says so. Teacher tensors are
detached here; everything is computed in fp32 (fp64 stays). Not covered: models with different tokenizers.

Shapes: B rows, N response positions, Q those of one row, D width of the student, E of the teacher, F of a filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from limbeck.objectives.bindable import register_bound
from limbeck.objectives.bound import BoundLoss, ModelPair, ModelSizes, PreparationText, check_width
from limbeck.objectives.forward import Features, Positions
from limbeck.objectives.head import PositionEvidence, fused_loss
from limbeck.objectives.layers import PROJECTIONS, Pair, Project, mean_over_pairs, pair_name, projections
from limbeck.objectives.parameters import Anything, Choice, Flag, Number, Range, Setting
from limbeck.objectives.precision import full_precision
from limbeck.objectives.supervised import PlainCrossEntropy
from limbeck.types import Batch, UserError, nearest

DISTANCES = ("squared", "cosine")


def hidden_match(
    student_ND: Tensor, teacher_NE: Tensor, project: Project | None = None, distance: str = "squared"
) -> Tensor:
    """sum_e (project(s)_e - t_e)^2 / E for `squared`, 1 - cos(project(s), t) for `cosine`: [N].

    Limits: `squared` is 0 iff the projected states are equal; `cosine` lies in [0, 2], is blind to both lengths, and is
    1 where a state is all zero.

    Raises:
        UserError: widths that differ after the projection, or an unknown distance.
    Source: hints, Romero et al., arXiv:1412.6550; per layer, Jiao et al., arXiv:1909.10351 (TinyBERT).
    """
    projected_NE = full_precision(student_ND)
    target_NE = full_precision(teacher_NE.detach())
    projected_NE = projected_NE if project is None else project(projected_NE)
    if projected_NE.shape != target_NE.shape:
        raise UserError(
            f"hidden states {tuple(projected_NE.shape)} and {tuple(target_NE.shape)} differ in shape; set projection:"
            " learned"
        )
    if distance == "cosine":
        return 1 - cosine_similarity(projected_NE, target_NE, dim=-1)
    if distance == "squared":
        return (projected_NE - target_NE).square().sum(-1) / target_NE.shape[-1]
    raise UserError(f"no distance is named {distance!r}{nearest(distance, DISTANCES)}")


def filtered_match(student_ND: Tensor, teacher_NE: Tensor, student_filter: Project, teacher_filter: Project) -> Tensor:
    """sum_f (g_s(s)_f - g_t(t)_f)^2 / F, with g_t as it stands (no gradient reaches it): [N]. See `TaskFilters`."""
    with torch.no_grad():
        target_NF = teacher_filter(full_precision(teacher_NE))
    return hidden_match(student_ND, target_NF, student_filter)


class TaskFilters(nn.Module):
    """A linear filter per pair of layers for the student and one for the teacher; the teacher's is frozen.

    Stage I of TED learns each filter on the task with its own model frozen (`FilteredMatch.prepare`); stage II adds
    this loss. Before stage I a filter is an identity or has orthonormal rows or columns. `hidden_match` without a
    projection is the case of two identities.

    Differs from the authors' code: their filters have a bias, and can have a hidden layer.
    Source: Liang et al., arXiv:2210.01351 (TED).
    """

    def __init__(
        self, pairs: Sequence[Pair], student_width: int, teacher_width: int, width: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        width = teacher_width if width is None else width
        self.student = projections(pairs, student_width, width, kind="learned", seed=seed)
        self.teacher = projections(pairs, teacher_width, width, kind="learned", seed=seed).requires_grad_(False)

    def forward(self, pair: Pair, student_ND: Tensor, teacher_NE: Tensor) -> Tensor:
        return filtered_match(student_ND, teacher_NE, self.student[pair_name(pair)], self.teacher[pair_name(pair)])


@register_bound("hidden_match", "|W h_q - h_p|^2 / width", "FitNets, arXiv:1412.6550; TinyBERT, arXiv:1909.10351")
class HiddenMatch(BoundLoss):
    """`hidden_match` over pairs of layers, through one projection per pair."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "layers": Anything("uniform"),
        "projection": Choice("learned", PROJECTIONS),
        "distance": Choice("squared", DISTANCES),
        "embeddings": Flag(False),
    }

    def __init__(self, values: Mapping[str, Any], models: ModelPair) -> None:
        super().__init__(values, models)
        self.learned = projections(self.pairs, *models.widths, kind=values["projection"], seed=models.seed)

    @classmethod
    def check_sizes(cls, values: Mapping[str, Any], student: ModelSizes, teacher: ModelSizes, path: str) -> None:
        super().check_sizes(values, student, teacher, path)
        if values["projection"] == "none":
            check_width(student, teacher, path, "set projection: learned")

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        where = (positions.row_N, positions.position_N)
        return mean_over_pairs(
            [
                hidden_match(
                    student.hidden[pair[0]][where],
                    teacher.hidden[pair[1]][where],
                    self.learned[pair_name(pair)],
                    self.values["distance"],
                )
                for pair in self.pairs
            ]
        )


@register_bound(
    "filtered_match", "|g_q(h_q) - g_p(h_p)|^2 / width, filters g learned on the task first", "TED, arXiv:2210.01351"
)
class FilteredMatch(BoundLoss):
    """`filtered_match` over pairs of layers. TED's first stage, in which the filters learn, is its preparation.

    The paper reads filtered states by a task head of their own; a language model has its head.
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "layers": Anything("uniform"),
        "filter_steps": Number(20, Range(1, 100_000)),
        "filter_lr": Number(1e-3, Range(0, 1, open_low=True)),
    }
    same_width = "use hidden_match or relations"
    needs_fixed_text = "its filters are learned from text that is there before the training"

    def __init__(self, values: Mapping[str, Any], models: ModelPair) -> None:
        super().__init__(values, models)
        if models.widths[0] != models.widths[1]:
            raise UserError(
                f"filters read by each model's own head need equal widths, not {models.widths}; use hidden_match or"
                " relations"
            )
        self.learned = TaskFilters(self.pairs, *models.widths, seed=models.seed)

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        where = (positions.row_N, positions.position_N)
        return mean_over_pairs(
            [self.learned(pair, student.hidden[pair[0]][where], teacher.hidden[pair[1]][where]) for pair in self.pairs]
        )

    def prepare(self, text: PreparationText) -> None:
        """Each layer's filter learns, by cross-entropy, to be read by its model's own head. Both models are frozen."""
        steps = self.values["filter_steps"]
        for side, name in enumerate(("student", "teacher")):
            filters = self.learned.get_submodule(name)
            filters.requires_grad_(True)
            optimizer = torch.optim.Adam(filters.parameters(), lr=self.values["filter_lr"])
            for step, batches in enumerate(islice(text.steps(side), steps)):
                tokens = int(sum(batch.mask_BT.sum() for batch in batches))
                for batch in batches:
                    self._filter_loss(text, side, batch, 1 / tokens).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                text.report_progress(side * steps + step + 1, 2 * steps)
            filters.requires_grad_(name == "student")

    def _filter_loss(self, text: PreparationText, side: int, batch: Batch, scale: float) -> Tensor:
        filters = self.learned.get_submodule("student" if side == 0 else "teacher")
        where = batch.response_positions()
        features = text.features(side, batch, self.taps(side))
        head = text.head(side)
        device = head.weight_VD.device
        evidence = PositionEvidence(batch.tokens_BT[where[0], where[1] + 1].to(device))
        weight_KN = torch.ones(1, len(evidence.targets_N), device=device)
        loss = weight_KN.new_zeros(())
        for pair in self.pairs:
            filtered_ND = filters.get_submodule(pair_name(pair))(features.hidden[pair[side]][where])
            part = fused_loss(filtered_ND, head, [PlainCrossEntropy()], [scale], weight_KN=weight_KN, evidence=evidence)
            loss = loss + part.loss
        return loss


def cka_distance(student_ND: Tensor, teacher_NE: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """1 - |X'Y|^2 / (|X'X| |Y'Y|) per row, X and Y its states centred over its response positions: [B].

    Limits: in [0, 1]; unchanged by rotations and by scaling of either side, for any two widths. Always 0 for 2
    positions, and biased towards 0 where positions are fewer than widths. Exactly 0 (with a gradient of 0) below 2
    positions; 1 where one side's states are all the same.
    Source: Kornblith et al., arXiv:1905.00414 (linear CKA, there a measure, not a loss).
    """
    student_ND, teacher_NE = full_precision(student_ND), full_precision(teacher_NE.detach())
    return torch.stack([_cka_distance(student_ND[row_N == row], teacher_NE[row_N == row]) for row in range(rows)])


def _cka_distance(student_QD: Tensor, teacher_QE: Tensor) -> Tensor:
    if len(student_QD) < 2:
        return student_QD.sum() * 0
    ours_QQ = _centred_gram(student_QD)
    theirs_QQ = _centred_gram(teacher_QE)
    scale = (ours_QQ.square().sum() * theirs_QQ.square().sum()).clamp_min(torch.finfo(ours_QQ.dtype).eps ** 4).sqrt()
    return 1 - (ours_QQ * theirs_QQ).sum() / scale


def _centred_gram(states_QD: Tensor) -> Tensor:
    """X X' of the centred states, brought to length 1 first so that small states keep their digits."""
    centred_QD = states_QD - states_QD.sum(0) / len(states_QD)
    unit_QD = normalize(centred_QD.flatten(), dim=0, eps=torch.finfo(states_QD.dtype).tiny).view_as(states_QD)
    return unit_QD @ unit_QD.T


@register_bound("cka", "1 - linear CKA over a row's positions", "Kornblith et al., arXiv:1905.00414")
class Cka(BoundLoss):
    """`cka_distance` over pairs of layers."""

    settings: ClassVar[Mapping[str, Setting]] = {"layers": Anything("uniform")}
    unit = "row"

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        where = (positions.row_N, positions.position_N)
        return mean_over_pairs(
            [
                cka_distance(
                    student.hidden[pair[0]][where], teacher.hidden[pair[1]][where], positions.row_N, positions.rows
                )
                for pair in self.pairs
            ]
        )
