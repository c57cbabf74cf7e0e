"""Which layers of a decoder a student can keep: the configuration must describe what is left, since whoever loads the
saved student builds it from there.

Layers are often told apart by their number (every second one is a mixture of experts, the first three are dense, every
fourth attends to all). Dropping layers renumbers the rest, so such settings are put as lists where the configuration
has one for it. Whether the result describes the layers that are kept is not believed but compared, on the meta device:
every submodule's kind, plain settings and parameter sizes. What can't be described is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from limbeck.models.weights import empty_model, layer_list, text_config
from limbeck.types import UserError

FIRST_ONES = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
PERIODS = ("step", "period", "interval", "every", "freq", "pattern", "offset")
PLAIN = (bool, int, float, str, type(None))
Signature = list[tuple[str, str, dict[str, Any], list[tuple[str, tuple[int, ...]]]]]


def keep_layers(config: Any, kept: Sequence[int]) -> None:
    """Make a configuration, in place, describe a model with only these layers.

    Raises:
        UserError: it can't; the message names a setting that is the cause.
    """
    check_numbers_of(kept, text_config(config).num_hidden_layers)
    before = copy.deepcopy(config)
    whole = empty_model(before)
    _, layers = layer_list(whole.get_decoder())
    wanted = [signature(layers[index]) for index in kept]
    text = text_config(config)
    total = text.num_hidden_layers
    _renumber(text, kept, total)
    _tell_experts(text, layers, kept)
    try:
        left = empty_model(config)
        built = [signature(layer) for layer in layer_list(left.get_decoder())[1]]
        wrong = next((n for n in range(len(kept)) if not _same(wanted[n], built[n], kept[n], n)), None)
        reason = None if wrong is None else f"layer {kept[wrong]} would be built as another kind of layer"
        if reason is None and _outside(whole) != _outside(left):
            reason = "it has tensors with a part for every layer"
        if reason is None and _runs(whole) and not _runs(left):
            reason = "transformers can't run what is left (a hybrid may need a layer of each kind)"
    except UserError as error:
        reason = str(error)
    if reason is not None:
        periods = [name for name in vars(text) if any(word in name for word in PERIODS) and getattr(text, name)]
        told = f" (see {', '.join(periods)} in its config.json)" if periods else ""
        raise UserError(
            f"{config.model_type}: a student with only the layers {list(kept)} can't be described by a configuration of"
            f" its type: {reason}{told}; keep other layers, or start in another way"
        )


def check_numbers_of(kept: Sequence[int], total: int) -> None:
    """Refuse numbers that are no choice of layers.

    Raises:
        UserError: they don't rise, or there are no such layers.
    """
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= total:
        raise UserError(f"layers to keep must be rising numbers from 0 to {total - 1}; got {list(kept)}")


def _renumber(text: Any, kept: Sequence[int], total: int) -> None:
    """Settings with an entry per layer, with the numbers of some layers, or with how many layers come first."""
    changed: dict[str, Any] = {}
    for name, value in vars(text).items():
        if is_per_layer(name, value, total):
            changed[name] = [value[index] for index in kept]
        elif isinstance(value, list) and value and _are_numbers(value, total) and _names_layers(name):
            changed[name] = [kept.index(number) for number in value if number in kept]
        elif name in FIRST_ONES and isinstance(value, int):
            changed[name] = sum(index < value for index in kept)
    for name, value in changed.items():
        setattr(text, name, value)
    text.num_hidden_layers = len(kept)


def is_per_layer(name: str, value: Any, total: int) -> bool:
    """Whether a setting has an entry for every layer; a list of tokens may be as long by chance."""
    return isinstance(value, list) and len(value) == total and "token" not in name and name != "architectures"


def _are_numbers(value: list[Any], total: int) -> bool:
    numbers = all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < total for entry in value)
    return numbers and value == sorted(set(value))


def _names_layers(name: str) -> bool:
    return any(word in name for word in ("layer", "idx", "indices", "indexes"))


def _tell_experts(text: Any, layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Put a period of layers with experts as a list of those without (the Qwen families have both)."""
    if getattr(text, "decoder_sparse_step", 1) == 1 or not hasattr(text, "mlp_only_layers"):
        return
    sparse = [any(parameter.dim() == 3 for parameter in layers[index].parameters()) for index in kept]
    text.decoder_sparse_step = 1
    text.mlp_only_layers = [number for number, has_experts in enumerate(sparse) if not has_experts]


def signature(layer: nn.Module) -> Signature:
    """What a layer is made of: each submodule's name, kind, plain settings and parameter sizes."""
    return [
        (
            name,
            type(module).__name__,
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, PLAIN) and key[0] != "_" and key != "training"
            },
            [(key, tuple(parameter.shape)) for key, parameter in module.named_parameters(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


def _same(wanted: Signature, built: Signature, old: int, new: int) -> bool:
    """Whether two layers are alike but for their own number."""
    if len(wanted) != len(built):
        return False
    for (name, kind, settings, sizes), (name2, kind2, settings2, sizes2) in zip(wanted, built, strict=True):
        if (name, kind, sizes, settings.keys()) != (name2, kind2, sizes2, settings2.keys()):
            return False
        for key, value in settings.items():
            if settings2[key] != value and not _is_number_of(value, settings2[key], old, new):
                return False
    return True


def _is_number_of(value: Any, other: Any, old: int, new: int) -> bool:
    return type(value) is int and type(other) is int and (value, other) == (old, new)


def number_layers(layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Give kept layers their new numbers, wherever a submodule has its layer's, as `layer_idx` or another name."""
    for new, (layer, old) in enumerate(zip(layers, kept, strict=True)):
        for module in layer.modules():
            for name in [key for key, value in vars(module).items() if type(value) is int and value == old]:
                if any(word in name for word in ("layer", "idx", "index", "block")):
                    setattr(module, name, new)


def _runs(net: Any) -> bool:
    """Whether a model gets through two tokens, on the meta device."""
    try:
        with torch.no_grad():
            net.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=True)
    except Exception:  # noqa: BLE001 (each family's own code raises its own kinds; the answer is no)
        return False
    return True


def _outside(net: Any) -> dict[str, tuple[int, ...]]:
    """Names and sizes of what is outside the list of layers."""
    _, layers = layer_list(net.get_decoder())
    inside = {id(parameter) for parameter in layers.parameters()}
    return {key: tuple(value.shape) for key, value in net.named_parameters() if id(value) not in inside}
