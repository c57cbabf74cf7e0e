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
from limbeck.models.quantise import QuantisedLinear
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
    facts: dict[str, Any] = sizes(model)
    sequences = [list(ids) for ids in prompts[:ROUNDS]]
    decoded = max(2, min(DECODED, model.max_length - max(map(len, sequences), default=0)))
    on_gpu = net.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(net.device)
    first_seconds = []
    token_seconds = []
    prefill_rates = []
    filler = torch.tensor([token for ids in sequences for token in ids] or [0])
    filler = filler.repeat(-(-PREFILL_TOKENS // len(filler)))[: min(PREFILL_TOKENS, model.max_length)][None].to(
        net.device
    )
    with torch.inference_mode():
        for ids in sequences:
            first_seconds.append(_seconds(model, ids, 1))
            token_seconds.append((_seconds(model, ids, decoded) - first_seconds[-1]) / (decoded - 1))
            began = time.perf_counter()
            hidden_states(net, filler).sum().item()
            prefill_rates.append(filler.shape[1] / (time.perf_counter() - began))
    facts |= {
        "first_token_ms": round(1000 * statistics.median(first_seconds), 1),
        "decode_tokens_per_second": round(1 / max(1e-9, statistics.median(token_seconds)), 1),
        "prefill_tokens_per_second": round(statistics.median(prefill_rates), 1),
    }
    if on_gpu:
        facts["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(net.device) / 2**20)
    return facts


def sizes(model: Model) -> dict[str, Any]:
    """Layers, parameters (tied ones once) and bytes of weights."""
    parameters = list(model.net.parameters())
    quantised = [module for module in model.net.modules() if isinstance(module, QuantisedLinear)]
    packed = sum(layer.weights - layer.weight.numel() for layer in quantised)
    tensors = [*parameters, *(layer.scale for layer in quantised)]
    return {
        "layers": model.net.config.get_text_config().num_hidden_layers,
        "parameters": sum(p.numel() for p in parameters) + packed,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def _seconds(model: Model, ids: Sequence[int], tokens: int) -> float:
    """Seconds to write so many tokens after a prompt; no token ends the answer."""
    job = GenerationJob(ids, Sampling(temperature=0.0, max_tokens=tokens), 0)
    began = time.perf_counter()
    for _ in generate(model.net, [job], frozenset(), vocab_size=model.vocab_size):
        pass
    return time.perf_counter() - began
