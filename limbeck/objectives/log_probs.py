"""The log-probability of given tokens through the chunked head, for losses that are not sums over tokens.

Shapes: N response positions, C positions of a chunk, R of a block, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.objectives.distribution import ValueAndGradient
from limbeck.objectives.head import (
    Block,
    Buffer,
    FusedLoss,
    Head,
    LossInputs,
    PositionEvidence,
    chunk_elements,
    chunks,
    project,
)
from limbeck.objectives.precision import full_precision, to_multiply


def token_log_probs(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """log q(target) per position [N] in nats, fp32 or better, differentiable: for losses that are not sums over tokens.

    The backward pass projects the chunks again, so no logits are stored.
    """
    parts = head.products(hidden_ND)
    flat = [tensor for part in parts for tensor in part]
    result: Tensor = _TokenLogProbs.apply(targets_N, (head.softcap, head.rounded), *flat)
    return result


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets_N: Tensor, how: tuple[float | None, torch.dtype | None], *flat: Tensor) -> Tensor:
        ctx.save_for_backward(targets_N, *flat)
        ctx.how = how
        softcap, rounded = how
        xs = [to_multiply(x, rounded) for x in flat[0::2]]
        weights = [to_multiply(weight, rounded) for weight in flat[1::2]]
        log_probs = []
        buffer = Buffer()
        for part in chunks(len(xs[0]), len(weights[0]), chunk_elements(xs[0].device)):
            logits_CV = project([(x[part], weight) for x, weight in zip(xs, weights, strict=True)], softcap, buffer)
            log_probs.append(logits_CV.gather(-1, targets_N[part, None])[:, 0] - logits_CV.logsumexp(-1))
        return torch.cat(log_probs) if log_probs else full_precision(xs[0].new_zeros(0))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        targets_N, *flat = ctx.saved_tensors
        weight_KN = full_precision(outer[0])[None]
        inputs = LossInputs([_TargetLogProb()], [1.0], PositionEvidence(targets_N), *ctx.how)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(n) for t, n in zip(flat, ctx.needs_input_grad[2:], strict=True)]
            loss, _ = FusedLoss.apply(inputs, weight_KN, *leaves)
        grads = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
        return None, None, *(next(grads) if leaf.requires_grad else None for leaf in leaves)


class _TargetLogProb:
    """log q(target) as a term."""

    label = "log_prob"

    def values(self, block: Block) -> ValueAndGradient:
        gradient_RV = block.q.prob.neg()
        index_R1 = block.targets_R[:, None]
        gradient_RV.scatter_add_(-1, index_R1, torch.ones_like(index_R1, dtype=gradient_RV.dtype))
        return block.q.log.gather(-1, index_R1)[:, 0], gradient_RV
