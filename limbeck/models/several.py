"""Several teachers of one student. The first also writes the text and is the reference for evaluation.

Shapes: N response positions, B rows, M teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.config.teacher import SeveralTeachers, Together
from limbeck.data.batches import CHOSEN, REJECTED
from limbeck.models.local import served_text_caveat
from limbeck.models.teacher import dense_signal
from limbeck.models.teacher_interface import REFERENCE, WRITES, Teacher, TeacherParts, TeacherUse
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.objectives.head import TeacherSignal
from limbeck.signals.several import GatedSignal, MixedSignal
from limbeck.types import Batch, RecipeError, content_hash, nearest

GIVES = WRITES | {"teacher_distribution", "teacher_features", REFERENCE}


class TeacherEnsemble:
    """Teachers with weights, each for all text or for the rows of one tag.

    Args:
        teachers: the first is the main one.
        weights: one for each.
        tags: the tag of the rows that a teacher teaches, or None for all rows that no tag claims.
        together: how the teachers of a row are combined: the weighted `mean` of their probabilities, the teacher with
            the `least_cross_entropy` on the row's response (FuseLLM, arXiv:2401.10491), or by the student's
            `uncertainty` (Dynamic KD; the second teacher is the small one).
    """

    gives = GIVES
    average = None

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        tags: Sequence[str | None],
        together: Together,
    ) -> None:
        self.teachers = teachers
        self.weights = weights
        self.tags = tags
        self.together = together
        self.model = teachers[0].model
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
            teaches = by_tag if any(by_tag) else [tag is None for tag in self.tags]
            row_weights = [weight if use else 0.0 for weight, use in zip(self.weights, teaches, strict=True)]
            shares.append([weight / sum(row_weights) for weight in row_weights])
        return torch.tensor(shares)

    def _likeliest(self, batch: Batch, signals: Sequence[TeacherSignal], candidate_BM: Tensor) -> Tensor:
        """One-hot [B, M] of the candidate under which the row's response is most probable; the first of equals."""
        row_N, position_N = batch.response_positions()
        targets_N = batch.tokens_BT[row_N, position_N + 1].to(signals[0].device)
        log_prob_NM = torch.stack([signal.log_prob(targets_N).cpu().double() for signal in signals], 1)
        sums_BM = torch.zeros(candidate_BM.shape, dtype=torch.float64).index_add_(0, row_N, log_prob_NM)
        best_B = sums_BM.masked_fill(~candidate_BM, -torch.inf).argmax(-1)
        return torch.nn.functional.one_hot(best_B, len(signals)).float()


class SeveralKind:
    """Several models in process with the same tokens and template."""

    def gives(self, settings: SeveralTeachers) -> frozenset[str]:
        evidence = GIVES if settings.server is None else GIVES - {"contrast"}
        return evidence if settings.context is None else evidence - {"teacher_features"}

    def lacks(self, _: SeveralTeachers, evidence: str) -> str:
        if evidence == "contrast":
            return "it writes against another prompt, which a server can't; leave teacher.server out"
        if evidence == "teacher_features":
            return "it compares position by position, and this teacher is shown other prompts; use a divergence"
        return f"it reads {evidence.replace('_', ' ')}, which several teachers don't have in common; name one teacher"

    def refuse(self, settings: SeveralTeachers, use: TeacherUse) -> None:
        recipe = use.recipe
        tags = {writer.by for writer in recipe.writer} | {prompt.task for prompt in use.training_prompts}
        tags |= {CHOSEN, REJECTED}
        for number, other in enumerate(settings.beside):
            if other.only is not None and other.only not in tags and recipe.elicit is None:
                raise RecipeError(
                    f"teacher.beside[{number}].only",
                    f"no text is by or for {other.only!r}{nearest(other.only, tags - {''})}",
                )
        if "teacher_distribution" not in use.read:
            raise RecipeError(
                "teacher.beside",
                "no loss reads the teachers' distribution, so those beside would teach nothing; leave them out",
            )

    def prepare(self, settings: SeveralTeachers, parts: TeacherParts) -> Teacher:
        teachers = [parts.load(source) for source in (settings.model, *(other.model for other in settings.beside))]
        weights = [settings.weight, *(other.weight for other in settings.beside)]
        return TeacherEnsemble(teachers, weights, [None, *(other.only for other in settings.beside)], settings.together)

    def caveats(self, settings: SeveralTeachers, _: str | None) -> list[str]:
        return [] if settings.server is None else [served_text_caveat(settings.server.name, settings.model)]
