"""Fidelity: how near a student's next-token distribution is to the teacher's, on held-out teacher text.

Full vocabulary, nats per response token, teacher-forced: every system reads the same prefixes. Not covered: text that
the student itself wrote (its own prefixes), where the distance is usually larger.

Shapes: N response positions of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.data import Row, make_batch
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.memory import keep_freed_memory
from limbeck.models.load import Model, head_of, hidden_states
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.head import TeacherSignal, compared
from limbeck.types import Batch

METRICS = ("forward_kl", "reverse_kl", "jsd")
ROWS_TOGETHER = 8


@dataclass
class ItemFidelity:
    """Sums over one answer's tokens; `lens` holds per token [id, forward KL, teacher's and student's top choice]."""

    sample_id: str
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    lens: list[tuple[int, float, int, int]] = field(default_factory=list)


def fidelity(
    systems: dict[str, Model],
    teacher: InProcessTeacher,
    rows: Sequence[Row],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[ItemFidelity]]:
    """Per-item sums of every fidelity metric for every system, in the order of `rows`.

    The teacher is run once per batch for all systems. `nll` is the negative log-likelihood of the teacher's text
    (its exponential per token is the perplexity), `top1` counts positions where both most likely tokens agree.
    """
    keep_freed_memory()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vocabulary = min(head_of(system.net).vocabulary for system in (*systems.values(), teacher.model))
    found: dict[str, dict[int, ItemFidelity]] = {name: {} for name in systems}
    for start in range(0, len(order), ROWS_TOGETHER):
        picked = tuple(order[start : start + ROWS_TOGETHER])
        batch = make_batch(rows, picked)
        signal = teacher.view(batch, vocabulary=vocabulary).signal
        assert signal is not None
        for name, system in systems.items():
            columns = _measure(system, batch, signal, vocabulary)
            for index, item in zip(picked, _split(batch, columns), strict=True):
                found[name][index] = item
        progress(min(start + ROWS_TOGETHER, len(order)), len(order))
    return {name: [items[index] for index in range(len(rows))] for name, items in found.items()}


@torch.no_grad()
def _measure(system: Model, batch: Batch, teacher: TeacherSignal, vocabulary: int) -> dict[str, Tensor]:
    """Every metric at every response position, [N] each."""
    device = system.net.device
    rows_N, positions_N = batch.response_positions()
    hidden_ND = hidden_states(system.net, batch.tokens_BT.to(device))[rows_N, positions_N]
    targets_N = batch.tokens_BT[rows_N, positions_N + 1].to(device)
    columns: dict[str, list[Tensor]] = {}
    for part, q, p in compared(hidden_ND, head_of(system.net).cut(vocabulary), teacher):
        values = {name: DIVERGENCES[name](p, q, DIVERGENCES[name].defaults)[0] for name in METRICS}
        values["nll"] = -q.log.gather(-1, targets_N[part, None])[:, 0]
        values["teacher_top"], values["student_top"] = p.logits_RV.argmax(-1), q.logits_RV.argmax(-1)
        values["top1"] = (values["teacher_top"] == values["student_top"]).float()
        for name, value_R in values.items():
            columns.setdefault(name, []).append(value_R)
    return {name: torch.cat(parts) for name, parts in columns.items()} | {"targets": targets_N}


def _split(batch: Batch, columns: dict[str, Tensor]) -> list[ItemFidelity]:
    """Cut the columns of a batch into its rows (response positions run row by row)."""
    items, at = [], 0
    for sample_id, count in zip(batch.sample_ids, batch.mask_BT.sum(1).tolist(), strict=True):
        part = slice(at, at + count)
        sums = {name: float(columns[name][part].double().sum()) for name in (*METRICS, "nll", "top1")}
        lens = zip(*(columns[name][part].tolist() for name in ("targets", "forward_kl", "teacher_top", "student_top")), strict=True)
        items.append(ItemFidelity(sample_id, count, sums, [(t, round(max(kl, 0.0), 4), a, b) for t, kl, a, b in lens]))
        at += count
    return items


def summarise(items: Sequence[ItemFidelity]) -> dict[str, dict[str, Any]]:
    """The fidelity metrics of one system with their intervals over answers."""
    tokens = [item.tokens for item in items]
    intervals = {name: ratio_interval([item.sums[name] for item in items], tokens) for name in (*METRICS, "top1", "nll")}
    nll = intervals.pop("nll")
    intervals["perplexity"] = Interval(math.exp(nll.value), math.exp(nll.low), math.exp(nll.high), nll.n)
    intervals["top1_agreement"] = intervals.pop("top1")
    return {name: interval.as_dict() for name, interval in intervals.items()}
