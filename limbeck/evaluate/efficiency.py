"""What a model costs to run, here and now: size, speed, memory. Timed on this machine, so only ratios carry over.

Systems are timed in turns, one round of each after the other, so that other work on the machine slows them alike; all
rounds are kept as their median, least and most. Decoding is greedy, one answer at a time. The first token's latency is
one pass over the prompt.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model, hidden_states
from limbeck.models.quantise import QuantisedLinear
from limbeck.types import Message, Sampling

ROUNDS = 3
DECODED = 32
PREFILL_TOKENS = 512
SPEEDS = ("first_token_ms", "decode_tokens_per_second", "prefill_tokens_per_second")
# Of the time that passes, the main thread of an idle machine computes nearly all: 0.97 and more here; beside as many
# other threads as cores, about half.
LEAST_SHARE = 0.8
MOST_LOAD = 1.25  # runnable threads per core, ours among them, averaged by the system over the last minute


@dataclass(frozen=True)
class Clock:
    """When a measurement began: by the wall, and in this thread's own time on the processor."""

    wall: float = field(default_factory=time.perf_counter)
    own: float = field(default_factory=time.thread_time)

    def facts(self) -> dict[str, Any]:
        """How busy the machine was since then: the share of the time that this thread was computing, and the load."""
        own_share = (time.thread_time() - self.own) / max(1e-9, time.perf_counter() - self.wall)
        return machine_facts(own_share, system_load(), os.cpu_count() or 1)


def system_load() -> float | None:
    """Threads that run or wait for the processor, averaged over a minute; None where the system doesn't say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def machine_facts(own_share: float, running: float | None, cores: int) -> dict[str, Any]:
    """What was seen of the machine, whether it was busy, and a sentence for the reader if so."""
    busy = own_share < LEAST_SHARE or (running is not None and running > MOST_LOAD * cores)
    facts: dict[str, Any] = {"own_share": round(own_share, 2), "cores": cores, "busy": busy, "note": ""}
    seen = f"the measurement got {own_share:.0%} of the time it could have had"
    if running is not None:
        facts["load"] = round(running, 1)
        seen += f", the load was {running:.1f} on {cores} core{'s' if cores > 1 else ''}"
    if busy:
        facts["note"] = (
            f"The machine was busy with other work while the speeds were measured ({seen}): compare them with each"
            " other, not with other machines, and only beyond their spread."
        )
    return facts


def time_in_turns(
    systems: Mapping[str, Callable[[], Model]], messages: tuple[Message, ...], rounds: int = ROUNDS
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(the speeds of every system, what was seen of the machine): A B A B ... A short answer before them isn't counted.

    Args:
        systems: how each is loaded. Two stay in memory; of more, each is loaded again for its turn.
        messages: the conversation that is answered.
    """
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    held: dict[str, Model] = {}
    clock = Clock()
    for _ in range(rounds):
        for name, load_model in systems.items():
            if name not in held:
                if len(systems) > 2:
                    held.clear()
                held[name] = load_model()
                _seconds(held[name], held[name].prompt_ids(messages), 2)  # what is set up once is not counted
            taken[name].append(_one_round(held[name], held[name].prompt_ids(messages)))
    return {name: _middle(each) for name, each in taken.items()}, {"rounds": rounds, **clock.facts()}


def _middle(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The median of every speed, and under `spread` the least and the most."""
    columns = {name: [each[name] for each in rounds] for name in rounds[0]}
    facts: dict[str, Any] = {name: round(statistics.median(column), 1) for name, column in columns.items()}
    spread = {name: [round(min(columns[name]), 1), round(max(columns[name]), 1)] for name in SPEEDS}
    if "peak_memory_mib" in columns:
        facts["peak_memory_mib"] = round(max(columns["peak_memory_mib"]))
    return facts | {"spread": spread}


def _one_round(model: Model, prompt: Sequence[int]) -> dict[str, float]:
    """Milliseconds to the first token, tokens a second (prefill and decode), and on a GPU the peak of its memory."""
    net = model.net
    decoded = max(2, min(DECODED, model.max_length - len(prompt)))
    on_gpu = net.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(net.device)
    filler = torch.tensor([*prompt] or [0])
    filler = filler.repeat(-(-PREFILL_TOKENS // len(filler)))[: min(PREFILL_TOKENS, model.max_length)][None]
    filler = filler.to(net.device)
    with torch.inference_mode():
        first = _seconds(model, prompt, 1)
        rest = _seconds(model, prompt, decoded) - first
        began = time.perf_counter()
        hidden_states(net, filler).sum().item()
        prefill = filler.shape[1] / (time.perf_counter() - began)
    measured = {
        "first_token_ms": 1000 * first,
        "decode_tokens_per_second": (decoded - 1) / max(1e-9, rest),
        "prefill_tokens_per_second": prefill,
    }
    return measured | ({"peak_memory_mib": torch.cuda.max_memory_allocated(net.device) / 2**20} if on_gpu else {})


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
