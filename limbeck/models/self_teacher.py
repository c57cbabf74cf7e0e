"""The student as its own teacher: with its weights before the training, its current ones, or their moving average.

No second copy of the model is loaded: the teacher's pass runs the student's modules with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.config.teacher import SelfTeacher
from limbeck.models.context import PromptContext
from limbeck.models.model import Model
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.teacher_interface import REFERENCE, TEACHER_EVIDENCE, WRITES, Teacher, TeacherParts, TeacherUse
from limbeck.types import RecipeError


class Average:
    """An exponential moving average of the trained parameters: `decay` of the average and the rest of the new values
    at every step. Starts with the parameters' values."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[str, Tensor] = {}

    def start(self, net: nn.Module) -> None:
        """Begin with the trained parameters of `net`."""
        self.parameters = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.detach(), 1 - self.decay)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the parameters. No autograd graph may span the start or the end of this context."""
        live = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.tensors[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = live[name]


@contextmanager
def adapters_off(net: PreTrainedModel) -> Iterator[None]:
    """Switch the low-rank adapters off: the model computes, to the bit, what it did before they were added."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in net.modules() if isinstance(module, LoraLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def self_teacher(
    student: Model,
    prompt_context: PromptContext | None,
    inside: Callable[[], AbstractContextManager[None]],
    average: Average | None = None,
) -> InProcessTeacher:
    """The student's modules as a teacher that is shown `prompt_context`; `inside` switches to the teacher's weights."""

    @contextmanager
    def as_teacher() -> Iterator[None]:
        training = student.net.training
        student.net.eval()  # a teacher has no dropout
        try:
            with inside():
                yield
        finally:
            student.net.train(training)

    return InProcessTeacher(student.with_context(prompt_context), as_teacher, average)


class SelfKind:
    """The student with its current weights, or with their moving average."""

    def gives(self, settings: SelfTeacher) -> frozenset[str]:
        evidence = WRITES | TEACHER_EVIDENCE
        return evidence if settings.context is None else evidence - {"teacher_features"}

    def lacks(self, _: SelfTeacher, evidence: str) -> str:
        if evidence == REFERENCE:
            return "it compares with a frozen teacher, and this student teaches itself"
        return "it compares position by position, and this teacher is shown other prompts; use a divergence"

    def refuse(self, settings: SelfTeacher, use: TeacherUse) -> None:
        recipe = use.recipe
        if recipe.student.start.pretrained != settings.model:
            raise RecipeError(
                "teacher.weights",
                f"{settings.weights} weights are the student's own: set student.start.pretrained: {settings.model}",
            )
        if recipe.rollout is not None and recipe.rollout.joint is not None:
            raise RecipeError(
                "rollout.joint",
                "a student that teaches itself can't write beside itself; leave it out, or name a teacher",
            )

    def prepare(self, settings: SelfTeacher, parts: TeacherParts) -> Teacher:
        if settings.weights == "live":
            return self_teacher(parts.student, parts.prompt_context, nullcontext)
        average = Average(settings.decay)
        return self_teacher(parts.student, parts.prompt_context, average.in_place, average)

    def caveats(self, settings: SelfTeacher, _: str | None) -> list[str]:
        return [
            "The teacher measured here has the start's weights; while training it had the student's own"
            f" ({settings.weights})."
        ]
