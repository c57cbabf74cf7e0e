"""Mixup of texts: beside every micro-batch stand its rows with the embeddings of others mixed in (MixKD,
arXiv:2011.00593).

There is no label for a mixed text but the teacher, which reads the same mixture. In the paper sentences of
classification tasks are mixed, and the student also fits their mixed labels; here rows of a step are mixed position by
position, each leading its own, and only the teacher is followed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from limbeck.data.batches import MIXED, Row, Source, StepBatch


@dataclass(frozen=True)
class Mixed:
    """A `Source` that follows each micro-batch of `source` by its mixed twin. Every draw is a function of the seed and
    the step.

    Args:
        alpha: of the Beta distribution that the weights are drawn from. A row's own weight is the larger of the two, so
            that its response positions are its own.
    """

    source: Source
    seed: int
    alpha: float

    def step_batch(self, step: int, progress: float, states: dict[str, dict[str, float]], /) -> StepBatch:
        turn = self.source.step_batch(step, progress, states)
        noise = random.Random(f"{self.seed}/{step}/mixed")  # noqa: S311 (a draw, not a secret)
        others = [row for micro_batch in turn.micro_batches for row in micro_batch]
        noise.shuffle(others)
        partners = iter(others)
        found = []
        for micro_batch in turn.micro_batches:
            found += [
                micro_batch,
                [self._mixed(row, next(partners), noise.betavariate(self.alpha, self.alpha)) for row in micro_batch],
            ]
        return StepBatch(found, turn.facts)

    def _mixed(self, row: Row, other: Row, weight: float) -> Row:
        """The row with another mixed in; it has no writer, no preference and no group."""
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
