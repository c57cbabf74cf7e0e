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
BEST, REST = "best", "rest"
WINDOW_STEPS = 8

MicroBatch = tuple[int, ...]
Step = tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Row:
    """A conversation in the student's token ids, split where the response begins (it ends with end-of-sequence).

    `tags` are its writer, its task, and whether it is the `best` answer or one of the `rest`; `group` is the prompt it
    answers, `weight` that of each of its tokens, `references` the log-probabilities of the response under frozen models.
    Rows of a group stand in the order of their rank, the best first.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    tags: frozenset[str] = frozenset()
    group: str = ""
    weight: float = 1.0
    references: tuple[tuple[str, float], ...] = ()

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
        meta = sample.meta
        tags = frozenset({*(str(meta[key]) for key in ("writer", "task") if meta.get(key)), REST if meta.get("place", 0) else BEST})
        group, weight = str(meta.get("prompt_id", sample.id)), float(meta.get("weight", 1.0))
        row = Row(sample.id, tuple(prompt_ids(sample.messages[:-1])), tuple(response_ids(sample)), tags, group, weight)
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


def units_of(rows: Sequence[Row], together: bool) -> list[MicroBatch]:
    """What is shuffled and never parted: single rows, or all the answers to one prompt where they are compared."""
    if not together:
        return [(index,) for index in range(len(rows))]
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.group, []).append(index)
    return [tuple(group) for group in groups.values()]


def steps_of_epoch(rows: Sequence[Row], seed: int, epoch: int, tokens_per_step: int, together: bool = False) -> list[Step]:
    """All steps of one epoch, each of about `tokens_per_step` response tokens.

    Units (rows, or the answers to one prompt when they stay `together`) are shuffled, sorted by length within windows of
    WINDOW_STEPS steps, cut into micro-batches of at most MICRO_TOKENS (and of a step) padded tokens, shuffled again and
    dealt out. Every row comes exactly once.
    """
    noise = random.Random(f"{seed}/{epoch}")  # noqa: S311 (an order, not a secret)
    units = units_of(rows, together)
    shuffled = list(range(len(units)))
    noise.shuffle(shuffled)
    micro_batches: list[MicroBatch] = []
    window: list[MicroBatch] = []
    tokens = 0
    for index in shuffled:
        window.append(units[index])
        tokens += sum(len(rows[row].response_ids) for row in units[index])
        if tokens >= WINDOW_STEPS * tokens_per_step:
            micro_batches += _cut(rows, window, noise, tokens_per_step)
            window, tokens = [], 0
    micro_batches += _cut(rows, window, noise, tokens_per_step)
    return _deal(rows, micro_batches, tokens_per_step)


def _cut(rows: Sequence[Row], window: list[MicroBatch], noise: random.Random, tokens_per_step: int) -> list[MicroBatch]:
    limit = min(MICRO_TOKENS, tokens_per_step)
    widths = {unit: max(len(rows[index]) for index in unit) for unit in window}
    cut: list[list[int]] = []
    for unit in sorted(window, key=lambda unit: (widths[unit], unit)):
        if cut and (len(cut[-1]) + len(unit)) * widths[unit] <= limit:
            cut[-1] += unit
        else:
            cut.append([*unit])
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


def steps_from(rows: Sequence[Row], seed: int, tokens_per_step: int, start: int, stop: int, together: bool = False) -> Iterator[Step]:
    """Steps number `start` to `stop` - 1 of the endless sequence of epochs."""
    step, epoch = 0, 0
    while step < stop:
        for content in steps_of_epoch(rows, seed, epoch, tokens_per_step, together):
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
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(chosen):
        tokens_BT[number, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        mask_BT[number, len(row.prompt_ids) : len(row)] = True
        groups.setdefault(row.group, []).append(number)
    weight_BT = mask_BT * torch.tensor([row.weight for row in chosen], dtype=torch.float32)[:, None]
    names = {name for row in chosen for name, _ in row.references}
    references = {name: torch.tensor([dict(row.references)[name] for row in chosen]) for name in sorted(names)}
    ids, tags = tuple(row.sample_id for row in chosen), tuple(row.tags for row in chosen)
    return Batch(tokens_BT, mask_BT, weight_BT, ids, tags, tuple(tuple(group) for group in groups.values()), references)
