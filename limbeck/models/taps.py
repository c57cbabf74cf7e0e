"""Record hidden states, and attention's queries, keys and values, while a decoder runs once.

Attention is recorded through transformers' AttentionInterface: for one forward pass the decoder's implementation is a
function that stores its inputs and calls the stock `sdpa`, with the mask that `sdpa` gets. So the results stay the same
bit for bit. Hidden states come from hooks that are removed after the pass.

Not covered: nested recordings, two threads on one model, compiled models, and attention other than `sdpa`.

Shapes: B rows, T positions, D hidden width, H query heads, G key-value heads, A head width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from limbeck.models.states import decoded, shared_states
from limbeck.models.weights import layer_list
from limbeck.objectives.forward import Attention, Features
from limbeck.objectives.precision import full_precision
from limbeck.types import UserError

NAME = "limbeck_taps"


@dataclass
class _Recorder:
    layers: frozenset[int]
    with_gradient: bool
    attention: dict[int, Attention] = field(default_factory=dict)


_ACTIVE: ContextVar[_Recorder | None] = ContextVar(NAME, default=None)


def features(
    net: PreTrainedModel,
    tokens_BT: Tensor,
    hidden_layers: Collection[int] = (),
    attention_layers: Collection[int] = (),
    mixed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Features]:
    """One pass of the decoder: (last hidden states [B, T, D], the features of the requested layers).

    Layers count from 1; hidden layer 0 is the embeddings, and the last one is taken after the final norm. Gradients
    flow through all of it, so run a teacher under `torch.no_grad()`. Right padding needs no mask: attention is causal.
    With `mixed` (other tokens [B, T], the weight of the row's own tokens [B, T]) the embeddings of both are mixed
    first. Queries are scaled so that q k / sqrt(A) is the model's own score, even if it divides by another number
    (Gemma 3).

    Raises:
        UserError: layers that the model does not have or that have no attention of the usual kind, or a model whose
            attention is not `sdpa` or does not go through transformers' AttentionInterface.
    """
    if not hidden_layers and not attention_layers:
        return (shared_states(net, tokens_BT) if mixed is None else decoded(net, tokens_BT, mixed)), Features()
    decoder: Any = net.get_decoder()
    count: int = decoder.config.get_text_config().num_hidden_layers
    _check_layers("hidden", hidden_layers, 0, count)
    _check_layers("attention", attention_layers, 1, count)
    hidden: dict[int, Tensor] = {}
    with _tapped(decoder, frozenset(attention_layers)) as recorder, _hooked(decoder, frozenset(hidden_layers), hidden):
        last_BTD = decoded(net, tokens_BT, mixed)
    if count in hidden_layers:
        hidden[count] = last_BTD
    missing = sorted(recorder.layers - recorder.attention.keys())
    if missing:
        raise UserError(
            f"{net.config.model_type}: layers {missing} have no queries, keys and values to record; name other layers"
        )
    # losses on features compute in fp32, whatever the model computes in
    attention = {
        layer: (full_precision(q), full_precision(k), full_precision(v))
        for layer, (q, k, v) in recorder.attention.items()
    }
    return last_BTD, Features({layer: full_precision(states) for layer, states in hidden.items()}, attention)


def _check_layers(what: str, layers: Collection[int], first: int, last: int) -> None:
    wrong = sorted(layer for layer in layers if not first <= layer <= last)
    if wrong:
        raise UserError(f"{what} layers {wrong} are outside {first} to {last}; name layers that the model has")


@contextlib.contextmanager
def _tapped(decoder: Any, layers: frozenset[int]) -> Iterator[_Recorder]:
    """Record these layers' attention while the block runs; restore the model's implementation after it."""
    recorder = _Recorder(layers, torch.is_grad_enabled())
    if not layers:
        yield recorder
        return
    assert _ACTIVE.get() is None, "recordings can't be nested"
    kind = decoder.config.model_type
    before = decoder.config._attn_implementation
    if before != "sdpa":
        raise UserError(
            f"{kind}: attention can be recorded under sdpa only, not {before}; load the model with"
            " attn_implementation='sdpa'"
        )
    AttentionInterface.register(NAME, _recorded_sdpa)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    token = _ACTIVE.set(recorder)
    try:
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            raise UserError(
                f"{kind}: its attention does not go through transformers' AttentionInterface; use losses on hidden"
                " states"
            )
        yield recorder
    finally:
        _ACTIVE.reset(token)
        decoder.set_attn_implementation(before)


def _recorded_sdpa(
    module: Any,
    query_BHTA: Tensor,
    key_BGTA: Tensor,
    value_BGTA: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The signature, with `settings` passed on, is transformers' contract for an attention function."""
    recorder = _ACTIVE.get()
    layer = module.layer_idx + 1
    if recorder is not None and layer in recorder.layers:
        assert layer not in recorder.attention, f"layer {layer} ran twice in one pass"
        if recorder.with_gradient and not torch.is_grad_enabled():
            raise UserError(
                "attention can't be recorded under reentrant gradient checkpointing; set use_reentrant to False"
            )
        usual = query_BHTA.shape[-1] ** -0.5
        scaling = settings.get("scaling") or usual
        same = math.isclose(scaling, usual, rel_tol=1e-9)
        recorder.attention[layer] = (query_BHTA if same else query_BHTA * (scaling / usual), key_BGTA, value_BGTA)
    result: tuple[Tensor, None] = AttentionInterface()["sdpa"](
        module, query_BHTA, key_BGTA, value_BGTA, attention_mask=attention_mask, **settings
    )
    return result


@contextlib.contextmanager
def _hooked(decoder: Any, requested: frozenset[int], hidden: dict[int, Tensor]) -> Iterator[None]:
    """Store the hidden states before layer 1 (as 0) and after layer i (as i) in `hidden` while the block runs."""
    layers = layer_list(decoder)[1] if requested else nn.ModuleList()

    def before_first(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden[0] = positional[0] if positional else named["hidden_states"]

    def after(index: int) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden[index] = output[0] if isinstance(output, tuple) else output

        return note

    handles = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)] if 0 in requested and layers else []
    handles += (
        [layers[index - 1].register_forward_hook(after(index)) for index in sorted(requested - {0})] if layers else []
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
