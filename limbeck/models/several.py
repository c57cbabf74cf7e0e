"""Several teachers of one text: the first writes and is measured against; all of them stand beside the student's text.

Shapes: N response positions, B rows, M teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.config.teacher import Together
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.objectives.head import token_log_probs
from limbeck.signals.dense import DenseSignal
from limbeck.signals.several import GatedSignal, MixedSignal
from limbeck.types import Batch, content_hash


class SeveralTeachers:
    """Teachers with weights, each for all text or for the rows of one tag.

    Args:
        teachers: the first is the main one.
        weights: one for each.
        tags: whose rows a teacher is for, or None. A row that has tags of some teachers is theirs alone.
        together: how those of a row become one: the `mean` of their probabilities by weight, the one with the
            `least_cross_entropy` on the row's response (FuseLLM, arXiv:2401.10491), or by the student's `uncertainty`
            (Dynamic KD; the second is the small one).
    """

    def __init__(
        self,
        teachers: Sequence[InProcessTeacher],
        weights: Sequence[float],
        tags: Sequence[str | None],
        together: Together,
    ) -> None:
        self.teachers = teachers
        self.weights = weights
        self.tags = tags
        self.together = together
        self.model = teachers[0].model
        self.can = teachers[0].can - {"log_probs", "teacher_states"}
        self.vocab_size = min(teacher.vocab_size for teacher in teachers)
        facts = [[teacher.identity, weight, tag] for teacher, weight, tag in zip(teachers, weights, tags, strict=True)]
        self.identity = f"several-{content_hash([facts, together])[:16]}"

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """The teachers' common distribution at the batch's response positions, and the main one's features."""
        vocab_size = vocab_size or self.vocab_size
        first = self.teachers[0].view(batch, taps, vocab_size)
        signals = [first.signal, *(teacher.view(batch, NO_TAPS, vocab_size).signal for teacher in self.teachers[1:])]
        dense = [signal for signal in signals if isinstance(signal, DenseSignal)]
        if self.together == "uncertainty":
            large, small = dense
            return TeacherView(GatedSignal(small, large), first.features)
        weight_BM = self._shares(batch)
        row_N, _ = batch.response_positions()
        if self.together == "least_cross_entropy":
            weight_BM = self._best(batch, dense, weight_BM > 0)
        return TeacherView(MixedSignal(dense, weight_BM[row_N].to(dense[0].hidden_NE.device)), first.features)

    def _shares(self, batch: Batch) -> Tensor:
        """Each row's weights [B, M], which add up to 1."""
        shares = []
        for row in range(len(batch.sample_ids)):
            tags = batch.tags[row] if batch.tags else frozenset()
            theirs = [tag is not None and tag in tags for tag in self.tags]
            here = theirs if any(theirs) else [tag is None for tag in self.tags]
            row_weights = [weight if chosen else 0.0 for weight, chosen in zip(self.weights, here, strict=True)]
            shares.append([weight / sum(row_weights) for weight in row_weights])
        return torch.tensor(shares)

    def _best(self, batch: Batch, signals: Sequence[DenseSignal], asked_BM: Tensor) -> Tensor:
        """1 for the row's teacher that finds its response likeliest, among those that are asked; the first of
        equals."""
        row_N, position_N = batch.response_positions()
        targets_N = batch.tokens_BT[row_N, position_N + 1].to(signals[0].hidden_NE.device)
        found = [token_log_probs(signal.hidden_NE, signal.head, targets_N).double().cpu() for signal in signals]
        sums_BM = torch.zeros(asked_BM.shape, dtype=torch.float64).index_add_(0, row_N, torch.stack(found, 1))
        best_B = sums_BM.masked_fill(~asked_BM, -torch.inf).argmax(-1)
        return torch.nn.functional.one_hot(best_B, len(signals)).float()
