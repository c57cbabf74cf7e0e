"""Losses that need nothing but the text."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.objectives.precision import full_precision


def cross_entropy(student_logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """-log q(target) per position, [C] in nats. The gradient with respect to the logits is q - onehot(target)."""
    return torch.nn.functional.cross_entropy(full_precision(student_logits_CV), targets_C, reduction="none")
