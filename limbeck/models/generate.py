"""Batched generation in process, for any Hugging Face decoder, on CPU or GPU.

Every row keeps its own random numbers, so an answer does not depend on who shares its batch (up to the rounding of
the matrix products). A finished row leaves its slot to the next prompt at once; the cache is written in place.
Not covered: sliding-window or recurrent caches, beam search.

Shapes: B slots, T columns of the cache, V vocabulary, H key-value heads, D head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from limbeck.models.sample import Drawn, draw, log_prob_of
from limbeck.types import Sampling, UserError

COLUMNS_BETWEEN_SHIFTS = 64
CACHE_BYTES = 3 * 2**29  # fewer rows decode together where their keys and values would take more


@dataclass(frozen=True)
class GenerationJob:
    """A prompt to continue. `seed` alone decides its random numbers. `beside_ids` is the prompt as the model beside
    sees it, where that is another."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    beside_ids: Sequence[int] | None = None


@dataclass
class Completion:
    """What became of a job: `ids` as they were drawn, the end-of-sequence token among them when the model wrote one.

    Where it was asked for, `log_prob` holds each token's log-probability under the model (temperature 1, whole
    vocabulary) and `sampler_log_prob` that under what it was drawn from, in nats; `own` counts the tokens that the
    model itself proposed.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    sampler_log_prob: list[float] = field(default_factory=list)
    own: int = 0


class Joint(Protocol):
    """How two models write one text: a token for each row, from both their logits and two random numbers."""

    def __call__(
        self, own_BV: Tensor, beside_BV: Tensor, samplings: Sequence[Sampling], uniform_B2: Tensor
    ) -> Drawn: ...


@dataclass(frozen=True)
class SecondModel:
    """A second model that reads along with a cache of its own, and how it joins in."""

    model: PreTrainedModel
    joint: Joint


@dataclass
class _Row:
    job: GenerationJob
    uniform_T2: Tensor  # two numbers per token to come, drawn from the row's own seed
    written: Completion

    @classmethod
    def begin(cls, index: int, job: GenerationJob, second: bool) -> _Row:
        noise = torch.Generator().manual_seed(job.seed)
        uniform_T2 = torch.rand(job.sampling.max_tokens, 1, generator=noise, dtype=torch.float64)
        if second:  # after all of the first, so that those are the same with and without it
            uniform_T2 = torch.cat(
                [uniform_T2, torch.rand(uniform_T2.shape, generator=noise, dtype=torch.float64)], dim=1
            )
        return cls(job, uniform_T2, Completion(index))


class _SlotLayer(DynamicLayer):
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
    """One model's side of the running batch: the shared cache and the column where the next token goes.

    A finished row stays as a dead slot until a new prompt takes its place or `compact` drops it: copying the cache for
    every finished row would cost more than the dead row's arithmetic.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], answer: int, size: int) -> None:
        longest = max(len(prompt) for prompt in prompts)
        self.model = model
        self.longest = longest
        self.at = longest
        self.size = size
        self.columns = columns_of(longest, answer)
        self.starts = [0] * size
        self.layers = [_SlotLayer(self.columns, longest) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.mask_BT = torch.zeros(size, self.columns, dtype=torch.long, device=model.device)
        self.logits_BV = torch.zeros(size, model.config.vocab_size, device=model.device)

    def admit(self, slots: list[int], prompts: Sequence[Sequence[int]]) -> None:
        """Prefill new rows together and put them into these slots."""
        width = max(len(prompt) for prompt in prompts)
        device = self.model.device
        tokens_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
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
        left = self.at - width
        self.mask_BT[slots] = 0
        self.mask_BT[slots, left : self.at] = mask_BT.to(device)
        self.logits_BV[slots] = logits_B1V[:, -1].float()
        for layer, new in zip(self.layers, fresh, strict=True):
            layer.place(slots, left, new, self.size)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.starts[slot] = self.at - len(prompt)

    def step(self, last: Sequence[int | None]) -> None:
        """Feed every running row its last token; None stands for a dead slot."""
        if self.at == self.columns:
            self._shift([slot for slot, token in enumerate(last) if token is not None])
        self.mask_BT[:, self.at] = 1
        device = self.model.device
        starts_B = torch.tensor(
            [0 if token is None else self.starts[slot] for slot, token in enumerate(last)], device=device
        )
        self.logits_BV = (
            self.model(
                input_ids=torch.tensor([token or 0 for token in last], device=device)[:, None],
                attention_mask=self.mask_BT[:, : self.at + 1],
                position_ids=(self.at - starts_B)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
            .logits[:, -1]
            .float()
        )
        self.at += 1

    def _shift(self, running: Sequence[int]) -> None:
        """Move what is still read to the left, so that the write column has room again."""
        by = self.at - max(self.longest, *(self.at - self.starts[slot] for slot in running))
        assert by > 0, "the cache has no column that every row has left behind"
        self.mask_BT = torch.cat([self.mask_BT[:, by:], self.mask_BT.new_zeros(self.size, by)], dim=1)
        for layer in self.layers:
            layer.shift(by)
        for slot in running:
            self.starts[slot] -= by
        self.at -= by

    def keep(self, slots: list[int]) -> None:
        """Drop all other slots."""
        self.starts = [self.starts[slot] for slot in slots]
        self.size = len(slots)
        self.mask_BT, self.logits_BV = self.mask_BT[slots], self.logits_BV[slots]
        for layer in self.layers:
            layer.key_buffer, layer.value_buffer = layer.key_buffer[slots], layer.value_buffer[slots]


class _Batch:
    """The running rows, and each model's side of them in step."""

    def __init__(
        self, model: PreTrainedModel, jobs: Sequence[GenerationJob], rows: int, beside: SecondModel | None
    ) -> None:
        answer = max(job.sampling.max_tokens for job in jobs)
        sides = [(model, [job.prompt_ids for job in jobs])]
        if beside is not None:
            sides.append((beside.model, [_beside_ids(job) for job in jobs]))
        bytes_each = sum(_row_bytes(net, columns_of(max(map(len, prompts)), answer)) for net, prompts in sides)
        size = max(1, min(rows, len(jobs), CACHE_BYTES // bytes_each))
        self.sides = [_Slots(net, prompts, answer, size) for net, prompts in sides]
        self.rows: list[_Row | None] = [None] * size

    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def running(self) -> list[tuple[int, _Row]]:
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]

    @torch.inference_mode()
    def admit(self, waiting: Sequence[tuple[int, GenerationJob]]) -> None:
        slots = self.free()[: len(waiting)]
        for slot, (index, job) in zip(slots, waiting, strict=True):
            self.rows[slot] = _Row.begin(index, job, len(self.sides) > 1)
        for side, ids in zip(self.sides, (lambda job: job.prompt_ids, _beside_ids), strict=False):
            side.admit(slots, [ids(job) for _, job in waiting])

    @torch.inference_mode()
    def step(self) -> None:
        last = [row.written.ids[-1] if row else None for row in self.rows]
        for side in self.sides:
            side.step(last)

    def compact(self) -> None:
        """Drop the dead slots."""
        slots = [slot for slot, _ in self.running()]
        self.rows = [self.rows[slot] for slot in slots]
        for side in self.sides:
            side.keep(slots)


def _beside_ids(job: GenerationJob) -> Sequence[int]:
    return job.prompt_ids if job.beside_ids is None else job.beside_ids


def columns_of(longest: int, answer: int) -> int:
    """Columns of the cache for prompts of at most `longest` tokens and answers of at most `answer`."""
    return longest + answer + COLUMNS_BETWEEN_SHIFTS


def _row_bytes(model: PreTrainedModel, columns: int) -> int:
    """Bytes of one row's keys and values over all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * columns * heads * width * model.dtype.itemsize)


def generate(
    model: PreTrainedModel,
    jobs: Sequence[GenerationJob],
    eos_ids: frozenset[int],
    batch_rows: int = 64,
    stop: Callable[[], bool] = lambda: False,
    tokens: int | None = None,
    beside: SecondModel | None = None,
    ended: Callable[[Sampling, Sequence[int]], bool] = lambda sampling, ids: False,
) -> Iterator[tuple[int, list[int]]]:
    """`write` for those who want the ids alone: (index of the job, sampled ids)."""
    for written in write(model, jobs, eos_ids, batch_rows, stop, tokens, beside=beside, ended=ended):
        yield written.index, written.ids


def write(
    model: PreTrainedModel,
    jobs: Sequence[GenerationJob],
    eos_ids: frozenset[int],
    batch_rows: int = 64,
    stop: Callable[[], bool] = lambda: False,
    tokens: int | None = None,
    record: bool = False,
    beside: SecondModel | None = None,
    ended: Callable[[Sampling, Sequence[int]], bool] = lambda sampling, ids: False,
) -> Iterator[Completion]:
    """Continue every prompt; yield each as it finishes. A row without an end-of-sequence token ran to `max_tokens`, or
    was `ended`.

    Args:
        model: a decoder in evaluation mode.
        eos_ids: tokens that end an answer.
        batch_rows: rows that decode together.
        stop: asked before every step; when true, unfinished rows are dropped (Ctrl-C between two tokens).
        tokens: ids from here on are never drawn: a head is often padded beyond its tokenizer.
        record: keep log-probabilities.
        beside: a second model that writes along.
        ended: whether what was written is all that is wanted; asked after every token.

    Raises:
        UserError: a prompt and its answer don't fit the context of a model that writes.
    """
    for job in jobs:
        _check_room(model, len(job.prompt_ids), job.sampling)
        if beside is not None:
            _check_room(beside.model, len(_beside_ids(job)), job.sampling)
    if not jobs:
        return
    order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].prompt_ids))
    waiting = deque((index, jobs[index]) for index in order)
    batch = _Batch(model, jobs, batch_rows, beside)
    while (waiting or batch.running()) and not stop():
        free = batch.free()
        if waiting and (len(free) >= max(1, len(batch.rows) // 8) or len(free) == len(batch.rows)):
            batch.admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))])
        elif not waiting and len(free) >= max(1, len(batch.rows) // 4):
            batch.compact()
        running = batch.running()
        _write_one(batch, running, tokens, record, beside)
        for slot, row in running:
            ids = row.written.ids
            sampling = row.job.sampling
            if ids[-1] in eos_ids or len(ids) == sampling.max_tokens or ended(sampling, ids):
                batch.rows[slot] = None
                yield row.written
        if batch.running():
            batch.step()


@torch.inference_mode()
def _write_one(
    batch: _Batch, running: Sequence[tuple[int, _Row]], tokens: int | None, record: bool, beside: SecondModel | None
) -> None:
    """Every running row's next token, and what was asked for of it."""
    slots = [slot for slot, _ in running]
    samplings = [row.job.sampling for _, row in running]
    own_BV, *others = (side.logits_BV[slots, :tokens] for side in batch.sides)
    for number, (_, row) in enumerate(running):
        if row.job.sampling.presence_penalty:
            own_BV[number, sorted(set(row.written.ids))] -= row.job.sampling.presence_penalty
    uniform_B2 = torch.stack([row.uniform_T2[len(row.written.ids)] for _, row in running])
    joint = None if beside is None else beside.joint
    drawn = joint(own_BV, others[0], samplings, uniform_B2) if joint else draw(own_BV, samplings, uniform_B2[:, 0])
    log_probs = log_prob_of(own_BV, drawn.token_B).tolist() if record else None
    columns = zip(running, drawn.token_B.tolist(), drawn.log_prob_B.tolist(), drawn.own_B.tolist(), strict=True)
    for number, ((_, row), token, log_prob, own) in enumerate(columns):
        row.written.ids.append(token)
        row.written.own += own
        if log_probs is not None:
            row.written.log_prob.append(log_probs[number])
            row.written.sampler_log_prob.append(log_prob)


def _check_room(model: PreTrainedModel, prompt: int, sampling: Sampling) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context and prompt + sampling.max_tokens > context:
        raise UserError(
            f"a prompt of {prompt} tokens leaves no room for {sampling.max_tokens} more in a "
            f"context of {context}: shorten the prompt or lower max_tokens"
        )
