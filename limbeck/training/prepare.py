"""What some terms need before the first step: a frozen model's opinion of the text, learned filters, a bank of states.

Shapes: N response positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.data.batches import MICRO_TOKENS, MicroBatch, Row, make_batch, steps_of_epoch
from limbeck.models.model import head_of
from limbeck.models.taps import features
from limbeck.objectives.feature import pair_name
from limbeck.objectives.head import PositionEvidence, fused_loss, token_log_probs
from limbeck.objectives.match import Match, Positions
from limbeck.objectives.policy import Policy, Responses
from limbeck.objectives.term import make_term
from limbeck.objectives.total import TeacherView
from limbeck.signals.cache import SignalCache, text_key, texts_of
from limbeck.signals.dense import DenseSignal
from limbeck.signals.sparse import TopK, joined
from limbeck.types import Batch, UserError

Progress = Callable[[int, int], None]


def even_batches(rows: Sequence[Row]) -> list[MicroBatch]:
    """All rows, those of like length together."""
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
) -> dict[str, float]:
    """log q(response | prompt) in nats for every row, by sample id; the head cut to `vocab_size` as in training.

    Raises:
        UserError: a response that the model gives no probability, or NaN.
    """
    found: dict[str, float] = {}
    done = 0
    for micro_batch in even_batches(rows):
        batch = make_batch(rows, micro_batch)
        row_N, position_N = batch.response_positions()
        hidden_BTD, _ = features(net, batch.tokens_BT.to(net.device))
        targets_N = batch.tokens_BT[row_N, position_N + 1].to(net.device)
        head = head_of(net)
        log_prob_N = (
            token_log_probs(hidden_BTD[row_N, position_N], head.cut(vocab_size or head.vocab_size), targets_N)
            .double()
            .cpu()
        )
        sums_B = torch.zeros(len(micro_batch), dtype=torch.float64).index_add_(0, row_N, log_prob_N)
        found |= dict(zip(batch.sample_ids, sums_B.tolist(), strict=True))
        if not bool(sums_B.isfinite().all()):
            bad = batch.sample_ids[int((~sums_B.isfinite()).nonzero()[0])]
            raise UserError(
                f"the reference gives sample {bad[:12]} a log-probability that is not finite; look at that sample"
            )
        done += len(micro_batch)
        progress(done, len(rows))
    return found


@torch.no_grad()
def fill_cache(
    cache: SignalCache, view: Callable[[Batch], TeacherView], rows: Sequence[Row], progress: Progress
) -> None:
    """The teacher's distributions over all rows that the cache does not hold yet, each text once."""
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
        assert isinstance(signal, DenseSignal | TopK)
        device = signal.hidden_NE.device if isinstance(signal, DenseSignal) else signal.ids_NK.device
        cache.add(keys, signal, batch.tokens_BT[row_N, position_N + 1].to(device), lengths)
        progress(number + 1, len(batches))
    cache.flush()


def with_reference(rows: Sequence[Row], name: str, log_probs: Mapping[str, float]) -> list[Row]:
    """The rows with a frozen model's log-probabilities beside them."""
    return [replace(row, references=(*row.references, (name, log_probs[row.sample_id]))) for row in rows]


class Remembered:
    """A teacher's view that scores a step's rows once and hands the same on when they are trained."""

    def __init__(self, view: Callable[[Batch], TeacherView]) -> None:
        self.view = view
        self._known: dict[str, TopK | DenseSignal] = {}

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[Tensor]:
        """log p of every response token, one tensor per row, in nats. What was remembered before is forgotten."""
        self._known = {}
        found = dict[str, Tensor]()
        for micro_batch in even_batches(rows):
            batch = make_batch(rows, micro_batch)
            signal = self.view(batch).signal
            assert isinstance(signal, DenseSignal | TopK)
            row_N, position_N = batch.response_positions()
            if isinstance(signal, TopK):
                log_prob_N = signal.log_prob(row_N)
            else:
                targets_N = batch.tokens_BT[row_N, position_N + 1].to(signal.hidden_NE.device)
                log_prob_N = token_log_probs(signal.hidden_NE, signal.head, targets_N).cpu()
            ends = batch.mask_BT.sum(1).cumsum(0).tolist()
            for sample_id, start, end in zip(batch.sample_ids, [0, *ends], ends, strict=False):
                part = slice(start, end)
                found[sample_id] = log_prob_N[part]
                own = (
                    signal.chunk(part) if isinstance(signal, TopK) else DenseSignal(signal.hidden_NE[part], signal.head)
                )
                self._known[sample_id] = own
        return [found[row.sample_id] for row in rows]

    def __call__(self, batch: Batch) -> TeacherView:
        known = [self._known[sample_id] for sample_id in batch.sample_ids if sample_id in self._known]
        if len(known) < len(batch.sample_ids):
            return self.view(batch)
        if dense := [one for one in known if isinstance(one, DenseSignal)]:
            return TeacherView(DenseSignal(torch.cat([one.hidden_NE for one in dense]), dense[0].head))
        return TeacherView(joined([one for one in known if isinstance(one, TopK)]))


def with_columns(
    rows: list[Row], teacher: Remembered, policies: Sequence[tuple[Policy, Mapping[str, float]]]
) -> list[Row]:
    """The student's rows with what the policies read of whole responses: the teacher's log-probabilities, advantages,
    weights."""
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
    for policy, params in policies:
        for name, column_BT in policy.columns(responses, params).items():
            values = [tuple(column_BT[number][batch.mask_BT[number]].tolist()) for number in range(len(rows))]
            rows = [replace(row, columns={**row.columns, name: value}) for row, value in zip(rows, values, strict=True)]
    return rows


def learn_filters(
    match: Match,
    nets: Sequence[PreTrainedModel],
    rows: Sequence[Row],
    tokens_per_step: int,
    seed: int,
    progress: Progress,
) -> None:
    """TED's first stage (arXiv:2210.01351): each layer's filter learns, by cross-entropy, to be read by its model's own
    head.

    Both models are frozen. The paper reads filtered states by a task head of their own; a language model has its head.
    """
    steps = match.settings.values["filter_steps"]
    for side, (net, name) in enumerate(zip(nets, ("student", "teacher"), strict=True)):
        filters = match.learned.get_submodule(name)
        filters.requires_grad_(True)
        optimizer = torch.optim.Adam(filters.parameters(), lr=match.settings.values["filter_lr"])
        contents = steps_of_epoch(rows, seed, side, tokens_per_step)
        for step in range(steps):
            batches = [make_batch(rows, micro_batch) for micro_batch in contents[step % len(contents)]]
            tokens = int(sum(batch.mask_BT.sum() for batch in batches))
            for batch in batches:
                _filter_loss(match, filters, net, batch, side, tokens).backward()
            net.zero_grad(set_to_none=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(side * steps + step + 1, 2 * steps)
        filters.requires_grad_(name == "student")


def _filter_loss(
    match: Match, filters: torch.nn.Module, net: PreTrainedModel, batch: Batch, side: int, tokens: int
) -> Tensor:
    where = batch.response_positions()
    with torch.no_grad():
        _, found = features(net, batch.tokens_BT.to(net.device), *match.taps(side))
    targets_N = batch.tokens_BT[where[0], where[1] + 1].to(net.device)
    weight_KN = torch.ones(1, len(targets_N), device=net.device)
    term = make_term("cross_entropy", {}).at_step(0.0, {})
    head = head_of(net)
    frozen = replace(head, weight_VD=head.weight_VD.detach())
    loss = weight_KN.new_zeros(())
    for pair in match.pairs:
        filtered_ND = filters.get_submodule(pair_name(pair))(found.hidden[pair[side]][where])
        loss = loss + fused_loss(filtered_ND, frozen, [term], [1 / tokens], weight_KN, PositionEvidence(targets_N)).loss
    return loss


@torch.no_grad()
def fill_bank(
    match: Match, teacher: PreTrainedModel, rows: Sequence[Row], bank_rows: Mapping[str, int], progress: Progress
) -> None:
    """The teacher's pooled states of every training text: what `contrast` draws its negatives from."""
    found_E: dict[int, Tensor] = {}
    for micro_batch in even_batches(rows):
        batch = make_batch(rows, micro_batch)
        _, found = features(teacher, batch.tokens_BT.to(teacher.device), *match.taps(1))
        row_N, position_N = (index.to(teacher.device) for index in batch.response_positions())
        pooled_BE = match.pooled_teacher(found, Positions(row_N, position_N, len(micro_batch)))
        found_E |= dict(zip((bank_rows[sample_id] for sample_id in batch.sample_ids), pooled_BE, strict=True))
        progress(len(found_E), len(rows))
    match.bank_ME = torch.stack([found_E[place] for place in range(len(bank_rows))])
