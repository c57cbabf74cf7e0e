"""Last hidden states of a batch, with the common prefix of all rows computed once.

Attention is causal, so the states of a common prefix are the same in every row: a chat template's first lines need one
pass, not one per row. Exact, with gradients; up to the rounding of the matrix products.

Shapes: B rows, T positions, P positions of the common prefix, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from limbeck.models.cache_name import cache_name
from limbeck.models.sharding import is_divided, run_decoder

SHORTEST_PREFIX = 8  # a shorter one is not worth a second pass


def decoded(net: PreTrainedModel, tokens_BT: Tensor, mixed: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Last hidden states [B, T, D] after the final norm, every row by itself. With `mixed` (other tokens [B, T], the
    weight of the row's own tokens [B, T]) the embeddings of both are mixed first."""
    tokens_BT = tokens_BT.to(net.device)
    if mixed is None:
        states_BTD: Tensor = run_decoder(net, input_ids=tokens_BT, use_cache=False).last_hidden_state
        return states_BTD
    embed: Any = net.get_input_embeddings()
    own_BT1 = mixed[1].to(tokens_BT.device)[..., None]
    embedded_BTD = own_BT1 * embed(tokens_BT) + (1 - own_BT1) * embed(mixed[0].to(tokens_BT.device))
    mixed_BTD: Tensor = run_decoder(net, inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
    return mixed_BTD


def shared_states(net: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, D] after the final norm. Right padding needs no mask: attention is causal.

    Tokens are best given on the host: they are compared there, so that nobody waits for the device. Models with other
    than full attention, with dropout or gradient checkpointing compute every row by itself, as do those whose weights
    are divided among ranks, where every rank must make as many passes.
    """
    decoder: Any = net.get_decoder()
    shared = common_prefix(tokens_BT) if shares_prefixes(net) else 0
    if shared < SHORTEST_PREFIX:
        return decoded(net, tokens_BT)
    tokens_BT = tokens_BT.to(net.device)
    cache = DynamicCache()
    cached: dict[str, Any] = {cache_name(decoder): cache, "use_cache": True}
    first_1PD: Tensor = decoder(input_ids=tokens_BT[:1, :shared], **cached).last_hidden_state
    rows = len(tokens_BT)
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        layer.keys, layer.values = (states.expand(rows, -1, -1, -1) for states in (layer.keys, layer.values))
    rest_BTD: Tensor = decoder(input_ids=tokens_BT[:, shared:], **cached).last_hidden_state
    return torch.cat([first_1PD.expand(rows, -1, -1), rest_BTD], dim=1)


def shares_prefixes(net: PreTrainedModel) -> bool:
    """Whether `shared_states` computes a common prefix once."""
    return not is_divided(net) and _may_share(net.get_decoder())


def common_prefix(tokens_BT: Tensor) -> int:
    """The length of the prefix that all rows share; less than the width, and 0 for a single row."""
    rows, width = tokens_BT.shape
    if rows < 2:
        return 0
    different_T = (tokens_BT != tokens_BT[:1]).any(0).nonzero()
    return min(int(different_T[0, 0]) if len(different_T) else width, width - 1)


def _may_share(decoder: Any) -> bool:
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    full = all(kind == "full_attention" for kind in kinds) if kinds else not getattr(config, "sliding_window", None)
    caches = DynamicCache(config=config).layers
    plain = bool(caches) and all(type(layer) is DynamicLayer for layer in caches)
    attends = plain and config._attn_implementation in ("sdpa", "eager")
    drops = float(getattr(config, "attention_dropout", 0.0) or 0.0) > 0 or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules()
    )
    dropout = decoder.training and drops
    checkpointing = decoder.training and getattr(decoder, "gradient_checkpointing", False)
    return full and attends and not dropout and not checkpointing
