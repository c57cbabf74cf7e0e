"""A loss as a recipe names it: its weight and parameters, which may change with the training.

Terms return sums or values, never means: the loop divides each term's sum once, by the global weight of its unit.

Shapes: R positions of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.objectives.bound import BoundLoss, ModelPair, ModelSizes
from limbeck.objectives.distribution import ValueAndGradient
from limbeck.objectives.facts import TeacherFacts, TextFacts
from limbeck.objectives.forward import StudentForward, TermSum
from limbeck.objectives.head import Block
from limbeck.objectives.loss import STUDENT, Loss, LossAtStep, LossSettings, Unit
from limbeck.objectives.parameters import Range
from limbeck.objectives.registry import LOSSES, loss_named
from limbeck.objectives.schedule import Schedule, State, make_schedule
from limbeck.types import TAUGHT, RecipeError

WEIGHT = Range(0, float("inf"), open_high=True)


@dataclass(frozen=True)
class Term:
    """A loss with its weight and settings."""

    loss: Loss
    weight: Schedule
    settings: LossSettings = field(default_factory=LossSettings)

    @property
    def name(self) -> str:
        return self.loss.name

    @property
    def label(self) -> str:
        """Its name in metrics: two terms of one name differ in the text they are limited to."""
        return self.name if self.only is None else f"{self.name}@{self.only}"

    @property
    def reads(self) -> frozenset[str]:
        return self.loss.reads

    @property
    def unit(self) -> Unit:
        return self.loss.unit

    @property
    def column(self) -> str | None:
        """The column that its tokens' weights are multiplied by, where the text has it: gaps in the teacher's
        distribution are left out of its sum and of its amount."""
        return TAUGHT if "teacher_distribution" in self.reads and self.unit == "token" else None

    @property
    def params(self) -> Mapping[str, Schedule]:
        return self.settings.params

    @property
    def only(self) -> str | None:
        return self.settings.only

    def at_step(self, progress: float, states: Mapping[str, State]) -> TermAtStep:
        """The term with this step's weight and parameters."""
        params = {
            key: schedule.value(progress, states.get(f"{self.label}.{key}")) for key, schedule in self.params.items()
        }
        return TermAtStep(self, self.weight.value(progress, states.get(f"{self.label}.weight")), params)

    def after(
        self, states: dict[str, State], progress: float, loss: float, measured: tuple[float, float] | None = None
    ) -> None:
        """Update the states of adaptive schedules with the step's loss, or with what the term measured (sum, count)."""
        measurement = self.loss.measurement(*measured) if measured is not None and measured[1] else None
        for key, schedule in {"weight": self.weight, **self.params}.items():
            value = measurement if schedule.shape == "measured" else loss
            if schedule.remembers and value is not None:
                name = f"{self.label}.{key}"
                states[name] = schedule.after(states.get(name), progress, value)

    def check_text(self, facts: TextFacts) -> None:
        """Refuse a recipe whose text lacks what the loss reads. RecipeError with the remedy."""
        by = self.settings.by
        if by is not None and self.only != STUDENT and facts.fixed:
            raise RecipeError(
                f"{self.settings.path}.by", f"{by} stands beside the student's tokens alone; limit it: only: student"
            )
        if by is not None and by not in facts.columns:
            makers = [name for name, loss in LOSSES.items() if by in loss.writes]
            raise RecipeError(
                f"{self.settings.path}.by", f"nothing writes {by} beside the tokens; add the loss {' or '.join(makers)}"
            )
        self.loss.check_text(self.settings, facts)

    def check_teacher(self, facts: TeacherFacts) -> None:
        """Refuse a recipe whose teacher can't give what the loss reads. RecipeError with the remedy."""
        self.loss.check_teacher(self.settings, facts)

    def check_models(self, student: ModelSizes, teacher: ModelSizes) -> None:
        """Refuse two models that the loss can't compare. RecipeError with the remedy."""
        self.loss.check_models(self.settings, student, teacher)

    def bind(self, models: ModelPair) -> BoundLoss:
        """The module of a loss that `binds`: it taps the two models and holds what is learned beside the student."""
        return self.loss.bind(self.settings, models)


@dataclass(frozen=True)
class TermAtStep:
    """A term at one step: numbers in the place of schedules."""

    term: Term
    weight: float
    params: Mapping[str, float]

    @property
    def label(self) -> str:
        return self.term.label

    def values(self, block: Block) -> ValueAndGradient:
        """Of a fused loss: values [R] in nats and their gradient for the logits [R, V]."""
        values_R, gradient_RV = self.term.loss.token_values(block, self.params)
        by = self.term.settings.by
        if by is None:
            return values_R, gradient_RV
        by_R = block.columns[by].to(values_R.dtype)
        return values_R * by_R, gradient_RV.mul_(by_R[:, None])

    def evaluate(self, scale: float, learned: BoundLoss | None, data: StudentForward) -> TermSum:
        """Of a loss that is not fused: its sum over a micro-batch."""
        return self.term.loss.evaluate(LossAtStep(self.term.settings, self.params, scale, learned), data)


def make_term(name: str, params: Mapping[str, Any], weight: object = 1.0, path: str = "") -> Term:
    """The term `name` with its parameters checked. Any number may be a schedule, `{from: 1, to: 0, shape: linear}`.

    Raises:
        RecipeError: unknown term or parameter, or a value out of range; `path` is the term's place in the recipe.
    """
    loss = loss_named(name, path)
    rest = dict(params)
    only = rest.pop("only", None)
    if only is not None and not isinstance(only, str):
        raise RecipeError(
            f"{path}.only".lstrip("."), f"{only!r} is not the name of a writer, such as teacher, or of a task"
        )
    weight_schedule = make_schedule(weight, f"{path}.weight".lstrip("."), WEIGHT.check)
    by = rest.pop("by", None)
    columns = list(dict.fromkeys(column for other in LOSSES.values() for column in other.writes))
    if by is not None and (by not in columns or not loss.fused):
        raise RecipeError(
            f"{path}.by".lstrip("."), f"{by!r} is no number beside every token for {name}; legal: {', '.join(columns)}"
        )
    schedules, values = loss.parse(rest, path)
    settings = LossSettings(schedules, values, loss.limit(only, f"{path}.only".lstrip(".")), by=by, path=path)
    return Term(loss, weight_schedule, settings)
