"""Make a student from its teacher by dropping layers.

The choice of layers matters more than anything that follows. Ways to choose: `importance` (greedy by the KL that a drop
costs on calibration text), `block_influence` (ShortGPT, arXiv:2403.03853: 1 - cos(input, output) of the layer),
`uniform`, `first` (keep the first ones, drop the last), or an explicit list. Any decoder whose layers form one list
and pass hidden states along works; others are refused.

Shapes: B rows, T positions, N calibration positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.models.model import head_of, hidden_states
from limbeck.types import UserError

CANDIDATES = 8
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class Calibration:
    """Text to rate layers on. `positions_BT` marks the hidden states that predict a response token."""

    tokens_BT: Tensor
    positions_BT: Tensor

    def to(self, device: torch.device) -> Calibration:
        return Calibration(self.tokens_BT.to(device), self.positions_BT.to(device))


@dataclass(frozen=True)
class LayerChoice:
    """The layers to keep, and the cost of each drop: (layer, KL to the full model in nats per token after the drop)."""

    kept: tuple[int, ...]
    drops: tuple[tuple[int, float], ...] = ()


def layers_of(net: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(net.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{net.config.model_type}: dropping layers needs a decoder with one list of layers")
    return layers


def drop_layers(net: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of `net` with only the layers `kept`, its configuration and cache indices renumbered.

    Keeping all layers gives the same logits bit for bit. The embeddings and the head are copied, not shared.
    """
    total = len(layers_of(net))
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= total:
        raise UserError(f"layers to keep must be rising numbers from 0 to {total - 1}; got {list(kept)}")
    full = layers_of(net)
    decoder = net.get_decoder()
    try:
        decoder.layers = nn.ModuleList([full[index] for index in kept])
        student = copy.deepcopy(net)
    finally:
        decoder.layers = full
    for index, layer in enumerate(layers_of(student)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (a plain number, not a parameter)
    config = student.config
    for key, value in list(vars(config).items()):  # per-layer settings, such as layer_types
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    return student


def choose_layers(
    net: PreTrainedModel,
    keep: str | Sequence[int],
    count: int,
    calibration: Callable[[], Calibration],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerChoice:
    """Choose the `count` layers to keep. `calibration` is called only by the ways that need text."""
    total = len(layers_of(net))
    if not isinstance(keep, str):
        return LayerChoice(tuple(keep))
    if not 1 <= count <= total:
        raise UserError(f"student.start.prune.layers: {count} is not between 1 and the teacher's {total} layers")
    if keep == "first":
        return LayerChoice(tuple(range(count)))
    if keep == "uniform":
        step = (total - 1) / max(1, count - 1)
        return LayerChoice(tuple(int(index * step + 0.5) for index in range(count)))
    if keep == "block_influence":
        influence = block_influence(net, calibration().to(net.device))
        return LayerChoice(tuple(sorted(sorted(range(total), key=lambda index: -influence[index])[:count])))
    if keep == "importance":
        return _greedy(net, count, calibration().to(net.device), progress)
    raise AssertionError(f"unknown way to keep layers: {keep}")


@torch.inference_mode()
def block_influence(net: PreTrainedModel, calibration: Calibration) -> list[float]:
    """Per layer 1 - E[cos(its input, its output)] over the calibration positions: 0 for a layer that does nothing."""
    states = _LayerRunner(net, calibration).states(list(range(len(layers_of(net)))))
    picked = [state[calibration.positions_BT] for state in states]
    return [float((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean()) for a, b in pairwise(picked)]


class _LayerRunner:
    """Runs chosen layers one by one, with the arguments that the decoder itself passes to them."""

    def __init__(self, net: PreTrainedModel, calibration: Calibration) -> None:
        self.net = net
        self.calibration = calibration
        self.layers = layers_of(net)
        decoder = net.get_decoder()
        norms = [getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name)]
        if len(norms) != 1:
            raise UserError(
                f"{net.config.model_type}: can't find the decoder's final norm, so layers can't be rated; list them"
                " under keep"
            )
        self.norm: nn.Module = norms[0]
        self.arguments: list[dict[str, Any]] = []
        self.first: Tensor | None = None
        hooks = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in self.layers]
        try:
            hidden_states(net, calibration.tokens_BT)
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            raise UserError(
                f"{self.net.config.model_type}: its layers take positional arguments, so they can't be rated; list"
                " them under keep"
            )
        if self.first is None:
            self.first = args[0] if args else kwargs["hidden_states"]
        self.arguments.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

    def run(self, state_BTD: Tensor, kept: Sequence[int]) -> Tensor:
        for index in kept:
            out = self.layers[index](state_BTD, **self.arguments[index])
            state_BTD = out[0] if isinstance(out, tuple) else out
        return state_BTD

    def states(self, kept: Sequence[int]) -> list[Tensor]:
        """The input of every kept layer, and at the end the output of the last."""
        assert self.first is not None
        states = [self.first]
        for index in kept:
            states.append(self.run(states[-1], [index]))
        return states

    def log_probs(self, state_BTD: Tensor) -> Tensor:
        picked_ND = self.norm(state_BTD[self.calibration.positions_BT])
        logits_NV = head_of(self.net).logits(picked_ND)
        return logits_NV.log_softmax(-1)


@torch.inference_mode()
def _greedy(
    net: PreTrainedModel, count: int, calibration: Calibration, progress: Callable[[int, int], None]
) -> LayerChoice:
    """Drop, one at a time, the layer whose loss adds the least forward KL to the full model.

    After the first round only the CANDIDATES layers that were cheapest when last tried are tried again.
    The states before the dropped layer are shared by all candidates.
    """
    runner = _LayerRunner(net, calibration)
    kept = list(range(len(runner.layers)))
    latest = dict.fromkeys(kept, 0.0)  # the cost of each layer's drop when it was last tried
    target_NV = runner.log_probs(runner.states(kept)[-1])
    probs_NV = target_NV.exp()
    drops: list[tuple[int, float]] = []
    rounds = len(kept) - count
    tried = [len(kept), *(min(len(kept) - number, CANDIDATES) for number in range(1, rounds))][:rounds]
    done = 0
    tries = sum(tried)
    for number in range(rounds):
        candidates = kept if number == 0 else sorted(kept, key=lambda layer: (latest[layer], layer))[:CANDIDATES]
        before = dict(zip(kept, runner.states(kept), strict=False))
        for layer in candidates:
            rest = [other for other in kept if other > layer]
            log_q_NV = runner.log_probs(runner.run(before[layer], rest))
            latest[layer] = float((probs_NV * (target_NV - log_q_NV)).sum(-1).mean())
            done += 1
            progress(done, tries)
        cheapest = min(candidates, key=lambda layer: (latest[layer], layer))
        drops.append((cheapest, latest[cheapest]))
        kept = [layer for layer in kept if layer != cheapest]
    return LayerChoice(tuple(kept), tuple(drops))
