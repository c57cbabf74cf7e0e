"""A teacher with another tokenizer than the student's: its distributions at the student's positions, over the tokens
that both have.

Where a token of each begins at the same byte, the teacher's next-token distribution is also about the student's next
token. Tokens with equal bytes are one outcome. The probability of the written token follows from the chain rule: with
t_1 ... t_k the teacher's tokens that cover it, the text begins with it with probability P = p(t_1) ... p(t_k) at least,
so P moves from t_1's outcome to the written token's. All tokens without a counterpart are one more outcome, the bucket;
or their sorted probabilities are compared, too (`sorted`, as in ULD).

With equal tokenizers every token has a counterpart, nothing moves and there is no bucket: the loss equals the one on
the dense signal.

Shapes: N response positions of the student, M of the teacher, C of a chunk, R of a block, A aligned ones, K common
tokens, V vocabulary of the student, W of the teacher, L likely tokens without a counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from limbeck.objectives.distances import sorted_distance
from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import TINY, Divergence
from limbeck.objectives.head import Buffer, Head, TeacherSignal
from limbeck.signals.sparse import TextSignal, TopK
from limbeck.types import UserError

LIKELY = 1e-3  # above this probability a teacher's token without a counterpart is paired by its spelling
NO_P = "a teacher with other tokens has no distribution over the student's; use a divergence"


@dataclass(frozen=True)
class Pairs:
    """How the two vocabularies correspond.

    Common tokens by their ids in the student (`ours_K`) and in the teacher (`theirs_K`), the ids without a counterpart
    on either side, and the student's id of every teacher token (`ours_W`, -1 for none). `nearest`, where given, returns
    the student's token whose spelling is closest to a teacher's token, or None; then there is no bucket.
    """

    ours_K: Tensor
    theirs_K: Tensor
    ours_alone: Tensor
    theirs_alone: Tensor
    ours_W: Tensor
    nearest: Callable[[int], int | None] | None = field(default=None, compare=False)

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(
            ours_K=self.ours_K.to(device),
            theirs_K=self.theirs_K.to(device),
            ours_alone=self.ours_alone.to(device),
            theirs_alone=self.theirs_alone.to(device),
            ours_W=self.ours_W.to(device),
            nearest=self.nearest,
        )

    @property
    def complete(self) -> bool:
        """Whether every token of both vocabularies has a counterpart."""
        return not len(self.ours_alone) and not len(self.theirs_alone)


@dataclass(frozen=True)
class Places:
    """Where the student's positions lie in the teacher's text.

    `at_N` is the teacher's position that predicts what begins at the same byte, or -1; `first_N` the teacher's token
    there; `target_N` the student's written token; `log_cover_N` log P of the teacher's tokens that cover it.
    """

    at_N: Tensor
    first_N: Tensor
    log_cover_N: Tensor
    target_N: Tensor

    def to(self, device: torch.device | str) -> Places:
        return self._map(lambda column: column.to(device))

    def select(self, positions: slice | Tensor) -> Places:
        return self._map(lambda column: column[positions])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Places:
        return Places(change(self.at_N), change(self.first_N), change(self.log_cover_N), change(self.target_N))


@dataclass(frozen=True)
class BridgedSignal(TeacherSignal):
    """Holds the teacher's hidden states at its own positions, and projects one chunk at a time.

    Args:
        rest: what happens to tokens without a counterpart, see above.
        others: what is taught at positions where no token of the teacher begins: nothing (`skip`), or the text alone
            (`written`).
    """

    hidden_ME: Tensor
    head: Head
    pairs: Pairs
    places: Places
    rest: Literal["bucket", "sorted"] = "bucket"
    others: Literal["skip", "written"] = "skip"
    buffer: Buffer = field(default_factory=Buffer, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.hidden_ME.device

    def to(self, device: torch.device | str) -> BridgedSignal:
        return replace(
            self,
            hidden_ME=self.hidden_ME.to(device),
            head=self.head.to(device),
            pairs=self.pairs.to(device),
            places=self.places.to(device),
            buffer=Buffer(),
        )

    def select(self, positions: slice | Tensor) -> BridgedSignal:
        return replace(self, places=self.places.select(positions))

    def join(self, others: Sequence[BridgedSignal]) -> BridgedSignal:
        signals = (self, *others)
        at = []
        before = 0  # positions of the teacher in the signals so far
        for signal in signals:
            at_N = signal.places.at_N
            at.append(torch.where(at_N >= 0, at_N + before, at_N))
            before += len(signal.hidden_ME)
        places = Places(
            at_N=torch.cat(at),
            first_N=torch.cat([signal.places.first_N for signal in signals]),
            log_cover_N=torch.cat([signal.places.log_cover_N for signal in signals]),
            target_N=torch.cat([signal.places.target_N for signal in signals]),
        )
        hidden_ME = torch.cat([signal.hidden_ME for signal in signals])
        return replace(self, hidden_ME=hidden_ME, places=places, buffer=Buffer())

    @torch.no_grad()
    def chunk(self, positions: slice) -> BridgedChunk:
        """Teacher logits at the aligned ones among these positions; valid until the next chunk."""
        places = self.places.select(positions)
        at_A = places.at_N[places.at_N >= 0]
        return BridgedChunk(self, places, self.head.logits(self.hidden_ME[at_A], self.buffer))

    def log_prob(self, _: Tensor) -> Tensor:
        raise UserError(NO_P)


@dataclass(frozen=True)
class BridgedChunk:
    signal: BridgedSignal
    places: Places
    logits_AW: Tensor

    def rows(self, rows: slice) -> BridgedRows:
        aligned_C = self.places.at_N >= 0
        first = int(aligned_C[: rows.start].sum())
        count = int(aligned_C[rows].sum())
        return BridgedRows(self.signal, self.places.select(rows), self.logits_AW[first : first + count])


@dataclass(frozen=True)
class BridgedRows:
    signal: BridgedSignal
    places: Places
    logits_AW: Tensor

    @property
    def p(self) -> Distribution:
        raise UserError(NO_P)

    def log_prob(self, _: Tensor) -> Tensor:
        raise UserError(NO_P)

    def compare(
        self, divergence: Divergence, params: Mapping[str, float], q: Distribution, _: Tensor
    ) -> ValueAndGradient:
        """The divergence at aligned positions; elsewhere 0, or the one to the written token."""
        aligned_R = self.places.at_N >= 0
        if bool(aligned_R.all()):
            return self._aligned(self.places, divergence, params, q)
        values_R = q.log.new_zeros(len(aligned_R))
        gradient_RV = torch.zeros_like(q.log)
        if self.signal.others == "written":
            row_A = (~aligned_R).nonzero()[:, 0]
            target_A = self.places.target_N[row_A]
            q_A = Distribution(q.logits_RV[row_A])
            values_R[row_A], gradient_RV[row_A] = TextSignal(target_A).compare(divergence, params, q_A, target_A)
        if bool(aligned_R.any()):
            row_A = aligned_R.nonzero()[:, 0]
            q_A = Distribution(q.logits_RV[row_A])
            values_R[row_A], gradient_RV[row_A] = self._aligned(self.places.select(row_A), divergence, params, q_A)
        return values_R, gradient_RV

    def _aligned(
        self, places: Places, divergence: Divergence, params: Mapping[str, float], q: Distribution
    ) -> ValueAndGradient:
        pairs = self.signal.pairs
        p = Distribution(self.logits_AW.to(q.log.dtype))
        if divergence.sorts:
            return divergence(p, q, params)
        if not divergence.buckets or params.get("temperature", 1) != 1:
            raise UserError(
                f"{divergence.name} (temperature {params.get('temperature', 1):g}) compares whole vocabularies, and"
                " these two differ: use forward_kl, jsd or another divergence at temperature 1, or uld"
            )
        if pairs.nearest is not None:
            return divergence(self._by_spelling(p, pairs), q, params)
        return self._by_bytes(places, divergence, params, p=p, q=q)

    def _by_bytes(
        self, places: Places, divergence: Divergence, params: Mapping[str, float], p: Distribution, q: Distribution
    ) -> ValueAndGradient:
        """The divergence over common tokens, the written token by the chain rule, and the bucket."""
        pairs = self.signal.pairs
        rows = len(places.at_N)
        prob_AW = p.prob
        target_A1 = places.target_N[:, None]
        first_A1 = places.first_N[:, None]
        moves_A = pairs.ours_W[places.first_N] != places.target_N
        amount_A1 = (places.log_cover_N.to(prob_AW.dtype).exp() * moves_A)[:, None]
        prob_AW = prob_AW.scatter(-1, first_A1, (prob_AW.gather(-1, first_A1) - amount_A1).clamp_min(0))
        prob_AK = prob_AW[:, pairs.theirs_K]
        column_V = torch.full((q.log.shape[-1],), -1, device=prob_AK.device)
        column_V[pairs.ours_K] = torch.arange(len(pairs.ours_K), device=prob_AK.device)
        column_A = column_V[places.target_N]
        common_A1 = (column_A >= 0)[:, None]
        prob_AK = prob_AK.scatter_add(-1, column_A.clamp_min(0)[:, None], torch.where(common_A1, amount_A1, 0))
        ids_AK = pairs.ours_K.expand(rows, -1)
        rest_A = prob_AW[:, pairs.theirs_alone].sum(-1)
        count_A = None
        if not bool(common_A1.all()):  # a written token without a counterpart is one more outcome
            ids_AK = torch.cat([ids_AK, torch.where(common_A1, pairs.ours_K[:1], target_A1)], -1)
            prob_AK = torch.cat([prob_AK, torch.where(common_A1, 0, amount_A1)], -1)
            count_A = ids_AK.shape[1] - common_A1[:, 0].long()
        outcomes = TopK(ids_AK, prob_AK.clamp_min(TINY).log(), rest_A, count_A)
        values_A, gradient_AV = outcomes.compare(divergence, params, q, places.target_N)
        if self.signal.rest == "sorted" and not pairs.complete:
            others = (prob_AW[:, pairs.theirs_alone], pairs.ours_alone)
            more_A, more_AV = sorted_distance(*others, q)
            values_A, gradient_AV = values_A + more_A, gradient_AV.add_(more_AV)
        return values_A, gradient_AV

    @staticmethod
    def _by_spelling(p: Distribution, pairs: Pairs) -> Distribution:
        """A distribution over the student's tokens: common ones keep their probability, likely others give theirs to
        the token with the closest spelling, and the sum is scaled to 1."""
        assert pairs.nearest is not None
        vocab_size = len(pairs.ours_K) + len(pairs.ours_alone)
        prob_AV = p.prob.new_zeros(len(p.prob), vocab_size)
        prob_AV[:, pairs.ours_K] = p.prob[:, pairs.theirs_K]
        row_L, column_L = (p.prob[:, pairs.theirs_alone] > LIKELY).nonzero(as_tuple=True)
        for row, token in zip(row_L.tolist(), pairs.theirs_alone[column_L].tolist(), strict=True):
            if (near := pairs.nearest(token)) is not None:
                prob_AV[row, near] += p.prob[row, token]
        return Distribution(prob_AV.clamp_min(TINY).log())
