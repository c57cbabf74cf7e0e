"""The order of the text and its batches: pure functions of (rows, seed, epoch), so a step can be replayed alone.

Rows of like length share a micro-batch, padded on the right; response tokens are counted, not rows. The state of the
data is one integer, the step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from limbeck.types import Batch, Message, Sample, UserError

MICRO_TOKENS = 1024
WINDOW_STEPS = 8

MicroBatch = tuple[int, ...]
Step = tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Row:
    """A conversation in the student's token ids, split where the response begins (it ends with end-of-sequence)."""

    sample_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def make_rows(
    samples: Sequence[Sample],
    prompt_ids: Callable[[tuple[Message, ...]], list[int]],
    response_ids: Callable[[Sample], Sequence[int]],
    context: int,
) -> list[Row]:
    """Samples as token rows; empty answers are left out.

    Raises:
        UserError: a row longer than the student's context, or no row at all.
    """
    rows = []
    for sample in samples:
        row = Row(sample.id, tuple(prompt_ids(sample.messages[:-1])), tuple(response_ids(sample)))
        if len(row) > context:
            raise UserError(
                f"the prompt {sample.messages[0]['content'][:60]!r}... and its answer take {len(row)} tokens, more than the "
                f"student's context of {context}: shorten it, or lower writer.max_tokens"
            )
        if sample.messages[-1]["content"].strip():
            rows.append(row)
    if not rows:
        raise UserError("there is no text to train on: every answer was empty; look at the store's answers")
    return rows


def steps_of_epoch(rows: Sequence[Row], seed: int, epoch: int, tokens_per_step: int) -> list[Step]:
    """All steps of one epoch, each of about `tokens_per_step` response tokens.

    Rows are shuffled, sorted by length within windows of WINDOW_STEPS steps, cut into micro-batches of at most
    MICRO_TOKENS (and of a step) padded tokens, shuffled again and dealt out. Every row comes exactly once.
    """
    noise = random.Random(f"{seed}/{epoch}")  # noqa: S311 (an order, not a secret)
    shuffled = list(range(len(rows)))
    noise.shuffle(shuffled)
    micro_batches: list[MicroBatch] = []
    window: list[int] = []
    tokens = 0
    for index in shuffled:
        window.append(index)
        tokens += len(rows[index].response_ids)
        if tokens >= WINDOW_STEPS * tokens_per_step:
            micro_batches += _cut(rows, window, noise, tokens_per_step)
            window, tokens = [], 0
    micro_batches += _cut(rows, window, noise, tokens_per_step)
    return _deal(rows, micro_batches, tokens_per_step)


def _cut(rows: Sequence[Row], window: list[int], noise: random.Random, tokens_per_step: int) -> list[MicroBatch]:
    limit = min(MICRO_TOKENS, tokens_per_step)
    cut: list[list[int]] = []
    for index in sorted(window, key=lambda index: (len(rows[index]), index)):
        if cut and (len(cut[-1]) + 1) * len(rows[index]) <= limit:
            cut[-1].append(index)
        else:
            cut.append([index])
    noise.shuffle(cut)
    return [tuple(micro_batch) for micro_batch in cut]


def _deal(rows: Sequence[Row], micro_batches: list[MicroBatch], tokens_per_step: int) -> list[Step]:
    """Consecutive micro-batches make a step; as many steps as the tokens call for, all of nearly equal weight."""
    weights = [sum(len(rows[index].response_ids) for index in micro_batch) for micro_batch in micro_batches]
    count = min(len(micro_batches), max(1, round(sum(weights) / tokens_per_step)))
    share, steps, at, done = sum(weights) / count, [], 0, 0.0
    for number in range(count):
        step = [micro_batches[at]]
        done += weights[at]
        at += 1
        while at < len(micro_batches) - (count - number - 1) and (number == count - 1 or done + weights[at] / 2 <= share * (number + 1)):
            step.append(micro_batches[at])
            done += weights[at]
            at += 1
        steps.append(tuple(step))
    return steps


def steps_from(rows: Sequence[Row], seed: int, tokens_per_step: int, start: int, stop: int) -> Iterator[Step]:
    """Steps number `start` to `stop` - 1 of the endless sequence of epochs."""
    step, epoch = 0, 0
    while step < stop:
        for content in steps_of_epoch(rows, seed, epoch, tokens_per_step):
            if start <= step < stop:
                yield content
            step += 1
        epoch += 1


def make_batch(rows: Sequence[Row], micro_batch: MicroBatch, pad_id: int = 0) -> Batch:
    """The rows of a micro-batch as tensors, padded on the right."""
    chosen = [rows[index] for index in micro_batch]
    width = max(len(row) for row in chosen)
    tokens_BT = torch.full((len(chosen), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(chosen), width, dtype=torch.bool)
    for number, row in enumerate(chosen):
        tokens_BT[number, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        mask_BT[number, len(row.prompt_ids) : len(row)] = True
    return Batch(tokens_BT, mask_BT, mask_BT.float(), tuple(row.sample_id for row in chosen))
