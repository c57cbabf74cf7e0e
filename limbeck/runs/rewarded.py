"""What a training on rewards costs beside its updates: the answers that the student writes, and who reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.config.recipe import Recipe
from limbeck.objectives.loss import REFERENCE_LOG_PROB
from limbeck.objectives.term import Term
from limbeck.runs.hardware import Hardware
from limbeck.runs.memory import teacher_shares_device
from limbeck.runs.shapes import Shape, forward_flops


@dataclass(frozen=True)
class RewardedText:
    """The answers of a training on rewards. Groups that are asked again (`resample`) are not counted.

    Args:
        trained: answers over all updates; with several passes, each as often as it is trained on.
        written: answers that are written and judged.
        asked: prompts that are read to write them, one for a group.
        reference: whether the student before training reads them, too.
    """

    trained: int
    written: int
    asked: int
    reference: bool

    def judged(self, answer: float) -> tuple[int, int]:
        """(answers that are judged, their tokens), with so many tokens to each."""
        return self.written, int(self.written * answer)

    def flops(self, student: Shape, scorers: Sequence[Shape], prompt: float, answer: float) -> float:
        """Floor of writing, judging and comparing; half is added for decoding, as for the teacher.

        Args:
            scorers: the reward models.
            prompt, answer: tokens of one, on average.
        """
        said = int(self.written * answer)
        flops = 1.5 * forward_flops(student, int(self.asked * prompt) + 2 * said, 2 * said)
        return flops + self.judging_flops(scorers, prompt, answer) + self.reference_flops(student, prompt, answer)

    def judging_flops(self, scorers: Sequence[Shape], prompt: float, answer: float) -> float:
        """Of the reward models."""
        read = int(self.written * (prompt + answer))
        return sum(forward_flops(scorer, read, 0) for scorer in scorers)

    def reference_flops(self, student: Shape, prompt: float, answer: float) -> float:
        """Of the student before training."""
        read, said = int(self.written * (prompt + answer)), int(self.written * answer)
        return forward_flops(student, read, said) if self.reference else 0.0


def rewarded_text(recipe: Recipe, terms: Sequence[Term], steps: int) -> RewardedText | None:
    """The answers of so many updates; None where no rewards judge them."""
    settings = recipe.rollout
    if settings is None or settings.rewards is None:
        return None
    prompts, group = settings.prompts or 1, settings.group or 1
    writings = math.ceil(steps / (settings.passes or 1))
    return RewardedText(
        trained=steps * prompts * group,
        written=writings * prompts * group,
        asked=writings * prompts,
        reference=any(REFERENCE_LOG_PROB in term.reads for term in terms),
    )


def rewarded_bytes(
    recipe: Recipe, terms: Sequence[Term], student: Shape, scorers: Sequence[Shape], *, hardware: Hardware
) -> float:
    """The reward models in float32, where they share the student's device, and the copy of the student before
    training."""
    models = sum(4.0 * scorer.parameters for scorer in scorers)
    if not teacher_shares_device(recipe.machine, hardware):
        models = 0.0
    copied = recipe.student.lora is None and any(REFERENCE_LOG_PROB in term.reads for term in terms)
    return models + (4.0 * student.parameters if copied else 0.0)
