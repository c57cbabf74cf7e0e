"""The order of the text and its batches: pure functions of (rows, seed, epoch), so a step can be replayed alone.

Rows of like length share a micro-batch, padded on the right; response tokens are counted, not rows. The state of the
data is one integer, the step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.types import Batch, Message, Sample, UserError

MICRO_TOKENS = 1024
CHOSEN = "best"
REJECTED = "rest"
MIXED = "mixed"  # the tag of a row whose embeddings are mixed with another's
WINDOW_STEPS = 8

MicroBatch = tuple[int, ...]
Step = tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Row:
    """A conversation in the student's token ids, split where the response begins (it ends with end-of-sequence).

    `tags` are its writer, its task, and whether it is the `best` answer or one of the `rest`; `group` is the prompt it
    answers, `weight` that of each of its tokens, `references` the log-probabilities of the response under frozen
    models. Rows of a group stand in the order of their rank, the best first. `teacher_prompt_ids` is the prompt as the
    teacher sees it, where that is another; `columns` hold numbers that stand beside each response token, such as its
    log-probability when drawn. `mixed` is (another row, this row's own weight) where their embeddings are mixed,
    position by position.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    tags: frozenset[str] = frozenset()
    group: str = ""
    weight: float = 1.0
    references: tuple[tuple[str, float], ...] = ()
    teacher_prompt_ids: tuple[int, ...] | None = None
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    mixed: tuple[Row, float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def make_rows(
    samples: Sequence[Sample],
    prompt_ids: Callable[[tuple[Message, ...]], list[int]],
    response_ids: Callable[[Sample], Sequence[int]],
    context: int,
    teacher_prompt_ids: Callable[[tuple[Message, ...]], list[int]] | None = None,
) -> list[Row]:
    """Samples as token rows; empty answers are left out. `teacher_prompt_ids` is given where the teacher sees another
    prompt.

    Raises:
        UserError: a row longer than the student's context, or no row at all.
    """
    rows = []
    for sample in samples:
        meta = sample.meta
        tags = frozenset(
            {
                *(str(meta[key]) for key in ("writer", "task") if meta.get(key)),
                REJECTED if meta.get("place", 0) else CHOSEN,
            }
        )
        group = str(meta.get("prompt_id", sample.id))
        weight = float(meta.get("weight", 1.0))
        seen = None if teacher_prompt_ids is None else tuple(teacher_prompt_ids(sample.messages[:-1]))
        ids = tuple(prompt_ids(sample.messages[:-1])), tuple(response_ids(sample))
        row = Row(sample.id, *ids, tags, group, weight, teacher_prompt_ids=seen)
        if max(len(row), len(seen or ()) + len(row.response_ids)) > context:
            raise UserError(
                f"the prompt {sample.messages[0]['content'][:60]!r}... and its answer take {len(row)} tokens, more than"
                f" the student's context of {context}: shorten it, or lower writer.max_tokens"
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


def steps_of_epoch(
    rows: Sequence[Row], seed: int, epoch: int, tokens_per_step: int, together: bool = False
) -> list[Step]:
    """All steps of one epoch, each of about `tokens_per_step` response tokens.

    Units (rows, or the answers to one prompt when they stay `together`) are shuffled, sorted by length within windows
    of WINDOW_STEPS steps, cut into micro-batches of at most MICRO_TOKENS (and of a step) padded tokens, shuffled again
    and dealt out. Every row comes exactly once.
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
            window = []
            tokens = 0
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
    share = sum(weights) / count
    steps = []
    at = 0
    done = 0.0
    for number in range(count):
        step = [micro_batches[at]]
        done += weights[at]
        at += 1
        while at < len(micro_batches) - (count - number - 1) and (
            number == count - 1 or done + weights[at] / 2 <= share * (number + 1)
        ):
            step.append(micro_batches[at])
            done += weights[at]
            at += 1
        steps.append(tuple(step))
    return steps


@dataclass(frozen=True)
class StepBatch:
    """A step's text in micro-batches, and what the metrics shall say of it."""

    micro_batches: list[list[Row]]
    facts: dict[str, float] = field(default_factory=dict)


class Source(Protocol):
    """Where the text of a step comes from."""

    def step_batch(self, step: int, progress: float, states: dict[str, dict[str, float]], /) -> StepBatch:
        """The text of step number `step`, asked for in order; `progress` is the part of the training that is done."""

    def state(self) -> dict[str, Any]:
        """What it must know to go on after the last turn, as plain data for the checkpoint."""

    def restore(self, state: Mapping[str, Any], /) -> None: ...


class FixedText:
    """Text that is there before the training: every step is a function of the seed and its number."""

    def __init__(self, rows: Sequence[Row], seed: int, tokens_per_step: int, together: bool = False) -> None:
        self.rows = rows
        self._epochs = partial(steps_of_epoch, rows, seed, tokens_per_step=tokens_per_step, together=together)
        self._epoch = -1
        self._first = 0
        self._contents = list[Step]()

    def step(self, number: int) -> list[list[Row]]:
        """The micro-batches of step `number`, counted from 0."""
        if number < self._first:
            self._epoch = -1
            self._first = 0
            self._contents = []
        while number >= self._first + len(self._contents):
            self._first += len(self._contents)
            self._epoch += 1
            self._contents = self._epochs(epoch=self._epoch)
        return [[self.rows[index] for index in micro_batch] for micro_batch in self._contents[number - self._first]]

    def step_batch(self, step: int, _: float, __: Mapping[str, Any]) -> StepBatch:
        return StepBatch(self.step(step))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, _: Mapping[str, Any]) -> None:
        pass


def cut(rows: Sequence[Row], seed: str, tokens_per_step: int, together: bool = False) -> list[list[Row]]:
    """Rows of one step in micro-batches, those of like length together."""
    noise = random.Random(seed)  # noqa: S311 (an order, not a secret)
    micro_batches = _cut(rows, units_of(rows, together), noise, tokens_per_step)
    return [[rows[index] for index in micro_batch] for micro_batch in micro_batches]


def make_batch(rows: Sequence[Row], micro_batch: MicroBatch | None = None, pad_id: int = 0) -> Batch:
    """The rows of a micro-batch (all of them by default) as tensors, padded on the right."""
    chosen = list(rows) if micro_batch is None else [rows[index] for index in micro_batch]
    tokens_BT, mask_BT = _padded([(row.prompt_ids, row.response_ids) for row in chosen], pad_id)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(chosen):
        groups.setdefault(row.group, []).append(number)
    weight_BT = mask_BT * torch.tensor([row.weight for row in chosen], dtype=torch.float32)[:, None]
    names = {name for row in chosen for name, _ in row.references}
    references = {name: torch.tensor([dict(row.references)[name] for row in chosen]) for name in sorted(names)}
    ids = tuple(row.sample_id for row in chosen)
    tags = tuple(row.tags for row in chosen)
    seen = None
    if any(row.teacher_prompt_ids is not None for row in chosen):
        seen = _padded(
            [
                (row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids, row.response_ids)
                for row in chosen
            ]
        )
    together = tuple(tuple(group) for group in groups.values())
    return Batch(
        tokens_BT,
        mask_BT,
        weight_BT,
        ids,
        tags,
        together,
        references,
        _columns(chosen, mask_BT),
        seen,
        _mixed(chosen, tokens_BT),
    )


def _mixed(rows: Sequence[Row], tokens_BT: Tensor) -> tuple[Tensor, Tensor] | None:
    """(the tokens that each row is mixed with [B, T], the weight of its own [B, T]): 1 where the other row has no
    token."""
    if all(row.mixed is None for row in rows):
        return None
    other_BT = tokens_BT.clone()
    weight_BT = torch.ones(tokens_BT.shape)
    for number, row in enumerate(rows):
        if row.mixed is not None:
            other, own = row.mixed
            ids = (other.prompt_ids + other.response_ids)[: len(row)]
            other_BT[number, : len(ids)] = torch.tensor(ids)
            weight_BT[number, : len(ids)] = own
    return other_BT, weight_BT


def _padded(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], which are response tokens) of (prompt, response) pairs."""
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens_BT = torch.full((len(pairs), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(pairs), width, dtype=torch.bool)
    for number, (prompt, response) in enumerate(pairs):
        tokens_BT[number, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask_BT[number, len(prompt) : len(prompt) + len(response)] = True
    return tokens_BT, mask_BT


def _columns(rows: Sequence[Row], mask_BT: Tensor) -> dict[str, Tensor]:
    """Every column that some row has, [B, T]: 0 outside the responses, and where a row does not have it."""
    found = {}
    for name in sorted({name for row in rows for name in row.columns}):
        column_BT = torch.zeros(mask_BT.shape)
        for number, row in enumerate(rows):
            if name in row.columns:
                column_BT[number, len(row.prompt_ids) : len(row)] = torch.tensor(row.columns[name])
        found[name] = column_BT
    return found
