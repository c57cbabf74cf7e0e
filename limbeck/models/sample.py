"""Sample the next token of every row from its logits and the row's own random number.

Shapes: B rows, V vocabulary, K tokens of a shortlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.types import Sampling

TOP_P_SHORTLIST = 256


class SampledTokens(NamedTuple):
    """One token for each of B rows, its log-probability under the distribution it was sampled from, and whether the
    model itself proposed it."""

    token_B: Tensor
    log_prob_B: Tensor
    own_B: Tensor


def draw(logits_BV: Tensor, samplings: Sequence[Sampling], uniform_B: Tensor) -> SampledTokens:
    """Sample one token per row by inverse transform: the first whose cumulative probability exceeds the row's uniform
    number.

    Temperature 0 takes the most likely token, with log-probability 0. `top_p` < 1 keeps the smallest set of tokens with
    at least that mass, the most likely first; `top_p` 1 samples from the whole vocabulary.
    """
    chosen_B = logits_BV.argmax(-1)
    log_prob_B = torch.zeros(len(chosen_B), device=logits_BV.device)
    temperature_B = torch.tensor([sampling.temperature for sampling in samplings], device=logits_BV.device)
    top_p_B = torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64, device=logits_BV.device)
    uniform_B = uniform_B.to(logits_BV.device)
    for rows, sample in ((top_p_B < 1, _from_nucleus), (top_p_B >= 1, _from_all)):
        at = (rows & (temperature_B > 0)).nonzero()[:, 0]
        if len(at):
            scaled_BV = logits_BV[at].float() / temperature_B[at, None]
            chosen_B[at], log_prob_B[at] = sample(scaled_BV, top_p_B[at], uniform_B[at])
    return SampledTokens(chosen_B, log_prob_B, torch.ones_like(chosen_B, dtype=torch.bool))


def _from_all(scaled_BV: Tensor, _: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    prob_BV = scaled_BV.softmax(-1)
    mass_BV = prob_BV.double().cumsum(-1)
    at_B1 = torch.searchsorted(mass_BV, (uniform_B * mass_BV[:, -1])[:, None], right=True).clamp(
        max=scaled_BV.shape[1] - 1
    )
    return at_B1[:, 0], log_prob_of(scaled_BV, at_B1[:, 0])


def _from_nucleus(
    scaled_BV: Tensor, top_p_B: Tensor, uniform_B: Tensor, shortlist: int = TOP_P_SHORTLIST
) -> tuple[Tensor, Tensor]:
    size = min(shortlist, scaled_BV.shape[1])
    top_BK, ids_BK = scaled_BV.topk(size)
    log_BK = top_BK - scaled_BV.logsumexp(-1, keepdim=True)
    mass_BK = log_BK.exp().double().cumsum(-1)
    if size < scaled_BV.shape[1] and bool((mass_BK[:, -1] < top_p_B).any()):
        return _from_nucleus(scaled_BV, top_p_B, uniform_B, shortlist=scaled_BV.shape[1])
    last_B1 = (mass_BK < top_p_B[:, None]).sum(-1, keepdim=True).clamp(max=size - 1)
    nucleus_mass_B1 = mass_BK.gather(1, last_B1)
    at_B1 = torch.minimum(torch.searchsorted(mass_BK, uniform_B[:, None] * nucleus_mass_B1, right=True), last_B1)
    return ids_BK.gather(1, at_B1)[:, 0], (log_BK.gather(1, at_B1) - nucleus_mass_B1.log())[:, 0].float()


def log_prob_of(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """log softmax at one token per row, [B]."""
    return logits_BV.gather(1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
