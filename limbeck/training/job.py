"""One training: the objective of a micro-batch, the text, the settings, and the folder of its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.config.machine import Machine
from limbeck.config.recipe import Recipe
from limbeck.config.sections import Train
from limbeck.data.batches import FixedText, Row, Source, steps_of_epoch
from limbeck.data.mixup import MixupSource
from limbeck.models.model import gives_scores, head_of
from limbeck.models.taps import features
from limbeck.models.teacher_interface import MovingAverage
from limbeck.objectives.bound import BoundLoss
from limbeck.objectives.forward import NO_TAPS, StudentForward, Taps, TeacherView
from limbeck.objectives.precision import passes_in
from limbeck.objectives.schedule import State
from limbeck.objectives.term import Term
from limbeck.types import Batch


def no_teacher(_: Batch) -> TeacherView:
    """An empty view, for objectives whose terms read no teacher."""
    return TeacherView()


def expect_nothing(_: Sequence[Batch]) -> None:
    """For teachers that are asked no sooner than their answer is needed."""


@dataclass(frozen=True)
class Objective:
    """Computes what the losses of a micro-batch read.

    Args:
        net: the student.
        terms: the recipe's losses.
        teacher: the teacher's side of a micro-batch.
        learned: losses with parameters of their own, by term label.
        taps: the layers of the student that losses read.
        bank_rows: each sample's row in the losses' banks.
        vocab_size: how many tokens are compared, if the student's head has more rows than the teacher's.
        states: of the adaptive schedules; kept in checkpoints.
        rounded: the type in which the student's passes compute; its weights stay in float32.
        expect: told a step's micro-batches in their order, so that a teacher elsewhere can work ahead.
    """

    net: PreTrainedModel
    terms: Sequence[Term]
    teacher: Callable[[Batch], TeacherView] = no_teacher
    learned: Mapping[str, BoundLoss] = field(default_factory=dict)
    taps: Taps = NO_TAPS
    bank_rows: Mapping[str, int] = field(default_factory=dict)
    vocab_size: int | None = None
    states: dict[str, State] = field(default_factory=dict)
    rounded: torch.dtype | None = None
    expect: Callable[[Sequence[Batch]], None] = expect_nothing

    @property
    def keeps_groups(self) -> bool:
        """Whether the answers to one prompt must share a micro-batch."""
        return any(term.unit == "group" for term in self.terms)

    def forward(self, batch: Batch, step: int) -> StudentForward:
        """The teacher's side of a micro-batch, and the student's forward pass."""
        view = self.teacher(batch)
        with passes_in(self.rounded, self.net.device):
            hidden_BTD, states = features(self.net, batch.tokens_BT, *self.taps, mixed=batch.mixed)
        head = replace(head_of(self.net), rounded=self.rounded)
        ends = (index.to(hidden_BTD.device) for index in batch.last_positions())
        return StudentForward(
            batch,
            hidden_ND=hidden_BTD[batch.response_positions()],
            head=head.cut(self.vocab_size or head.vocab_size),
            features=states,
            teacher=view,
            step=step,
            bank_rows=self.bank_rows,
            ended_BD=hidden_BTD[*ends] if gives_scores(self.net) else None,
        )

    def parameters(self) -> dict[str, Tensor]:
        """All trained parameters: the student's and the losses' own."""
        parameters: dict[str, Tensor] = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        for label, match in self.learned.items():
            parameters |= {f"match.{label}.{name}": p for name, p in match.named_parameters() if p.requires_grad}
        return parameters

    def frozen(self) -> dict[str, Tensor]:
        """Tensors of the losses that are not trained: filters of the teacher, banks."""
        tensors = {
            f"{label}.{name}": value
            for label, match in self.learned.items()
            for name, value in match.state_dict().items()
        }
        trained = self.parameters()
        return {name: value for name, value in tensors.items() if f"match.{name}" not in trained and value.numel()}

    def rate_multiplier(self, name: str) -> float:
        """The learning rate of a parameter as a multiple of the student's."""
        for label, learned in self.learned.items():
            if name.startswith(f"match.{label}."):
                return learned.lr_multiplier
        return 1.0


@dataclass(frozen=True)
class TrainingJob:
    """All that one training needs.

    Args:
        rows: text written before the training.
        settings: steps, rates, seed.
        folder: receives `checkpoints/` and `metrics.jsonl`.
        key: names the job in its checkpoints; a checkpoint with another key is refused.
        source: where the steps' text comes from; by default the rows, in an order that the seed decides.
        prepare: called before step 0, and again if the run was killed before its first checkpoint.
        average: the student's moving average, if that is the teacher.
        monitor: returns (sum, count) by metric of each micro-batch of the student's own text.
        frozen: the models whose passes the losses read at every step, beside the student.
        machine: sizes that suit the device.
        row_tokens: how many of a step's response tokens are of the rows, if the student answers beside them
            (`tokens_beside`).
    """

    objective: Objective
    rows: Sequence[Row]
    settings: Train
    folder: Path
    key: str
    source: Source | None = None
    prepare: Callable[[], None] = lambda: None
    average: MovingAverage | None = None
    monitor: Callable[[StudentForward], dict[str, tuple[float, float]]] | None = None
    frozen: Sequence[PreTrainedModel] = ()
    machine: Machine = field(default_factory=Machine)
    row_tokens: int | None = None

    @property
    def net(self) -> PreTrainedModel:
        return self.objective.net

    @property
    def terms(self) -> Sequence[Term]:
        return self.objective.terms

    @cached_property
    def text(self) -> Source:
        """Where the steps' text comes from."""
        if self.source is not None:
            return self.source
        text = FixedText(self.rows, self.settings.seed, self.settings.tokens_per_step, self.objective.keeps_groups)
        return text if self.settings.mixup is None else MixupSource(text, self.settings.seed, self.settings.mixup)

    @property
    def steps(self) -> int:
        """The number of updates."""
        return total_steps(self.rows, self.settings, self.objective.keeps_groups, self.row_tokens)


def tokens_beside(recipe: Recipe) -> int | None:
    """How many of a step's response tokens are of text that is there before the training, if the student answers the
    same prompts beside it; None where it does not, so that all of them are."""
    if recipe.student_writer is None or not recipe.all_answer:
        return None
    return max(1, round(len(recipe.fixed_writers) / len(recipe.writer) * recipe.train.tokens_per_step))


def total_steps(rows: Sequence[Row], settings: Train, together: bool = False, row_tokens: int | None = None) -> int:
    """The number of updates that the settings ask for; an epoch is every row once.

    Args:
        together: the answers to one prompt share a step.
        row_tokens: see `TrainingJob`.
    """
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    tokens = settings.tokens_per_step if row_tokens is None else row_tokens
    together = together or row_tokens is not None
    return max(1, round(settings.epochs * len(steps_of_epoch(rows, settings.seed, 0, tokens, together=together))))
