"""The chunked head: losses over the vocabulary without ever holding [positions, vocabulary].

The head walks the response positions in chunks, projects their hidden states to logits, asks every term for its values
and closed-form gradients in blocks small enough for the processor's cache, and turns those into the gradients of the
hidden states and of the head in the same pass: no graph, no stored logits. Prompt and padding positions are left out.

Shapes: N response positions, C positions of a chunk, R of a block, D width of the student, V vocabulary, K terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.objectives.distribution import IMPOSSIBLE, Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.precision import full_precision

CHUNK_ELEMENTS = 18 * 2**20  # logits projected at once: 72 MiB in fp32 for each model
BLOCK_ELEMENTS = 2**19  # logits that a term reads at once on a CPU


@dataclass(frozen=True)
class Head:
    """logits = cap(scale (W h + B A h) + bias), cap(x) = c tanh(x / c): every part but W optional.

    `softcap` is Gemma's, `scale` Cohere's (Granite's divides: its inverse), `low_rank` a LoRA adapter (A, B, its
    scaling).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[Tensor, Tensor, float] | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.weight_VD)

    def cut(self, vocab_size: int) -> Head:
        """The head of the first `vocab_size` tokens: without padding that the other model does not have."""
        if vocab_size == self.vocab_size:
            return self
        low_rank = (
            None if self.low_rank is None else (self.low_rank[0], self.low_rank[1][:vocab_size], self.low_rank[2])
        )
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VD=self.weight_VD[:vocab_size], bias_V=bias_V, low_rank=low_rank)

    def detached(self) -> Head:
        """The same numbers without a gradient."""
        low_rank = (
            None if self.low_rank is None else (self.low_rank[0].detach(), self.low_rank[1].detach(), self.low_rank[2])
        )
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V, low_rank=low_rank)

    def products(self, hidden_ND: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(x, W) whose products x W^T add up to the logits before the cap; x is as small as the hidden states."""
        scaled_ND = hidden_ND if self.scale == 1 else hidden_ND * self.scale
        parts = [(scaled_ND, self.weight_VD)]
        if self.low_rank is not None:
            a_RD, b_VR, scaling = self.low_rank
            parts.append((scaled_ND.to(a_RD.dtype) @ a_RD.T * scaling, b_VR))
        if self.bias_V is not None:
            parts.append((torch.ones_like(hidden_ND[:, :1]), self.bias_V[:, None]))
        return parts

    def logits(self, hidden_ND: Tensor, buffer: Buffer | None = None) -> Tensor:
        """Logits [N, V] in fp32 or better; for a few positions at a time. See `project` for `buffer`."""
        return project(self.products(hidden_ND), self.softcap, buffer)


class Buffer:
    """The memory of one chunk's logits, which each chunk overwrites: new pages cost more than what a loss does on
    them."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    @torch.no_grad()
    def product(self, x_CD: Tensor, weight_VD: Tensor) -> Tensor:
        """x W^T without a graph, in memory that the next call overwrites."""
        x_CD, rows = x_CD.to(weight_VD.dtype), len(x_CD)
        if self._memory is None or len(self._memory) < rows:
            self._memory = weight_VD.new_empty(rows, len(weight_VD))
        return torch.mm(x_CD, weight_VD.T, out=self._memory[:rows])


def project(parts: Sequence[tuple[Tensor, Tensor]], softcap: float | None, buffer: Buffer | None = None) -> Tensor:
    """cap(sum x W^T) in fp32 or better. In a `buffer` it has no graph and is valid until the buffer's next use."""
    (x_CD, weight_VD), *others = parts
    logits_CV = full_precision(buffer.product(x_CD, weight_VD) if buffer else x_CD.to(weight_VD.dtype) @ weight_VD.T)
    for x, weight in others:
        logits_CV += x.to(weight.dtype) @ weight.T
    if others:
        logits_CV.clamp_min_(IMPOSSIBLE)  # a bias may mask tokens with -inf
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


class TeacherRows(Protocol):
    """The teacher's side of a block.

    `p` is its whole distribution, if the signal has one, and `log_prob` its log-probability of the target tokens.
    """

    @property
    def p(self) -> Distribution: ...

    def log_prob(self, targets_R: Tensor, /) -> Tensor: ...

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor, /
    ) -> ValueAndGradient: ...


class TeacherChunk(Protocol):
    def rows(self, rows: slice) -> TeacherRows: ...


class TeacherSignal(Protocol):
    """The teacher's side of the response positions; `signals/` has the implementations."""

    def chunk(self, positions: slice) -> TeacherChunk: ...


@dataclass(frozen=True)
class Block:
    """What a term over the vocabulary reads at R positions."""

    q: Distribution
    targets_R: Tensor
    teacher: TeacherRows | None
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class VocabularyTerm(Protocol):
    """A loss per position from the student's distribution; see `objectives/term.py`."""

    @property
    def label(self) -> str: ...

    def values(self, block: Block) -> ValueAndGradient: ...


@dataclass(frozen=True)
class PositionEvidence:
    """The evidence at the N response positions: target tokens, the teacher's distribution, and named columns [N]."""

    targets_N: Tensor
    teacher: TeacherSignal | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def block(self, positions: slice, q: Distribution, teacher: TeacherRows | None) -> Block:
        return Block(
            q, self.targets_N[positions], teacher, {name: column[positions] for name, column in self.columns.items()}
        )


@dataclass(frozen=True)
class Total:
    """A loss to go backward from: `loss` carries the gradient, `sums` are each term's own weighted sum (detached)."""

    loss: Tensor
    sums: dict[str, float]


def chunks(positions: int, vocab_size: int, elements: int) -> Iterator[slice]:
    """Slices of the positions that keep one chunk of logits within `elements` numbers."""
    size = max(1, elements // vocab_size)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def fused_loss(
    hidden_ND: Tensor,
    head: Head,
    terms: Sequence[VocabularyTerm],
    scales: Sequence[float],
    weight_KN: Tensor,
    evidence: PositionEvidence,
) -> Total:
    """sum_k scale_k sum_n w_kn l_k(n), with its gradient for the hidden states and the head.

    Args:
        hidden_ND: last hidden states (after the final norm) that predict the response tokens.
        head: the output projection; its parts get a gradient where they require one (tied embeddings add theirs as
            usual).
        terms: what is summed.
        scales: one factor per term: its weight divided by the global weight of its tokens.
        weight_KN: a weight per term and token.
        evidence: tokens, teacher and columns of the same N positions.
    """
    parts = head.products(hidden_ND)
    flat = [tensor for part in parts for tensor in part]
    # integers would round the scales away
    weight_KN = weight_KN.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    loss, sums_K = _Fused.apply(_FusedTask(terms, scales, weight_KN, evidence, softcap=head.softcap), *flat)
    return Total(loss, {term.label: float(value) for term, value in zip(terms, sums_K.tolist(), strict=True)})


@dataclass(frozen=True)
class _FusedTask:
    """What `fused_loss` computes, apart from the tensors that get a gradient."""

    terms: Sequence[VocabularyTerm]
    scales: Sequence[float]
    weight_KN: Tensor
    evidence: PositionEvidence
    softcap: float | None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _FusedTask, *flat: Tensor) -> tuple[Tensor, Tensor]:
        xs = flat[0::2]
        weights = flat[1::2]
        grads = [
            torch.zeros_like(t) if needed else None for t, needed in zip(flat, ctx.needs_input_grad[1:], strict=True)
        ]
        sums_K = torch.zeros(len(task.terms), dtype=torch.float64, device=xs[0].device)
        factors = task.weight_KN.new_tensor(task.scales)[:, None]
        buffer = Buffer()
        for part in chunks(len(xs[0]), len(weights[0]), CHUNK_ELEMENTS):
            grad_CV = project([(x[part], weight) for x, weight in zip(xs, weights, strict=True)], task.softcap, buffer)
            teacher = None if task.evidence.teacher is None else task.evidence.teacher.chunk(part)
            for rows in _blocks(grad_CV):
                here = slice(part.start + rows.start, part.start + rows.stop)
                block = task.evidence.block(
                    here, Distribution(grad_CV[rows]), None if teacher is None else teacher.rows(rows)
                )
                sums_K += _gradient(
                    task.terms,
                    block,
                    task.weight_KN[:, here],
                    factors,
                    softcap=task.softcap,
                    out_RV=grad_CV[rows],
                )
            for x, weight, grad_x, grad_weight in zip(xs, weights, grads[0::2], grads[1::2], strict=True):
                own_CV = grad_CV.to(weight.dtype)
                if grad_x is not None:
                    grad_x[part] = (own_CV @ weight).to(x.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(own_CV.T, x[part].to(weight.dtype))
        ctx.grads = grads
        ctx.mark_non_differentiable(sums_K)
        loss = (sums_K * sums_K.new_tensor(task.scales)).sum()
        return loss.to(task.weight_KN.dtype), sums_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factor = grads[0]
        scaled = [None if g is None else g if factor == 1 else g * factor.to(g.dtype) for g in ctx.grads]
        return None, *scaled


def compared(
    hidden_ND: Tensor, head: Head, teacher: TeacherSignal
) -> Iterator[tuple[slice, Distribution, Distribution]]:
    """(positions, student's q, teacher's p) block by block. The signal must have whole distributions."""
    parts = [(x_ND.detach(), weight.detach()) for x_ND, weight in head.products(hidden_ND)]
    buffer = Buffer()
    for part in chunks(len(hidden_ND), head.vocab_size, CHUNK_ELEMENTS):
        logits_CV = project([(x_ND[part], weight) for x_ND, weight in parts], head.softcap, buffer)
        chunk = teacher.chunk(part)
        for rows in _blocks(logits_CV):
            here = slice(part.start + rows.start, part.start + rows.stop)
            yield here, Distribution(logits_CV[rows]), chunk.rows(rows).p


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """On a CPU a block stays in the cache while the terms pass over it; elsewhere the whole chunk is one block."""
    elements = BLOCK_ELEMENTS if logits_CV.device.type == "cpu" else logits_CV.numel()
    return chunks(len(logits_CV), logits_CV.shape[1], max(1, elements))


def _gradient(
    terms: Sequence[VocabularyTerm],
    block: Block,
    weight_KR: Tensor,
    factors: Tensor,
    softcap: float | None,
    out_RV: Tensor,
) -> Tensor:
    """Each term's weighted sum [K]. The gradient of their sum overwrites the projected logits in `out_RV`."""
    slope = None if softcap is None else 1 - (out_RV / softcap).square()
    sums = []
    total_RV = None
    for term, weight_R, factor_R in zip(terms, weight_KR, factors * weight_KR, strict=True):
        values_R, gradient_RV = term.values(block)
        sums.append((values_R * weight_R).double().sum())
        gradient_RV = gradient_RV.mul_(factor_R[:, None])
        total_RV = gradient_RV if total_RV is None else total_RV.add_(gradient_RV)
    assert total_RV is not None
    torch.mul(total_RV, 1 if slope is None else slope, out=out_RV)
    return torch.stack(sums)


def token_log_probs(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """log q(target) per position [N], fp32 or better, differentiable: for losses that are not sums over tokens.

    The backward pass projects the chunks again, so no logits are stored.
    """
    parts = head.products(hidden_ND)
    flat = [tensor for part in parts for tensor in part]
    result: Tensor = _LogProbs.apply(targets_N, head.softcap, *flat)
    return result


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets_N: Tensor, softcap: float | None, *flat: Tensor) -> Tensor:
        ctx.save_for_backward(targets_N, *flat)
        ctx.softcap = softcap
        xs = flat[0::2]
        weights = flat[1::2]
        log_probs = []
        buffer = Buffer()
        for part in chunks(len(xs[0]), len(weights[0]), CHUNK_ELEMENTS):
            logits_CV = project([(x[part], weight) for x, weight in zip(xs, weights, strict=True)], softcap, buffer)
            log_probs.append(logits_CV.gather(-1, targets_N[part, None])[:, 0] - logits_CV.logsumexp(-1))
        return torch.cat(log_probs) if log_probs else full_precision(xs[0].new_zeros(0))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        targets_N, *flat = ctx.saved_tensors
        weight_KN = full_precision(outer[0])[None]
        task = _FusedTask([_LogProbTerm()], [1.0], weight_KN, PositionEvidence(targets_N), softcap=ctx.softcap)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(n) for t, n in zip(flat, ctx.needs_input_grad[2:], strict=True)]
            loss, _ = _Fused.apply(task, *leaves)
        grads = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
        return None, None, *(next(grads) if leaf.requires_grad else None for leaf in leaves)


class _LogProbTerm:
    """log q(target) as a term."""

    label = "log_prob"

    def values(self, block: Block) -> ValueAndGradient:
        gradient_RV = block.q.prob.neg()
        index_R1 = block.targets_R[:, None]
        gradient_RV.scatter_add_(-1, index_R1, torch.ones_like(index_R1, dtype=gradient_RV.dtype))
        return block.q.log.gather(-1, index_R1)[:, 0], gradient_RV
