"""Predicts what a run takes on machines that are not here, from the numbers stated for them (`config.cluster`).

A rank is a device. Rank 0 alone elicits, fills caches and judges while the others wait; trainings are shared. The
evaluation is counted as rank 0's alone, though its items are shared. A step is its passes, what the student writes for
it, what goes over the wire, and the update of the weights, one after another: nothing overlaps. Operations run at
`tflops` times `utilisation`; writing reads all weights and the keys and values once a token.

Not counted: the start of kernels and of collectives (much where models or micro-batches are tiny), padding, loading,
checkpoints, and a server's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limbeck.config.cluster import Cluster
from limbeck.config.recipe import Recipe
from limbeck.config.sections import Rollout
from limbeck.data.batches import MICRO_TOKENS
from limbeck.models.generate import PLAIN
from limbeck.models.placement import Precision
from limbeck.models.slots import columns_of, room_within
from limbeck.models.teacher_interface import TEACHER_EVIDENCE
from limbeck.objectives.head import elements_within
from limbeck.objectives.term import Term
from limbeck.runs import memory
from limbeck.runs.hardware import GIB, Hardware
from limbeck.runs.memory import FLOAT, Parts
from limbeck.runs.prediction import (
    JUDGING,
    LOADING,
    PASSES,
    TEXT,
    TRAINING,
    UPDATE,
    WIRE,
    WRITING,
    Prediction,
    Share,
    Work,
)
from limbeck.runs.rewarded import rewarded_bytes
from limbeck.runs.shapes import Shape, Shapes, forward_flops, step_flops
from limbeck.training.room import tokens_within
from limbeck.training.student_writer import writing_dtype

CHUNKS = 4  # tensors of a chunk's logits: the student's and the teacher's, with their gradients and exponentials
UPDATE_BYTES = 28  # AdamW reads weight, gradient and two moments of a number, and writes all but the gradient


def passing_teacher(recipe: Recipe, terms: Sequence[Term], shapes: Shapes) -> Shape | None:
    """The teachers that pass over every micro-batch, as one: those in process whose cache is not kept."""
    reads = any(term.reads & TEACHER_EVIDENCE for term in terms)
    if shapes.teacher is None or recipe.teacher.cache is not None or not reads:
        return None
    return shapes.teacher.joined(shapes.others)


def predict(
    recipe: Recipe, terms: Sequence[Term], shapes: Shapes, work: Work, *, hardware: Hardware, steps: int, controls: int
) -> Prediction:
    """What a run takes of the machines that `hardware` is a device of.

    Args:
        steps: of each training.
        controls: how many are trained, on as much text, without the teacher.
    """
    setting = _Setting(recipe, terms, shapes, hardware)
    row = work.prompt + work.answer
    micro_tokens = min(
        setting.micro_tokens(), max(1, row, math.ceil(work.tokens / setting.ranks))
    )  # as training.loop deals them
    control = Work(work.tokens, work.responses)
    batches = max(1, math.ceil(work.tokens / micro_tokens))
    in_one = math.ceil(work.tokens / batches)
    sent = setting.sent(setting.teacher, setting.passes(batches))
    control_sent = setting.sent(None, setting.passes(batches))
    return Prediction(
        cluster=setting.cluster,
        divided=setting.divided,
        memory=setting.memory(work, in_one),
        step=setting.step(work, setting.teacher, batches, sent),
        control_step=setting.step(control, None, batches, control_sent) if controls else {},
        sent=sent,
        all_sent=steps * (sent + controls * control_sent),
        micro_batches=batches,
        micro_tokens=in_one,
    )


@dataclass(frozen=True)
class _Setting:
    """Who trains whom, where."""

    recipe: Recipe
    terms: Sequence[Term]
    shapes: Shapes
    hardware: Hardware

    @property
    def cluster(self) -> Cluster:
        assert self.hardware.cluster is not None
        return self.hardware.cluster

    @property
    def student(self) -> Shape:
        return self.shapes.student

    @property
    def ranks(self) -> int:
        return self.cluster.devices

    @property
    def divided(self) -> bool:
        return self.recipe.machine.shard == "full" and self.ranks > 1

    @property
    def parts(self) -> int:
        """Among how many ranks matrices are divided."""
        return self.ranks if self.divided else 1

    @property
    def teacher(self) -> Shape | None:
        return passing_teacher(self.recipe, self.terms, self.shapes)

    @property
    def teacher_parts(self) -> int:
        """Among how many ranks the teacher is divided: only while it passes."""
        return self.parts if self.teacher is not None else 1

    @property
    def memory_seen(self) -> int | None:
        """A device's memory where sizes follow from it."""
        return None if self.cluster.kind == "cpu" else self.cluster.memory_bytes

    @property
    def writing_dtype(self) -> torch.dtype | None:
        return writing_dtype(self.recipe, self.terms)

    def passes(self, batches: int) -> int:
        """Of each rank in a step, at most."""
        return math.ceil(batches / self.ranks)

    def micro_tokens(self) -> int:
        """Tokens of a micro-batch, as `training.room` chooses them."""
        asked = self.recipe.machine.micro_tokens
        if asked is not None or self.cluster.kind == "cpu":
            return asked or MICRO_TOKENS
        held = memory.student_bytes(self.recipe, self.student, self.parts)["weights"] + self._teacher_bytes()
        free = max(0, int(self.cluster.memory_bytes - held - memory.LIBRARY_BYTES))
        lora = self.recipe.student.lora
        trained = self.student.parameters if lora is None else memory.adapter_parameters(self.recipe, self.student)
        return tokens_within(free, int(trained), layers=self.student.layers, width=self.student.width)

    # Memory

    def memory(self, work: Work, tokens: int) -> dict[str, Parts]:
        """Bytes of a rank in each phase; `tokens` are those of a micro-batch."""
        student = memory.student_bytes(self.recipe, self.student, self.parts)
        whole = memory.student_bytes(self.recipe, self.student)["weights"]
        base = {"libraries": memory.LIBRARY_BYTES}
        logits = elements_within(self.memory_seen, self._head_bytes())
        logits = min(logits, max(1, tokens) * self._vocabulary())
        training = student | {
            "activations": memory.activation_bytes(self.recipe, self.student, tokens),
            "logits": float(CHUNKS * FLOAT * logits),
            "gradient of the head": float(FLOAT * self.student.head_parameters if self._trains_head() else 0),
            "gathered": self._gathered_bytes(),
            **self._frozen(),
        }
        phases = {
            LOADING: {"weights": whole, "teacher": memory.teacher_bytes(self.recipe, self.shapes, self.hardware)}
            | base,
            TRAINING: training | base,
        }
        judge = self.recipe.evaluate.judge
        if self.shapes.judge is not None and judge != self.recipe.teacher.model:
            phases[JUDGING] = {"judge": float(FLOAT * self.shapes.judge.parameters)} | self._frozen() | base
        if work.written:
            phases[WRITING] = self._kept() | {"keys and values": self.rows(work) * self._row_bytes(work)}
        return phases

    def _kept(self) -> Parts:
        """What is there while the student writes, beside keys and values."""
        student = memory.student_bytes(self.recipe, self.student, self.parts)
        logits = float(CHUNKS * FLOAT * (self.recipe.rollout or Rollout()).rows * self._vocabulary())
        kept = {name: student[name] for name in ("weights", "moments")} | self._frozen()
        return kept | {"logits": logits, "libraries": memory.LIBRARY_BYTES}

    def _frozen(self) -> Parts:
        return {"teacher": self._teacher_bytes(), "other models": self._other_bytes()}

    def _teacher_bytes(self) -> float:
        return memory.teacher_bytes(self.recipe, self.shapes, self.hardware, self.teacher_parts)

    def _other_bytes(self) -> float:
        """The copy that writes, what judges, and the student before training."""
        settings = self.recipe.rollout
        copied = self.recipe.student_writer is not None and self.writing_dtype is not None
        total = 2.0 * self.student.parameters if copied and (settings is None or settings.through is None) else 0.0
        if settings is not None and settings.rewards is not None:
            scorers = self.shapes.scorers
            total += rewarded_bytes(self.recipe, self.terms, self.student, scorers, hardware=self.hardware)
        return total

    def _gathered_bytes(self) -> float:
        if not self.divided:
            return 0.0
        gathered = memory.gathered_bytes(self.recipe, self.student)
        if self.teacher is not None and self.shapes.teacher is not None:
            gathered += memory.gathered_teacher_bytes(self.shapes.teacher, memory.teacher_precision(self.recipe))
        return gathered

    def _trains_head(self) -> bool:
        return self.recipe.student.lora is None

    def _head_bytes(self) -> int | None:
        asked = self.recipe.machine.head_mib
        return None if asked is None else int(asked * 2**20)

    def _vocabulary(self) -> int:
        return self.student.head_parameters // max(1, self.student.width)

    # Writing

    def rows(self, work: Work) -> int:
        """Answers that a rank writes at once."""
        settings = self.recipe.rollout or Rollout()
        asked = self.recipe.machine.cache_gib
        free = max(0, int(self.cluster.memory_bytes - sum(self._kept().values())))
        room = room_within(None if self.cluster.kind == "cpu" else free, None if asked is None else int(asked * GIB))
        most = math.ceil(work.written * settings.ahead / self.ranks)
        return max(1, min(settings.rows, most, int(room // max(1, self._row_bytes(work)))))

    def _row_bytes(self, work: Work) -> float:
        itemsize = (self.writing_dtype or torch.float32).itemsize
        return memory.cache_bytes(self.student, columns_of(int(work.prompt), work.most), itemsize)

    def writing(self, work: Work) -> Share:
        """What a rank writes for a step."""
        dtype = self.writing_dtype or torch.float32
        return writing_time(
            self.hardware,
            self.student,
            Precision(dtype),
            answers=work.written / self.ranks,
            rows=self.rows(work),
            prompt=work.prompt,
            answer=work.answer,
            read=work.read / self.ranks,
        )

    # A step

    def step(self, work: Work, teacher: Shape | None, batches: int, sent: float) -> dict[str, Share]:
        """The parts of a step; `sent` bytes go out from each rank."""
        flops = step_flops(self.student, teacher, int(work.tokens), int(work.responses)) + work.further
        if self.recipe.machine.checkpointing:
            flops += forward_flops(self.student, int(work.tokens), 0)
        dtype = memory.compute_dtype(self.recipe)
        seconds = flops * self.passes(batches) / batches / self.hardware.rate(dtype)
        link, rate = self.cluster.slowest_link
        lora = self.recipe.student.lora
        trained = self.student.parameters / self.parts
        trained = trained if lora is None else memory.adapter_parameters(self.recipe, self.student)
        update = UPDATE_BYTES * trained / (self.cluster.memory_gb_s * 1e9)
        return {
            PASSES: Share(seconds, _rate_key(self.hardware, dtype)),
            TEXT: self.writing(work) if work.written else Share(0.0, "memory_gb_s"),
            WIRE: Share(sent / rate, link),
            UPDATE: Share(update, "memory_gb_s"),
        }

    def sent(self, teacher: Shape | None, passes: int) -> float:
        """Bytes that a rank sends in a step: a ring's share of what is gathered and summed. Whole weights sum the
        gradients once; divided ones gather each layer twice a pass and sum its gradient, embeddings and head once."""
        student, around = self.student, (self.ranks - 1) / self.ranks
        lora = self.recipe.student.lora
        if not self.divided:
            trained = student.parameters if lora is None else memory.adapter_parameters(self.recipe, student)
            return around * 2 * FLOAT * trained
        of_outside, of_layers = memory.gathered_sizes(self.recipe)
        layers = student.layers * (student.layer_parameters - student.layer_vectors)
        outside = student.embedded_parameters + student.other_parameters
        moved = 2.0 * of_layers * layers + of_outside * outside
        whole = student.layers * student.layer_vectors
        if lora is None:
            moved += FLOAT * (layers + outside)
        else:
            whole = int(memory.adapter_parameters(self.recipe, student))
        if teacher is not None:
            matrices = teacher.parameters - teacher.layers * teacher.layer_vectors
            moved += memory.teacher_precision(self.recipe).dtype.itemsize * matrices
        return around * (passes * moved + 2 * FLOAT * whole)


def writing_time(
    hardware: Hardware,
    shape: Shape,
    precision: Precision,
    *,
    answers: float,
    prompt: float,
    answer: float,
    rows: int = PLAIN.batch_rows,
    read: float | None = None,
) -> Share:
    """Seconds in which one device writes answers, `rows` at a time: for each token of them all weights and the rows'
    keys and values are read once, or as long as the operations take.

    Args:
        prompt, answer: tokens of one, on average.
        read: tokens of all prompts that are read first; by default each answer's own.
    """
    assert hardware.cluster is not None
    at_once = max(1.0, min(rows, answers))
    turns = max(1.0, answers / at_once) * answer
    rate = hardware.rate(precision.dtype)
    weights = memory.weight_bytes(shape, precision)
    cached = memory.cache_bytes(shape, prompt + answer / 2, precision.dtype.itemsize)
    reading = (weights + at_once * cached) / (hardware.cluster.memory_gb_s * 1e9)
    computing = forward_flops(shape, 1, 1) * at_once / rate
    first = forward_flops(shape, int(answers * prompt if read is None else read), int(answers)) / rate
    limit = "memory_gb_s" if turns * reading > turns * computing + first else _rate_key(hardware, precision.dtype)
    return Share(turns * max(reading, computing) + first, limit)


def _rate_key(hardware: Hardware, dtype: torch.dtype) -> str:
    """The stated rate that products of this type run at."""
    name = str(dtype).removeprefix("torch.") if dtype in hardware.rates else "float32"
    return f"tflops.{name} x utilisation"
