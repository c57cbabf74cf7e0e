"""Batched generation in process, for any Hugging Face decoder, on CPU or GPU.

Every row keeps its own random numbers, so an answer does not depend on who shares its batch (up to the rounding of
the matrix products). A finished row leaves its slot to the next prompt at once; the cache is written in place.
Not covered: sliding-window or recurrent caches, beam search, repetition penalties.

Shapes: B slots, T columns of the cache, V vocabulary, H key-value heads, D head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from limbeck.types import Sampling, UserError

COLUMNS_BETWEEN_SHIFTS = 64
TOP_P_SHORTLIST = 256
CACHE_BYTES = 3 * 2**29  # fewer rows decode together where their keys and values would take more


@dataclass(frozen=True)
class Job:
    """A prompt to continue. `seed` alone decides its random numbers."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int


@dataclass
class _Row:
    index: int
    job: Job
    start: int
    uniform: Tensor  # one number per token to come, drawn from the row's own seed
    ids: list[int] = field(default_factory=list)


class _SlotLayer(DynamicLayer):
    """Keys and values in one buffer [B, H, T, D] with a write column shared by all rows (rows are left-padded)."""

    def __init__(self, columns: int, at: int) -> None:
        super().__init__()
        self.columns, self.at = columns, at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        shape = (rows, heads, self.columns, width)
        self.key_buffer = key_states.new_zeros(shape)
        self.value_buffer = value_states.new_zeros((*shape[:3], value_states.shape[-1]))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.at + key_states.shape[2]
        self.key_buffer[:, :, self.at : end] = key_states
        self.value_buffer[:, :, self.at : end] = value_states
        self.at = end
        return self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]

    def place(self, slots: list[int], left: int, new: _SlotLayer, rows: int) -> None:
        """Write the prefilled columns of `new` into these rows, from column `left` on."""
        if not self.is_initialized:
            blank = new.key_buffer[:1].expand(rows, -1, -1, -1), new.value_buffer[:1].expand(rows, -1, -1, -1)
            self.lazy_initialization(*blank)
        self.key_buffer[slots, :, left : left + new.at] = new.key_buffer
        self.value_buffer[slots, :, left : left + new.at] = new.value_buffer

    def shift(self, by: int) -> None:
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[:, :, : self.columns - by] = buffer[:, :, by:].clone()
        self.at -= by

    def get_seq_length(self) -> int:
        return self.at

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.at + query_length, 0


class _Slots:
    """The running batch: rows, the shared cache and the column where the next token goes.

    A finished row stays as a dead slot (None) until a new prompt takes its place or `compact` drops it: copying the
    cache for every finished row would cost more than the dead row's arithmetic.
    """

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], size: int) -> None:
        longest = max(len(job.prompt_ids) for job in jobs)
        answer = max(job.sampling.max_tokens for job in jobs)
        self.model, self.longest, self.at = model, longest, longest
        self.columns = longest + answer + COLUMNS_BETWEEN_SHIFTS
        size = max(1, min(size, CACHE_BYTES // _row_bytes(model, self.columns)))
        self.rows: list[_Row | None] = [None] * size
        self.layers = [_SlotLayer(self.columns, longest) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.mask_BT = torch.zeros(size, self.columns, dtype=torch.long, device=model.device)
        self.logits_BV = torch.zeros(size, model.config.vocab_size, device=model.device)

    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def running(self) -> list[tuple[int, _Row]]:
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]

    @torch.inference_mode()
    def admit(self, waiting: Sequence[tuple[int, Job]]) -> None:
        """Prefill new rows together and put them into free slots."""
        width = max(len(job.prompt_ids) for _, job in waiting)
        device = self.model.device
        tokens_BT = torch.zeros(len(waiting), width, dtype=torch.long)
        mask_BT = torch.zeros(len(waiting), width, dtype=torch.long)
        for row, (_, job) in enumerate(waiting):
            tokens_BT[row, width - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
            mask_BT[row, width - len(job.prompt_ids) :] = 1
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        fresh = [_SlotLayer(width, 0) for _ in self.layers]
        logits_B1V = self.model(
            input_ids=tokens_BT.to(device),
            attention_mask=mask_BT.to(device),
            position_ids=positions_BT.to(device),
            past_key_values=Cache(layers=list(fresh)),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        slots = self.free()[: len(waiting)]
        left = self.at - width
        self.mask_BT[slots] = 0
        self.mask_BT[slots, left : self.at] = mask_BT.to(device)
        self.logits_BV[slots] = logits_B1V[:, -1].float()
        for layer, new in zip(self.layers, fresh, strict=True):
            layer.place(slots, left, new, len(self.rows))
        for slot, (index, job) in zip(slots, waiting, strict=True):
            noise = torch.Generator().manual_seed(job.seed)
            uniform = torch.rand(job.sampling.max_tokens, generator=noise, dtype=torch.float64)
            self.rows[slot] = _Row(index, job, self.at - len(job.prompt_ids), uniform)

    @torch.inference_mode()
    def step(self) -> None:
        """Feed every running row its last token."""
        if self.at == self.columns:
            self._shift()
        self.mask_BT[:, self.at] = 1
        device = self.model.device
        tokens = [row.ids[-1] if row else 0 for row in self.rows]
        starts_B = torch.tensor([row.start if row else 0 for row in self.rows], device=device)
        self.logits_BV = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=self.mask_BT[:, : self.at + 1],
            position_ids=(self.at - starts_B)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1].float()  # fmt: skip
        self.at += 1

    def _shift(self) -> None:
        """Move what is still read to the left, so that the write column has room again."""
        by = self.at - max(self.longest, *(self.at - row.start for _, row in self.running()))
        assert by > 0, "the cache has no column that every row has left behind"
        self.mask_BT = torch.cat([self.mask_BT[:, by:], self.mask_BT.new_zeros(len(self.rows), by)], dim=1)
        for layer in self.layers:
            layer.shift(by)
        for _, row in self.running():
            row.start -= by
        self.at -= by

    def compact(self) -> None:
        """Drop the dead slots."""
        slots = [slot for slot, _ in self.running()]
        self.rows = [self.rows[slot] for slot in slots]
        self.mask_BT, self.logits_BV = self.mask_BT[slots], self.logits_BV[slots]
        for layer in self.layers:
            layer.key_buffer, layer.value_buffer = layer.key_buffer[slots], layer.value_buffer[slots]


def _row_bytes(model: PreTrainedModel, columns: int) -> int:
    """Bytes of one row's keys and values over all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * columns * heads * width * model.dtype.itemsize)


def pick(logits_BV: Tensor, samplings: Sequence[Sampling], uniform_B: Tensor) -> list[int]:
    """One token per row by inverse transform: the first whose cumulative probability exceeds the row's uniform number.

    Temperature 0 takes the most likely token. `top_p` < 1 keeps the smallest set of tokens with at least that mass,
    counted most likely first; with `top_p` 1 the whole vocabulary is drawn from.
    """
    chosen_B = logits_BV.argmax(-1)
    temperature_B = torch.tensor([sampling.temperature for sampling in samplings], device=logits_BV.device)
    top_p_B = torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64, device=logits_BV.device)
    uniform_B = uniform_B.to(logits_BV.device)
    for rows, draw in ((top_p_B < 1, _from_nucleus), (top_p_B >= 1, _from_all)):
        at = (rows & (temperature_B > 0)).nonzero()[:, 0]
        if len(at):
            scaled_BV = logits_BV[at].float() / temperature_B[at, None]
            chosen_B[at] = draw(scaled_BV, top_p_B[at], uniform_B[at])
    return [int(token) for token in chosen_B.tolist()]


def _from_all(scaled_BV: Tensor, _: Tensor, uniform_B: Tensor) -> Tensor:
    mass_BV = scaled_BV.softmax(-1).double().cumsum(-1)
    at_B1 = torch.searchsorted(mass_BV, (uniform_B * mass_BV[:, -1])[:, None], right=True)
    return at_B1[:, 0].clamp(max=scaled_BV.shape[1] - 1)


def _from_nucleus(scaled_BV: Tensor, top_p_B: Tensor, uniform_B: Tensor, shortlist: int = TOP_P_SHORTLIST) -> Tensor:
    size = min(shortlist, scaled_BV.shape[1])
    top_BK, ids_BK = scaled_BV.topk(size)
    mass_BK = (top_BK - scaled_BV.logsumexp(-1, keepdim=True)).exp().double().cumsum(-1)
    if size < scaled_BV.shape[1] and bool((mass_BK[:, -1] < top_p_B).any()):
        return _from_nucleus(scaled_BV, top_p_B, uniform_B, shortlist=scaled_BV.shape[1])
    last_B1 = (mass_BK < top_p_B[:, None]).sum(-1, keepdim=True).clamp(max=size - 1)
    kept_B1 = mass_BK.gather(1, last_B1)
    at_B1 = torch.searchsorted(mass_BK, uniform_B[:, None] * kept_B1, right=True)
    return ids_BK.gather(1, torch.minimum(at_B1, last_B1))[:, 0]


def generate(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    eos_ids: frozenset[int],
    batch_rows: int = 64,
    stop: Callable[[], bool] = lambda: False,
    tokens: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt; yield (index of the job, sampled ids) as each finishes, in order of finishing.

    The ids hold the end-of-sequence token when the model wrote one; a row without it ran to `max_tokens`.

    Args:
        model: a decoder in evaluation mode.
        eos_ids: tokens that end an answer.
        batch_rows: rows that decode together.
        stop: asked before every step; when true, unfinished rows are dropped (Ctrl-C between two tokens).
        tokens: ids from here on are never drawn: a head is often padded beyond its tokenizer.

    Raises:
        UserError: a prompt and its answer don't fit the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    for job in jobs:
        if context and len(job.prompt_ids) + job.sampling.max_tokens > context:
            raise UserError(
                f"a prompt of {len(job.prompt_ids)} tokens leaves no room for {job.sampling.max_tokens} more in a "
                f"context of {context}: shorten the prompt or lower max_tokens"
            )
    if not jobs:
        return
    order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].prompt_ids))
    waiting = deque((index, jobs[index]) for index in order)
    slots = _Slots(model, jobs, min(batch_rows, len(jobs)))
    while (waiting or slots.running()) and not stop():
        free = slots.free()
        if waiting and (len(free) >= max(1, len(slots.rows) // 8) or len(free) == len(slots.rows)):
            slots.admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))])
        elif not waiting and len(free) >= max(1, len(slots.rows) // 4):
            slots.compact()
        running = slots.running()
        uniform_B = torch.stack([row.uniform[len(row.ids)] for _, row in running])
        logits_BV = slots.logits_BV[[slot for slot, _ in running], :tokens]
        for (slot, row), token in zip(running, pick(logits_BV, [row.job.sampling for _, row in running], uniform_B), strict=True):
            row.ids.append(token)
            if token in eos_ids or len(row.ids) == row.job.sampling.max_tokens:
                slots.rows[slot] = None
                yield row.index, row.ids
        if slots.running():
            slots.step()
