"""One text's teacher distributions in few bytes, and back: what `signals/cache.py` keeps.

Shapes: N response positions, E width of the teacher, V vocabulary, C positions of a chunk, K tokens kept at a position,
M of all positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from limbeck.config.teacher import CachedSamples, CachedTop, CacheSettings
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.head import CHUNK_ELEMENTS, chunks
from limbeck.signals.dense import DenseSignal
from limbeck.signals.sparse import Sampled, TopK

# by name: numbers per position, per kept token, or (`ids`) packed bits; each of one dimension but `hidden`
Packed = dict[str, Tensor]
LEVELS = {8: torch.uint8, 16: torch.uint16}
LEAST_REST = 1e-6  # what is left of 1 beside a server's tokens is never taken for less: its numbers are rounded


def pack(signal: DenseSignal | TopK, targets_N: Tensor, form: CacheSettings, seed: int, vocab_size: int) -> Packed:
    """What is kept of the distributions at N positions; `target` [N] is log p of the written token, for finding rows
    that have moved; NaN where it is not among the tokens that a server names.

    Args:
        signal: whole distributions, or, for a `top_k` form alone, a server's likeliest tokens.
        seed: of the draws of a `sampled` form; one text has the same draws wherever it is packed.
    """
    if isinstance(signal, TopK):
        assert form.top_k is not None
        return _closed(_named(signal, targets_N, form.top_k), vocab_size)
    if form.hidden is not None:
        dtype = getattr(torch, form.hidden.dtype)
        found = [
            _target(signal, part, targets_N) for part in chunks(len(targets_N), signal.head.vocab_size, CHUNK_ELEMENTS)
        ]
        return {"hidden": signal.hidden_NE.to("cpu", dtype).contiguous(), "target": torch.cat(found)}
    noise = torch.Generator().manual_seed(seed)
    parts = []
    for part in chunks(len(targets_N), signal.head.vocab_size, CHUNK_ELEMENTS):
        p = Distribution(signal.chunk(part).logits_CV)
        columns = _top(p, form.top_k) if form.top_k is not None else _drawn(p, form.sampled or CachedSamples(), noise)
        columns["target"] = p.log.gather(-1, targets_N[part, None])[:, 0].half()
        parts.append({name: column.cpu() for name, column in columns.items()})
    return _closed({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, vocab_size)


def _closed(packed: Packed, vocab_size: int) -> Packed:
    return packed | {"ids": pack_bits(packed["ids"], width(vocab_size))}


def _target(signal: DenseSignal, part: slice, targets_N: Tensor) -> Tensor:
    return Distribution(signal.chunk(part).logits_CV).log.gather(-1, targets_N[part, None])[:, 0].half().cpu()


def _top(p: Distribution, settings: CachedTop) -> Packed:
    log_CK, ids_CK = p.log.topk(min(settings.k, p.log.shape[-1]))
    count_C, kept_CK = _enough(log_CK, settings.mass)
    others_CV = p.log.scatter(-1, torch.where(kept_CK, ids_CK, ids_CK[:, :1]), -math.inf)
    # -inf where all tokens are kept
    return _levels(log_CK, ids_CK, count_C, kept_CK, others_CV.logsumexp(-1), settings.bits)


def _named(signal: TopK, targets_N: Tensor, settings: CachedTop) -> Packed:
    """What a server named, the likeliest first; the rest is what is left of 1."""
    log_NK, order_NK = signal.log_prob_NK.float().sort(-1, descending=True)
    ids_NK = signal.ids_NK.gather(-1, order_NK)
    count_N, kept_NK = _enough(log_NK, settings.mass)
    rest_N = 1 - log_NK.double().exp().masked_fill(~kept_NK, 0).sum(-1)
    log_rest_N = rest_N.clamp_min(LEAST_REST).log().float()
    is_target_NK = ids_NK == targets_N[:, None]
    target_N = torch.where(is_target_NK.any(-1), log_NK.masked_fill(~is_target_NK, 0).sum(-1), math.nan)
    return _levels(log_NK, ids_NK, count_N, kept_NK, log_rest_N, settings.bits) | {"target": target_N.half()}


def _enough(log_CK: Tensor, mass: float | None) -> tuple[Tensor, Tensor]:
    """How many of the tokens [C], the likeliest first, are kept, and which [C, K]: all, or as few as have the mass."""
    count_C = torch.full((len(log_CK),), log_CK.shape[-1], device=log_CK.device)
    if mass is not None:
        count_C = ((log_CK.exp().cumsum(-1) < mass).sum(-1) + 1).clamp_max(log_CK.shape[-1])
    return count_C, torch.arange(log_CK.shape[-1], device=log_CK.device) < count_C[:, None]


def _levels(log_CK: Tensor, ids_CK: Tensor, count_C: Tensor, kept_CK: Tensor, log_rest_C: Tensor, bits: int) -> Packed:
    # away from 0, so that no level is passed
    lowest_C1 = log_CK.gather(-1, count_C[:, None] - 1).mul(1 + 2**-10).half()
    most = 2**bits - 1
    level_CK = (log_CK / lowest_C1.float().clamp_max(-1e-6) * most).round().clamp(0, most)
    return {
        "count": count_C.to(torch.uint16),
        "ids": ids_CK[kept_CK],
        "level": level_CK[kept_CK].to(torch.int32).to(LEVELS[bits]),
        "lowest": lowest_C1[:, 0],
        "rest": log_rest_C.half(),
    }


def _drawn(p: Distribution, settings: CachedSamples, noise: torch.Generator) -> Packed:
    """The tokens drawn, each once, with weight times its draws / all draws x p / proposal."""
    proposal = p.at(settings.temperature)
    counts = []
    ids = []
    weights = []
    log_ratio_CV = (p.log - proposal.log).cpu()
    drawn_CS = torch.multinomial(proposal.prob.cpu(), settings.draws, replacement=True, generator=noise)
    for row, drawn_S in enumerate(drawn_CS):
        found, times = drawn_S.unique(return_counts=True)
        counts.append(len(found))
        ids.append(found)
        weights.append(times / settings.draws * log_ratio_CV[row, found].exp())
    return {
        "count": torch.tensor(counts).to(torch.uint16),
        "ids": torch.cat(ids),
        "weight": torch.cat(weights).float(),
        "entropy": -(p.prob * p.log).sum(-1).half(),
    }


def unpack(texts: Sequence[Mapping[str, Tensor]], form: CacheSettings, vocab_size: int) -> TopK | Sampled:
    """The signal of several texts' positions, one after the other; of a `hidden` form the cache makes it, which has the
    head."""
    joined = {name: torch.cat([text[name] for text in texts]) for name in texts[0] if name != "ids"}
    bits = width(vocab_size)
    count_N = joined["count"].to(torch.int64)
    amounts = [int(text["count"].to(torch.int64).sum()) for text in texts]
    ids_M = torch.cat([unpack_bits(text["ids"], bits, amount) for text, amount in zip(texts, amounts, strict=True)])
    used_NK = torch.arange(int(count_N.max())) < count_N[:, None]
    ids_NK = torch.zeros(used_NK.shape, dtype=torch.int64).masked_scatter_(used_NK, ids_M)
    if form.top_k is None:
        weight_NK = torch.zeros(used_NK.shape).masked_scatter_(used_NK, joined["weight"])
        return Sampled(ids_NK, weight_NK, joined["entropy"].float())
    most = 2**form.top_k.bits - 1
    lowest_N = joined["lowest"].float().clamp_max(-1e-6)
    level_NK = torch.zeros(used_NK.shape).masked_scatter_(used_NK, joined["level"].to(torch.int32).float())
    log_NK = (level_NK / most * lowest_N[:, None]).masked_fill(~used_NK, -math.inf)
    log_rest_N = joined["rest"].float()
    whole_N = torch.cat([log_NK, log_rest_N[:, None]], -1).logsumexp(-1)  # rounding leaves it beside 0
    even = bool(used_NK.all())
    return TopK(ids_NK, log_NK - whole_N[:, None], (log_rest_N - whole_N).exp(), None if even else count_N)


def width(vocab_size: int) -> int:
    """Bits that a token id takes."""
    return max(1, math.ceil(math.log2(vocab_size)))


def pack_bits(ids_M: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, `bits` bits each, as bytes [ceil(M bits / 8)]."""
    octets_M4 = ids_M.numpy().astype(">u4").view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(np.packbits(np.unpackbits(octets_M4, axis=1)[:, 32 - bits :].reshape(-1)))


def unpack_bits(octets: Tensor, bits: int, amount: int) -> Tensor:
    """The first `amount` numbers of `pack_bits` [amount]."""
    all_bits = np.unpackbits(octets.numpy(), count=amount * bits).reshape(amount, bits)
    padded = np.concatenate([np.zeros((amount, 32 - bits), np.uint8), all_bits], axis=1)
    return torch.from_numpy(np.packbits(padded, axis=1).view(">u4")[:, 0].astype(np.int64))
