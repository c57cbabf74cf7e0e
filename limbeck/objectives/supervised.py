"""Cross-entropy: the loss that needs nothing but the text.

Shapes: R positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.facts import TextFacts
from limbeck.objectives.head import Block
from limbeck.objectives.loss import STUDENT, Loss, LossSettings
from limbeck.objectives.parameters import Range, defaults_of
from limbeck.objectives.registry import register
from limbeck.types import RecipeError


def cross_entropy(q: Distribution, targets_R: Tensor, *, label_smoothing: float = 0.0) -> ValueAndGradient:
    """-log q(target) per position, [R] in nats, and its gradient q - onehot(target) for the logits, [R, V].

    With label smoothing e the target is (1-e) onehot + e/V (Szegedy et al., arXiv:1512.00567).
    """
    values_R = -q.log.gather(-1, targets_R[:, None])[:, 0]
    if label_smoothing == 0:
        gradient_RV = q.prob.clone()
    else:
        even = label_smoothing / q.log.shape[-1]
        values_R = (1 - label_smoothing) * values_R - even * q.log.sum(-1)
        gradient_RV = q.prob - even
    hit = torch.full_like(values_R, label_smoothing - 1)[:, None]
    return values_R, gradient_RV.scatter_add_(-1, targets_R[:, None], hit)


class PlainCrossEntropy:
    """Cross-entropy for `fused_loss`, for losses that need it inside."""

    label = "cross_entropy"

    def values(self, block: Block) -> ValueAndGradient:
        return cross_entropy(block.q, block.targets_R)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy of the text as it is written."""

    fused: ClassVar[bool] = True

    @property
    def defaults(self) -> Mapping[str, float]:
        return defaults_of(cross_entropy)

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        super().check_text(settings, facts)
        others = facts.writers - {STUDENT}
        if STUDENT in facts.writers and settings.only not in facts.others_tags:
            remedy = f"limit it, such as {{only: {min(others)}}}" if others else "choose a divergence"
            raise RecipeError(
                settings.path, f"it would teach the student its own text, and so to stay as it is; {remedy}"
            )
        if settings.only is None and not facts.all_preferred:
            raise RecipeError(
                settings.path,
                "it would also fit answers that are not preferred, or the student's own; limit it, such as {only:"
                " chosen}",
            )

    def token_values(self, block: Block, params: Mapping[str, float]) -> ValueAndGradient:
        return cross_entropy(block.q, block.targets_R, label_smoothing=params["label_smoothing"])


register(
    CrossEntropy(
        name="cross_entropy",
        formula="-log q(token)",
        paper="",
        reads=frozenset({"tokens"}),
        ranges={"label_smoothing": Range(0, 1, open_high=True)},
    )
)
