"""Two models write one text: the teacher mixed into the student's distribution, or replacing the student's unlikely
tokens; or one model contrasted with itself under another prompt.

Shapes: B rows, V vocabulary, K the teacher's likeliest tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.models.sample import RowSamplings, SampledTokens, draw, draw_at, log_prob_of


def _softened(logits_BV: Tensor, temperature: Tensor | float) -> Tensor:
    """log-probabilities at that temperature, one number or a column [B, 1]."""
    return (logits_BV.float() / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Mixture:
    """Samples each token from `teacher_share` p + (1 - `teacher_share`) q (MiniLLM, arXiv:2306.08543: 0.2).

    q is the student at the rows' temperature, p the teacher at its own. Limits: the student alone at 0, the teacher
    alone at 1.
    """

    teacher_share: float
    teacher_temperature: float = 1.0

    def __call__(self, own_BV: Tensor, second_BV: Tensor, rows: RowSamplings, uniform_B2: Tensor) -> SampledTokens:
        parts = []
        if self.teacher_share < 1:
            parts.append(_softened(own_BV, rows.temperature_B[:, None]) + math.log1p(-self.teacher_share))
        if self.teacher_share > 0:
            parts.append(_softened(second_BV, self.teacher_temperature) + math.log(self.teacher_share))
        mixed_BV = parts[0] if len(parts) == 1 else torch.logaddexp(*parts)
        return draw_at(mixed_BV, 1.0, uniform_B2[:, 0])


@dataclass(frozen=True)
class Speculation:
    """Keeps the student's token if it is among the teacher's `top_k` likeliest; otherwise samples one from the teacher
    (speculative knowledge distillation, arXiv:2410.11325: 25). Checking several drafts at a time, as done there,
    changes the speed, not the text. Limits: the student alone with the whole vocabulary; the teacher's greedy text with
    1 and temperature 0.
    """

    top_k: int
    teacher_temperature: float = 1.0

    def __call__(self, own_BV: Tensor, second_BV: Tensor, rows: RowSamplings, uniform_B2: Tensor) -> SampledTokens:
        own = draw(own_BV, rows, uniform_B2[:, 0])
        replacement = draw_at(second_BV, self.teacher_temperature, uniform_B2[:, 1])
        top_BK = second_BV.topk(min(self.top_k, second_BV.shape[1])).indices
        accepted_B = (top_BK == own.token_B[:, None]).any(-1)
        token_B = torch.where(accepted_B, own.token_B, replacement.token_B)
        log_q_BV = _softened(own_BV, rows.temperature_B[:, None])
        # log of the probability that a token is replaced
        log_replace_B = torch.log1p(-log_q_BV.gather(1, top_BK).exp().sum(-1).clamp(max=1.0))
        if self.teacher_temperature > 0:
            by_teacher_B = log_prob_of(second_BV / self.teacher_temperature, token_B)
        else:
            by_teacher_B = torch.where(token_B == second_BV.argmax(-1), 0.0, -math.inf)
        own_B = torch.where((top_BK == token_B[:, None]).any(-1), log_q_BV.gather(1, token_B[:, None])[:, 0], -math.inf)
        return SampledTokens(token_B, torch.logaddexp(own_B, log_replace_B + by_teacher_B), accepted_B)


@dataclass(frozen=True)
class ContrastDecoding:
    """Samples each token by log p(token) - `strength` * log p(token | the other prompt), at the rows' temperature: what
    follows from this prompt and not from the other (contrastive decoding as in SCOTT, arXiv:2305.01879). Limit: the
    model alone at 0.

    Not covered: a threshold for tokens that are unlikely under both.
    """

    strength: float

    def __call__(self, own_BV: Tensor, second_BV: Tensor, rows: RowSamplings, uniform_B2: Tensor) -> SampledTokens:
        contrast_BV = own_BV.float().log_softmax(-1)
        if self.strength:
            contrast_BV = contrast_BV - self.strength * second_BV.float().log_softmax(-1)
        return draw(contrast_BV, rows, uniform_B2[:, 0])
