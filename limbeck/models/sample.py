"""Sample the next token of every row from its logits and the row's own random number.

What a row asks for is known to the host, so rows are told apart there: nothing here waits for the device, but the
nucleus, which asks once whether its shortlist was long enough.

Shapes: B rows, N some of them, V vocabulary, K tokens of a shortlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.objectives.precision import accumulation_dtype
from limbeck.types import Sampling

TOP_P_SHORTLIST = 256


class SampledTokens(NamedTuple):
    """One token for each of B rows, its log-probability under the distribution it was sampled from, and whether the
    model itself proposed it."""

    token_B: Tensor
    log_prob_B: Tensor
    own_B: Tensor


@dataclass(frozen=True)
class RowSamplings:
    """How each of B rows is sampled, as columns on the device of its logits, put there once.

    `whole_N` are the rows that are drawn from the whole vocabulary, `nucleus_N` those drawn from its likeliest part;
    the others are greedy.
    """

    temperature_B: Tensor
    top_p_B: Tensor
    whole_N: Tensor
    nucleus_N: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> RowSamplings:
        whole: list[int] = []
        nucleus: list[int] = []
        for row, sampling in enumerate(samplings):
            if sampling.temperature > 0:
                (nucleus if sampling.top_p < 1 else whole).append(row)
        top_p_B = torch.tensor([sampling.top_p for sampling in samplings], dtype=accumulation_dtype(device))
        return cls(
            upload(torch.tensor([sampling.temperature for sampling in samplings]), device),
            upload(top_p_B, device),
            upload(torch.tensor(whole, dtype=torch.long), device),
            upload(torch.tensor(nucleus, dtype=torch.long), device),
        )


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. CUDA has taken the values when this returns, and the host need not wait for the device."""
    return values.to(device, non_blocking=device.type == "cuda")


def draw(logits_BV: Tensor, rows: RowSamplings, uniform_B: Tensor) -> SampledTokens:
    """Sample one token per row by inverse transform: the first whose cumulative probability exceeds the row's uniform
    number (of `accumulation_dtype`).

    Temperature 0 takes the most likely token, with log-probability 0. `top_p` < 1 keeps the smallest set of tokens with
    at least that mass, the most likely first; `top_p` 1 samples from the whole vocabulary.
    """
    size = len(logits_BV)
    chosen_B = log_prob_B = None
    for at_N, sample in ((rows.nucleus_N, _from_nucleus), (rows.whole_N, _from_all)):
        if len(at_N) == size:
            chosen_B, log_prob_B = sample(logits_BV.float() / rows.temperature_B[:, None], rows.top_p_B, uniform_B)
        elif len(at_N):
            if chosen_B is None or log_prob_B is None:
                chosen_B, log_prob_B = _likeliest(logits_BV)
            scaled_NV = logits_BV[at_N].float() / rows.temperature_B[at_N, None]
            chosen_B[at_N], log_prob_B[at_N] = sample(scaled_NV, rows.top_p_B[at_N], uniform_B[at_N])
    if chosen_B is None or log_prob_B is None:
        chosen_B, log_prob_B = _likeliest(logits_BV)
    return _own(chosen_B, log_prob_B)


def draw_at(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> SampledTokens:
    """`draw` for rows of one temperature, from the whole vocabulary."""
    if temperature > 0:
        return _own(*_from_all(logits_BV.float() / temperature, None, uniform_B))
    return _own(*_likeliest(logits_BV))


def _own(token_B: Tensor, log_prob_B: Tensor) -> SampledTokens:
    return SampledTokens(token_B, log_prob_B, torch.ones_like(token_B, dtype=torch.bool))


def _likeliest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    return logits_BV.argmax(-1), torch.zeros(len(logits_BV), device=logits_BV.device)


def _from_all(scaled_BV: Tensor, _: Tensor | None, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    prob_BV = scaled_BV.softmax(-1)
    mass_BV = prob_BV.to(uniform_B.dtype).cumsum(-1)
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
    mass_BK = log_BK.exp().to(uniform_B.dtype).cumsum(-1)
    if size < scaled_BV.shape[1] and bool((mass_BK[:, -1] < top_p_B).any()):
        return _from_nucleus(scaled_BV, top_p_B, uniform_B, shortlist=scaled_BV.shape[1])
    last_B1 = (mass_BK < top_p_B[:, None]).sum(-1, keepdim=True).clamp(max=size - 1)
    nucleus_mass_B1 = mass_BK.gather(1, last_B1)
    at_B1 = torch.minimum(torch.searchsorted(mass_BK, uniform_B[:, None] * nucleus_mass_B1, right=True), last_B1)
    return ids_BK.gather(1, at_B1)[:, 0], (log_BK.gather(1, at_B1) - nucleus_mass_B1.log())[:, 0].float()


def log_prob_of(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """log softmax at one token per row, [B]."""
    return logits_BV.gather(1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
