"""Batched generation in process, for any Hugging Face decoder, on CPU or GPU.

Every row has its own random numbers, so an answer does not depend on the rest of its batch (up to the rounding of the
matrix products). A finished row leaves its slot to the next prompt at once; the cache is written in place.
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

from limbeck.models.sample import SampledTokens, draw, log_prob_of
from limbeck.types import Sampling, UserError

COLUMNS_BETWEEN_SHIFTS = 64
CACHE_BYTES = 3 * 2**29  # of keys and values; fewer rows decode together if they would take more


@dataclass(frozen=True)
class GenerationJob:
    """A prompt to continue. `seed` alone decides its random numbers. `second_prompt_ids` is the prompt for the second
    model, if it gets another one."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    second_prompt_ids: Sequence[int] | None = None


@dataclass
class Completion:
    """The answer to job `index`: `ids` as sampled, with the end-of-sequence token if the model wrote one.

    If recorded, `log_prob` holds each token's log-probability under the model (temperature 1, whole vocabulary) and
    `sampler_log_prob` that under the distribution it was sampled from, in nats. `own_tokens` counts the tokens that the
    model itself proposed.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    sampler_log_prob: list[float] = field(default_factory=list)
    own_tokens: int = 0


class Joint(Protocol):
    """How two models write one text: one token per row from the logits of both and two uniform numbers."""

    def __call__(
        self, own_BV: Tensor, second_BV: Tensor, samplings: Sequence[Sampling], uniform_B2: Tensor
    ) -> SampledTokens: ...


@dataclass(frozen=True)
class SecondModel:
    """A second model that reads along with its own cache, and how it takes part."""

    model: PreTrainedModel
    joint: Joint


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued.

    Args:
        batch_rows: how many rows decode together at most.
        record: keep log-probabilities.
        second: a second model that takes part in the writing.
        is_finished: whether a text so far (its sampling, its ids) is complete; called after every token.
    """

    batch_rows: int = 64
    record: bool = False
    second: SecondModel | None = None
    is_finished: Callable[[Sampling, Sequence[int]], bool] = lambda sampling, ids: False


PLAIN = Decoding()


@dataclass
class _Row:
    job: GenerationJob
    uniform_T2: Tensor  # two numbers for each token to come, from the job's seed
    completion: Completion

    @classmethod
    def begin(cls, index: int, job: GenerationJob, with_second: bool) -> _Row:
        generator = torch.Generator().manual_seed(job.seed)
        uniform_T2 = torch.rand(job.sampling.max_tokens, 1, generator=generator, dtype=torch.float64)
        if with_second:  # after all of the first column, which is then the same with and without it
            second_T1 = torch.rand(uniform_T2.shape, generator=generator, dtype=torch.float64)
            uniform_T2 = torch.cat([uniform_T2, second_T1], dim=1)
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

    def insert(self, slots: list[int], left: int, new: _SlotLayer, rows: int) -> None:
        """Copy the prefilled columns of `new` into these rows, from column `left` on."""
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
    """One model's part of the running batch: its cache and the column where the next token goes.

    A finished row stays as a dead slot until a new prompt takes it or `compact` drops it: copying the cache for every
    finished row would cost more than the dead row's arithmetic.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, size: int) -> None:
        longest = max(len(prompt) for prompt in prompts)
        self.model = model
        self.longest = longest
        self.at = longest
        self.size = size
        self.columns = columns_of(longest, max_tokens)
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
            layer.insert(slots, left, new, self.size)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.starts[slot] = self.at - len(prompt)

    def step(self, last: Sequence[int | None]) -> None:
        """Feed every running row its last token; None marks a dead slot."""
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
        """Move the columns in use to the left, so that there are free columns again."""
        by = self.at - max(self.longest, *(self.at - self.starts[slot] for slot in running))
        assert by > 0, "no column of the cache is free of all running rows"
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
    """The running rows, and each model's slots for them, in step."""

    def __init__(self, model: PreTrainedModel, jobs: Sequence[GenerationJob], decoding: Decoding) -> None:
        max_tokens = max(job.sampling.max_tokens for job in jobs)
        models = [(model, [job.prompt_ids for job in jobs])]
        if decoding.second is not None:
            models.append((decoding.second.model, [_second_prompt(job) for job in jobs]))
        row_bytes = sum(_row_bytes(net, columns_of(max(map(len, prompts)), max_tokens)) for net, prompts in models)
        size = max(1, min(decoding.batch_rows, len(jobs), CACHE_BYTES // row_bytes))
        self.sides = [_Slots(net, prompts, max_tokens, size) for net, prompts in models]
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
        for side, ids in zip(self.sides, (lambda job: job.prompt_ids, _second_prompt), strict=False):
            side.admit(slots, [ids(job) for _, job in waiting])

    @torch.inference_mode()
    def step(self) -> None:
        last = [row.completion.ids[-1] if row else None for row in self.rows]
        for side in self.sides:
            side.step(last)

    def compact(self) -> None:
        """Drop the dead slots."""
        slots = [slot for slot, _ in self.running()]
        self.rows = [self.rows[slot] for slot in slots]
        for side in self.sides:
            side.keep(slots)


def _second_prompt(job: GenerationJob) -> Sequence[int]:
    return job.prompt_ids if job.second_prompt_ids is None else job.second_prompt_ids


def columns_of(longest: int, max_tokens: int) -> int:
    """Columns of the cache for prompts of at most `longest` tokens and answers of at most `max_tokens`."""
    return longest + max_tokens + COLUMNS_BETWEEN_SHIFTS


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
    vocab_size: int | None = None,
    decoding: Decoding = PLAIN,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, list[int]]]:
    """`write`, but the ids alone: (index of the job, sampled ids)."""
    for completion in write(model, jobs, eos_ids, vocab_size, decoding=decoding, stop=stop):
        yield completion.index, completion.ids


def write(
    model: PreTrainedModel,
    jobs: Sequence[GenerationJob],
    eos_ids: frozenset[int],
    vocab_size: int | None = None,
    decoding: Decoding = PLAIN,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Completion]:
    """Continue every prompt; yield each answer as it finishes: with an end-of-sequence token, at `max_tokens`, or
    where `decoding` says so.

    Args:
        model: a decoder in evaluation mode.
        eos_ids: tokens that end an answer.
        vocab_size: ids from here on are never sampled: a head is often padded beyond its tokenizer.
        stop: called before every step; once true, unfinished rows are dropped (Ctrl-C between two tokens).

    Raises:
        UserError: a prompt and its answer don't fit the context of a model that writes.
    """
    second = decoding.second
    for job in jobs:
        _check_room(model, len(job.prompt_ids), job.sampling)
        if second is not None:
            _check_room(second.model, len(_second_prompt(job)), job.sampling)
    if not jobs:
        return
    order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].prompt_ids))
    waiting = deque((index, jobs[index]) for index in order)
    batch = _Batch(model, jobs, decoding)
    while (waiting or batch.running()) and not stop():
        free = batch.free()
        if waiting and (len(free) >= max(1, len(batch.rows) // 8) or len(free) == len(batch.rows)):
            batch.admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))])
        elif not waiting and len(free) >= max(1, len(batch.rows) // 4):
            batch.compact()
        running = batch.running()
        _write_one_token(batch, running, vocab_size, decoding)
        for slot, row in running:
            ids = row.completion.ids
            sampling = row.job.sampling
            if ids[-1] in eos_ids or len(ids) == sampling.max_tokens or decoding.is_finished(sampling, ids):
                batch.rows[slot] = None
                yield row.completion
        if batch.running():
            batch.step()


@torch.inference_mode()
def _write_one_token(
    batch: _Batch, running: Sequence[tuple[int, _Row]], vocab_size: int | None, decoding: Decoding
) -> None:
    """Add every running row's next token, with its log-probabilities if they are recorded."""
    slots = [slot for slot, _ in running]
    samplings = [row.job.sampling for _, row in running]
    own_BV, *second_BV = (side.logits_BV[slots, :vocab_size] for side in batch.sides)
    for number, (_, row) in enumerate(running):
        if row.job.sampling.presence_penalty:
            own_BV[number, sorted(set(row.completion.ids))] -= row.job.sampling.presence_penalty
    uniform_B2 = torch.stack([row.uniform_T2[len(row.completion.ids)] for _, row in running])
    if decoding.second is None:
        sampled = draw(own_BV, samplings, uniform_B2[:, 0])
    else:
        sampled = decoding.second.joint(own_BV, second_BV[0], samplings, uniform_B2)
    log_probs = log_prob_of(own_BV, sampled.token_B).tolist() if decoding.record else None
    columns = zip(running, sampled.token_B.tolist(), sampled.log_prob_B.tolist(), sampled.own_B.tolist(), strict=True)
    for number, ((_, row), token, log_prob, is_own) in enumerate(columns):
        row.completion.ids.append(token)
        row.completion.own_tokens += is_own
        if log_probs is not None:
            row.completion.log_prob.append(log_probs[number])
            row.completion.sampler_log_prob.append(log_prob)


def _check_room(model: PreTrainedModel, prompt_length: int, sampling: Sampling) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context and prompt_length + sampling.max_tokens > context:
        raise UserError(
            f"a prompt of {prompt_length} tokens leaves no room for {sampling.max_tokens} more in a "
            f"context of {context}: shorten the prompt or lower max_tokens"
        )
