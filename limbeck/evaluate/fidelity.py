"""Fidelity: how near a system's next-token distribution is to the teacher's, at every token of some text.

Full vocabulary, nats per response token. All read the same prefixes: held-out text of the teacher, or text that the
system itself wrote, where what it does differently adds up (exposure bias).

Shapes: N response positions of a batch, K choices.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batches import MicroBatch, Row, make_batch
from limbeck.evaluate.calibration import Reliability
from limbeck.evaluate.metrics import token_sums
from limbeck.evaluate.records import Choices, ItemFidelity, Progress
from limbeck.evaluate.token_sums import TokenBlock
from limbeck.models.model import Model, head_of
from limbeck.models.states import shared_states
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.head import BLOCK_ELEMENTS, Buffer, Head, chunk_elements, chunks, distribution_pairs
from limbeck.signals.dense import DenseSignal
from limbeck.training.memory import keep_freed_memory
from limbeck.types import Batch

SHOWN_CHOICES = 3
ROWS_TOGETHER = 8
KEPT_BYTES = 2**30  # of the teacher's hidden states, so that a second system costs no second pass of the teacher
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)


class EvaluationText:
    """Rows with the teacher's distribution at their response tokens, computed once for all systems that read them;
    without it where the teacher's weights are not here."""

    def __init__(self, rows: Sequence[Row], teacher: InProcessTeacher | None) -> None:
        self.rows = rows
        self.teacher = teacher
        self.vocab_size = (
            sys.maxsize if teacher is None else min(head_of(teacher.model.net).vocab_size, teacher.model.vocab_size)
        )
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        self.picks: list[MicroBatch] = [
            tuple(order[start : start + ROWS_TOGETHER]) for start in range(0, len(order), ROWS_TOGETHER)
        ]
        self._hidden: dict[int, Tensor] = {}
        self._buffer = Buffer()

    def batches(self) -> Iterator[tuple[MicroBatch, Batch, DenseSignal | None]]:
        """(places of the rows, batch, the teacher's side), the shortest rows first."""
        if self.teacher is None:
            yield from ((picked, make_batch(self.rows, picked), None) for picked in self.picks)
            return
        width = self.teacher.model.net.config.get_text_config().hidden_size
        keep = sum(len(row.response_ids) for row in self.rows) * width * 4 <= KEPT_BYTES
        for number, picked in enumerate(self.picks):
            batch = make_batch(self.rows, picked)
            hidden_NE = self._hidden.get(number)
            if hidden_NE is None:
                hidden_NE = self.teacher.signal(batch).hidden_NE
            if keep:
                self._hidden[number] = hidden_NE
            yield (
                picked,
                batch,
                DenseSignal(hidden_NE, head_of(self.teacher.model.net).cut(self.vocab_size), self._buffer),
            )


@torch.no_grad()
def fidelity(
    system: Model, text: EvaluationText, shown: Collection[str] = (), progress: Progress = lambda done, total: None
) -> list[ItemFidelity]:
    """One record per row, in the order of the rows.

    Args:
        shown: sample ids whose single tokens are recorded too.
    """
    keep_freed_memory()
    records: dict[int, ItemFidelity] = {}
    classes = TokenClasses(system.tokenizer)
    head = head_of(system.net)
    for picked, batch, signal in text.batches():
        rows_N, positions_N = batch.response_positions()
        if signal is not None and text.teacher is not None and system is text.teacher.model:
            hidden_ND = signal.hidden_NE
        else:  # a student that is shown the teacher's prompt reads it
            read = batch if system.prompt_context is None else batch.seen_by_teacher()
            hidden_ND = shared_states(system.net, read.tokens_BT)[read.response_positions()]
            signal = None if signal is None else signal.to(system.net.device)
        targets_N = batch.tokens_BT[rows_N, positions_N + 1].to(hidden_ND.device)
        columns = _columns(hidden_ND, head.cut(min(text.vocab_size, head.vocab_size)), signal, targets_N)
        at = 0
        for index, sample_id, count in zip(picked, batch.sample_ids, batch.mask_BT.sum(1).tolist(), strict=True):
            part = {name: column[at : at + count] for name, column in columns.items()}
            records[index] = _record(sample_id, part, classes, sample_id in shown)
            at += count
        progress(len(records), len(text.rows))
    return [records[index] for index in range(len(text.rows))]


def _columns(hidden_ND: Tensor, head: Head, signal: DenseSignal | None, targets_N: Tensor) -> dict[str, Tensor]:
    """Every quantity at every response position: [N], choices [N, K]."""
    parts: dict[str, list[Tensor]] = {}
    pairs: Iterator[tuple[slice, Distribution, Distribution | None]]
    if signal is None:
        pairs = ((part, q, None) for part, q, _ in _with_itself(DenseSignal(hidden_ND, head)))
    else:
        pairs = _with_itself(signal) if hidden_ND is signal.hidden_NE else distribution_pairs(hidden_ND, head, signal)
    for part, q, p in pairs:
        for name, value in _quantities(TokenBlock(q, p, targets_N[part, None])).items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values).cpu() for name, values in parts.items()} | {"targets": targets_N.cpu()}


def _with_itself(signal: DenseSignal) -> Iterator[tuple[slice, Distribution, Distribution]]:
    """As `distribution_pairs`, of a model with itself: its logits are projected once."""
    for part in chunks(len(signal.hidden_NE), signal.head.vocab_size, chunk_elements(signal.device)):
        chunk = signal.chunk(part)
        for rows in chunks(part.stop - part.start, signal.head.vocab_size, BLOCK_ELEMENTS):
            p = chunk.rows(rows).p
            yield slice(part.start + rows.start, part.start + rows.stop), p, p


def _quantities(block: TokenBlock) -> dict[str, Tensor]:
    """All quantities of a block in one go: `limbeck.divergence` would take its gradient each time, too. Without the
    teacher's distribution, those of the system alone."""
    values = {
        name: each.of(block) for name, each in token_sums().items() if block.p is not None or not each.reads_teacher
    }
    values |= {"confidence": block.choices[0][:, 0], "right": 1 - block.is_wrong.float()}
    if block.p is None:
        return values
    return values | {
        "teacher_choices": block.teacher_choices[1][:, :SHOWN_CHOICES],
        "teacher_shares": block.teacher_choices[0][:, :SHOWN_CHOICES],
        "student_choices": block.choices[1][:, :SHOWN_CHOICES],
        "student_shares": block.choices[0][:, :SHOWN_CHOICES],
    }


def _record(sample_id: str, part: Mapping[str, Tensor], classes: TokenClasses, shown: bool) -> ItemFidelity:
    """One answer's record from the quantities at its positions."""
    targets = part["targets"].tolist()
    sums = {name: float(part[name].double().sum()) for name in token_sums() if name in part}
    item = ItemFidelity(sample_id, len(targets), sums)
    item.reliability = Reliability.of(part["confidence"].numpy(), part["right"].numpy())
    if "forward_kl" not in part:
        return item
    nats = part["forward_kl"].double().tolist()
    for position, (token, value) in enumerate(zip(targets, nats, strict=True)):
        length = str(next((length for length in LENGTHS if position < length), "longer"))
        for table, key in ((item.lengths, length), (item.classes, classes.of(token))):
            total, count = table.get(key, (0.0, 0))
            table[key] = (total + value, count + 1)
    if shown:
        teachers, students = (_choices(part[f"{who}_choices"], part[f"{who}_shares"]) for who in ("teacher", "student"))
        item.lens = [
            (t, round(max(kl, 0.0), 4), a, b) for t, kl, a, b in zip(targets, nats, teachers, students, strict=True)
        ]
    return item


def _choices(ids_NK: Tensor, shares_NK: Tensor) -> list[Choices]:
    return [
        list(zip(ids, shares, strict=True)) for ids, shares in zip(ids_NK.tolist(), shares_NK.tolist(), strict=True)
    ]


class TokenClasses:
    """What kind of token an id is, by its text: where does a student lose most?"""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._by_token = dict[int, str]()

    def of(self, token: int) -> str:
        if token not in self._by_token:
            self._by_token[token] = self._classify(token)
        return self._by_token[token]

    def _classify(self, token: int) -> str:
        if token in self.tokenizer.all_special_ids:
            return "end of answer"
        text = str(self.tokenizer.decode([token]))
        bare = text.strip()
        if not bare:
            return "white space"
        if any(letter.isdigit() for letter in bare):
            return "number"
        if not any(letter.isalpha() for letter in bare):
            return "punctuation"
        return "start of a word" if text[0].isspace() else "inside a word"


def by_class(items: Sequence[ItemFidelity]) -> dict[str, dict[str, float]]:
    """Per class of token: their number, mean forward KL in nats and share of all nats; the largest share first."""
    totals: dict[str, tuple[float, int]] = {}
    for item in items:
        for name, (nats, count) in item.classes.items():
            before = totals.get(name, (0.0, 0))
            totals[name] = (before[0] + nats, before[1] + count)
    whole = sum(nats for nats, _ in totals.values())
    ordered = sorted(totals.items(), key=lambda entry: -entry[1][0])
    return {
        name: {"tokens": count, "forward_kl": nats / count, "share_of_loss": nats / whole if whole > 0 else 0.0}
        for name, (nats, count) in ordered
    }


def exposure(own: Sequence[ItemFidelity], free: Sequence[ItemFidelity]) -> list[dict[str, float]]:
    """Excess accumulated error in per cent, up to each length: 100 (R(l) - l e(l)) / (l e(l)) (Arora et al.,
    arXiv:2204.01171).

    R(l) is the forward KL summed over the first l tokens after prefixes that the system wrote (`own`), l e(l) the same
    after the teacher's (`free`), each as the sum of the mean per position bucket. Both must be drawn in the same way,
    to the same prompts. Ends where no answer of either fills the bucket. 0: no exposure bias.
    """
    points = []
    after_own = 0.0
    after_teachers = 0.0
    done = 0
    longest = min(max((item.tokens for item in items), default=0) for items in (own, free))
    for length in (length for length in LENGTHS if length <= longest):
        means = []
        for items in (own, free):
            pairs = [item.lengths[str(length)] for item in items if str(length) in item.lengths]
            count = sum(n for _, n in pairs)
            means.append(sum(nats for nats, _ in pairs) / count if count else None)
        if means[0] is None or means[1] is None:
            break
        after_own += means[0] * (length - done)
        after_teachers += means[1] * (length - done)
        done = length
        if after_teachers > 0:
            points.append({"upto": length, "value": 100 * (after_own - after_teachers) / after_teachers})
    return points
