"""The loss of reward models: scores of answers to one prompt, the preferred one first.

A score is what a student with a scalar head says of a whole conversation, at its last token.

Shapes: B rows, G groups (prompts), K answers of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from limbeck.objectives.facts import TextFacts
from limbeck.objectives.forward import StudentForward, TermSum
from limbeck.objectives.loss import Loss, LossAtStep, LossSettings
from limbeck.objectives.parameters import Range
from limbeck.objectives.precision import full_precision
from limbeck.objectives.registry import register
from limbeck.types import MARGIN, PROBABILITY, SCORE, RecipeError, UserError

NOT_NEGATIVE = Range(0, float("inf"), open_high=True)


def bradley_terry(
    score_GK: Tensor, present_GK: Tensor, probability_G: Tensor | None = None, margin_G: Tensor | None = None
) -> Tensor:
    """-log s(score_i - score_j), the mean over all pairs i before j of a group's ranked answers: [G] in nats.

    With labels, -(p log s(d - m) + (1 - p) log s(-d - m)), d = score_i - score_j: p in [0, 1] is the probability that i
    is better, 1 without one, and the margin m is the least lead of the better one, 0 without one. The gradient for d
    at m = 0 is s(d) - p. Shifting a group's scores changes nothing. A group with fewer than two answers gives 0.

    Ouyang et al., arXiv:2203.02155 (all pairs of a prompt as one element); m: Touvron et al., arXiv:2307.09288.

    Raises:
        UserError: not one label for every group.
    """
    score_GK = full_precision(score_GK).masked_fill(~present_GK, 0.0)
    for label_G in (probability_G, margin_G):
        if label_G is not None and label_G.shape != score_GK.shape[:1]:
            raise UserError(f"{len(score_GK)} groups need one label each; got {tuple(label_G.shape)}")
    lead_GKK = score_GK[:, :, None] - score_GK[:, None, :]
    pairs_GKK = (present_GK[:, :, None] & present_GK[:, None, :]).triu(1)
    margin_G11 = (score_GK.new_zeros(len(score_GK)) if margin_G is None else margin_G.to(score_GK))[:, None, None]
    losses_GKK = -logsigmoid(lead_GKK - margin_G11)
    if probability_G is not None:
        first_G11 = probability_G.to(score_GK)[:, None, None]
        losses_GKK = first_G11 * losses_GKK - (1 - first_G11) * logsigmoid(-lead_GKK - margin_G11)
    return losses_GKK.masked_fill(~pairs_GKK, 0.0).sum((1, 2)) / pairs_GKK.sum((1, 2)).clamp(min=1)


def squared_sums(score_GK: Tensor, present_GK: Tensor) -> Tensor:
    """The mean of (r_i + r_j)^2 over the pairs of each group, [G]: it draws the level of the scores to 0 and leaves
    their differences alone (Eisenstein et al., arXiv:2312.09244)."""
    score_GK = full_precision(score_GK).masked_fill(~present_GK, 0.0)
    count_G = present_GK.sum(1)
    sums_G = (count_G - 2) * score_GK.square().sum(1) + score_GK.sum(1).square()  # over i < j
    return sums_G / (count_G * (count_G - 1) / 2).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(Loss):
    """The loss of a reward model. A pair's own probability and margin are read where its line gives them."""

    ranks: ClassVar[bool] = True
    unlimited: ClassVar[str] = "compares the answers of all writers, so it can't be limited to one"

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {"margin": 0.0, "centre": 0.0}

    @property
    def needs(self) -> str:
        return "student: {head: scalar}"

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        super().check_text(settings, facts)
        if not facts.ranked_answers:
            raise RecipeError(
                settings.path,
                f"{self.name} compares answers to one prompt, and here every prompt has one: give a corpus with"
                " `chosen` and `rejected` (or `answers`, the preferred one first), or let all writers answer every"
                " prompt, the preferred one first",
            )
        schedule = settings.params["margin"]
        if max(schedule.start, schedule.end) > 0 and facts.labels is not None and MARGIN not in facts.labels:
            raise RecipeError(
                f"{settings.path}.margin",
                "it multiplies the margin beside each pair, and no line has one: give lines a number under `margin`,"
                " or leave it out",
            )

    def evaluate(self, at_step: LossAtStep, data: StudentForward) -> TermSum:
        batch = data.batch
        device = data.hidden_ND.device
        most = max(len(group) for group in batch.groups)
        row_GK = torch.tensor([[*group, *[group[0]] * (most - len(group))] for group in batch.groups], device=device)
        present_GK = torch.tensor([[k < len(group) for k in range(most)] for group in batch.groups], device=device)
        score_GK = data.score_B[row_GK]
        labels = {name: label_B.to(device)[row_GK[:, 0]] for name, label_B in batch.labels.items()}
        probability_G = labels[PROBABILITY].nan_to_num(1.0) if PROBABILITY in labels else None
        margin_G = labels[MARGIN].nan_to_num(0.0) * at_step.params["margin"] if MARGIN in labels else None
        values_G = bradley_terry(score_GK, present_GK, probability_G, margin_G)
        if at_step.params["centre"]:
            values_G = values_G + at_step.params["centre"] * squared_sums(score_GK, present_GK)
        values_G = values_G * batch.group_weights().to(values_G)
        return TermSum(at_step.scale * values_G.sum(), float(values_G.detach().cpu().double().sum()))


register(
    BradleyTerry(
        name="bradley_terry",
        formula="-log s(r_i - r_j) + c (r_i + r_j)^2, r_i the better, s = logistic; mean over a prompt's pairs",
        paper="Ouyang et al., arXiv:2203.02155; margin: arXiv:2307.09288; centre c: arXiv:2312.09244",
        reads=frozenset({"answers", SCORE}),
        unit="group",
        ranges={"margin": NOT_NEGATIVE, "centre": NOT_NEGATIVE},
    )
)
