"""Signals that hold a few tokens per position: the teacher's top tokens with a bucket for the rest, tokens sampled from
it, or only the token that was written.

Top tokens and bucket are a distribution over K + 1 outcomes. The student is brought to the same outcomes (the bucket
gets all that its own softmax gives to other tokens), and any divergence compares the two. Renormalising both sides over
the top tokens is not offered: it leaves the rest of the vocabulary unpenalised.

Shapes: N response positions, R of a block, K tokens kept per position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.objectives.distribution import IMPOSSIBLE, Distribution, ValueAndGradient
from limbeck.objectives.divergence import TINY, Divergence
from limbeck.types import UserError

PARTIAL = "this signal holds a few tokens of the teacher's distribution only; measure with the teacher itself"


@dataclass(frozen=True)
class TopK:
    """`ids_NK` (distinct in a row) with the teacher's `log_prob_NK`; the bucket has `rest_N`, else what is left of 1.

    Where rows keep different numbers of tokens, `count_N` (1 or more) says how many; the columns after them are not
    looked at. `written_N` is log p of the tokens that the text went on with, where those are known beside the
    likeliest.
    """

    ids_NK: Tensor
    log_prob_NK: Tensor
    rest_N: Tensor | None = None
    count_N: Tensor | None = None
    written_N: Tensor | None = None

    def chunk(self, positions: slice) -> TopK:
        optional = (None if column_N is None else column_N[positions] for column_N in self._optional)
        return TopK(self.ids_NK[positions], self.log_prob_NK[positions], *optional)

    rows = chunk

    def to(self, device: torch.device | str) -> TopK:
        optional = (None if column_N is None else column_N.to(device) for column_N in self._optional)
        return TopK(self.ids_NK.to(device), self.log_prob_NK.to(device), *optional)

    @property
    def _optional(self) -> tuple[Tensor | None, ...]:
        return self.rest_N, self.count_N, self.written_N

    def log_prob(self, _: Tensor) -> Tensor:
        """log p of the written tokens [N].

        Raises:
            UserError: only the likeliest are known.
        """
        if self.written_N is None:
            raise UserError(PARTIAL)
        return self.written_N

    @property
    def p(self) -> Distribution:
        raise UserError(PARTIAL)

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, _: Tensor
    ) -> ValueAndGradient:
        """The divergence over K + 1 outcomes, and its gradient for all V logits.

        With G the gradient for the outcomes' logits, a kept token's logit gets its own G and every other token v the
        bucket's, in proportion: q_v / q_bucket G_bucket.
        """
        if not divergence.buckets or params.get("temperature", 1) != 1:
            raise UserError(
                f"{divergence.name} (temperature {params.get('temperature', 1):g}) needs the teacher's whole"
                " distribution, and this signal has its top tokens only: use forward_kl, jsd or another divergence at"
                " temperature 1, or a dense signal"
            )
        ids_RK, log_p_RK, unused_RK = self._kept(q.log.dtype)
        log_q_RK = q.log.gather(-1, ids_RK)
        if unused_RK is not None:  # an outcome that neither side gives anything adds nothing
            log_q_RK = log_q_RK.masked_fill(unused_RK, IMPOSSIBLE)
        others_RV = q.prob.scatter(-1, ids_RK, 0)
        if unused_RK is not None or log_q_RK.shape[-1] < q.log.shape[-1]:
            rest_R1 = others_RV.sum(-1, keepdim=True).clamp_min(TINY)
            log_p_RK, log_q_RK = (
                torch.cat([log_p_RK, self._log_rest(log_p_RK, divergence.one_hot)], -1),
                torch.cat([log_q_RK, rest_R1.log()], -1),
            )
            values_R, outcomes_RK = divergence(Distribution(log_p_RK), Distribution(log_q_RK), params)
            others_RV.mul_(outcomes_RK[:, -1:] / rest_R1)
            outcomes_RK = outcomes_RK[:, :-1]
        else:
            values_R, outcomes_RK = divergence(Distribution(log_p_RK), Distribution(log_q_RK), params)
        if unused_RK is not None:  # their ids repeat the first one's, and so must what is written there
            outcomes_RK = torch.where(unused_RK, outcomes_RK[:, :1], outcomes_RK)
        return values_R, others_RV.scatter_(-1, ids_RK, outcomes_RK)

    def _kept(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """(ids, log p, which columns are not used), the unused ones with the first column's id and no probability."""
        log_p_RK = self.log_prob_NK.to(dtype)
        if self.count_N is None:
            return self.ids_NK, log_p_RK, None
        unused_RK = torch.arange(self.ids_NK.shape[1], device=self.ids_NK.device) >= self.count_N[:, None]
        return (
            torch.where(unused_RK, self.ids_NK[:, :1], self.ids_NK),
            log_p_RK.masked_fill(unused_RK, IMPOSSIBLE),
            unused_RK,
        )

    def _log_rest(self, log_p_RK: Tensor, may_be_empty: bool) -> Tensor:
        """log of the bucket's probability [R, 1]. What is left of 1 is never taken for less than a rounding error, nor
        is a bucket that is said to be empty where the divergence would be infinite."""
        least = torch.finfo(log_p_RK.dtype).eps
        if self.rest_N is None:
            return (1 - log_p_RK.exp().sum(-1, keepdim=True)).clamp_min(least).log()
        rest_R1 = self.rest_N.to(log_p_RK.dtype)[:, None]
        if not may_be_empty:
            return rest_R1.clamp_min(least).log()
        return torch.where(rest_R1 > 0, rest_R1.clamp_min(TINY).log(), IMPOSSIBLE)


def joined(signals: Sequence[TopK]) -> TopK:
    """Positions one after the other, of signals that keep equally many tokens at each and know the written ones."""
    ids_NK, log_NK = (torch.cat([getattr(signal, name) for signal in signals]) for name in ("ids_NK", "log_prob_NK"))
    return TopK(ids_NK, log_NK, written_N=torch.cat([signal.log_prob(signal.ids_NK) for signal in signals]))


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from the teacher with weights whose expectation, token by token, is p: `counts / draws`.

    Carries forward KL alone, which is linear in p: its gradient is unbiased (arXiv:2503.16870). `entropy_N` is the
    teacher's entropy; without it the value is the cross-entropy. Tokens may repeat in a row; padding has weight 0.
    """

    ids_NK: Tensor
    weight_NK: Tensor
    entropy_N: Tensor | None = None

    def chunk(self, positions: slice) -> Sampled:
        return Sampled(
            self.ids_NK[positions],
            self.weight_NK[positions],
            None if self.entropy_N is None else self.entropy_N[positions],
        )

    rows = chunk

    def to(self, device: torch.device | str) -> Sampled:
        return Sampled(
            self.ids_NK.to(device),
            self.weight_NK.to(device),
            None if self.entropy_N is None else self.entropy_N.to(device),
        )

    @property
    def p(self) -> Distribution:
        raise UserError(PARTIAL)

    def log_prob(self, _: Tensor) -> Tensor:
        raise UserError(PARTIAL)

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, _: Tensor
    ) -> ValueAndGradient:
        if divergence.name != "forward_kl" or params.get("temperature", 1) != 1:
            raise UserError(
                f"sampled tokens of the teacher carry forward_kl at temperature 1 only, not {divergence.name}"
            )
        weight_RK = self.weight_NK.to(q.log.dtype)
        values_R = -(weight_RK * q.log.gather(-1, self.ids_NK)).sum(-1)
        if self.entropy_N is not None:
            values_R = values_R - self.entropy_N
        gradient_RV = q.prob * weight_RK.sum(-1, keepdim=True)
        return values_R, gradient_RV.scatter_add_(-1, self.ids_NK, -weight_RK)


@dataclass(frozen=True)
class TextSignal:
    """The text alone: the teacher is taken to be certain of the token that was written.

    Exact for every divergence that is finite there; forward KL becomes the cross-entropy.
    """

    ids_N: Tensor

    def chunk(self, positions: slice) -> TextSignal:
        return TextSignal(self.ids_N[positions])

    rows = chunk

    @property
    def p(self) -> Distribution:
        raise UserError(PARTIAL)

    def log_prob(self, _: Tensor) -> Tensor:
        raise UserError(PARTIAL)

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, targets_R: Tensor
    ) -> ValueAndGradient:
        if not divergence.one_hot or params.get("teacher_share") == 1:
            raise UserError(
                f"{divergence.name} is infinite where the teacher gives a token no probability, as text alone does; use"
                " cross_entropy, jsd or tvd, or a teacher's distribution"
            )
        certain = torch.zeros_like(self.ids_N, dtype=q.log.dtype)[:, None]
        return TopK(self.ids_N[:, None], certain, certain[:, 0]).compare(divergence, params, q, targets_R)
