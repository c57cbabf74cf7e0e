"""Fidelity: how near a system's next-token distribution is to the teacher's, at every token of some text.

Full vocabulary, nats per response token. All read the same prefixes: held-out text of the teacher, or text that the
system itself wrote, where what it does differently adds up (exposure bias).

Shapes: N response positions of a batch, R of a block, V vocabulary, K choices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batches import MicroBatch, Row, make_batch
from limbeck.evaluate.calibration import Reliability
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.models.model import Model, head_of
from limbeck.models.states import shared_states
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence import TINY
from limbeck.objectives.head import BLOCK_ELEMENTS, CHUNK_ELEMENTS, Buffer, Head, chunks, compared
from limbeck.signals.dense import DenseSignal
from limbeck.training.memory import keep_freed_memory
from limbeck.types import Batch

SUMMED = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "nll",
    "teacher_nll",
    "entropy",
    "top1",
    "top5",
    "wrong",
    "same_wrong",
)
CHOICES = 5
SHOWN_CHOICES = 3
ROWS_TOGETHER = 8
KEPT_BYTES = 2**30  # of the teacher's hidden states, so that a second system costs no second pass of the teacher
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
Progress = Callable[[int, int], None]
Choices = list[tuple[int, float]]


@dataclass
class ItemFidelity:
    """Sums over one answer's tokens.

    `lengths` holds [nats of forward KL, tokens] among the tokens before each position of LENGTHS (and after the one
    before), `classes` the same by class of token, `lens` per token (id, forward KL, the teacher's choices, the system's
    choices), for the answers that are shown.
    """

    sample_id: str
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    lengths: dict[str, tuple[float, int]] = field(default_factory=dict)
    classes: dict[str, tuple[float, int]] = field(default_factory=dict)
    reliability: Reliability | None = None
    lens: list[tuple[int, float, Choices, Choices]] = field(default_factory=list)


class Text:
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
        self._kept: dict[int, Tensor] = {}
        self._buffer = Buffer()

    def batches(self) -> Iterator[tuple[MicroBatch, Batch, DenseSignal | None]]:
        """(places of the rows, batch, the teacher's side), the shortest rows first."""
        if self.teacher is None:
            yield from ((picked, make_batch(self.rows, picked), None) for picked in self.picks)
            return
        width = self.teacher.model.net.config.hidden_size
        keep = sum(len(row.response_ids) for row in self.rows) * width * 4 <= KEPT_BYTES
        for number, picked in enumerate(self.picks):
            batch = make_batch(self.rows, picked)
            hidden_NE = self._kept.get(number)
            if hidden_NE is None:
                hidden_NE = self.teacher.signal(batch).hidden_NE
            if keep:
                self._kept[number] = hidden_NE
            yield (
                picked,
                batch,
                DenseSignal(hidden_NE, head_of(self.teacher.model.net).cut(self.vocab_size), self._buffer),
            )


@torch.no_grad()
def fidelity(
    system: Model, text: Text, shown: Collection[str] = (), progress: Progress = lambda done, total: None
) -> list[ItemFidelity]:
    """One record per row, in the order of the rows.

    Args:
        shown: sample ids whose single tokens are recorded too.
    """
    keep_freed_memory()
    found: dict[int, ItemFidelity] = {}
    classes = TokenClasses(system.tokenizer)
    head = head_of(system.net)
    for picked, batch, signal in text.batches():
        rows_N, positions_N = batch.response_positions()
        if signal is not None and text.teacher is not None and system is text.teacher.model:
            hidden_ND = signal.hidden_NE
        else:
            hidden_ND = shared_states(system.net, batch.tokens_BT.to(system.net.device))[rows_N, positions_N]
        targets_N = batch.tokens_BT[rows_N, positions_N + 1].to(hidden_ND.device)
        columns = _columns(hidden_ND, head.cut(min(text.vocab_size, head.vocab_size)), signal, targets_N)
        at = 0
        for index, sample_id, count in zip(picked, batch.sample_ids, batch.mask_BT.sum(1).tolist(), strict=True):
            part = {name: column[at : at + count] for name, column in columns.items()}
            found[index] = _item(sample_id, part, classes, sample_id in shown)
            at += count
        progress(len(found), len(text.rows))
    return [found[index] for index in range(len(text.rows))]


def _columns(hidden_ND: Tensor, head: Head, signal: DenseSignal | None, targets_N: Tensor) -> dict[str, Tensor]:
    """Every measure at every response position: [N], choices [N, K]."""
    parts: dict[str, list[Tensor]] = {}
    pairs: Iterator[tuple[slice, Distribution, Distribution | None]]
    if signal is None:
        pairs = ((part, q, None) for part, q, _ in _alone(DenseSignal(hidden_ND, head)))
    else:
        pairs = _alone(signal) if hidden_ND is signal.hidden_NE else compared(hidden_ND, head, signal)
    for part, q, p in pairs:
        for name, value in _measures(p, q, targets_N[part, None]).items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values).cpu() for name, values in parts.items()} | {"targets": targets_N.cpu()}


def _alone(signal: DenseSignal) -> Iterator[tuple[slice, Distribution, Distribution]]:
    """As `compared`, of a model with itself: its logits are projected once."""
    for part in chunks(len(signal.hidden_NE), signal.head.vocab_size, CHUNK_ELEMENTS):
        chunk = signal.chunk(part)
        for rows in chunks(part.stop - part.start, signal.head.vocab_size, BLOCK_ELEMENTS):
            p = chunk.rows(rows).p
            yield slice(part.start + rows.start, part.start + rows.stop), p, p


def _measures(p: Distribution | None, q: Distribution, target_R1: Tensor) -> dict[str, Tensor]:
    """All measures of a block in one go: `limbeck.divergence` would take its gradient each time, too. Without `p`,
    those of q alone."""

    def dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
        return (a_RV * b_RV).sum(-1)

    student = q.prob.topk(min(CHOICES, q.prob.shape[-1]))
    first_R = student.indices[:, 0]
    target_R = target_R1[:, 0]
    alone = {
        "nll": -q.log.gather(-1, target_R1)[:, 0],
        "entropy": -dot(q.prob, q.log),
        "wrong": (first_R != target_R).float(),
        "confidence": student.values[:, 0],
    }
    if p is None:
        return alone
    teacher = student if q is p else p.prob.topk(min(CHOICES, p.prob.shape[-1]))
    apart = dict.fromkeys(("forward_kl", "reverse_kl", "jsd", "tvd"), torch.zeros_like(teacher.values[:, 0]))
    if q is not p:
        ratio_RV = p.log - q.log
        log_m_RV = (0.5 * (p.prob + q.prob)).clamp_min_(TINY).log_()
        apart = {
            "forward_kl": dot(p.prob, ratio_RV),
            "reverse_kl": -dot(q.prob, ratio_RV),
            "jsd": 0.5 * (dot(p.prob, p.log - log_m_RV) + dot(q.prob, q.log - log_m_RV)),
            "tvd": 0.5 * (p.prob - q.prob).abs_().sum(-1),
        }
    theirs_R = teacher.indices[:, 0]
    common_R = (student.indices[:, :, None] == teacher.indices[:, None]).any(-1).float().mean(-1)
    return {
        **alone,
        **apart,
        "teacher_nll": -p.log.gather(-1, target_R1)[:, 0],
        "top1": (first_R == theirs_R).float(),
        "top5": common_R,
        "same_wrong": ((first_R != target_R) & (first_R == theirs_R)).float(),
        "teacher_choices": teacher.indices[:, :SHOWN_CHOICES],
        "teacher_shares": teacher.values[:, :SHOWN_CHOICES],
        "student_choices": student.indices[:, :SHOWN_CHOICES],
        "student_shares": student.values[:, :SHOWN_CHOICES],
    }


def _item(sample_id: str, part: Mapping[str, Tensor], classes: TokenClasses, shown: bool) -> ItemFidelity:
    """One answer's record from its positions' measures."""
    targets = part["targets"].tolist()
    item = ItemFidelity(
        sample_id, len(targets), {name: float(part[name].double().sum()) for name in SUMMED if name in part}
    )
    item.reliability = Reliability.of(part["confidence"].numpy(), 1 - part["wrong"].numpy())
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
        self._known = dict[int, str]()

    def of(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._look(token)
        return self._known[token]

    def _look(self, token: int) -> str:
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


def summarise(items: Sequence[ItemFidelity]) -> dict[str, Interval]:
    """The fidelity metrics of one system with their intervals over answers."""
    tokens = [item.tokens for item in items]

    def per_token(name: str) -> Interval:
        return ratio_interval([item.sums[name] for item in items], tokens)

    found = {name: per_token(name) for name in ("forward_kl", "reverse_kl", "jsd", "tvd", "entropy")}
    found |= {"top1_agreement": per_token("top1"), "top5_overlap": per_token("top5")}
    found["perplexity"] = per_token("nll").exponential()
    wrong = [item.sums["wrong"] for item in items]
    if sum(wrong) > 0:
        found["agree_when_wrong"] = ratio_interval([item.sums["same_wrong"] for item in items], wrong)
    return found


def by_class(items: Sequence[ItemFidelity]) -> dict[str, dict[str, float]]:
    """Per class of token: how many, the mean forward KL in nats, and the share of all nats; the largest share first."""
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


def exposure(own: Sequence[ItemFidelity], given: Sequence[ItemFidelity]) -> list[dict[str, float]]:
    """Excess accumulated error in per cent, up to each length: 100 (R(l) - l e(l)) / (l e(l)) (Arora et al.,
    arXiv:2204.01171).

    R(l) is the forward KL summed over the first l tokens after prefixes that the system wrote (`own`), l e(l) the same
    after the teacher's (`given`), each as the sum of the mean per position bucket. Both must be drawn in the same way,
    to the same prompts. Ends where no answer of either fills the bucket. 0: no exposure bias.
    """
    found = []
    here = 0.0
    there = 0.0
    done = 0
    longest = min(max((item.tokens for item in items), default=0) for items in (own, given))
    for length in (length for length in LENGTHS if length <= longest):
        means = []
        for items in (own, given):
            pairs = [item.lengths[str(length)] for item in items if str(length) in item.lengths]
            count = sum(n for _, n in pairs)
            means.append(sum(nats for nats, _ in pairs) / count if count else None)
        if means[0] is None or means[1] is None:
            break
        here += means[0] * (length - done)
        there += means[1] * (length - done)
        done = length
        if there > 0:
            found.append({"upto": length, "value": 100 * (here - there) / there})
    return found
