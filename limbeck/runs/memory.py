"""How many bytes of a device's memory, and of the disk, a training takes, from the sizes of its models alone.

On several ranks either each holds all of it, or matrices are divided among them (`machine.shard: full`, docs/ranks.md):
then each holds 1/N of the weights, gradients and moments of matrices, and gathers what it computes with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from limbeck.config.machine import Machine
from limbeck.config.recipe import Recipe
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import MICRO_TOKENS
from limbeck.models.placement import Precision
from limbeck.models.teacher_interface import TeacherUse
from limbeck.objectives.term import Term
from limbeck.runs.hardware import GIB, Hardware
from limbeck.runs.shapes import Shape, Shapes
from limbeck.signals.forms import form_of

Parts = dict[str, float]  # bytes, by what they hold

BYTES_PER_ROOT = 33  # of activations for the backward pass, per token and layer, for the root of the layer's weights
LORA_WIDTHS = 20  # inputs and outputs of a layer's matrices together, in widths, about
LAYERS_AT_ONCE = 2  # gathered: the one that computes, and the next
LIBRARY_BYTES = 0.9 * GIB  # the libraries, and on the CPU one chunk of logits and its gradients
FLOAT = 4  # bytes of a float32


def teacher_precision(recipe: Recipe) -> Precision:
    """How the weights of the recipe's teachers are kept."""
    settings = recipe.teacher
    return Precision.named(getattr(settings, "dtype", None), getattr(settings, "quantise", None))


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The type that the student's passes compute in."""
    return Precision.named(recipe.train.precision).dtype


def weight_bytes(shape: Shape, precision: Precision, ranks: int = 1) -> float:
    """A model's weights, or a rank's part of them where they are divided. Those of quantised layers have a scale for
    every 32 or so."""
    dense = precision.dtype.itemsize
    layer = {"int8": 1.05, "int4": 0.6}.get(precision.quantise or "", dense)
    matrices = layer * shape.layers * (shape.layer_parameters - shape.layer_vectors) + dense * _outside(shape)
    return matrices / ranks + layer * shape.layers * shape.layer_vectors


def student_bytes(recipe: Recipe, student: Shape, ranks: int = 1) -> Parts:
    """The student's weights, gradients and Adam's two moments, all trained ones in fp32, and the copies that passes in
    a shorter type compute with. Of matrices that are divided, a rank's part."""
    lora = recipe.student.lora
    if lora is None:
        trained = weight_bytes(student, Precision(), ranks)
        parts = {"weights": trained, "gradients": trained, "moments": 2 * trained}
    else:
        adapters = FLOAT * adapter_parameters(recipe, student)
        base = weight_bytes(student, Precision.of_base(lora.base), ranks)
        parts = {"weights": base + adapters, "gradients": adapters, "moments": 2 * adapters}
    if recipe.train.precision is not None:  # of every matrix; what is divided is gathered so, except for the head
        parts["rounded copies"] = 2.0 * (student.parameters if ranks == 1 else student.head_parameters)
    return parts


def gathered_sizes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of a number of a divided student as it is gathered: (of embeddings and head, of a layer)."""
    lora = recipe.student.lora
    kept = FLOAT if lora is None else Precision.of_base(lora.base).dtype.itemsize
    return kept, kept if recipe.train.precision is None else compute_dtype(recipe).itemsize


def gathered_bytes(recipe: Recipe, student: Shape) -> float:
    """What a rank gathers of a divided student: embeddings and head for a whole pass, some layers at once, and the
    gradients of these before they are divided again."""
    outside, layers = _outside(student), LAYERS_AT_ONCE * student.layer_parameters
    of_outside, of_layers = gathered_sizes(recipe)
    gradients = FLOAT * (outside + layers) if recipe.student.lora is None else 0.0
    return of_outside * outside + of_layers * layers + gradients


def gathered_teacher_bytes(teacher: Shape, precision: Precision) -> float:
    """What a rank gathers of a divided teacher: embeddings and head for a whole pass, and some layers at once."""
    return precision.dtype.itemsize * (_outside(teacher) + LAYERS_AT_ONCE * teacher.layer_parameters)


def activation_bytes(recipe: Recipe, student: Shape, tokens: int) -> float:
    """What a micro-batch of so many tokens keeps for its backward pass."""
    activations = student.layers * BYTES_PER_ROOT * math.sqrt(student.layer_parameters)
    if recipe.machine.checkpointing:  # each layer's input, and the inside of one layer at a time
        activations = activations / student.layers + FLOAT * student.layers * student.width
    return tokens * activations / (1 if recipe.train.precision is None else 2)  # half the bytes inside the layers


def training_bytes(recipe: Recipe, student: Shape) -> float:
    """All that a training keeps on one device, beside its teachers."""
    tokens = recipe.machine.micro_tokens or MICRO_TOKENS
    return sum(student_bytes(recipe, student).values()) + activation_bytes(recipe, student, tokens)


def teacher_shares_device(machine: Machine, hardware: Hardware) -> bool:
    """Whether the teachers are on the student's device, under whichever name."""
    names = (machine.device, machine.teacher_device or machine.device)
    first, second = ((hardware.auto if name == "auto" else name).removesuffix(":0") for name in names)
    return first == second


def teacher_bytes(recipe: Recipe, shapes: Shapes, hardware: Hardware, ranks: int = 1) -> float:
    """The teachers in process, unless they are on a device of their own."""
    if not teacher_shares_device(recipe.machine, hardware):
        return 0.0
    teachers = [shape for shape in (shapes.teacher, *shapes.others) if shape is not None]
    return sum(weight_bytes(shape, teacher_precision(recipe), ranks) for shape in teachers)


def models_bytes(
    recipe: Recipe, terms: Sequence[Term], shapes: Shapes, judge: Shape | None, *, hardware: Hardware
) -> float:
    """The largest of the training, with the teachers in process if it needs them, and of the teachers with the student
    that is measured, or with a judge."""
    teachers = teacher_bytes(recipe, shapes, hardware)
    training = training_bytes(recipe, shapes.student) + (teachers if keeps_teacher(recipe, terms) else 0.0)
    measured = FLOAT * max(shapes.student.parameters, judge.parameters if judge else 0)
    return max(training, teachers + measured)


def keeps_teacher(recipe: Recipe, terms: Sequence[Term]) -> bool:
    """Whether a training may need the teachers in process: for a loss, to write with the student, or for a reward."""
    rewarded = recipe.rollout is not None and recipe.rollout.rewards is not None
    return rewarded or TeacherUse(recipe, terms, ()).needs_common_tokens


def adapter_parameters(recipe: Recipe, student: Shape) -> float:
    """The numbers in a student's adapters, about; 0 without."""
    lora = recipe.student.lora
    return 0.0 if lora is None else float(lora.rank * student.layers * LORA_WIDTHS * student.width)


def cache_bytes(shape: Shape, columns: float, itemsize: int) -> float:
    """Keys and values of one row of so many tokens."""
    return 2.0 * itemsize * shape.layers * shape.key_value_width * columns


def disk_bytes(recipe: Recipe, student: Shape, trainings: int) -> int:
    """Two checkpoints and one being written, each with the trained numbers and Adam's two moments of them; and the
    exports, which are whole models."""
    trained = student.parameters if recipe.student.lora is None else adapter_parameters(recipe, student)
    return int(FLOAT * (3 * 3 * trained + trainings * student.parameters))


def kept_bytes(cache: CacheSettings | None, teacher: Shape | None, tokens: int) -> float:
    """An upper bound of the cache of the teacher's distributions."""
    if cache is None or teacher is None:
        return 0.0
    return form_of(cache).disk_bytes(tokens, width=teacher.width, head_parameters=teacher.head_parameters)


def _outside(shape: Shape) -> int:
    """The numbers in matrices outside the layers."""
    return shape.embedded_parameters + shape.other_parameters
