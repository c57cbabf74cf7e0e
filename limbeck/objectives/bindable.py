"""The registered side of losses that are bound to two models: their settings and checks, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from limbeck.objectives.bound import BoundLoss, ModelPair, ModelSizes, layer_pairs
from limbeck.objectives.facts import TextFacts
from limbeck.objectives.forward import StudentForward, TermSum
from limbeck.objectives.loss import STUDENT, Loss, LossAtStep, LossSettings
from limbeck.objectives.parameters import check_settings
from limbeck.objectives.registry import LossesOf, register
from limbeck.objectives.schedule import Schedule
from limbeck.types import RecipeError

MOST_LAYERS = 1000
AnyBound = TypeVar("AnyBound", bound=BoundLoss)


@dataclass(frozen=True, kw_only=True)
class BindableLoss(Loss):
    """A loss whose sums are those of `bound`, once it is bound to a student and a teacher."""

    bound: type[BoundLoss]

    binds: ClassVar[bool] = True

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {key: setting.default for key, setting in self.bound.settings.items()}

    @property
    def legal(self) -> Mapping[str, object]:
        return {key: setting.legal for key, setting in self.bound.settings.items() if setting.legal}

    def parse(self, params: Mapping[str, Any], path: str) -> tuple[dict[str, Schedule], dict[str, Any]]:
        values = check_settings(self.name, self.bound.settings, params=params, path=path)
        if "layers" in values:  # their form only: whether the models have these layers is checked in `check_models`
            layer_pairs(values, MOST_LAYERS, MOST_LAYERS, path)
        return {}, values

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        super().check_text(settings, facts)
        if facts.teacher_prompts and "teacher_features" in self.reads:
            raise RecipeError(
                settings.path,
                f"{self.name} compares position by position, and this teacher is shown other prompts; use a divergence",
            )
        if self.bound.needs_all_text and STUDENT in facts.writers:
            raise RecipeError(settings.path, f"{self.bound.needs_all_text}; leave the student out of the writers")
        if self.bound.needs_fixed_text and not facts.fixed:
            raise RecipeError(settings.path, f"{self.bound.needs_fixed_text}; add a writer")

    def check_models(self, settings: LossSettings, student: ModelSizes, teacher: ModelSizes) -> None:
        self.bound.check_sizes(settings.values, student, teacher, settings.path)

    def bind(self, settings: LossSettings, models: ModelPair) -> BoundLoss:
        return self.bound(settings.values, models)

    def evaluate(self, at_step: LossAtStep, data: StudentForward) -> TermSum:
        assert at_step.learned is not None, f"{self.name} is not bound to two models"
        return at_step.learned.evaluate(data, at_step.settings.only, at_step.scale)


BINDABLE = LossesOf(BindableLoss)


def register_bound(name: str, formula: str, paper: str) -> Callable[[type[AnyBound]], type[AnyBound]]:
    """Register a class of `BoundLoss` as the loss `name`."""

    def add(bound: type[AnyBound]) -> type[AnyBound]:
        register(BindableLoss(name=name, formula=formula, paper=paper, reads=bound.reads, unit=bound.unit, bound=bound))
        return bound

    return add
