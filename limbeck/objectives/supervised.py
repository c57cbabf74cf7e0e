"""Losses that need nothing but the text."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution


def cross_entropy(q: Distribution, targets_R: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
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
