"""One model's part of a running batch of generation: its cache, its mask, the logits of every row's next token.

What the running rows need is on the device; the host knows where each row begins, and asks the device for nothing. The
library does, once a token, to see whether a mask masks anything; a model that can be given the mask as its attention
wants it (rotary positions, `sdpa`, no windows) is spared that.
Not covered: recurrent states, and models that count positions themselves; `rows.py` has those.

Shapes: B slots, N of them, U different prompts of those, T columns of the cache, V vocabulary, H key-value heads,
D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from limbeck.models.cache_name import cache_name
from limbeck.models.sample import upload
from limbeck.models.weights import context_length, head_rows, text_config
from limbeck.objectives.sizes import SIZES

COLUMNS_BETWEEN_SHIFTS = 64
CACHE_BYTES = 3 * 2**29  # of keys and values where the device does not say what is free
_MEASURED: WeakKeyDictionary[PreTrainedModel, tuple[int, int]] = WeakKeyDictionary()  # (bytes, bytes of a token)
CACHE_SHARE = 4  # a device's free memory is divided by this


class SlotLayer(DynamicLayer):
    """Keys and values in one buffer [B, H, T, D] with a write column shared by all rows (rows are left-padded)."""

    def __init__(self, columns: int, at: int) -> None:
        super().__init__()
        self.columns = columns
        self.at = at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        shape = (rows, heads, self.columns, width)
        self.key_buffer = key_states.new_zeros(shape)
        self.value_buffer = value_states.new_zeros((*shape[:3], value_states.shape[-1]))
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.at + key_states.shape[2]
        self.key_buffer[:, :, self.at : end] = key_states
        self.value_buffer[:, :, self.at : end] = value_states
        self.at = end
        return self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]

    def insert(self, slots_N: Tensor, left: int, new: SlotLayer, *, of_N: Tensor, rows: int) -> None:
        """Copy the prefilled columns of `new` into these rows, from column `left` on; `of_N` are the rows there."""
        if not self.is_initialized:
            blank = new.key_buffer[:1].expand(rows, -1, -1, -1), new.value_buffer[:1].expand(rows, -1, -1, -1)
            self.lazy_initialization(*blank)
        self.key_buffer[slots_N, :, left : left + new.at] = new.key_buffer[of_N]
        self.value_buffer[slots_N, :, left : left + new.at] = new.value_buffer[of_N]

    def shift(self, by: int) -> None:
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[:, :, : self.columns - by] = buffer[:, :, by:].clone()
        self.at -= by

    def keep(self, slots_N: Tensor) -> None:
        self.key_buffer, self.value_buffer = self.key_buffer[slots_N], self.value_buffer[slots_N]

    def get_seq_length(self) -> int:
        return self.at

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.at + query_length, 0


class Slots:
    """One model's part of the running batch: its cache and the column where the next token goes.

    A finished row stays as a dead slot, and writes on, until a new prompt takes it or `keep` drops it: copying the
    cache for every finished row would cost more than the dead row's arithmetic.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, size: int) -> None:
        longest = max(len(prompt) for prompt in prompts)
        self.model = model
        self.device = model.device
        self.longest = longest
        self.at = longest
        self.size = size
        self.columns = columns_of(longest, max_tokens)
        self.context = context_of(model)
        self.key = cache_name(model)
        self.whole_mask = _takes_whole_masks(model)
        self.starts = [0] * size
        self.starts_B = torch.zeros(size, dtype=torch.long, device=self.device)
        self.layers = [SlotLayer(self.columns, longest) for _ in range(text_config(model.config).num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.mask_BT = torch.zeros(size, self.columns, dtype=torch.long, device=self.device)
        self.logits_BV = torch.zeros(size, head_rows(model), device=self.device)

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Prefill new rows together, each prompt once, and put them into these slots."""
        width = max(len(prompt) for prompt in prompts)
        device = self.device
        places: dict[tuple[int, ...], int] = {}
        of_N = index([places.setdefault(tuple(prompt), len(places)) for prompt in prompts], device)
        tokens_UT = torch.zeros(len(places), width, dtype=torch.long)
        mask_UT = torch.zeros(len(places), width, dtype=torch.long)
        for ids, row in places.items():
            tokens_UT[row, width - len(ids) :] = torch.tensor(ids)
            mask_UT[row, width - len(ids) :] = 1
        positions_UT = (mask_UT.cumsum(1) - 1).clamp(min=0)
        mask_UT = upload(mask_UT, device)
        fresh = [SlotLayer(width, 0) for _ in self.layers]
        logits_U1V = self.model(
            input_ids=upload(tokens_UT, device),
            attention_mask=mask_UT,
            position_ids=upload(positions_UT, device),
            use_cache=True,
            logits_to_keep=1,
            **{self.key: Cache(layers=list(fresh))},
        ).logits
        left = self.at - width
        slots_N = index(slots, device)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.starts[slot] = self.at - len(prompt)
        self.starts_B = upload(torch.tensor(self.starts), device)
        self.mask_BT.index_fill_(0, slots_N, 0)
        self.mask_BT[slots_N, left : self.at] = mask_UT[of_N]
        self.logits_BV[slots_N] = logits_U1V[:, -1].float()[of_N]
        for layer, new in zip(self.layers, fresh, strict=True):
            layer.insert(slots_N, left, new, of_N=of_N, rows=self.size)

    def step(self, last_B: Tensor, running: Sequence[int]) -> None:
        """Feed every slot its last token."""
        if self.at == self.columns:
            self._shift(running)
        self.mask_BT[:, self.at] = 1
        self.logits_BV = (
            self.model(
                input_ids=last_B.to(self.device)[:, None],
                attention_mask=self._mask(),
                position_ids=(self.at - self.starts_B).clamp(max=self.context - 1)[:, None],  # dead rows may pass it
                use_cache=True,
                **{self.key: self.cache},
            )
            .logits[:, -1]
            .float()
        )
        self.at += 1

    def _mask(self) -> Tensor | None:
        """The mask of one more column. What the library would make of it is made here where it would ask the device
        first whether any row is padded: the host knows."""
        mask_BT = self.mask_BT[:, : self.at + 1]
        if not self.whole_mask:
            return mask_BT
        return mask_BT[:, None, None].bool() if max(self.starts) > 0 else None

    def _shift(self, running: Sequence[int]) -> None:
        """Move the columns in use to the left, so that there are free columns again."""
        by = self.at - max(self.longest, *(self.at - self.starts[slot] for slot in running))
        assert by > 0, "no column of the cache is free of all running rows"
        self.mask_BT = torch.cat([self.mask_BT[:, by:], self.mask_BT.new_zeros(self.size, by)], dim=1)
        for layer in self.layers:
            layer.shift(by)
        self.starts = [start - by for start in self.starts]
        self.starts_B -= by
        self.at -= by

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots."""
        slots_N = index(slots, self.device)
        self.starts = [self.starts[slot] for slot in slots]
        self.size = len(slots)
        self.starts_B, self.mask_BT, self.logits_BV = (
            column[slots_N] for column in (self.starts_B, self.mask_BT, self.logits_BV)
        )
        for layer in self.layers:
            layer.keep(slots_N)


def index(slots: Sequence[int], device: torch.device) -> Tensor:
    """Slots as an index on the device."""
    return upload(torch.tensor(slots, dtype=torch.long), device)


def _takes_whole_masks(model: PreTrainedModel) -> bool:
    """Whether `model` may be given the mask of each query and key, or none, in place of that of the columns: it needs
    it for nothing but plain attention."""
    config = text_config(model.config)
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(model, "_can_compile_fullgraph", False)  # the library gives such models whole masks, too
        and getattr(config, "rope_parameters", None) is not None
        and not getattr(config, "alibi", False)
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "attention_chunk_size", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    )


def context_of(model: PreTrainedModel) -> int:
    """How many tokens `model` can read."""
    return context_length(model.config)


def columns_of(longest: int, max_tokens: int) -> int:
    """Columns of the cache for prompts of at most `longest` tokens and answers of at most `max_tokens`."""
    return longest + max_tokens + COLUMNS_BETWEEN_SHIFTS


def takes_slots(model: PreTrainedModel) -> bool:
    """Whether rows of a model can be padded on the left and moved: all its layers keep keys and values, and it can be
    told the positions."""
    cache = DynamicCache(config=text_config(model.config))
    attends = bool(cache.layers) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    carries = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    return attends and not carries and "position_ids" in inspect.signature(model.forward).parameters


def row_bytes(model: PreTrainedModel, columns: int) -> int:
    """Bytes that one row's part of the cache takes, over all layers: measured once, on one token and on two."""
    if model not in _MEASURED:
        one, two = (_cache_bytes(model, tokens) for tokens in (1, 2))
        _MEASURED[model] = max(0, 2 * one - two), two - one
    fixed, each = _MEASURED[model]
    return max(1, fixed + each * columns)


@torch.inference_mode()
def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    told = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True)
    return sum(_tensor_bytes(vars(layer)) for layer in getattr(told, cache_name(model)).layers)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(entry) for entry in value.values())
    return sum(_tensor_bytes(entry) for entry in value) if isinstance(value, list | tuple) else 0


def cache_room(device: torch.device) -> int:
    """Bytes that keys and values may take on the device: as many as `SIZES` says, else a share of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and SIZES.cache_bytes is None else None
    return room_within(free, SIZES.cache_bytes)


def room_within(free: int | None, cache_bytes: int | None = None) -> int:
    """Bytes that keys and values may take where so many are free (None: the device does not say), unless the user has
    set `cache_bytes`."""
    if cache_bytes is not None:
        return cache_bytes
    return CACHE_BYTES if free is None else free // CACHE_SHARE
