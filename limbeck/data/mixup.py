"""Mixup of texts: every micro-batch is followed by its rows with the embeddings of other rows mixed in (MixKD,
arXiv:2011.00593).

The only label of a mixed text is the teacher's distribution over the same mixture. The paper mixes sentences of
classification tasks, and the student also fits their mixed labels; here the rows of a step are mixed position by
position, the row's own embedding having the larger weight, and the student follows only the teacher.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from limbeck.data.batches import MIXED, Row, Source, StepBatch


@dataclass(frozen=True)
class MixupSource:
    """A `Source` that adds a mixed copy after each micro-batch of `source`. All draws depend on the seed and the step.

    Args:
        alpha: of the Beta distribution of the weights. A row's own weight is the larger of the two, so that it
            keeps its response positions.
    """

    source: Source
    seed: int
    alpha: float

    def step_batch(self, step: int, progress: float, states: dict[str, dict[str, float]], /) -> StepBatch:
        batch = self.source.step_batch(step, progress, states)
        rng = random.Random(f"{self.seed}/{step}/mixed")  # noqa: S311 (no secret)
        others = [row for micro_batch in batch.micro_batches for row in micro_batch]
        rng.shuffle(others)
        partners = iter(others)
        micro_batches = []
        for micro_batch in batch.micro_batches:
            mixed = [self._mixed(row, next(partners), rng.betavariate(self.alpha, self.alpha)) for row in micro_batch]
            micro_batches += [micro_batch, mixed]
        return StepBatch(micro_batches, batch.facts)

    def _mixed(self, row: Row, other: Row, weight: float) -> Row:
        """The row with another one mixed in; it has no writer, no preference, and is a group by itself."""
        name = f"{row.sample_id}/{MIXED}"
        return replace(
            row,
            sample_id=name,
            group=name,
            tags=frozenset({MIXED}),
            references=(),
            mixed=(other, max(weight, 1 - weight)),
        )

    def state(self) -> dict[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any], /) -> None:
        self.source.restore(state)
