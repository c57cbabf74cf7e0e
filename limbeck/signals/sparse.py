"""Signals that hold a few tokens per position: the teacher's top tokens with a bucket for the rest, tokens sampled from
the teacher, or only the token that was written.

Top tokens and bucket are a distribution over K + 1 outcomes. The student's distribution is reduced to the same outcomes
(its bucket gets the probability of all other tokens), and the divergence compares the two. Renormalising both sides
over the top tokens is not offered: it leaves the rest of the vocabulary unpenalised.

Shapes: N response positions, R of a block, K tokens per position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from limbeck.objectives.distribution import IMPOSSIBLE, Distribution, ValueAndGradient
from limbeck.objectives.divergence import TINY, Divergence
from limbeck.objectives.head import TeacherSignal, TopTokens
from limbeck.types import UserError

PARTIAL = "this signal holds a few tokens of the teacher's distribution only; measure with the teacher itself"


@dataclass(frozen=True)
class TopK(TeacherSignal):
    """Named tokens `ids_NK` (distinct in a row) with the teacher's `log_prob_NK`, and a bucket for all others.

    The bucket has probability `rest_N`, or what is left of 1 without it. Where rows name different numbers of tokens,
    `count_N` (1 or more) says how many, and later columns are ignored. `target_log_prob_N` is log p of the written
    tokens, where it is known whatever their rank.
    """

    ids_NK: Tensor
    log_prob_NK: Tensor
    rest_N: Tensor | None = None
    count_N: Tensor | None = None
    target_log_prob_N: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.ids_NK.device

    def to(self, device: torch.device | str) -> TopK:
        return self._map(lambda column: column.to(device))

    def select(self, positions: slice | Tensor) -> TopK:
        return self._map(lambda column: column[positions])

    def chunk(self, positions: slice) -> TopK:
        return self.select(positions)

    def rows(self, rows: slice) -> TopK:
        return self.select(rows)

    def join(self, others: Sequence[TopK]) -> TopK:
        signals = (self, *others)
        count_N = torch.cat([signal.top_tokens().count_N for signal in signals])
        ids_NK = _cat_rows([signal.ids_NK for signal in signals])
        return TopK(
            ids_NK,
            _cat_rows([signal.log_prob_NK for signal in signals]),
            rest_N=_cat([signal.rest_N for signal in signals]),
            count_N=None if bool((count_N == ids_NK.shape[1]).all()) else count_N,
            target_log_prob_N=_cat([signal.target_log_prob_N for signal in signals]),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> TopK:
        optional = (self.rest_N, self.count_N, self.target_log_prob_N)
        changed = (None if column is None else change(column) for column in optional)
        return TopK(change(self.ids_NK), change(self.log_prob_NK), *changed)

    def log_prob(self, _: Tensor) -> Tensor:
        """log p of the written tokens [N], in nats.

        Raises:
            UserError: only the likeliest tokens are known.
        """
        if self.target_log_prob_N is None:
            raise UserError(PARTIAL)
        return self.target_log_prob_N

    def top_tokens(self) -> TopTokens:
        count_N = self.count_N
        if count_N is None:
            count_N = torch.full((len(self.ids_NK),), self.ids_NK.shape[1], device=self.device)
        return TopTokens(self.ids_NK, self.log_prob_NK, count_N)

    @property
    def p(self) -> Distribution:
        raise UserError(PARTIAL)

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, _: Tensor
    ) -> ValueAndGradient:
        """The divergence over K + 1 outcomes, and its gradient for all V logits.

        With G the gradient for the outcomes' logits, a named token's logit gets its own G, and every other token v its
        share of the bucket's: q_v / q_bucket G_bucket.

        Raises:
            UserError: a divergence that needs the whole distribution.
        """
        if not divergence.buckets or params.get("temperature", 1) != 1:
            raise UserError(
                f"{divergence.name} (temperature {params.get('temperature', 1):g}) needs the teacher's whole"
                " distribution, and this signal has its top tokens only: use forward_kl, jsd or another divergence at"
                " temperature 1, or a dense signal"
            )
        ids_RK, log_p_RK, unused_RK = self._outcomes(q.log.dtype)
        log_q_RK = q.log.gather(-1, ids_RK)
        if unused_RK is not None:  # an outcome of probability 0 on both sides adds nothing
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
        if unused_RK is not None:  # their ids repeat the first id, so the same gradient must be written there
            outcomes_RK = torch.where(unused_RK, outcomes_RK[:, :1], outcomes_RK)
        return values_R, others_RV.scatter_(-1, ids_RK, outcomes_RK)

    def _outcomes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """(ids, log p, which columns are unused). Unused columns get the first column's id and probability 0."""
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
        """log of the bucket's probability [R, 1].

        What is left of 1 counts as a rounding error at least, and so does an empty bucket where it would make the
        divergence infinite.
        """
        least = torch.finfo(log_p_RK.dtype).eps
        if self.rest_N is None:
            return (1 - log_p_RK.exp().sum(-1, keepdim=True)).clamp_min(least).log()
        rest_R1 = self.rest_N.to(log_p_RK.dtype)[:, None]
        if not may_be_empty:
            return rest_R1.clamp_min(least).log()
        return torch.where(rest_R1 > 0, rest_R1.clamp_min(TINY).log(), IMPOSSIBLE)


def _cat(columns: Sequence[Tensor | None]) -> Tensor | None:
    """The columns one after the other; None where one is missing."""
    present = [column for column in columns if column is not None]
    return torch.cat(present) if len(present) == len(columns) else None


def _cat_rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts, filled with zeros up to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])


@dataclass(frozen=True)
class Sampled(TeacherSignal):
    """Tokens drawn from the teacher, with weights whose expectation, token by token, is p: `counts / draws`.

    Supports forward KL only, which is linear in p, so its gradient is unbiased (arXiv:2503.16870). `entropy_N` is the
    teacher's entropy; without it the value is the cross-entropy. Tokens may repeat in a row; padding has weight 0.
    """

    ids_NK: Tensor
    weight_NK: Tensor
    entropy_N: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.ids_NK.device

    def to(self, device: torch.device | str) -> Sampled:
        return self._map(lambda column: column.to(device))

    def select(self, positions: slice | Tensor) -> Sampled:
        return self._map(lambda column: column[positions])

    def chunk(self, positions: slice) -> Sampled:
        return self.select(positions)

    def rows(self, rows: slice) -> Sampled:
        return self.select(rows)

    def join(self, others: Sequence[Sampled]) -> Sampled:
        signals = (self, *others)
        return Sampled(
            _cat_rows([signal.ids_NK for signal in signals]),
            _cat_rows([signal.weight_NK for signal in signals]),
            _cat([signal.entropy_N for signal in signals]),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Sampled:
        entropy_N = None if self.entropy_N is None else change(self.entropy_N)
        return Sampled(change(self.ids_NK), change(self.weight_NK), entropy_N)

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
class TextSignal(TeacherSignal):
    """The text alone: the teacher counts as certain of the token that was written.

    Exact for every divergence that is finite there; forward KL becomes the cross-entropy.
    """

    ids_N: Tensor

    @property
    def device(self) -> torch.device:
        return self.ids_N.device

    def to(self, device: torch.device | str) -> TextSignal:
        return TextSignal(self.ids_N.to(device))

    def select(self, positions: slice | Tensor) -> TextSignal:
        return TextSignal(self.ids_N[positions])

    def chunk(self, positions: slice) -> TextSignal:
        return self.select(positions)

    def rows(self, rows: slice) -> TextSignal:
        return self.select(rows)

    def join(self, others: Sequence[TextSignal]) -> TextSignal:
        return TextSignal(torch.cat([signal.ids_N for signal in (self, *others)]))

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
