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

from limbeck.models.layers import keep_layers, number_layers
from limbeck.models.model import head_of, hidden_states
from limbeck.models.weights import layer_list
from limbeck.types import UserError

CANDIDATES = 8


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
    """The decoder's layers.

    Raises:
        UserError: a decoder without one list of layers.
    """
    return layer_list(net.get_decoder())[1]


def drop_layers(net: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of `net` with only the layers `kept`, its configuration and cache indices renumbered.

    Keeping all layers gives the same logits bit for bit. The embeddings and the head are copied, not shared.

    Raises:
        UserError: the configuration can't describe such a model (see `layers.py`).
    """
    decoder: Any = net.get_decoder()
    name, full = layer_list(decoder)
    check_kept(net.config, kept)
    try:
        setattr(decoder, name, nn.ModuleList([full[index] for index in kept]))
        student = copy.deepcopy(net)
    finally:
        setattr(decoder, name, full)
    keep_layers(student.config, kept)
    number_layers(layers_of(student), kept)
    return student


def check_kept(config: Any, kept: Sequence[int]) -> None:
    """Refuse layers that no configuration of this type can describe; no weights are needed.

    Raises:
        UserError: it names the reason.
    """
    keep_layers(copy.deepcopy(config), kept)


def _uniform(count: int, total: int) -> tuple[int, ...]:
    step = (total - 1) / max(1, count - 1)
    return tuple(int(index * step + 0.5) for index in range(count))


SPREADS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "first": lambda count, total: tuple(range(count)),
    "uniform": _uniform,
}  # ways that need no text


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
    if keep in SPREADS:
        return LayerChoice(SPREADS[keep](count, total))
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
        self.tail: list[nn.Module] = []  # what the decoder applies after its last layer: a norm, a projection
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.first: Tensor | None = None
        others = [child for child in net.get_decoder().children() if child is not self.layers]
        hooks = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in self.layers]
        hooks += [child.register_forward_hook(self._record_tail) for child in others]
        try:
            last_BTD = hidden_states(net, calibration.tokens_BT)
        finally:
            for hook in hooks:
                hook.remove()
        again_BTD = self.last(self.states(list(range(len(self.layers))))[-1])
        if not torch.allclose(again_BTD, last_BTD, rtol=1e-3, atol=1e-3 * float(last_BTD.abs().max())):
            raise UserError(
                f"{net.config.model_type}: its layers run one by one don't give the model's states, so they can't be"
                " rated; list them under keep"
            )

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.first is None:
            self.first = args[0] if args else kwargs["hidden_states"]
        self.arguments.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    def _record_tail(self, module: nn.Module, _: Any, __: Any) -> None:
        if len(self.arguments) == len(self.layers):
            self.tail.append(module)

    def run(self, state_BTD: Tensor, kept: Sequence[int]) -> Tensor:
        for index in kept:
            args, kwargs = self.arguments[index]
            out = self.layers[index](state_BTD, *args, **kwargs)
            state_BTD = out[0] if isinstance(out, tuple) else out
        return state_BTD

    def last(self, state_BTD: Tensor) -> Tensor:
        """The last layer's output as the head reads it."""
        for module in self.tail:
            state_BTD = module(state_BTD)
        return state_BTD

    def states(self, kept: Sequence[int]) -> list[Tensor]:
        """The input of every kept layer, and at the end the output of the last."""
        assert self.first is not None
        states = [self.first]
        for index in kept:
            states.append(self.run(states[-1], [index]))
        return states

    def log_probs(self, state_BTD: Tensor) -> Tensor:
        picked_ND = self.last(state_BTD[self.calibration.positions_BT])
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
