"""Losses that need nothing but the text."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(student_logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """-log q(target) per position, [C] in nats. The gradient with respect to the logits is q - onehot(target)."""
    logits_CV = student_logits_CV if student_logits_CV.dtype == torch.float64 else student_logits_CV.float()
    return torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")
