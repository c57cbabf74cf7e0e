"""Batched generation in process, for any Hugging Face decoder, on CPU or GPU.

Every row has its own random numbers, so an answer does not depend on the rest of its batch (up to the rounding of the
matrix products). A finished row leaves its slot to the next prompt at once; the cache is written in place.
Models whose caches can't be moved keep the library's own (`rows.py`). A row that is held to a form (`constrain.py`)
draws from the tokens that may come next; rows without a form are written as if there were none.
Not covered: beam search.

Shapes: B slots, T tokens to come, V vocabulary, N some of the slots or the numbers for one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.models.placement import is_out_of_memory
from limbeck.models.rows import OwnCaches
from limbeck.models.sample import RowSamplings, SampledTokens, draw, log_prob_of, upload
from limbeck.models.slots import Slots, cache_room, columns_of, context_of, index, row_bytes, takes_slots
from limbeck.objectives.precision import accumulation_dtype
from limbeck.types import Sampling, UserError


class RowConstraint(Protocol):
    """What holds one answer to a form."""

    def allowed(self) -> bytes | None:
        """The tokens that may come next, a bit each, the first in the lowest; None for all of them."""

    def take(self, token: int, /) -> None:
        """The token that was drawn."""


@dataclass(frozen=True)
class GenerationJob:
    """A prompt to continue. `seed` alone decides its random numbers. `second_prompt_ids` is the prompt for the second
    model, if it gets another one. `until` is called with the ids so far after every token, and ends the text where it
    is true; it is called from the first token again where memory ran out. `hold` begins what holds the answer to a
    form, if anything does."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    second_prompt_ids: Sequence[int] | None = None
    until: Callable[[Sequence[int]], bool] | None = None
    hold: Callable[[], RowConstraint] | None = None


@dataclass
class Completion:
    """The answer to job `index`: `ids` as sampled, with the end-of-sequence token if the model wrote one.

    If recorded, `log_prob` holds each token's log-probability under the model (temperature 1, whole vocabulary, what a
    form forbids included) and `sampler_log_prob` that under the distribution it was sampled from, in nats. `own_tokens`
    counts the tokens that the model itself proposed.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    sampler_log_prob: list[float] = field(default_factory=list)
    own_tokens: int = 0


class Joint(Protocol):
    """How two models write one text: one token per row from the logits of both and two uniform numbers."""

    def __call__(self, own_BV: Tensor, second_BV: Tensor, rows: RowSamplings, uniform_B2: Tensor) -> SampledTokens: ...


@dataclass(frozen=True)
class SecondModel:
    """A second model that reads along with its own cache, and how it takes part."""

    model: PreTrainedModel
    joint: Joint


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued.

    Args:
        batch_rows: how many rows decode together at most; fewer if their keys and values would not fit `cache_room`.
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
    uniform_TN: Tensor  # a number of each model for each token to come, from the job's seed
    completion: Completion
    held: RowConstraint | None = None

    @classmethod
    def begin(cls, number: int, job: GenerationJob, models: int) -> _Row:
        generator = torch.Generator().manual_seed(job.seed)
        shape = (job.sampling.max_tokens, 1)  # column by column: the first is the same with and without a second model
        columns = [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(models)]
        return cls(job, torch.cat(columns, dim=1), Completion(number), None if job.hold is None else job.hold())


class _Columns:
    """What it takes to draw every slot's next token, on the device: nothing goes there while the same rows write."""

    def __init__(self, size: int, jobs: Sequence[GenerationJob], numbers: int, first: Slots | OwnCaches) -> None:
        self.device = first.device
        self.samplings = [Sampling()] * size
        longest = max(job.sampling.max_tokens for job in jobs)
        self.uniform_BTN = torch.zeros(
            size, longest, numbers, dtype=accumulation_dtype(self.device), device=self.device
        )
        self.written_B = torch.zeros(size, dtype=torch.long, device=self.device)
        self.last_B = torch.zeros_like(self.written_B)
        penalised = any(job.sampling.presence_penalty for job in jobs)
        self.penalty_BV = torch.zeros_like(first.logits_BV) if penalised else None
        self._put_samplings()

    def admit(self, slots: Sequence[int], rows: Sequence[_Row]) -> None:
        slots_N = index(slots, self.device)
        uniform_NTN = torch.zeros(len(rows), *self.uniform_BTN.shape[1:], dtype=self.uniform_BTN.dtype)
        for number, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            self.samplings[slot] = row.job.sampling
            uniform_NTN[number, : len(row.uniform_TN)] = row.uniform_TN
        self.uniform_BTN[slots_N] = upload(uniform_NTN, self.device)
        self.written_B.index_fill_(0, slots_N, 0)
        if self.penalty_BV is not None:
            self.penalty_BV.index_fill_(0, slots_N, 0.0)
        self._put_samplings()

    def keep(self, slots: Sequence[int]) -> None:
        slots_N = index(slots, self.device)
        self.samplings = [self.samplings[slot] for slot in slots]
        self.uniform_BTN, self.written_B, self.last_B = (
            column[slots_N] for column in (self.uniform_BTN, self.written_B, self.last_B)
        )
        if self.penalty_BV is not None:
            self.penalty_BV = self.penalty_BV[slots_N]
        self._put_samplings()

    def _put_samplings(self) -> None:
        self.rows = RowSamplings.of(self.samplings, self.device)
        penalties = torch.tensor([sampling.presence_penalty for sampling in self.samplings])
        self.presence_B1 = upload(penalties, self.device)[:, None] if self.penalty_BV is not None else None

    def penalised(self, logits_BV: Tensor) -> Tensor:
        """Logits less each row's penalty at the tokens that it wrote."""
        return logits_BV if self.penalty_BV is None else logits_BV - self.penalty_BV[:, : logits_BV.shape[1]]

    def uniform(self) -> Tensor:
        """Every row's numbers for its next token; a dead row's last ones serve again."""
        at_B = self.written_B.clamp(max=self.uniform_BTN.shape[1] - 1)
        return self.uniform_BTN.gather(1, at_B[:, None, None].expand(-1, 1, self.uniform_BTN.shape[2]))[:, 0]

    def wrote(self, token_B: Tensor) -> None:
        self.last_B = token_B
        self.written_B += 1
        if self.penalty_BV is not None and self.presence_B1 is not None:
            self.penalty_BV.scatter_(1, token_B[:, None], self.presence_B1)


class _Batch:
    """The running rows, and each model's slots for them, in step."""

    def __init__(self, model: PreTrainedModel, jobs: Sequence[GenerationJob], decoding: Decoding) -> None:
        max_tokens = max(job.sampling.max_tokens for job in jobs)
        models = [(model, [job.prompt_ids for job in jobs])]
        if decoding.second is not None:
            models.append((decoding.second.model, [_second_prompt(job) for job in jobs]))
        needed = sum(row_bytes(net, columns_of(max(map(len, prompts)), max_tokens)) for net, prompts in models)
        size = max(1, min(decoding.batch_rows, len(jobs), cache_room(model.device) // needed))
        self.sides = [_side(net, prompts, max_tokens, size) for net, prompts in models]
        self.columns = _Columns(size, jobs, len(models), self.sides[0])
        self.rows: list[_Row | None] = [None] * size

    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def running(self) -> list[tuple[int, _Row]]:
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]

    @torch.inference_mode()
    def admit(self, waiting: Sequence[tuple[int, GenerationJob]]) -> None:
        slots = self.free()[: len(waiting)]
        rows = [_Row.begin(number, job, len(self.sides)) for number, job in waiting]
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
        self.columns.admit(slots, rows)
        for side, ids in zip(self.sides, (lambda job: job.prompt_ids, _second_prompt), strict=False):
            side.admit(slots, [ids(job) for _, job in waiting])

    @torch.inference_mode()
    def step(self) -> None:
        running = [slot for slot, _ in self.running()]
        for side in self.sides:
            side.step(self.columns.last_B, running)

    @torch.inference_mode()
    def compact(self) -> None:
        """Drop the dead slots."""
        slots = [slot for slot, _ in self.running()]
        self.rows = [self.rows[slot] for slot in slots]
        self.columns.keep(slots)
        for side in self.sides:
            side.keep(slots)


def _side(net: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, size: int) -> Slots | OwnCaches:
    return Slots(net, prompts, max_tokens, size) if takes_slots(net) else OwnCaches(net, size)


def _second_prompt(job: GenerationJob) -> Sequence[int]:
    return job.prompt_ids if job.second_prompt_ids is None else job.second_prompt_ids


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
    where `decoding` says so. Where memory runs out, fewer rows decode together.

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
    unfinished = dict(enumerate(jobs))
    while unfinished:
        try:
            for completion in _write(model, unfinished, eos_ids, vocab_size, decoding=decoding, stop=stop):
                del unfinished[completion.index]
                yield completion
            return
        except (RuntimeError, MemoryError) as error:
            rows = min(decoding.batch_rows, len(unfinished))
            if not is_out_of_memory(error) or rows == 1:
                raise
        # an answer does not depend on its batch, so those that are lost are begun again
        decoding = replace(decoding, batch_rows=rows // 2)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _write(
    model: PreTrainedModel,
    jobs: Mapping[int, GenerationJob],
    eos_ids: frozenset[int],
    vocab_size: int | None,
    *,
    decoding: Decoding,
    stop: Callable[[], bool],
) -> Iterator[Completion]:
    """`write` in one batch, whose memory must be there."""
    waiting = deque(sorted(jobs.items(), key=lambda item: len(item[1].prompt_ids)))
    batch = _Batch(model, list(jobs.values()), decoding)
    while (waiting or batch.running()) and not stop():
        free = batch.free()
        if waiting and (len(free) >= max(1, len(batch.rows) // 8) or len(free) == len(batch.rows)):
            batch.admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))])
        elif not waiting and len(free) >= max(1, len(batch.rows) // 4):
            batch.compact()
        _write_one_token(batch, vocab_size, decoding)
        for slot, row in batch.running():
            ids = row.completion.ids
            sampling = row.job.sampling
            is_enough = row.job.until is not None and row.job.until(ids)
            if (
                is_enough
                or ids[-1] in eos_ids
                or len(ids) == sampling.max_tokens
                or decoding.is_finished(sampling, ids)
            ):
                batch.rows[slot] = None
                yield row.completion
        if batch.running():
            batch.step()


@torch.inference_mode()
def _write_one_token(batch: _Batch, vocab_size: int | None, decoding: Decoding) -> None:
    """Add every running row's next token, with its log-probabilities if they are recorded.

    Dead rows draw along. The host waits for the device once, for one copy of all that it must know.
    """
    columns = batch.columns
    own_BV, *second_BV = (side.logits_BV[:, :vocab_size] for side in batch.sides)
    own_BV, uniform_BN = columns.penalised(own_BV), columns.uniform()
    held_BV = _held(batch, own_BV)
    if decoding.second is None:
        sampled = draw(held_BV, columns.rows, uniform_BN[:, 0])
    else:
        sampled = decoding.second.joint(held_BV, second_BV[0].to(columns.device), columns.rows, uniform_BN)
    if held_BV is not own_BV:  # a number that was rounded to 1 draws the last token, which may not be allowed
        is_allowed_B = held_BV.gather(1, sampled.token_B[:, None])[:, 0].isfinite()
        sampled = sampled._replace(token_B=torch.where(is_allowed_B, sampled.token_B, held_BV.argmax(-1)))
    columns.wrote(sampled.token_B)
    told = [sampled.token_B, sampled.own_B]
    if decoding.record:
        told += [log_prob_of(own_BV, sampled.token_B), sampled.log_prob_B]
    exact = accumulation_dtype(columns.device)  # holds every id
    token, is_own, *log_probs = torch.stack([column.to(exact) for column in told]).tolist()
    for slot, row in batch.running():
        row.completion.ids.append(int(token[slot]))
        row.completion.own_tokens += int(is_own[slot])
        if row.held is not None:
            row.held.take(int(token[slot]))
        if decoding.record:
            row.completion.log_prob.append(log_probs[0][slot])
            row.completion.sampler_log_prob.append(log_probs[1][slot])


def _held(batch: _Batch, logits_BV: Tensor) -> Tensor:
    """The logits, with those of tokens that may not come next at minus infinity; the same tensor if all may."""
    masks = [(slot, row.held.allowed()) for slot, row in batch.running() if row.held is not None]
    held = [(slot, torch.frombuffer(bytearray(bits), dtype=torch.uint8)) for slot, bits in masks if bits is not None]
    if not held:
        return logits_BV
    device, size = logits_BV.device, logits_BV.shape[1]
    slots_N = index([slot for slot, _ in held], device)
    bytes_NW = upload(torch.stack([bits for _, bits in held]), device)
    bits_NV = ((bytes_NW[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1).flatten(1)[:, :size]
    may_NV = torch.nn.functional.pad(bits_NV, (0, size - bits_NV.shape[1])).bool()
    logits_BV = logits_BV.clone()
    logits_BV[slots_N] = logits_BV[slots_N].masked_fill(~may_NV, float("-inf"))
    return logits_BV


def _check_room(model: PreTrainedModel, prompt_length: int, sampling: Sampling) -> None:
    context = context_of(model)
    if prompt_length + sampling.max_tokens > context:
        raise UserError(
            f"a prompt of {prompt_length} tokens leaves no room for {sampling.max_tokens} more in a "
            f"context of {context}: shorten the prompt or lower max_tokens"
        )
