"""All terms of one micro-batch: a loss to go backward from, and each term's sum.

Every term's sum is divided by the global weight of its unit over the step (token weights, rows or groups), which the
loop knows before the first micro-batch. So no split of the step into micro-batches or ranks changes anything.

Shapes: N response positions, K terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from limbeck.objectives.bound import BoundLoss
from limbeck.objectives.forward import StudentForward, Sums
from limbeck.objectives.head import PositionEvidence, Total, fused_loss
from limbeck.objectives.term import TermAtStep


def total_loss(
    terms: Sequence[TermAtStep], amounts: Mapping[str, float], learned: Mapping[str, BoundLoss], data: StudentForward
) -> tuple[Tensor, Sums]:
    """sum_k weight_k sum_n w_n l_k(n) / amount_k, ready for `backward`, and the sums.

    Args:
        terms: the step's terms.
        amounts: by term label, the global weight of its unit over the step. A term whose amount is 0 adds nothing.
        learned: the losses that are bound to the two models, by label.
    """
    scales = {term.label: term.weight / amounts[term.label] if amounts[term.label] else 0.0 for term in terms}
    fused = _fused([term for term in terms if term.term.loss.fused], scales, data)
    loss = fused.loss
    sums = Sums(terms=dict(fused.sums))
    for term in terms:
        if term.term.loss.fused:
            continue
        part = term.evaluate(scales[term.label], learned.get(term.label), data)
        loss = loss + part.loss
        sums.terms[term.label] = part.total
        if part.measured is not None:
            sums.measured[term.label] = part.measured
    return loss, sums


def _fused(terms: Sequence[TermAtStep], scales: Mapping[str, float], data: StudentForward) -> Total:
    """The terms that share one pass through the head; one without text in this micro-batch is left out."""
    weights = {term.label: data.token_weights(term.term.only, term.term.column) for term in terms}
    present = [term for term in terms if weights[term.label].any()]
    if not present:
        return Total((data.hidden_ND * 0).sum(), {})
    batch = data.batch
    device = data.hidden_ND.device
    row_N, position_N = batch.response_positions()
    columns = {name: column_BT[row_N, position_N + 1].to(device) for name, column_BT in batch.columns.items()}
    evidence = PositionEvidence(batch.tokens_BT[row_N, position_N + 1].to(device), data.teacher.signal, columns)
    weight_KN = torch.stack([weights[term.label] for term in present]).to(device)
    return fused_loss(
        data.hidden_ND,
        data.head,
        present,
        [scales[term.label] for term in present],
        weight_KN=weight_KN,
        evidence=evidence,
    )
