"""The chunked head: losses over the vocabulary without ever holding [positions, vocabulary].

The head walks the response positions in chunks, projects their hidden states to logits, asks every term for its
values, and takes the gradient of the hidden states and of the head weight in the same pass. Prompt and padding
positions never get here. Not covered yet: soft-capped or scaled logits, heads with a bias (refused by `head_of`).

Shapes: N response positions, C positions of a chunk, D width of the student, E width of the teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.objectives.precision import full_precision
from limbeck.objectives.term import Chunk, Term

CHUNK_ELEMENTS = 8 * 2**20


class TeacherSignal(Protocol):
    """The teacher's side of the response positions; `signals/` has the implementations."""

    def logits(self, positions: slice) -> Tensor: ...


@dataclass(frozen=True)
class Projection:
    """What a fused pass returns: `total` carries the gradient, `sums` are each term's own weighted sum (detached)."""

    total: Tensor
    sums: dict[str, float]


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices that keep one chunk of logits within CHUNK_ELEMENTS numbers (32 MiB in fp32)."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def fused_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    terms: Sequence[Term],
    scales: Sequence[float],
    targets_N: Tensor,
    weight_N: Tensor,
    teacher: TeacherSignal | None,
) -> Projection:
    """sum_k scale_k sum_n w_n l_k(n), with its gradient for `hidden_ND` and `head_VD`.

    Args:
        hidden_ND: last hidden states (after the final norm) that predict the response tokens.
        head_VD: the output embedding; gets a gradient if it requires one (tied embeddings add theirs as usual).
        terms: what is summed.
        scales: one factor per term: its weight divided by the global weight of its tokens.
        targets_N: the token that each position predicts.
        weight_N: a weight per token, in fp32.
        teacher: needed when a term reads the teacher's distribution.
    """
    total, sums_K = _Fused.apply(hidden_ND, head_VD, list(terms), list(scales), targets_N, weight_N, teacher)
    return Projection(total, {term.name: float(value) for term, value in zip(terms, sums_K.tolist(), strict=True)})


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        terms: list[Term],
        scales: list[float],
        targets_N: Tensor,
        weight_N: Tensor,
        teacher: TeacherSignal | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_ND = torch.zeros_like(hidden_ND) if needs_hidden else None
        grad_VD = torch.zeros_like(head_VD) if needs_head else None
        sums_K = torch.zeros(len(terms), dtype=torch.float64)
        for part in chunks(len(hidden_ND), len(head_VD)):
            logits_CV = full_precision(hidden_ND[part] @ head_VD.T)
            teacher_CV = teacher.logits(part) if teacher is not None else None
            chunk = Chunk(targets_N[part], teacher_CV)
            with torch.enable_grad():
                leaf_CV = logits_CV.requires_grad_(needs_hidden or needs_head)
                values_KC = torch.stack([term.values(leaf_CV, chunk) for term in terms]) * weight_N[part]
                loss = (values_KC * values_KC.new_tensor(scales)[:, None]).sum()
            sums_K += values_KC.detach().double().sum(1).cpu()
            if needs_hidden or needs_head:
                (grad_CV,) = torch.autograd.grad(loss, leaf_CV)
                grad_CV = grad_CV.to(head_VD.dtype)
                if grad_ND is not None:
                    grad_ND[part] = grad_CV @ head_VD
                if grad_VD is not None:
                    grad_VD.addmm_(grad_CV.T, hidden_ND[part])
        ctx.grads = grad_ND, grad_VD
        total = (sums_K * torch.tensor(scales, dtype=torch.float64)).sum()
        ctx.mark_non_differentiable(sums_K)
        return total.to(hidden_ND.device, weight_N.dtype), sums_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_ND, grad_VD = ctx.grads
        factor = grads[0]
        scaled = [None if g is None else g if factor == 1 else g * factor for g in (grad_ND, grad_VD)]
        return (*scaled, None, None, None, None, None)
