"""The chunked head: losses over the vocabulary without a [positions, vocabulary] tensor.

The head walks the response positions in chunks, projects their hidden states to logits, asks every term for its values
and closed-form gradients in blocks small enough for the processor's cache, and turns those into the gradients of the
hidden states and of the head in the same pass. No graph is built and no logits are stored. Prompt and padding positions
are not among the response positions, so they are never projected.

Shapes: N response positions, C positions of a chunk, R of a block, D width of the student, E of the teacher,
V vocabulary, K terms or named tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from limbeck.objectives.distribution import IMPOSSIBLE, Distribution, ValueAndGradient
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.precision import (
    accumulation_dtype,
    add_product,
    full_precision,
    multiply,
    product_dtype,
    to_multiply,
)
from limbeck.objectives.sizes import SIZES
from limbeck.types import UserError

CHUNK_ELEMENTS = 18 * 2**20  # logits projected at once: 72 MiB in fp32 for each model
BLOCK_ELEMENTS = 2**19  # logits a term sees at once on a CPU


@dataclass(frozen=True)
class Head:
    """logits = cap(scale (W h + B A h) + bias), cap(x) = c tanh(x / c). Every part but W is optional.

    `softcap` is Gemma's; `scale` is Cohere's (and the inverse of Granite's divisor); `low_rank` is a LoRA adapter: A, B
    and its scaling. `rounded` is the type that the losses round hidden states and weights to before they multiply them;
    products are summed in fp32 all the same.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[Tensor, Tensor, float] | None = None
    rounded: torch.dtype | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.weight_VD)

    def cut(self, vocab_size: int) -> Head:
        """Keep only the first `vocab_size` tokens, for a model whose vocabulary is padded less."""
        if vocab_size == self.vocab_size:
            return self
        return self._map(lambda a_RD: a_RD, lambda by_token: by_token[:vocab_size])

    def detached(self) -> Head:
        """The same numbers without a gradient; they stay the same when the model is given other parameters."""
        return self._map(Tensor.detach, Tensor.detach)

    def to(self, device: torch.device | str) -> Head:
        """The head on another device."""
        return self._map(lambda a_RD: a_RD.to(device), lambda by_token: by_token.to(device))

    def _map(self, change_a: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]) -> Head:
        """The head with the adapter's A and all tensors of V rows changed."""
        low_rank = self.low_rank and (change_a(self.low_rank[0]), change(self.low_rank[1]), self.low_rank[2])
        bias_V = None if self.bias_V is None else change(self.bias_V)
        return replace(self, weight_VD=change(self.weight_VD), bias_V=bias_V, low_rank=low_rank)

    def products(self, hidden_ND: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs (x, W) whose products x W^T add up to the logits before the cap. No x is larger than the hidden
        states."""
        scaled_ND = hidden_ND if self.scale == 1 else hidden_ND * self.scale
        parts = [(scaled_ND, self.weight_VD)]
        if self.low_rank is not None:
            a_RD, b_VR, scaling = self.low_rank
            parts.append((scaled_ND.to(a_RD.dtype) @ a_RD.T * scaling, b_VR))
        if self.bias_V is not None:
            parts.append((torch.ones_like(hidden_ND[:, :1]), self.bias_V[:, None]))
        return parts

    def logits(self, hidden_ND: Tensor, buffer: Buffer | None = None) -> Tensor:
        """Logits [N, V] in fp32 or better, for a few positions at a time. See `project` for `buffer`."""
        return project(self.products(hidden_ND), self.softcap, buffer)


class Buffer:
    """Memory for one chunk's logits, reused by every chunk: allocating new pages costs more than the loss itself."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    @torch.no_grad()
    def product(self, x_CD: Tensor, weight_VD: Tensor) -> Tensor:
        """x W^T without a graph, in memory that the next call overwrites."""
        rows = len(x_CD)
        if self._memory is None or len(self._memory) < rows:
            self._memory = weight_VD.new_empty(rows, len(weight_VD), dtype=product_dtype(weight_VD))
        return multiply(x_CD.to(weight_VD.dtype), weight_VD.T, self._memory[:rows])


def project(parts: Sequence[tuple[Tensor, Tensor]], softcap: float | None, buffer: Buffer | None = None) -> Tensor:
    """cap(sum x W^T) in fp32 or better. With a `buffer` there is no graph, and the result is valid until its next
    use."""
    (x_CD, weight_VD), *others = parts
    if buffer is None and not (torch.is_grad_enabled() and any(one.requires_grad for part in parts for one in part)):
        buffer = Buffer()  # without a graph no whole copy of W is needed where its type is shorter
    logits_CV = buffer.product(x_CD, weight_VD) if buffer else _product(x_CD, weight_VD)
    for x, weight in others:
        logits_CV += _product(x, weight)
    if others:
        logits_CV.clamp_min_(IMPOSSIBLE)  # a bias may mask tokens with -inf
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


def _product(x_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """x W^T in fp32 or better, of numbers in the type of W."""
    return full_precision(x_CD.to(weight_VD.dtype)) @ full_precision(weight_VD).T


class TeacherRows(Protocol):
    """The teacher's side of a block."""

    @property
    def p(self) -> Distribution:
        """The whole distribution. UserError where the signal is not `whole`."""

    def log_prob(self, targets_R: Tensor, /) -> Tensor:
        """log p of the target tokens [R], in nats."""

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor, /
    ) -> ValueAndGradient:
        """The divergence from the student's distribution `q`, and its gradient for the student's logits."""


class TeacherChunk(Protocol):
    """The teacher's side of a chunk; `rows` are counted from the chunk's first position."""

    def rows(self, rows: slice) -> TeacherRows: ...


class TopTokens(NamedTuple):
    """The tokens that a sparse signal names at each position, the first `count_N` of each row, with log p in nats."""

    ids_NK: Tensor
    log_prob_NK: Tensor
    count_N: Tensor

    def log_prob(self, targets_N: Tensor) -> Tensor:
        """log p of the target tokens [N]; NaN where one is not named."""
        named_NK = torch.arange(self.ids_NK.shape[1], device=self.ids_NK.device) < self.count_N[:, None]
        target_NK = named_NK & (self.ids_NK == targets_N[:, None])
        return torch.where(target_NK.any(-1), self.log_prob_NK.masked_fill(~target_NK, 0).sum(-1), math.nan)


class TeacherSignal(Protocol):
    """What a teacher says at N response positions. `signals/` has the implementations.

    Signals inherit from it; what one can't do, it refuses with a `UserError` of its own. `whole` tells whether its rows
    have `p`, the distribution over the whole vocabulary.
    """

    whole: ClassVar[bool] = False

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str, /) -> Self: ...

    def select(self, positions: slice | Tensor, /) -> Self:
        """The signal at some of its positions: a slice, or their indices."""

    def join(self, others: Sequence[Self], /) -> Self:
        """This signal's positions followed by those of others, which are of the same teacher and kind."""

    def chunk(self, positions: slice, /) -> TeacherChunk: ...

    def log_prob(self, targets_N: Tensor, /) -> Tensor:  # noqa: ARG002 (a signal that can overrides it)
        """log p of the target tokens [N], in nats."""
        raise UserError("this signal has no probability of every token; measure with the teacher itself")

    def hidden_states(self) -> tuple[Tensor, Head]:
        """The teacher's last hidden states [N, E] and its head."""
        raise UserError("this signal has no hidden states; they need one teacher whose weights are here")

    def top_tokens(self) -> TopTokens:
        """The tokens that it names at each position."""
        raise UserError("this signal names no tokens; only a server's or a cache's top tokens do")


@dataclass(frozen=True)
class Block:
    """What a term over the vocabulary reads at R positions: the student's distribution `q`, the target tokens, the
    teacher's side and named columns [R]."""

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
    """What terms read at the N response positions: target tokens, the teacher's signal, and named columns [N]."""

    targets_N: Tensor
    teacher: TeacherSignal | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def block(self, positions: slice, q: Distribution, teacher: TeacherRows | None) -> Block:
        columns = {name: column_N[positions] for name, column_N in self.columns.items()}
        return Block(q, self.targets_N[positions], teacher, columns)


@dataclass(frozen=True)
class Total:
    """`loss` carries the gradient; `sums` are each term's own weighted sum, detached."""

    loss: Tensor
    sums: dict[str, float]


def chunk_elements(device: torch.device) -> int:
    """How many logits to project at once; `SIZES` may say it."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return elements_within(memory, SIZES.head_bytes)


def elements_within(memory: int | None, head_bytes: int | None = None) -> int:
    """How many logits to project at once on a device of so many bytes: on the CPU (None) CHUNK_ELEMENTS, elsewhere 1/64
    of the memory, unless the user has set `head_bytes`."""
    if head_bytes is not None:
        return max(1, head_bytes // 4)
    return CHUNK_ELEMENTS if memory is None else max(CHUNK_ELEMENTS, memory // 256)


def chunks(positions: int, vocab_size: int, elements: int) -> Iterator[slice]:
    """Slices of the positions such that the logits of one have at most `elements` numbers (but one position at
    least)."""
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
        head: the output projection. Its parts get a gradient where they require one; tied embeddings add theirs as
            usual.
        terms: the losses to sum.
        scales: one factor per term: its weight divided by the global weight of its tokens.
        weight_KN: one weight per term and token.
        evidence: target tokens, teacher and columns of the same N positions.
    """
    parts = head.products(hidden_ND)
    flat = [tensor for part in parts for tensor in part]
    # integers would round the scales away
    weight_KN = weight_KN.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    inputs = LossInputs(terms, scales, evidence, softcap=head.softcap, rounded=head.rounded)
    loss, sums_K = FusedLoss.apply(inputs, weight_KN, *flat)
    return Total(loss, {term.label: float(value) for term, value in zip(terms, sums_K.tolist(), strict=True)})


@dataclass(frozen=True)
class LossInputs:
    """What `FusedLoss` reads and gives no gradient to."""

    terms: Sequence[VocabularyTerm]
    scales: Sequence[float]
    evidence: PositionEvidence
    softcap: float | None
    rounded: torch.dtype | None = None


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: LossInputs, weight_KN: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        xs = [to_multiply(x, inputs.rounded) for x in flat[0::2]]
        weights = [to_multiply(weight, inputs.rounded) for weight in flat[1::2]]
        # summed over many chunks, so in fp32 whatever the weights are in
        grads = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if needs_grad else None
            for tensor, needs_grad in zip(flat, ctx.needs_input_grad[2:], strict=True)
        ]
        sums_K = torch.zeros(len(inputs.terms), dtype=accumulation_dtype(xs[0].device), device=xs[0].device)
        scale_K1 = weight_KN.new_tensor(inputs.scales)[:, None]
        signal = inputs.evidence.teacher
        buffer = Buffer()
        for part in chunks(len(xs[0]), len(weights[0]), chunk_elements(xs[0].device)):
            products = [(x[part], weight) for x, weight in zip(xs, weights, strict=True)]
            grad_CV = project(products, inputs.softcap, buffer)  # logits first; their gradient overwrites them
            teacher = None if signal is None else signal.chunk(part)
            for rows in _blocks(grad_CV):
                positions = slice(part.start + rows.start, part.start + rows.stop)
                q = Distribution(grad_CV[rows])
                block = inputs.evidence.block(positions, q, None if teacher is None else teacher.rows(rows))
                sums_K += _gradient(inputs, block, weight_KN[:, positions], scale_K1, out_RV=grad_CV[rows])
            for x, weight, grad_x, grad_weight in zip(xs, weights, grads[0::2], grads[1::2], strict=True):
                out_CV = to_multiply(grad_CV, inputs.rounded).to(weight.dtype)
                if grad_x is not None:
                    grad_x[part] = out_CV @ weight
                if grad_weight is not None:
                    add_product(grad_weight, out_CV.T, x[part].to(weight.dtype))
        ctx.grads = [None if g is None else g.to(tensor.dtype) for g, tensor in zip(grads, flat, strict=True)]
        ctx.mark_non_differentiable(sums_K)
        loss = (sums_K * sums_K.new_tensor(inputs.scales)).sum()
        return loss.to(weight_KN.dtype), sums_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factor = grads[0]
        if bool(factor == 1):  # as in the loop; a copy of the head's gradient would cost more than the question
            return None, None, *ctx.grads
        return None, None, *(None if g is None else g * factor.to(g.dtype) for g in ctx.grads)


def distribution_pairs(
    hidden_ND: Tensor, head: Head, teacher: TeacherSignal
) -> Iterator[tuple[slice, Distribution, Distribution]]:
    """(positions, student's q, teacher's p) block by block, for measuring.

    Raises:
        UserError: the signal has no whole distributions.
    """
    parts = [(x_ND.detach(), weight.detach()) for x_ND, weight in head.products(hidden_ND)]
    buffer = Buffer()
    for part in chunks(len(hidden_ND), head.vocab_size, chunk_elements(hidden_ND.device)):
        logits_CV = project([(x_ND[part], weight) for x_ND, weight in parts], head.softcap, buffer)
        chunk = teacher.chunk(part)
        for rows in _blocks(logits_CV):
            positions = slice(part.start + rows.start, part.start + rows.stop)
            yield positions, Distribution(logits_CV[rows]), chunk.rows(rows).p


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Rows of a chunk to treat at once: on a CPU as many as fit its cache, elsewhere all of them."""
    elements = BLOCK_ELEMENTS if logits_CV.device.type == "cpu" else logits_CV.numel()
    return chunks(len(logits_CV), logits_CV.shape[1], max(1, elements))


def _gradient(inputs: LossInputs, block: Block, weight_KR: Tensor, scale_K1: Tensor, out_RV: Tensor) -> Tensor:
    """Each term's weighted sum [K]. Overwrites the logits in `out_RV` with their gradient, summed over the terms."""
    slope = None if inputs.softcap is None else 1 - (out_RV / inputs.softcap).square()
    sums = []
    total_RV = None
    for term, weight_R, factor_R in zip(inputs.terms, weight_KR, scale_K1 * weight_KR, strict=True):
        values_R, gradient_RV = term.values(block)
        sums.append((values_R * weight_R).to(accumulation_dtype(values_R.device)).sum())
        gradient_RV = gradient_RV.mul_(factor_R[:, None])
        total_RV = gradient_RV if total_RV is None else total_RV.add_(gradient_RV)
    assert total_RV is not None
    torch.mul(total_RV, 1 if slope is None else slope, out=out_RV)
    return torch.stack(sums)
