"""Makes a training ready to start: computes or connects what its terms read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.config.machine import Machine
from limbeck.config.sections import Lora, Train
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import CHOSEN, MIXED, Row
from limbeck.models.model import Model, head_of
from limbeck.models.placement import check_dtype
from limbeck.models.self_teacher import adapters_off
from limbeck.models.start import add_adapters
from limbeck.models.teacher_interface import REFERENCE, TEACHER_EVIDENCE, MovingAverage, Teacher
from limbeck.objectives.bound import BoundLoss, ModelPair, joined_taps
from limbeck.objectives.forward import NO_TAPS, TeacherView
from limbeck.objectives.loss import REFERENCE_LOG_PROB
from limbeck.objectives.term import Term
from limbeck.signals.cache import SignalCache
from limbeck.signals.dense import DenseSignal
from limbeck.storage.files import exclusive, user_path
from limbeck.storage.store import Store
from limbeck.training.job import Objective, TrainingJob, expect_nothing, no_teacher, tokens_beside
from limbeck.training.prepare import (
    Frozen,
    TextBeforeTraining,
    fill_cache,
    response_log_probs,
    with_reference,
)
from limbeck.training.rollout_stats import teachers_view
from limbeck.training.student_writer import StudentWriting, remember_scores, rollouts, watch_prompts
from limbeck.types import Batch, Evidence, UserError

Progress = Callable[[int, int, str], None]
View = Callable[[Batch], TeacherView]


@dataclass(frozen=True)
class TrainingPlan:
    """A training before anything is computed for it.

    Args:
        terms: the losses.
        rows: text written before the training.
        settings: steps, rates, seed.
        folder: receives checkpoints and metrics.
        key: names the job in its checkpoints.
        store: the database with the log-probabilities under frozen models; by default the cache lies beside it.
        lora: adapters to train instead of all weights; added after the references are scored.
        cache: the form in which the teacher's distributions are cached, if they are.
        writing: how the student writes its share of the text, if it does.
        machine: attention, checkpointing of activations, sizes.
    """

    terms: Sequence[Term]
    rows: Sequence[Row]
    settings: Train
    folder: Path
    key: str
    store: Path
    lora: Lora | None = None
    cache: CacheSettings | None = None
    writing: StudentWriting | None = None
    machine: Machine = field(default_factory=Machine)

    @property
    def tags_to_come(self) -> frozenset[str]:
        """The tags of text that is only made during training."""
        tags = self.writing.tags if self.writing is not None else frozenset()
        return tags | ({MIXED} if self.settings.mixup is not None else set())

    @property
    def rounded(self) -> torch.dtype | None:
        """The type in which the student's passes compute, if it is not that of its weights."""
        return None if self.settings.precision is None else getattr(torch, self.settings.precision)


def make_job(
    plan: TrainingPlan,
    student: Model,
    teacher: Callable[[], Teacher],
    progress: Progress = lambda done, total, detail: None,
) -> TrainingJob:
    """Make the training of `student` (with its initial weights) ready to start or to go on. The teacher is loaded only
    if a term reads it.

    Raises:
        UserError: no text for a term, evidence that this teacher does not give, or a prompt that leaves no room.
    """
    rows = _usable_rows(plan)
    if plan.rounded is not None:
        check_dtype(plan.rounded, student.net.device, "train.precision")
    reads = {evidence for term in plan.terms for evidence in term.reads}
    reads_teacher = bool(reads & TEACHER_EVIDENCE)
    vocab_size = None
    if reads_teacher or REFERENCE in reads:
        _check_gives(teacher(), reads & TEACHER_EVIDENCE)
        vocab_size = common_vocab_size(student, teacher())
    rows = _with_references(plan, rows, student, teacher, vocab_size=vocab_size, progress=progress)
    learned = {
        term.label: _bind(term, student.net, _weights(teacher).net, plan.settings.seed)
        for term in plan.terms
        if term.loss.binds
    }
    reference = _frozen_start(plan, student.net, vocab_size) if REFERENCE_LOG_PROB in reads else None
    if plan.lora is not None:
        add_adapters(student.net, plan.lora, plan.settings.seed)
    if plan.machine.checkpointing:
        _recompute_activations(student.net)
    average = _started_average(teacher(), student) if reads_teacher else None
    student_taps, teacher_taps = (joined_taps(list(learned.values()), side) for side in (0, 1))
    view: View = no_teacher
    if reads_teacher:
        live = partial(teacher().view, taps=teacher_taps, vocab_size=vocab_size)
        view = _view(plan, student, teacher(), live, rows=rows, progress=progress)
    scores = remember_scores(plan.terms, view)
    asked_ahead = reads_teacher and plan.cache is None and scores is None
    objective = Objective(
        student.net,
        plan.terms,
        teacher=scores if scores is not None and not learned else view,  # who reads layers reads more than scores
        learned=learned,
        taps=student_taps if reads_teacher else NO_TAPS,
        bank_rows=_numbered(rows) if reads_teacher else {},
        vocab_size=vocab_size,
        rounded=plan.rounded,
        expect=getattr(teacher(), "expect", expect_nothing) if asked_ahead else expect_nothing,
    )
    passing = _passing(teacher()) if reads_teacher and plan.cache is None else ()
    job = TrainingJob(objective, rows, plan.settings, plan.folder, key=plan.key, average=average, frozen=passing)
    job = replace(job, machine=plan.machine)
    if plan.writing is not None:
        job = replace(job, row_tokens=tokens_beside(plan.writing.recipe))
        job, watched, slots = watch_prompts(job, plan.writing)
        source = rollouts(plan.writing, job, student, slots, scores=scores, watched=watched, reference=reference)
        job = replace(job, source=source, monitor=teachers_view)
    return replace(job, prepare=partial(_prepare, job, teacher, progress)) if reads_teacher else job


def _view(
    plan: TrainingPlan, student: Model, teacher: Teacher, live: View, *, rows: Sequence[Row], progress: Progress
) -> View:
    """The teacher's view of a micro-batch: live, or from the cache where the recipe keeps one."""
    view: View = partial(_on_device, live, student.net.device)
    return view if plan.cache is None else _cached(plan, student, teacher, view, rows=rows, progress=progress)


def _started_average(teacher: Teacher, student: Model) -> MovingAverage | None:
    """The student's moving average, from its weights of now, if that is the teacher."""
    if teacher.average is not None:
        teacher.average.start(student.net)
    return teacher.average


def _passing(teacher: Teacher) -> list[PreTrainedModel]:
    """The model that passes over every micro-batch."""
    return [] if teacher.model is None else [teacher.model.net]


def _frozen_start(plan: TrainingPlan, net: PreTrainedModel, vocab_size: int | None) -> Frozen:
    """The student before training: a copy, or its own weights without the adapters that will be trained."""
    if plan.lora is not None:
        return Frozen(net, vocab_size, partial(adapters_off, net), rounded=plan.rounded)
    return Frozen(copy.deepcopy(net).requires_grad_(False), vocab_size, rounded=plan.rounded)


def _recompute_activations(net: PreTrainedModel) -> None:
    try:
        net.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"machine.checkpointing: a {net.config.model_type} can't compute its activations again: leave it out, and"
            " set machine.micro_tokens"
        ) from error


def _on_device(view: View, device: torch.device, batch: Batch) -> TeacherView:
    """The teacher's view on the student's device."""
    return view(batch).to(device)


def common_vocab_size(student: Model, teacher: Teacher) -> int:
    """How many tokens are compared: all that both models have, without the padding of either head."""
    return min(head_of(student.net).vocab_size, teacher.vocab_size, student.vocab_size)


def _usable_rows(plan: TrainingPlan) -> Sequence[Row]:
    """The rows that the terms can read; UserError if a term has none."""
    rows = plan.rows
    to_come = plan.tags_to_come
    if any(term.loss.ranks for term in plan.terms):
        rows = _whole_groups(rows, least=1 if to_come else 2, without_chosen=CHOSEN in to_come)
    for term in plan.terms:
        if term.only is not None and term.only not in to_come and not any(term.only in row.tags for row in rows):
            raise UserError(f"{term.label}: no text is left by or for {term.only!r} (its answers were empty)")
    return rows


def _check_gives(teacher: Teacher, reads: set[str]) -> None:
    for evidence in sorted(reads - teacher.gives):
        raise UserError(
            f"the teacher {teacher.identity} can't give {evidence.replace('_', ' ')}, which a loss reads: choose losses"
            " on text (cross_entropy), or a teacher that runs in process"
        )


def _weights(teacher: Callable[[], Teacher]) -> Model:
    """The teacher's model; validation has refused losses that read it from a teacher without weights."""
    model = teacher().model
    assert model is not None
    return model


def _numbered(rows: Sequence[Row]) -> dict[str, int]:
    """Each sample's row in the banks of teacher states."""
    return {sample_id: number for number, sample_id in enumerate(dict.fromkeys(row.sample_id for row in rows))}


def _whole_groups(rows: Sequence[Row], least: int = 2, without_chosen: bool = False) -> list[Row]:
    """Drop prompts without a chosen answer or with fewer than `least` different answers. Of equal answers the better
    placed one stays.

    Without its chosen answer a prompt's next one would pass for it; a single answer is compared with nothing.
    If the student will write the rejected answer, `least` is 1; if it will write the chosen one, `without_chosen`.
    """
    groups: dict[str, dict[tuple[int, ...], Row]] = {}
    for row in rows:
        groups.setdefault(row.group, {}).setdefault(row.response_ids, row)
    whole = [
        group
        for group in groups.values()
        if len(group) >= least and (without_chosen or CHOSEN in next(iter(group.values())).tags)
    ]
    if not whole:
        raise UserError(
            "no prompt has two different answers with the preferred one among them; look at the store's answers"
        )
    return [row for group in whole for row in group.values()]


# What is computed from the text before the first step


def _with_references(
    plan: TrainingPlan,
    rows: Sequence[Row],
    student: Model,
    teacher: Callable[[], Teacher],
    vocab_size: int | None,
    progress: Progress,
) -> Sequence[Row]:
    """The rows with the log-probabilities of their responses under the frozen models that terms read."""
    names = {
        read.removeprefix("reference_") for term in plan.terms for read in term.reads if read.startswith("reference_")
    }
    for name in sorted(names):
        model = student if name == "start" else _weights(teacher)
        model_rows = rows if name == "start" else [_with_teacher_prompt(row) for row in rows]
        rounded = plan.rounded if name == "start" else None
        log_probs = _reference_log_probs(plan.store, model, model_rows, vocab_size, rounded=rounded, progress=progress)
        rows = with_reference(rows, name, log_probs)
    return rows


def _with_teacher_prompt(row: Row) -> Row:
    if row.teacher_prompt_ids is None:
        return row
    return replace(row, prompt_ids=row.teacher_prompt_ids, teacher_prompt_ids=None)


def _reference_log_probs(
    store: Path,
    model: Model,
    rows: Sequence[Row],
    vocab_size: int | None,
    *,
    rounded: torch.dtype | None,
    progress: Progress,
) -> dict[str, float]:
    """log p(response) under a frozen model by sample id, read from the store or computed and stored."""
    kind = "log_prob" if vocab_size is None else f"log_prob of {vocab_size} tokens"
    kind += "" if rounded is None else f" in {str(rounded).removeprefix('torch.')}"
    with Store(store) as database:
        log_probs = {e.sample_id: float(e.value) for e in database.evidence(kind) if e.judge == model.identity}
        if missing := [row for row in rows if row.sample_id not in log_probs]:
            report = partial(_report, progress, "answers scored by the reference")
            computed = response_log_probs(model.net, missing, vocab_size, report, rounded=rounded)
            database.write_evidence(
                *(Evidence(sample_id, kind, model.identity, value) for sample_id, value in computed.items())
            )
            log_probs |= computed
    return log_probs


def _cached(
    plan: TrainingPlan, student: Model, teacher: Teacher, live: View, rows: Sequence[Row], progress: Progress
) -> View:
    """A view that reads the teacher's distributions from the cache; computes those that are missing first."""
    assert plan.cache is not None
    home = plan.store.parent
    folder = home / "signals" if plan.cache.folder is None else user_path(plan.cache.folder)
    with exclusive(folder / "lock", wait=True):  # runs that share it fill it one after another
        vocab_size = common_vocab_size(student, teacher)
        cache = SignalCache(folder, teacher.identity, vocab_size, plan.cache, device=student.net.device)
        report = partial(_report, progress, "keeping what the teacher knows of the text")
        fill_cache(cache, live, rows, report)
    return cache.view


def _report(progress: Progress, detail: str, done: int, total: int) -> None:
    progress(done, total, detail)


def _prepare(job: TrainingJob, teacher: Callable[[], Teacher], progress: Progress) -> None:
    for label, learned in job.objective.learned.items():
        text = TextBeforeTraining(
            (job.net, _weights(teacher).net),
            job.rows,
            job.objective.bank_rows,
            tokens_per_step=job.settings.tokens_per_step,
            seed=job.settings.seed,
            on_progress=partial(_report, progress, f"{label}: getting ready"),
        )
        learned.prepare(text)


def _bind(term: Term, student: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> BoundLoss:
    """The term's loss with its own parameters, for these two models."""
    ours = student.config.get_text_config()
    theirs = teacher.config.get_text_config()
    embed: Any = student.get_input_embeddings()
    models = ModelPair(
        layers=(ours.num_hidden_layers, theirs.num_hidden_layers),
        widths=(ours.hidden_size, theirs.hidden_size),
        seed=seed,
        embed=lambda token_N: embed(token_N).detach(),
        dense=DenseSignal,
    )
    return term.bind(models).to(student.device)
