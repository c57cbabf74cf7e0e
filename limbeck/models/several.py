"""Several teachers of one text. The first writes the text and is the reference for evaluation; all of them teach.

Shapes: N response positions, B rows, M teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.config.teacher import Together
from limbeck.models.teacher import InProcessTeacher, dense_signal
from limbeck.objectives.head import TeacherSignal
from limbeck.objectives.total import NO_TAPS, Taps, TeacherView
from limbeck.signals.several import GatedSignal, MixedSignal
from limbeck.types import Batch, content_hash


class SeveralTeachers:
    """Teachers with weights, each for all text or for the rows of one tag.

    Args:
        teachers: the first is the main one.
        weights: one for each.
        tags: the tag of the rows that a teacher is for, or None. A row with tags of some teachers is for them alone.
        together: how the teachers of a row are combined: the weighted `mean` of their probabilities, the teacher with
            the `least_cross_entropy` on the row's response (FuseLLM, arXiv:2401.10491), or by the student's
            `uncertainty` (Dynamic KD; the second teacher is the small one).
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
        main = self.teachers[0].view(batch, taps, vocab_size)
        others = [teacher.view(batch, NO_TAPS, vocab_size) for teacher in self.teachers[1:]]
        signals = [dense_signal(view) for view in (main, *others)]
        if self.together == "uncertainty":
            large, small = signals
            return TeacherView(GatedSignal(small, large), main.features)
        weight_BM = self._shares(batch)
        row_N, _ = batch.response_positions()
        if self.together == "least_cross_entropy":
            weight_BM = self._likeliest(batch, signals, weight_BM > 0)
        return TeacherView(MixedSignal(signals, weight_BM[row_N].to(signals[0].device)), main.features)

    def _shares(self, batch: Batch) -> Tensor:
        """Each row's weights [B, M], which add up to 1."""
        shares = []
        for row in range(len(batch.sample_ids)):
            tags = batch.tags[row] if batch.tags else frozenset()
            by_tag = [tag is not None and tag in tags for tag in self.tags]
            chosen = by_tag if any(by_tag) else [tag is None for tag in self.tags]
            row_weights = [weight if use else 0.0 for weight, use in zip(self.weights, chosen, strict=True)]
            shares.append([weight / sum(row_weights) for weight in row_weights])
        return torch.tensor(shares)

    def _likeliest(self, batch: Batch, signals: Sequence[TeacherSignal], candidate_BM: Tensor) -> Tensor:
        """1 for the candidate that gives the row's response the highest probability, the first of equals; else 0."""
        row_N, position_N = batch.response_positions()
        targets_N = batch.tokens_BT[row_N, position_N + 1].to(signals[0].device)
        log_prob_NM = torch.stack([signal.log_prob(targets_N).double().cpu() for signal in signals], 1)
        sums_BM = torch.zeros(candidate_BM.shape, dtype=torch.float64).index_add_(0, row_N, log_prob_NM)
        best_B = sums_BM.masked_fill(~candidate_BM, -torch.inf).argmax(-1)
        return torch.nn.functional.one_hot(best_B, len(signals)).float()
