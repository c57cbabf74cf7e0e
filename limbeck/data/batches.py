"""The order of the training text and its batches: pure functions of (rows, seed, epoch), so any step can be replayed.

Rows of similar length share a micro-batch, padded on the right; a step's size is counted in response tokens, not rows.
The state of the data is one integer, the step.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.types import MARGIN, PROBABILITY, TAUGHT_FINISHES, Batch, Message, Sample, UserError

MICRO_TOKENS = 1024
CHOSEN = "chosen"
REJECTED = "rejected"
MIXED = "mixed"  # the tag of a row whose embeddings are mixed with another's
LABELS = (PROBABILITY, MARGIN)
WINDOW_STEPS = 8

MicroBatch = tuple[int, ...]  # places of rows
StepPlan = tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Row:
    """A conversation in the student's token ids: a prompt, and a response that ends with the end-of-sequence token.

    Args:
        tags: its writer, its task, and whether it is the `chosen` answer or a `rejected` one.
        group: the prompt that it answers. The rows of a group are in order of preference, the chosen one first.
        weight: the weight of each of its tokens.
        references: log-probability of the response under frozen models, by name.
        labels: what is known of the pair of answers that it is the first of, by name.
        teacher_prompt_ids: the prompt that the teacher sees, if it sees another one.
        columns: numbers for each response token, such as its log-probability when it was sampled.
        mixed: (another row, the weight of this one) if their embeddings are mixed, position by position.
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
    labels: tuple[tuple[str, float], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def make_rows(
    samples: Sequence[Sample],
    prompt_ids: Callable[[tuple[Message, ...]], list[int]],
    response_ids: Callable[[Sample], Sequence[int]],
    max_length: int,
    teacher_prompt_ids: Callable[[tuple[Message, ...]], list[int]] | None = None,
) -> list[Row]:
    """Tokenize samples; those that teach nothing (empty, refused, ...) are left out.

    Args:
        prompt_ids, response_ids: tokenize the conversation before the answer, and the answer.
        max_length: of prompt and response together, in tokens.
        teacher_prompt_ids: tokenizes the prompt for a teacher that sees another one.

    Raises:
        UserError: a row is longer than `max_length` or has an empty prompt, or there is no row at all.
    """
    taught = [sample for sample in samples if sample.teaches]
    if not taught:
        finishes = [str(sample.meta.get("finish", "ok")) for sample in samples]
        ends = Counter("empty" if finish in TAUGHT_FINISHES else finish for finish in finishes)
        counts = ", ".join(f"{count:,} {finish}" for finish, count in ends.most_common())
        raise UserError(f"there is no text to train on: of {len(samples):,} answers none can be used ({counts})")
    rows = []
    for sample in taught:
        meta = sample.meta
        tags = frozenset(
            {
                *(str(meta[key]) for key in ("writer", "task") if meta.get(key)),
                REJECTED if meta.get("place", 0) else CHOSEN,
            }
        )
        teacher_ids = None if teacher_prompt_ids is None else tuple(teacher_prompt_ids(sample.messages[:-1]))
        row = Row(
            sample.id,
            tuple(prompt_ids(sample.messages[:-1])),
            tuple(response_ids(sample)),
            tags,
            group=str(meta.get("prompt_id", sample.id)),
            weight=float(meta.get("weight", 1.0)),
            teacher_prompt_ids=teacher_ids,
            labels=tuple((name, float(meta[name])) for name in LABELS if name in meta and not meta.get("place", 0)),
        )
        if max(len(row), len(teacher_ids or ()) + len(row.response_ids)) > max_length:
            raise UserError(
                f"the prompt {sample.messages[0]['content'][:60]!r}... and its answer take {len(row)} tokens, more than"
                f" the student's context of {max_length}: shorten it, or lower writer.max_tokens"
            )
        if not row.prompt_ids or teacher_ids == ():
            raise UserError(
                f"the prompt of the answer {sample.messages[-1]['content'][:60]!r}... has no token, so nothing predicts"
                " the answer's first one: give it a prompt, or take a model whose chat template begins with a token"
            )
        rows.append(row)
    return rows


def units_of(rows: Sequence[Row], together: bool) -> list[MicroBatch]:
    """The groups of rows that stay in one micro-batch: single rows, or with `together` all answers to one prompt."""
    if not together:
        return [(index,) for index in range(len(rows))]
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.group, []).append(index)
    return [tuple(group) for group in groups.values()]


def steps_of_epoch(
    rows: Sequence[Row], seed: int, epoch: int, tokens_per_step: int, together: bool = False
) -> list[StepPlan]:
    """All steps of one epoch, each of about `tokens_per_step` response tokens. Every row occurs exactly once.

    Units (rows, or with `together` all the answers to one prompt) are shuffled, sorted by length within windows of
    WINDOW_STEPS steps, and packed into micro-batches of at most MICRO_TOKENS (and at most a step's) padded tokens,
    which are shuffled and dealt out to the steps. Where answers are short and prompts are not, a step has many small
    ones; they are joined.
    """
    rng = random.Random(f"{seed}/{epoch}")  # noqa: S311 (no secret)
    units = units_of(rows, together)
    shuffled = list(range(len(units)))
    rng.shuffle(shuffled)
    micro_batches: list[MicroBatch] = []
    window: list[MicroBatch] = []
    tokens = 0
    for index in shuffled:
        window.append(units[index])
        tokens += sum(len(rows[row].response_ids) for row in units[index])
        if tokens >= WINDOW_STEPS * tokens_per_step:
            micro_batches += _pack(rows, window, rng, tokens_per_step)
            window = []
            tokens = 0
    micro_batches += _pack(rows, window, rng, tokens_per_step)
    steps = _deal(rows, micro_batches, tokens_per_step)
    return steps if tokens_per_step >= MICRO_TOKENS else [_joined(rows, step, together) for step in steps]


def _pack(rows: Sequence[Row], units: list[MicroBatch], rng: random.Random, tokens_per_step: int) -> list[MicroBatch]:
    """Micro-batches of units of similar length, in random order."""
    micro_batches = _packed(rows, units, min(MICRO_TOKENS, tokens_per_step))
    rng.shuffle(micro_batches)
    return [tuple(micro_batch) for micro_batch in micro_batches]


def _packed(rows: Sequence[Row], units: Sequence[MicroBatch], limit: int) -> list[list[int]]:
    """Micro-batches of units of similar length, each of at most `limit` padded tokens (but one unit at least)."""
    widths = {unit: max(len(rows[index]) for index in unit) for unit in units}
    micro_batches: list[list[int]] = []
    for unit in sorted(units, key=lambda unit: (widths[unit], unit)):
        if micro_batches and (len(micro_batches[-1]) + len(unit)) * widths[unit] <= limit:
            micro_batches[-1] += unit
        else:
            micro_batches.append([*unit])
    return micro_batches


def resized(micro_batches: Sequence[Sequence[Row]], limit: int, together: bool = False) -> list[list[Row]]:
    """The rows of a step in micro-batches of at most `limit` padded tokens (but one row, or group, at least).

    The text of a step follows from the seed alone; only its split depends on the machine, and no loss on that.
    """
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    return [[rows[index] for index in packed] for packed in _packed(rows, units_of(rows, together), limit)]


def _joined(rows: Sequence[Row], step: StepPlan, together: bool) -> StepPlan:
    """The rows of a step in micro-batches of at most MICRO_TOKENS padded tokens."""
    places = [place for micro_batch in step for place in micro_batch]
    chosen = [rows[place] for place in places]
    packed = _packed(chosen, units_of(chosen, together), MICRO_TOKENS)
    return tuple(tuple(places[index] for index in micro_batch) for micro_batch in packed)


def _deal(rows: Sequence[Row], micro_batches: list[MicroBatch], tokens_per_step: int) -> list[StepPlan]:
    """Steps of consecutive micro-batches with nearly equal numbers of response tokens."""
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
    """The text of a step in micro-batches, and facts about it for the metrics."""

    micro_batches: list[list[Row]]
    facts: dict[str, float] = field(default_factory=dict)


class Source(Protocol):
    """A source of the text of every step."""

    def step_batch(self, step: int, progress: float, states: dict[str, dict[str, float]], /) -> StepBatch:
        """The text of step number `step`; steps are requested in order. `progress` is the share of the training
        done."""

    def state(self) -> dict[str, Any]:
        """Its state after the last step, as plain data for the checkpoint."""

    def restore(self, state: Mapping[str, Any], /) -> None: ...


class FixedText:
    """Text written before the training: every step is a function of the seed and its number."""

    def __init__(self, rows: Sequence[Row], seed: int, tokens_per_step: int, together: bool = False) -> None:
        self.rows = rows
        self._epochs = partial(steps_of_epoch, rows, seed, tokens_per_step=tokens_per_step, together=together)
        self._epoch = -1
        self._first = 0
        self._plans = list[StepPlan]()

    def step(self, number: int) -> list[list[Row]]:
        """The micro-batches of step `number`, the first being 0."""
        if number < self._first:
            self._epoch = -1
            self._first = 0
            self._plans = []
        while number >= self._first + len(self._plans):
            self._first += len(self._plans)
            self._epoch += 1
            self._plans = self._epochs(epoch=self._epoch)
        return [[self.rows[index] for index in micro_batch] for micro_batch in self._plans[number - self._first]]

    def step_batch(self, step: int, _: float, __: Mapping[str, Any]) -> StepBatch:
        return StepBatch(self.step(step))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, _: Mapping[str, Any]) -> None:
        pass


def cut(rows: Sequence[Row], seed: str, together: bool = False) -> list[list[Row]]:
    """The rows of one step in micro-batches of similar length."""
    rng = random.Random(seed)  # noqa: S311 (no secret)
    micro_batches = _pack(rows, units_of(rows, together), rng, MICRO_TOKENS)
    return [[rows[index] for index in micro_batch] for micro_batch in micro_batches]


def make_batch(rows: Sequence[Row], micro_batch: MicroBatch | None = None, pad_id: int = 0) -> Batch:
    """The rows of a micro-batch (all of them by default) as tensors, padded on the right."""
    rows = list(rows) if micro_batch is None else [rows[index] for index in micro_batch]
    tokens_BT, mask_BT = _padded([(row.prompt_ids, row.response_ids) for row in rows], pad_id)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.group, []).append(number)
    weight_BT = mask_BT * torch.tensor([row.weight for row in rows], dtype=torch.float32)[:, None]
    names = {name for row in rows for name, _ in row.references}
    references = {name: torch.tensor([dict(row.references)[name] for row in rows]) for name in sorted(names)}
    labelled = sorted({name for row in rows for name, _ in row.labels})
    labels = {name: torch.tensor([dict(row.labels).get(name, math.nan) for row in rows]) for name in labelled}
    teacher_tokens = None
    if any(row.teacher_prompt_ids is not None for row in rows):
        prompts = [row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids for row in rows]
        teacher_tokens = _padded([(prompt, row.response_ids) for prompt, row in zip(prompts, rows, strict=True)])
    return Batch(
        tokens_BT,
        mask_BT,
        weight_BT,
        sample_ids=tuple(row.sample_id for row in rows),
        tags=tuple(row.tags for row in rows),
        groups=tuple(tuple(group) for group in groups.values()),
        references=references,
        columns=_columns(rows, mask_BT),
        labels=labels,
        seen=teacher_tokens,
        mixed=_mixed(rows, tokens_BT),
    )


def _mixed(rows: Sequence[Row], tokens_BT: Tensor) -> tuple[Tensor, Tensor] | None:
    """(tokens mixed into each row [B, T], weight of the row's own [B, T]); the weight is 1 where the other row has no
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
    """(tokens [B, T], mask of response tokens [B, T]) of (prompt, response) pairs."""
    if not all(prompt for prompt, _ in pairs):
        raise UserError("a row has an empty prompt, so nothing predicts its first token: give it one token at least")
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens_BT = torch.full((len(pairs), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(pairs), width, dtype=torch.bool)
    for number, (prompt, response) in enumerate(pairs):
        tokens_BT[number, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask_BT[number, len(prompt) : len(prompt) + len(response)] = True
    return tokens_BT, mask_BT


def _columns(rows: Sequence[Row], mask_BT: Tensor) -> dict[str, Tensor]:
    """Every column that some row has, [B, T]: 0 outside the responses and in rows without it."""
    columns = {}
    for name in sorted({name for row in rows for name in row.columns}):
        column_BT = torch.zeros(mask_BT.shape)
        for number, row in enumerate(rows):
            if name in row.columns:
                column_BT[number, len(row.prompt_ids) : len(row)] = torch.tensor(row.columns[name])
        columns[name] = column_BT
    return columns
