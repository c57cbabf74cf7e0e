"""What a model costs to run, here and now: size, speed, memory. Timed on this machine, so only ratios carry over.

Decoding is greedy, one answer at a time. The first token's latency is one pass over the prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model, hidden_states
from limbeck.types import Sampling

ROUNDS = 3
DECODED = 32
PREFILL_TOKENS = 512


def efficiency(model: Model, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Layers, parameters, bytes of weights, tokens a second (prefill and decode), first-token latency, peak memory (GPU
    only).

    Args:
        prompts: token ids of some prompts; the median over the first few is taken.
    """
    net = model.net
    found: dict[str, Any] = sizes(model)
    picked = [list(ids) for ids in prompts[:ROUNDS]]
    decoded = max(2, min(DECODED, model.max_length - max(map(len, picked), default=0)))
    on_gpu = net.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(net.device)
    first = []
    every = []
    prefill = []
    filler = torch.tensor([token for ids in picked for token in ids] or [0])
    filler = filler.repeat(-(-PREFILL_TOKENS // len(filler)))[: min(PREFILL_TOKENS, model.max_length)][None].to(
        net.device
    )
    with torch.inference_mode():
        for ids in picked:
            first.append(_seconds(model, ids, 1))
            every.append((_seconds(model, ids, decoded) - first[-1]) / (decoded - 1))
            began = time.perf_counter()
            hidden_states(net, filler).sum().item()
            prefill.append(filler.shape[1] / (time.perf_counter() - began))
    found |= {
        "first_token_ms": round(1000 * statistics.median(first), 1),
        "decode_tokens_per_second": round(1 / max(1e-9, statistics.median(every)), 1),
        "prefill_tokens_per_second": round(statistics.median(prefill), 1),
    }
    if on_gpu:
        found["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(net.device) / 2**20)
    return found


def sizes(model: Model) -> dict[str, Any]:
    """Layers, parameters (tied ones once) and bytes of weights."""
    parameters = list(model.net.parameters())
    return {
        "layers": model.net.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _seconds(model: Model, ids: Sequence[int], tokens: int) -> float:
    """Seconds to write so many tokens after a prompt; no token ends the answer."""
    job = GenerationJob(ids, Sampling(temperature=0.0, max_tokens=tokens), 0)
    began = time.perf_counter()
    for _ in generate(model.net, [job], frozenset(), vocab_size=model.vocab_size):
        pass
    return time.perf_counter() - began
