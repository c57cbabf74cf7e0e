"""A teacher with other tokens than the student's: its distributions at the student's positions, over what both can say.

Where a token of each begins at the same byte, the teacher's next-token distribution is about the student's next token,
too. Tokens of equal bytes are one outcome. The written token is told by the chain rule: with t_1 ... t_k the teacher's
tokens that cover it, the text begins with it with probability P = p(t_1) ... p(t_k) at least, so P is moved from t_1's
outcome to the written token's. All that has no counterpart is one outcome more, the bucket, or its sorted probabilities
are compared as well (`sorted`, as ULD does).

With equal tokenizers all tokens have counterparts, nothing is moved and no bucket is left: it is the loss on the dense
signal.

Shapes: N response positions of the student, M of the teacher, A aligned ones of a block, K common tokens, V vocabulary
of the student, W of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from limbeck.objectives.distances import sorted_distance
from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import TINY, Divergence
from limbeck.objectives.head import Buffer, Head
from limbeck.signals.sparse import TextSignal, TopK
from limbeck.types import UserError

LEAST = 1e-3  # a teacher's token without counterpart is looked up by its spelling from this probability on
NO_P = "a teacher with other tokens has no distribution over the student's; use a divergence"


@dataclass(frozen=True)
class Pairs:
    """The two vocabularies: common tokens by their id in the student (`ours_K`) and in the teacher (`theirs_K`), the
    ids without a counterpart on both sides, and the student's id of every teacher token (`ours_W`, -1 for none).

    `nearest`, where it is given, names the student's token that is spelled most alike, or None: then no bucket is used.
    """

    ours_K: Tensor
    theirs_K: Tensor
    ours_alone: Tensor
    theirs_alone: Tensor
    ours_W: Tensor
    nearest: Callable[[int], int | None] | None = field(default=None, compare=False)

    def to(self, device: torch.device | str) -> Pairs:
        ours_K = self.ours_K.to(device)
        theirs_K = self.theirs_K.to(device)
        ours_W = self.ours_W.to(device)
        return Pairs(ours_K, theirs_K, self.ours_alone.to(device), self.theirs_alone.to(device), ours_W, self.nearest)

    @property
    def whole(self) -> bool:
        """Every token of the student has a counterpart, and every one of the teacher."""
        return not len(self.ours_alone) and not len(self.theirs_alone)


@dataclass(frozen=True)
class Places:
    """Where the student's positions are in the teacher's text.

    `at_N` is the teacher's position that predicts what begins at the same byte, or -1; `first_N` the teacher's token
    there, `log_cover_N` log P of those that cover the student's written token, `written_N` that token.
    """

    at_N: Tensor
    first_N: Tensor
    log_cover_N: Tensor
    written_N: Tensor

    def part(self, positions: slice) -> Places:
        return Places(
            self.at_N[positions], self.first_N[positions], self.log_cover_N[positions], self.written_N[positions]
        )


@dataclass(frozen=True)
class BridgedSignal:
    """Holds the teacher's hidden states at its own positions, and projects a chunk at a time.

    Args:
        rest: what becomes of tokens without a counterpart, see above.
        others: at positions where no token of the teacher begins, nothing is taught (`skip`), or the text alone
            (`written`).
    """

    hidden_ME: Tensor
    head: Head
    pairs: Pairs
    places: Places
    rest: Literal["bucket", "sorted"] = "bucket"
    others: Literal["skip", "written"] = "skip"
    buffer: Buffer = field(default_factory=Buffer, repr=False, compare=False)

    @torch.no_grad()
    def chunk(self, positions: slice) -> BridgedChunk:
        """Teacher logits of the aligned ones among these positions; valid until the next chunk."""
        places = self.places.part(positions)
        at_A = places.at_N[places.at_N >= 0]
        return BridgedChunk(self, places, self.head.logits(self.hidden_ME[at_A], self.buffer))


@dataclass(frozen=True)
class BridgedChunk:
    signal: BridgedSignal
    places: Places
    logits_AW: Tensor

    def rows(self, rows: slice) -> BridgedRows:
        aligned_C = self.places.at_N >= 0
        first = int(aligned_C[: rows.start].sum())
        count = int(aligned_C[rows].sum())
        return BridgedRows(self.signal, self.places.part(rows), self.logits_AW[first : first + count])


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
        """The divergence at aligned positions; elsewhere 0, or that to the written token."""
        on_R = self.places.at_N >= 0
        if bool(on_R.all()):
            return self._aligned(self.places, divergence, params, q)
        values_R = q.log.new_zeros(len(on_R))
        gradient_RV = torch.zeros_like(q.log)
        if self.signal.others == "written":
            off_A = (~on_R).nonzero()[:, 0]
            written_A = self.places.written_N[off_A]
            found = TextSignal(written_A).compare(divergence, params, Distribution(q.logits_RV[off_A]), written_A)
            values_R[off_A], gradient_RV[off_A] = found
        if bool(on_R.any()):
            on_A = on_R.nonzero()[:, 0]
            places = Places(*(column_N[on_A] for column_N in vars(self.places).values()))
            values_R[on_A], gradient_RV[on_A] = self._aligned(
                places, divergence, params, Distribution(q.logits_RV[on_A])
            )
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
        return self._by_bytes(places, divergence, params, p, q)

    def _by_bytes(
        self, places: Places, divergence: Divergence, params: Mapping[str, float], p: Distribution, q: Distribution
    ) -> ValueAndGradient:
        pairs = self.signal.pairs
        rows = len(places.at_N)
        prob_AW = p.prob
        written_A1 = places.written_N[:, None]
        first_A1 = places.first_N[:, None]
        moved_A = pairs.ours_W[places.first_N] != places.written_N
        amount_A1 = (places.log_cover_N.to(prob_AW.dtype).exp() * moved_A)[:, None]
        prob_AW = prob_AW.scatter(-1, first_A1, (prob_AW.gather(-1, first_A1) - amount_A1).clamp_min(0))
        prob_AK = prob_AW[:, pairs.theirs_K]
        column_V = torch.full((q.log.shape[-1],), -1, device=prob_AK.device)
        column_V[pairs.ours_K] = torch.arange(len(pairs.ours_K), device=prob_AK.device)
        column_A = column_V[places.written_N]
        known_A1 = (column_A >= 0)[:, None]
        prob_AK = prob_AK.scatter_add(-1, column_A.clamp_min(0)[:, None], torch.where(known_A1, amount_A1, 0))
        ids_AK = pairs.ours_K.expand(rows, -1)
        rest_A = prob_AW[:, pairs.theirs_alone].sum(-1)
        count_A = None
        if not bool(known_A1.all()):  # a written token without counterpart is an outcome of its own, where there is one
            ids_AK = torch.cat([ids_AK, torch.where(known_A1, pairs.ours_K[:1], written_A1)], -1)
            prob_AK = torch.cat([prob_AK, torch.where(known_A1, 0, amount_A1)], -1)
            count_A = ids_AK.shape[1] - known_A1[:, 0].long()
        common = TopK(ids_AK, prob_AK.clamp_min(TINY).log(), rest_A, count_A)
        values_A, gradient_AV = common.compare(divergence, params, q, places.written_N)
        if self.signal.rest == "sorted" and not pairs.whole:
            others = (prob_AW[:, pairs.theirs_alone], pairs.ours_alone)
            more_A, more_AV = sorted_distance(*others, q)
            values_A, gradient_AV = values_A + more_A, gradient_AV.add_(more_AV)
        return values_A, gradient_AV

    @staticmethod
    def _by_spelling(p: Distribution, pairs: Pairs) -> Distribution:
        """Over all of the student's tokens: common ones, and likely others as the one that is spelled most alike;
        scaled to 1."""
        assert pairs.nearest is not None
        vocab_size = len(pairs.ours_K) + len(pairs.ours_alone)
        prob_AV = p.prob.new_zeros(len(p.prob), vocab_size)
        prob_AV[:, pairs.ours_K] = p.prob[:, pairs.theirs_K]
        row_L, column_L = (p.prob[:, pairs.theirs_alone] > LEAST).nonzero(as_tuple=True)
        for row, token in zip(row_L.tolist(), pairs.theirs_alone[column_L].tolist(), strict=True):
            if (near := pairs.nearest(token)) is not None:
                prob_AV[row, near] += p.prob[row, token]
        return Distribution(prob_AV.clamp_min(TINY).log())
