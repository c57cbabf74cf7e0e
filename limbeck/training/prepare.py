"""What some terms need of frozen models before they train on a text: log-probabilities, distributions and states.

Shapes: B rows, T positions, N response positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.data.batches import MICRO_TOKENS, MicroBatch, Row, make_batch, steps_of_epoch
from limbeck.models.model import head_of
from limbeck.models.taps import features
from limbeck.objectives.forward import Features, Taps, TeacherView
from limbeck.objectives.head import Head, TeacherSignal
from limbeck.objectives.log_probs import token_log_probs
from limbeck.objectives.loss import Responses
from limbeck.objectives.precision import passes_in
from limbeck.objectives.term import TermAtStep
from limbeck.signals.cache import SignalCache, text_key, texts_of
from limbeck.types import Batch, UserError

Progress = Callable[[int, int], None]


def even_batches(rows: Sequence[Row]) -> list[MicroBatch]:
    """All rows in micro-batches of similar length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * len(rows[index]) <= MICRO_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]


@torch.no_grad()
def response_log_probs(
    net: PreTrainedModel,
    rows: Sequence[Row],
    vocab_size: int | None = None,
    progress: Progress = lambda done, total: None,
    rounded: torch.dtype | None = None,
) -> dict[str, float]:
    """log q(response | prompt) in nats of every row, by sample id. The head is cut to `vocab_size`, and the passes are
    `rounded`, as in training.

    Raises:
        UserError: the log-probability of a response is not finite.
    """
    log_probs: dict[str, float] = {}
    done = 0
    for micro_batch in even_batches(rows):
        batch = make_batch(rows, micro_batch)
        row_N, position_N = batch.response_positions()
        with passes_in(rounded, net.device):
            hidden_BTD, _ = features(net, batch.tokens_BT)
        targets_N = batch.tokens_BT[row_N, position_N + 1].to(net.device)
        head = replace(head_of(net), rounded=rounded)
        log_prob_N = (
            token_log_probs(hidden_BTD[row_N, position_N], head.cut(vocab_size or head.vocab_size), targets_N)
            .cpu()
            .double()
        )
        sums_B = torch.zeros(len(micro_batch), dtype=torch.float64).index_add_(0, row_N, log_prob_N)
        log_probs |= dict(zip(batch.sample_ids, sums_B.tolist(), strict=True))
        if not bool(sums_B.isfinite().all()):
            bad = batch.sample_ids[int((~sums_B.isfinite()).nonzero()[0])]
            raise UserError(
                f"the reference gives sample {bad[:12]} a log-probability that is not finite; look at that sample"
            )
        done += len(micro_batch)
        progress(done, len(rows))
    return log_probs


@torch.no_grad()
def next_token_log_probs(
    net: PreTrainedModel, prompts: Sequence[tuple[int, ...]], tokens: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log q(token | prompt) in nats of some next tokens of every prompt, each prompt read once.

    Raises:
        UserError: one of them is not finite.
    """
    found: list[list[float]] = [[] for _ in prompts]
    rows = [Row(str(number), prompt, (tokens[number][0],)) for number, prompt in enumerate(prompts)]
    head = head_of(net)
    for micro_batch in even_batches(rows):
        batch = make_batch(rows, micro_batch)
        hidden_BTD, _ = features(net, batch.tokens_BT)
        log_prob_BV = head.logits(hidden_BTD[batch.response_positions()]).float().log_softmax(-1)
        for place, number in enumerate(micro_batch):
            found[number] = log_prob_BV[place, list(tokens[number])].cpu().double().tolist()
            if not all(map(math.isfinite, found[number])):
                raise UserError("a model gives a token a log-probability that is not finite; look at that model")
    return found


@dataclass(frozen=True)
class Frozen:
    """A model as it was before the training, whose passes are `rounded` as the student's are. `inside` switches to its
    weights, where they are the student's without adapters."""

    net: PreTrainedModel
    vocab_size: int | None = None
    inside: Callable[[], AbstractContextManager[None]] = nullcontext
    rounded: torch.dtype | None = None

    @torch.no_grad()
    def with_log_probs(self, rows: Sequence[Row], name: str) -> list[Row]:
        """The rows with the column `name`: the log-probability of every response token, in nats."""
        values: dict[str, tuple[float, ...]] = {}
        training = self.net.training
        self.net.eval()
        head = replace(head_of(self.net), rounded=self.rounded)
        head = head.cut(self.vocab_size or head.vocab_size)
        with self.inside(), passes_in(self.rounded, self.net.device):
            for micro_batch in even_batches(rows):
                batch = make_batch(rows, micro_batch)
                row_N, position_N = batch.response_positions()
                hidden_BTD, _ = features(self.net, batch.tokens_BT)
                targets_N = batch.tokens_BT[row_N, position_N + 1].to(self.net.device)
                log_prob_N = token_log_probs(hidden_BTD[row_N, position_N], head, targets_N).cpu()
                parts = log_prob_N.split(batch.mask_BT.sum(1).tolist())
                values |= {ident: tuple(part.tolist()) for ident, part in zip(batch.sample_ids, parts, strict=True)}
        self.net.train(training)
        return [replace(row, columns={**row.columns, name: values[row.sample_id]}) for row in rows]


@torch.no_grad()
def fill_cache(
    cache: SignalCache, view: Callable[[Batch], TeacherView], rows: Sequence[Row], progress: Progress
) -> None:
    """Add the teacher's distributions over the rows that are not in the cache yet, each text once."""
    texts = {
        text_key(row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids, row.response_ids): row
        for row in rows
    }
    missing = [row for key, row in texts.items() if key not in cache]
    for number, micro_batch in enumerate(batches := even_batches(missing)):
        batch = make_batch(missing, micro_batch)
        keys, lengths = zip(*texts_of(batch), strict=True)
        row_N, position_N = batch.response_positions()
        signal = view(batch).signal
        assert signal is not None
        cache.add(keys, signal, batch.tokens_BT[row_N, position_N + 1].to(signal.device), lengths)
        progress(number + 1, len(batches))
    cache.flush()


def with_reference(rows: Sequence[Row], name: str, log_probs: Mapping[str, float]) -> list[Row]:
    """The rows with their log-probabilities under the frozen model `name`."""
    return [replace(row, references=(*row.references, (name, log_probs[row.sample_id]))) for row in rows]


class Remembered:
    """A teacher's view that scores a step's rows and reuses its signals when they are trained on."""

    def __init__(self, view: Callable[[Batch], TeacherView]) -> None:
        self.view = view
        self._by_sample: dict[str, TeacherSignal] = {}

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[Tensor]:
        """log p of every response token, one tensor per row, in nats. Forgets the rows that were scored before."""
        self._by_sample = {}
        scores = dict[str, Tensor]()
        for micro_batch in even_batches(rows):
            batch = make_batch(rows, micro_batch)
            signal = self.view(batch).signal
            assert signal is not None
            row_N, position_N = batch.response_positions()
            log_prob_N = signal.log_prob(batch.tokens_BT[row_N, position_N + 1].to(signal.device)).cpu()
            ends = batch.mask_BT.sum(1).cumsum(0).tolist()
            for sample_id, start, end in zip(batch.sample_ids, [0, *ends], ends, strict=False):
                part = slice(start, end)
                scores[sample_id] = log_prob_N[part]
                self._by_sample[sample_id] = signal.select(part)
        return [scores[row.sample_id] for row in rows]

    def __call__(self, batch: Batch) -> TeacherView:
        if any(sample_id not in self._by_sample for sample_id in batch.sample_ids):
            return self.view(batch)
        first, *rest = (self._by_sample[sample_id] for sample_id in batch.sample_ids)
        return TeacherView(first.join(rest))


def with_columns(rows: list[Row], teacher: Remembered, terms: Sequence[TermAtStep]) -> list[Row]:
    """Add the teacher's log-probabilities, and the columns that the terms compute from whole responses, such as
    advantages: one number per response token."""
    if not rows:
        return rows
    scores = [tuple(score.tolist()) for score in teacher.score(rows)]
    rows = [
        replace(row, columns={**row.columns, "teacher_log_prob": score})
        for row, score in zip(rows, scores, strict=True)
    ]
    batch = make_batch(rows)
    log_prob_BT, sampler_BT, teacher_BT = (
        batch.columns[name] for name in ("log_prob", "old_log_prob", "teacher_log_prob")
    )
    responses = Responses(log_prob_BT, sampler_BT, teacher_BT, batch.mask_BT)
    for term in terms:
        for name, column_BT in term.term.loss.columns(responses, term.params).items():
            values = [tuple(column_BT[number][batch.mask_BT[number]].tolist()) for number in range(len(rows))]
            rows = [replace(row, columns={**row.columns, name: value}) for row, value in zip(rows, values, strict=True)]
    return rows


@dataclass(frozen=True)
class TextBeforeTraining:
    """The `PreparationText` that losses prepare on before the first step; side 0 is the student, 1 the teacher."""

    nets: tuple[PreTrainedModel, PreTrainedModel]
    rows: Sequence[Row]
    bank_rows: Mapping[str, int]
    tokens_per_step: int
    seed: int
    on_progress: Progress = lambda done, total: None

    def steps(self, epoch: int) -> Iterator[list[Batch]]:
        for step in cycle(steps_of_epoch(self.rows, self.seed, epoch, self.tokens_per_step)):
            yield [make_batch(self.rows, micro_batch) for micro_batch in step]

    def batches(self) -> Iterator[Batch]:
        for micro_batch in even_batches(self.rows):
            yield make_batch(self.rows, micro_batch)

    @torch.no_grad()
    def features(self, side: int, batch: Batch, taps: Taps) -> Features:
        net = self.nets[side]
        return features(net, batch.tokens_BT, *taps)[1]

    def head(self, side: int) -> Head:
        return head_of(self.nets[side]).detached()

    def report_progress(self, done: int, total: int) -> None:
        self.on_progress(done, total)
