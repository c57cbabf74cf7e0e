"""All terms of one micro-batch: each family gives a loss to go backward from, and its terms' sums.

Every term's sum is divided by the global weight of its unit over the step (token weights, rows or groups), which the
loop knows before the first micro-batch: so no split of the step into micro-batches or ranks changes anything.

Shapes: B rows, N response positions, D width, G groups, K answers of a group or terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.objectives.consistency import common_ends, consistency
from limbeck.objectives.dual import DualSpace, TeacherStates
from limbeck.objectives.feature import Features
from limbeck.objectives.head import Head, PositionEvidence, TeacherSignal, Total, fused_loss, token_log_probs
from limbeck.objectives.match import Match, Positions
from limbeck.objectives.precision import full_precision
from limbeck.objectives.rank import RANKINGS, Candidates
from limbeck.objectives.term import TermAtStep
from limbeck.types import Batch


class Taps(NamedTuple):
    """Which layers' hidden states and attention a forward pass should leave."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()


NO_TAPS = Taps()


@dataclass(frozen=True)
class TeacherView:
    """What the teacher gives beside one micro-batch."""

    signal: TeacherSignal | None = None
    features: Features = field(default_factory=Features)
    states: TeacherStates | None = None


@dataclass(frozen=True)
class StudentForward:
    """One micro-batch after the student's forward pass: `hidden_ND` predicts its response tokens."""

    batch: Batch
    hidden_ND: Tensor
    head: Head
    features: Features
    teacher: TeacherView
    step: int = 0
    bank_rows: Mapping[str, int] = field(default_factory=dict)  # a sample's place in the banks of teacher states


@dataclass
class Sums:
    """Each term's weighted sum over a step; as (sum, count), what terms `measured` for their own parameters, and what a
    monitor has `seen` of the text."""

    terms: dict[str, float] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        for label, value in other.terms.items():
            self.terms[label] = self.terms.get(label, 0.0) + value
        for mine, theirs in ((self.measured, other.measured), (self.seen, other.seen)):
            for label, (total, count) in theirs.items():
                before = mine.get(label, (0.0, 0.0))
                mine[label] = (before[0] + total, before[1] + count)


Learned = Match | DualSpace


def total_loss(
    terms: Sequence[TermAtStep], amounts: Mapping[str, float], matches: Mapping[str, Learned], data: StudentForward
) -> tuple[Tensor, Sums]:
    """sum_k weight_k sum_n w_n l_k(n) / amount_k, ready for `backward`, and the sums.

    Args:
        terms: the step's terms.
        amounts: by term label, the global weight of its unit over the step. A term whose amount is 0 adds nothing.
        matches: the losses that learn parts of their own, by label.
    """
    scale = {term.label: term.weight / amounts[term.label] if amounts[term.label] else 0.0 for term in terms}
    loss = (data.hidden_ND * 0).sum()
    sums = Sums()
    families = {
        family: [term for term in terms if term.term.family == family]
        for family in ("vocabulary", "ranking", "match", "consistency", "dual")
    }
    if chosen := families["vocabulary"]:
        part = _vocabulary(chosen, [scale[term.label] for term in chosen], data)
        loss, sums.terms = loss + part.loss, sums.terms | part.sums
    if chosen := families["ranking"]:
        part, sums.measured = _ranking(chosen, [scale[term.label] for term in chosen], data)
        loss, sums.terms = loss + part.loss, sums.terms | part.sums
    if chosen := families["match"]:
        part = _matching(chosen, [scale[term.label] for term in chosen], matches, data)
        loss, sums.terms = loss + part.loss, sums.terms | part.sums
    if chosen := families["consistency"]:
        part = _consistent(chosen, [scale[term.label] for term in chosen], data)
        loss, sums.terms = loss + part.loss, sums.terms | part.sums
    if chosen := families["dual"]:
        part = _dual(chosen, [scale[term.label] for term in chosen], matches, data)
        loss, sums.terms = loss + part.loss, sums.terms | part.sums
    return loss, sums


def _vocabulary(terms: Sequence[TermAtStep], scales: Sequence[float], data: StudentForward) -> Total:
    batch = data.batch
    device = data.hidden_ND.device
    row_N, position_N = batch.response_positions()
    weight_N = batch.weight_BT[row_N, position_N + 1]
    weights = [weight_N * batch.rows_on(term.term.only)[row_N] for term in terms]
    # a term without text in this micro-batch reads nothing
    here = [number for number, weight_N in enumerate(weights) if weight_N.any()]
    if not here:
        return Total((data.hidden_ND * 0).sum(), {})
    weight_KN = torch.stack([weights[number] for number in here]).to(device)
    columns = {name: column_BT[row_N, position_N + 1].to(device) for name, column_BT in batch.columns.items()}
    evidence = PositionEvidence(batch.tokens_BT[row_N, position_N + 1].to(device), data.teacher.signal, columns)
    return fused_loss(
        data.hidden_ND, data.head, [terms[n] for n in here], [scales[n] for n in here], weight_KN, evidence
    )


def _ranking(
    terms: Sequence[TermAtStep], scales: Sequence[float], data: StudentForward
) -> tuple[Total, dict[str, tuple[float, float]]]:
    batch = data.batch
    device = data.hidden_ND.device
    row_N, position_N = batch.response_positions()
    log_prob_N = token_log_probs(data.hidden_ND, data.head, batch.tokens_BT[row_N, position_N + 1].to(device))
    log_prob_B = log_prob_N.new_zeros(len(batch.sample_ids)).index_add(0, row_N.to(device), log_prob_N)
    widest = max(len(group) for group in batch.groups)
    row_GK = torch.tensor([[*group, *[group[0]] * (widest - len(group))] for group in batch.groups], device=device)
    present_GK = torch.tensor([[k < len(group) for k in range(widest)] for group in batch.groups], device=device)
    length_B = batch.mask_BT.sum(1).to(device)
    loss = log_prob_B.sum() * 0.0
    found = {}
    measured = {}
    for term, scale in zip(terms, scales, strict=True):
        reference = next(
            (name.removeprefix("reference_") for name in term.term.reads if name.startswith("reference_")), None
        )
        reference_GK = None if reference is None else batch.references[reference].to(device)[row_GK]
        candidates = Candidates(log_prob_B[row_GK], length_B[row_GK], present_GK, reference_GK)
        values_G = term.group_values(candidates)
        loss = loss + scale * values_G.sum()
        found[term.label] = float(values_G.detach().double().sum())
        if (measure := RANKINGS[term.term.name].measures) is not None:
            total, count = measure(candidates)
            measured[term.label] = (float(total), float(count))
    return Total(loss, found), measured


def _consistent(terms: Sequence[TermAtStep], scales: Sequence[float], data: StudentForward) -> Total:
    ends = common_ends(data.batch)
    loss = (data.hidden_ND * 0).sum()
    found = {}
    for term, scale in zip(terms, scales, strict=True):
        total = consistency(data.hidden_ND, data.head, ends, **term.params).sum()
        loss = loss + scale * total
        found[term.label] = float(total.detach().double())
    return Total(loss, found)


def _dual(
    terms: Sequence[TermAtStep], scales: Sequence[float], matches: Mapping[str, Learned], data: StudentForward
) -> Total:
    assert data.teacher.states is not None
    row_N, position_N = data.batch.response_positions()
    weight_N = data.batch.weight_BT[row_N, position_N + 1]
    loss = (data.hidden_ND * 0).sum()
    found = {}
    for term, scale in zip(terms, scales, strict=True):
        on_N = (weight_N * data.batch.rows_on(term.term.only)[row_N]).to(data.hidden_ND.device)
        learned = matches[term.label]
        assert isinstance(learned, DualSpace)
        part, found[term.label] = learned(data.batch, data.hidden_ND, data.head, data.teacher.states, on_N, scale)
        loss = loss + part
    return Total(loss, found)


def _matching(
    terms: Sequence[TermAtStep], scales: Sequence[float], matches: Mapping[str, Learned], data: StudentForward
) -> Total:
    batch = data.batch
    device = data.hidden_ND.device
    row_N, position_N = (index.to(device) for index in batch.response_positions())
    own_B = torch.tensor([data.bank_rows.get(sample_id, 0) for sample_id in batch.sample_ids])
    place = Positions(row_N, position_N, len(batch.sample_ids), own_B, data.step)
    loss = (data.hidden_ND * 0).sum()
    found = {}
    for term, scale in zip(terms, scales, strict=True):
        values = full_precision(matches[term.label](data.features, data.teacher.features, place))
        on_B = batch.rows_on(term.term.only).to(device)
        if term.term.unit == "row":
            weight = on_B.to(values.dtype)
        else:
            weight = (batch.weight_BT.to(device)[row_N, position_N + 1] * on_B[row_N]).to(values.dtype)
        total = (values * weight).sum()
        loss = loss + scale * total
        found[term.label] = float(total.detach().double())
    return Total(loss, found)
