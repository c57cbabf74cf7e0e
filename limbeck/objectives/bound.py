"""Losses that are bound to one student and one teacher: they read inner layers, or learn projections, or both.

What such a loss learns is trained and checkpointed with the student, and dropped when the student is exported.

Shapes: B rows, N response positions, D width of the student, E of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from limbeck.objectives.forward import NO_TAPS, Features, Positions, StudentForward, Taps, TermSum
from limbeck.objectives.head import Head, TeacherSignal
from limbeck.objectives.layers import layer_map
from limbeck.objectives.parameters import Setting
from limbeck.objectives.precision import full_precision
from limbeck.types import Batch, RecipeError

STUDENT_SIDE = 0
TEACHER_SIDE = 1


class ModelSizes(Protocol):
    """The sizes of a model that decide whether a loss can be bound to it."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def query_width(self) -> int: ...
    @property
    def key_value_width(self) -> int: ...


@dataclass(frozen=True)
class ModelPair:
    """A student and a teacher to which losses are bound.

    Args:
        layers: how many layers each has.
        widths: the width of each one's hidden states.
        seed: of the initial projections.
        embed: the student's embeddings of tokens, without gradient.
        dense: makes a teacher signal of hidden states and a head.
    """

    layers: tuple[int, int]
    widths: tuple[int, int]
    seed: int
    embed: Callable[[Tensor], Tensor]
    dense: Callable[[Tensor, Head], TeacherSignal]


class PreparationText(Protocol):
    """The training text as the frozen models read it before the first step. Side 0 is the student, 1 the teacher."""

    @property
    def bank_rows(self) -> Mapping[str, int]:
        """Each sample's place in a bank, by its id."""

    def steps(self, epoch: int, /) -> Iterator[list[Batch]]:
        """The micro-batches of one step after the other, in the order of this epoch, again and again."""

    def batches(self) -> Iterator[Batch]:
        """Every row once."""

    def features(self, side: int, batch: Batch, taps: Taps, /) -> Features:
        """What these layers of one model give, without gradient."""

    def head(self, side: int, /) -> Head:
        """The output projection of one model, without gradient."""

    def report_progress(self, done: int, total: int, /) -> None: ...


class BoundLoss(nn.Module):
    """Base of losses that are bound to two models. `values` are its settings, checked.

    A subclass declares its `settings` and implements `forward`, which gives a value per token [N] or per row [B] (its
    `unit`). One with a setting `layers` has `pairs` of layers and taps their hidden states or attention (`tapped`).
    One that is no sum over such values overrides `evaluate` instead.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}
    reads: ClassVar[frozenset[str]] = frozenset({"teacher_features"})
    unit: ClassVar[Literal["token", "row"]] = "token"
    tapped: ClassVar[Literal["hidden", "attention"]] = "hidden"
    same_heads: ClassVar[bool] = False  # whether both models must have equally many attention heads
    same_width: ClassVar[str] = ""  # what to do about models of different widths, where it can't compare those
    needs_fixed_text: ClassVar[str] = ""  # why it needs some text that is there before the training
    needs_all_text: ClassVar[str] = ""  # why all of its text must be there before the training

    def __init__(self, values: Mapping[str, Any], models: ModelPair) -> None:
        super().__init__()
        self.values = values
        self.pairs = layer_pairs(values, *models.layers) if "layers" in values else ()

    @classmethod
    def check_sizes(cls, values: Mapping[str, Any], student: ModelSizes, teacher: ModelSizes, path: str) -> None:
        """Refuse two models that can't be compared by this loss. RecipeError with the remedy."""
        if "layers" in values:
            layer_pairs(values, student.layers, teacher.layers, path)
        if cls.same_width:
            check_width(student, teacher, path, cls.same_width)
        if cls.same_heads and student.heads != teacher.heads:
            raise RecipeError(
                path, f"the student has {student.heads} attention heads, the teacher {teacher.heads}; use relations"
            )

    @property
    def lr_multiplier(self) -> float:
        """How many times the student's learning rate its own parameters are trained with."""
        return 1.0

    def taps(self, side: int) -> Taps:
        """The layers that it reads of the student (0) or the teacher (1)."""
        layers = frozenset(pair[side] for pair in self.pairs)
        if not layers:
            return NO_TAPS
        return Taps(hidden=layers) if self.tapped == "hidden" else Taps(attention=layers)

    def prepare(self, text: PreparationText) -> None:
        """Learn or compute what must be there before the first step."""

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        raise NotImplementedError

    def evaluate(self, data: StudentForward, only: str | None, scale: float) -> TermSum:
        """The weighted sum of its values over the text with the tag `only`."""
        values = full_precision(self(data.features, data.teacher.features, data.positions))
        batch = data.batch
        weight = batch.row_weights() * batch.rows_on(only) if self.unit == "row" else data.token_weights(only)
        total = (values * weight.to(values.device, values.dtype)).sum()
        return TermSum(scale * total, float(total.detach()))


def check_width(student: ModelSizes, teacher: ModelSizes, path: str, remedy: str) -> None:
    """RecipeError for models of different widths."""
    if student.width != teacher.width:
        raise RecipeError(path, f"the student's width {student.width} is not the teacher's {teacher.width}; {remedy}")


def layer_pairs(
    values: Mapping[str, Any], student_layers: int, teacher_layers: int, path: str = ""
) -> tuple[tuple[int, int], ...]:
    """The layers that these settings compare. RecipeError for layers that a model does not have."""
    embeddings = bool(values.get("embeddings", False))
    return layer_map(
        values["layers"], student_layers, teacher_layers, embeddings=embeddings, path=f"{path}.layers".lstrip(".")
    )


def joined_taps(losses: list[BoundLoss], side: int) -> Taps:
    """The layers that all of these losses together read of one model."""
    taps = [loss.taps(side) for loss in losses]
    return Taps(
        frozenset[int]().union(*(tap.hidden for tap in taps)), frozenset[int]().union(*(tap.attention for tap in taps))
    )
