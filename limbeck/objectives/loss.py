"""The interface of a loss: what it reads, its parameters, what it refuses, what it learns, and its sums over a pass.

A loss is an object in the registry (`objectives/registry.py`). There are two ways to give sums. A *fused* loss gives
values and closed-form gradients for a block of logits (`token_values`); all fused losses of a step share one pass
through the chunked head. Any other loss gives its own sum over a micro-batch (`evaluate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from limbeck.objectives.bound import BoundLoss, ModelPair, ModelSizes
from limbeck.objectives.distribution import ValueAndGradient
from limbeck.objectives.facts import TeacherFacts, TextFacts
from limbeck.objectives.forward import StudentForward, TermSum
from limbeck.objectives.head import Block
from limbeck.objectives.parameters import Range, make_schedules
from limbeck.objectives.schedule import Schedule
from limbeck.types import SCORE, RecipeError, nearest

Unit = Literal["token", "row", "group"]
STUDENT = "student"  # the tag of text that the student writes while it trains
ADVANTAGE = "advantage"  # the column that rewards of the student's answers give
REFERENCE_LOG_PROB = "reference_log_prob"  # the column of the student before training


@dataclass(frozen=True)
class Responses:
    """The responses of a step that the student wrote, [B, T], 0 where `mask_BT` is.

    The log-probability of each token under the student that wrote it, under the distribution that it was drawn from
    (another temperature, a mixture), and under the teacher.
    """

    log_prob_BT: Tensor
    sampler_log_prob_BT: Tensor
    teacher_log_prob_BT: Tensor
    mask_BT: Tensor


@dataclass(frozen=True)
class LossSettings:
    """What a recipe says of a loss, checked.

    Args:
        params: its numbers, each of which may change with the training.
        values: its other settings.
        only: the writer, task or rank whose text it is limited to.
        by: the column that multiplies its values.
        path: its place in the recipe.
    """

    params: Mapping[str, Schedule] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    only: str | None = None
    by: str | None = None
    path: str = ""

    def softened(self) -> bool:
        """Whether its temperature is, at some step, other than 1."""
        schedule = self.params.get("temperature")
        return schedule is not None and (schedule.start, schedule.end) != (1, 1)


@dataclass(frozen=True)
class LossAtStep:
    """A loss that is not fused, at one step: its numbers, its factor (weight over amount), and what it learns."""

    settings: LossSettings
    params: Mapping[str, float]
    scale: float
    learned: BoundLoss | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss that a recipe can name.

    Args:
        reads: the evidence that it needs: tokens, answers, teacher_distribution, teacher_features, teacher_states,
            reference_start, reference_teacher, score (of a scalar head), student (text that the student writes while it
            trains), or columns.
        unit: what its sum is divided by: token weights, rows, or groups of answers to one prompt.
        ranges: the legal values of its numbers.
        writes: columns that it writes for each token, which may multiply other losses (`by`).
    """

    name: str
    formula: str
    paper: str
    reads: frozenset[str]
    unit: Unit = "token"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    writes: tuple[str, ...] = ()

    fused: ClassVar[bool] = False
    binds: ClassVar[bool] = False  # whether `bind` gives a module
    unlimited: ClassVar[str] = ""  # why it takes no `only`
    ranks: ClassVar[bool] = False  # whether the preferred answer must be among the answers to a prompt

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Its parameters with their defaults."""
        return {}

    @property
    def legal(self) -> Mapping[str, object]:
        """The legal values of its parameters, as text."""
        return self.ranges

    @property
    def needs(self) -> str:
        """What a recipe must have for it, beyond the evidence that it reads."""
        return ""

    @property
    def reads_teacher_log_prob(self) -> bool:
        """Whether it reads one teacher's log-probability of each written token."""
        return False

    @property
    def spans_responses(self) -> bool:
        """Whether `columns` makes something of whole responses."""
        return False

    @property
    def is_on_policy(self) -> bool:
        """Whether it is right only for text of today's student itself, not of an older one or a rounded copy."""
        return False

    @property
    def writes_columns(self) -> frozenset[str]:
        """The columns that `columns` makes."""
        return frozenset()

    # what a recipe says

    def parse(self, params: Mapping[str, Any], path: str) -> tuple[dict[str, Schedule], dict[str, Any]]:
        """Its numbers and other settings, checked. RecipeError for an unknown one or an illegal value."""
        return make_schedules(self.name, self.defaults, self.ranges, params=params, path=path), {}

    def limit(self, only: str | None, path: str) -> str | None:
        """The text that it is limited to, where a recipe says `only`. RecipeError if it can't be limited so."""
        if only is not None and self.unlimited:
            raise RecipeError(path, f"{self.name} {self.unlimited}")
        return only

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        """Refuse a recipe whose text lacks what it reads. RecipeError with the remedy."""
        path = settings.path
        if (SCORE in self.reads) != facts.scores:
            raise RecipeError(
                path,
                f"{self.name} reads the score of a whole conversation: set student.head: scalar"
                if SCORE in self.reads
                else f"{self.name} reads distributions over the vocabulary, and a student with a scalar head has none:"
                " use bradley_terry, or leave student.head out",
            )
        if STUDENT in self.reads and STUDENT not in facts.writers:
            raise RecipeError(
                path, f"{self.name} reads text that the student writes while it trains; add a writer {{by: student}}"
            )
        if ADVANTAGE in self.reads and not facts.rewarded:
            raise RecipeError(
                path,
                f"{self.name} reads the advantage of the student's answers, which rewards give: add"
                " rollout: {prompts: 8, group: 8, rewards: [check]}",
            )
        if ADVANTAGE in self.writes_columns and facts.rewarded:
            raise RecipeError(
                path, f"{self.name} makes advantages of its own, and so do rewards; leave it or rollout.rewards out"
            )
        if facts.self_taught and "reference_teacher" in self.reads:
            raise RecipeError(path, f"{self.name} compares with a frozen teacher, and this student teaches itself")
        if facts.tags is not None and settings.only is not None and settings.only not in facts.tags:
            raise RecipeError(
                f"{path}.only", f"no text is by or for {settings.only!r}{nearest(settings.only, facts.tags)}"
            )
        if facts.mixed_tag is not None:
            self._check_mixed(settings, facts.mixed_tag)

    def _check_mixed(self, settings: LossSettings, tag: str) -> None:
        """Refuse what a mixture of two texts can't teach."""
        if "answers" in self.reads:
            raise RecipeError(
                settings.path,
                f"{self.name} compares answers to one prompt, and a mixed text answers none; leave train.mixup out",
            )
        if settings.only in (None, tag) and "teacher_distribution" not in self.reads:
            raise RecipeError(
                settings.path,
                f"a mixed text has no label but the teacher's distribution, which {self.name} doesn't read; limit it"
                " to a writer",
            )

    def check_teacher(self, settings: LossSettings, facts: TeacherFacts) -> None:
        """Refuse a recipe whose teacher, as it is read, can't give what it reads. RecipeError with the remedy."""
        path = settings.path
        by_token = self.reads_teacher_log_prob or self.reads & {"teacher_features", "reference_teacher"}
        if facts.bridged and by_token:
            raise RecipeError(
                path,
                "it reads the teacher token by token, and this one has other tokens; use a divergence, uld or"
                " dual_space",
            )
        if facts.cached and self.reads & {"teacher_features", "teacher_states"}:
            raise RecipeError(
                path,
                "it reads the teacher's layers, and the cache keeps its last distribution; leave teacher.cache out",
            )
        one_opinion = self.reads_teacher_log_prob and (self.spans_responses or facts.together == "uncertainty")
        if facts.together is not None and one_opinion:
            raise RecipeError(path, "it reads one teacher's opinion of the text; use a divergence, or one teacher")

    def check_models(self, settings: LossSettings, student: ModelSizes, teacher: ModelSizes) -> None:
        """Refuse two models that it can't compare. RecipeError with the remedy."""

    # before and in the training

    def bind(self, settings: LossSettings, models: ModelPair) -> BoundLoss:
        """The module that taps the two models and holds what it learns beside the student, if it `binds`."""
        raise NotImplementedError

    def columns(self, responses: Responses, params: Mapping[str, float]) -> dict[str, Tensor]:
        """The columns [B, T] that it makes of whole responses, before the step is cut into micro-batches."""
        raise NotImplementedError

    def token_values(self, block: Block, params: Mapping[str, float]) -> ValueAndGradient:
        """Of a fused loss: values [R] in nats and their gradient for the logits [R, V], which the caller overwrites."""
        raise NotImplementedError

    def evaluate(self, at_step: LossAtStep, data: StudentForward) -> TermSum:
        """Of a loss that is not fused: its sum over a micro-batch."""
        raise NotImplementedError

    def measurement(self, total: float, count: float) -> float:
        """What it measured over a step, from the sum and count of `TermSum.measured`."""
        return total / count
