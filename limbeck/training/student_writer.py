"""How the student writes text during training, in process or through a server, and the columns beside its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from limbeck.config.recipe import Recipe
from limbeck.config.sections import JointSettings, Rollout, Server
from limbeck.data.batches import CHOSEN, REJECTED, FixedText, Row, make_batch
from limbeck.elicit.prompt import Prompt
from limbeck.models.copy import Copy
from limbeck.models.generate import Completion, Decoding, GenerationJob, Joint, SecondModel, write
from limbeck.models.joint import Mixture, Speculation
from limbeck.models.model import Model, head_of
from limbeck.models.vllm import VllmWriter
from limbeck.models.vllm_protocol import StudentTokens
from limbeck.objectives.forward import TeacherView
from limbeck.objectives.loss import REFERENCE_LOG_PROB, STUDENT
from limbeck.objectives.schedule import Schedule
from limbeck.objectives.term import Term
from limbeck.progress import StoppedError
from limbeck.storage.files import crash_point
from limbeck.training import distributed
from limbeck.training.asking import Asking
from limbeck.training.group_rollout import GroupRollouts
from limbeck.training.job import TrainingJob
from limbeck.training.loop import loss_on
from limbeck.training.prepare import Frozen, Remembered, even_batches, with_columns
from limbeck.training.rewards import Rewards
from limbeck.training.rollout import Rollouts
from limbeck.types import Batch, UserError, content_hash

Stop = Callable[[], bool]
Watch = Callable[[float], float]
Columns = Callable[[list[Row], float], list[Row]]
WRITINGS = 3  # of one text, on a server that loses the weights


@dataclass(frozen=True)
class StudentWriting:
    """How the student writes while it trains.

    Args:
        slots: the training prompts as rows without a response.
        share: the student's share of the text.
        fresh: the part of the student's text that is not replayed.
        max_length: how many tokens student and teacher both can read.
        second_model: loads the model that writes jointly with the student, if the recipe has one.
        rewards: what judges its answers, if something does.
        prompts: the training prompts by their id.
    """

    recipe: Recipe
    slots: Sequence[Row]
    share: Schedule
    fresh: Schedule
    max_length: int
    second_model: Callable[[], Model]
    rewards: Rewards | None = None
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    stop: Stop = lambda: False

    @property
    def settings(self) -> Rollout:
        return self.recipe.rollout or Rollout()

    @property
    def tags(self) -> frozenset[str]:
        """The tags that the student's text will have."""
        tags = frozenset(tag for slot in self.slots for tag in slot.tags) | {STUDENT}
        if not self.recipe.all_answer:
            return tags
        return tags | {CHOSEN if self.recipe.writer[0].by == STUDENT else REJECTED}


def watch_prompts(job: TrainingJob, writing: StudentWriting) -> tuple[TrainingJob, Watch | None, Sequence[Row]]:
    """Set validation prompts aside for an adaptive share.

    Returns (job without their rows, the loss on those rows, slots without theirs); for any other share, the job and
    the slots as they are, and None.

    Raises:
        UserError: a prompt that leaves no room for an answer, or too few prompts to set some aside.
    """
    _check_room(writing)
    if writing.share.shape != "plateau":
        return job, None, writing.slots
    prompts = writing.settings.validation.prompts
    groups = sorted(
        {row.group for row in job.rows}, key=lambda group: content_hash([job.settings.seed, "watched", group])
    )
    if len(groups) < 2 * prompts:
        raise UserError(
            f"an adaptive share watches the text of {prompts} prompts, and there are {len(groups)}: add prompts"
        )
    watched = set(groups[:prompts])
    settings = job.settings.model_copy(update={"steps": job.steps, "epochs": None})  # as many as with all prompts
    watched_rows = [row for row in job.rows if row.group in watched]
    batches = [make_batch(watched_rows, micro_batch) for micro_batch in even_batches(watched_rows)]
    job = replace(job, rows=[row for row in job.rows if row.group not in watched], settings=settings)
    slots = [slot for slot in writing.slots if slot.group not in watched]
    return job, partial(loss_on, job.objective, batches), slots


def rollouts(
    writing: StudentWriting,
    job: TrainingJob,
    student: Model,
    slots: Sequence[Row],
    *,
    scores: Remembered | None,
    watched: Watch | None,
    reference: Frozen | None = None,
) -> Rollouts | GroupRollouts:
    """The `Source` in which the student's text is mixed with the job's rows, if there are any, or is judged by
    rewards.

    Args:
        reference: the student before training, if a loss reads its log-probabilities.
    """
    recipe = writing.recipe
    settings = writing.settings
    writer = recipe.student_writer
    assert writer is not None
    if writing.rewards is not None:
        return _judged(writing, job, student, slots, columns=_columns(job, scores, reference))
    fixed = None
    if job.rows:
        tokens = job.settings.tokens_per_step if job.row_tokens is None else job.row_tokens
        fixed = FixedText(job.rows, job.settings.seed, tokens, recipe.all_answer)
    return Rollouts(
        slots=slots,
        fixed=fixed,
        write=_writer_of(writing, job, student, slots),
        writer=writer,
        settings=settings,
        share=writing.share,
        fresh=writing.fresh,
        seed=job.settings.seed,
        tokens_per_step=job.settings.tokens_per_step,
        ends=student.eos_ids,
        order=[each_writer.by for each_writer in recipe.writer] if recipe.all_answer else [],
        columns=_columns(job, scores, reference),
        watched=watched,
    )


def _judged(
    writing: StudentWriting, job: TrainingJob, student: Model, slots: Sequence[Row], *, columns: Columns
) -> GroupRollouts:
    """The `Source` in which rewards judge the student's answers."""
    writer = writing.recipe.student_writer
    assert writer is not None and writing.rewards is not None
    asking = Asking(
        slots,
        _writer_of(writing, job, student, slots),
        writer,
        seed=job.settings.seed,
        ends=student.eos_ids,
    )
    return GroupRollouts(
        asking,
        [writing.prompts[slot.group] for slot in slots],
        text=lambda slot, ids: student.opens_thinking(slot.prompt_ids) + student.decode(ids),
        rewards=writing.rewards,
        settings=writing.settings,
        columns=columns,
    )


def remember_scores(terms: Sequence[Term], view: Callable[[Batch], TeacherView]) -> Remembered | None:
    """A teacher that scores whole responses before they are trained on; None if no loss needs that."""
    return Remembered(view) if _spanning(terms) else None


def _spanning(terms: Sequence[Term]) -> list[Term]:
    """The terms that read columns computed from whole responses."""
    return [term for term in terms if term.loss.spans_responses]


def _columns(job: TrainingJob, scores: Remembered | None, reference: Frozen | None) -> Columns:
    """A function that adds the columns which the job's losses read of frozen models and of whole responses."""
    terms = _spanning(job.terms)

    def columns(rows: list[Row], progress: float) -> list[Row]:
        if reference is not None:
            rows = reference.with_log_probs(rows, REFERENCE_LOG_PROB)
        if scores is None:
            return rows
        return with_columns(rows, scores, [term.at_step(progress, job.objective.states) for term in terms])

    return columns


# Asking the student


def _writer_of(
    writing: StudentWriting, job: TrainingJob, student: Model, slots: Sequence[Row]
) -> Callable[[Sequence[GenerationJob]], list[Completion]]:
    settings = writing.settings
    if settings.through is not None:
        server = _server(settings.through, job, student, settings.rows)
        if distributed.rank() == 0:  # so that a server that can't do it fails now
            server.sync(student.net, student.tokenizer)
            server.probe(student.net, slots[0].prompt_ids)
        return partial(_ask_server, student, server, writing.stop)
    dtype = writing_dtype(writing.recipe, job.terms)
    asker = _InProcess(
        student,
        rows=settings.rows,
        second=None if settings.joint is None else SecondModel(writing.second_model().net, joint(settings.joint)),
        copy=None if dtype is None else Copy(student.net, dtype),
        stop=writing.stop,
    )
    return asker.ask


def writing_dtype(recipe: Recipe, terms: Sequence[Term]) -> torch.dtype | None:
    """The type of the copy of the student that writes; None where its own weights do."""
    named = None if recipe.rollout is None else recipe.rollout.dtype
    if named is None and not any(term.loss.is_on_policy for term in terms):
        named = recipe.train.precision
    return None if named in (None, "float32") else getattr(torch, named)


def joint(settings: JointSettings) -> Joint:
    """How two models write one text."""
    if settings.teacher_share is not None:
        return Mixture(settings.teacher_share, settings.teacher_temperature)
    assert settings.teacher_top_k is not None
    return Speculation(settings.teacher_top_k, settings.teacher_temperature)


@dataclass(frozen=True)
class _InProcess:
    """The student's own modules, or a copy of them in another precision, alone or with a second model."""

    student: Model
    rows: int
    second: SecondModel | None
    copy: Copy | None
    stop: Stop

    def ask(self, jobs: Sequence[GenerationJob]) -> list[Completion]:
        """The answers, in the order of the jobs; each rank writes its part."""
        student = self.student
        own_jobs = distributed.in_turns(jobs)
        training = student.net.training
        student.net.eval()
        written = write(
            student.net if self.copy is None else self.copy.now(),
            own_jobs,
            student.eos_ids,
            student.vocab_size,
            decoding=Decoding(batch_rows=self.rows, record=True, second=self.second),
            stop=self.stop if distributed.world_size() == 1 else lambda: False,
        )
        completions = {}
        for completion in written:
            completions[completion.index] = completion
            crash_point("rollout.after_text")
        student.net.train(training)
        if len(completions) < len(own_jobs):
            raise StoppedError("stopped while the student wrote; the step has not begun")
        return distributed.gather_in_turns([completions[index] for index in range(len(own_jobs))])


def _server(through: Server, job: TrainingJob, student: Model, rows: int) -> VllmWriter:
    tokens = StudentTokens(student.eos_ids, student.vocab_size, head_of(student.net).vocab_size)
    return VllmWriter(
        through.vllm,
        job.folder / "vllm",
        tokens,
        through.model,
        server_folder=through.folder_there,
        concurrency=rows,
    )


def _ask_server(student: Model, server: VllmWriter, stop: Stop, jobs: Sequence[GenerationJob]) -> list[Completion]:
    """The answers from a server, which is sent the student's weights first; rank 0 asks for all ranks.

    What a server wrote that lost those weights meanwhile, since it was started again, is written once more.

    Raises:
        UserError: it lost them again.
    """
    completions: list[Completion] = []
    if distributed.rank() == 0:
        for _ in range(WRITINGS):
            server.sync(student.net, student.tokenizer)
            completions = server.write(jobs, stop)
            if server.holds_them():
                break
        else:
            raise UserError(
                f"the vLLM server {server.url} lost the student's weights {WRITINGS} times while it wrote: let no other"
                " program give it weights, see its log, then run it again to go on"
            )
    distributed.wait()
    completions = distributed.gather(completions)[0]
    if len(completions) < len(jobs):
        raise StoppedError("stopped while the student wrote; the step has not begun")
    return completions


def _check_room(writing: StudentWriting) -> None:
    writer = writing.recipe.student_writer
    assert writer is not None
    for slot in writing.slots:
        longest = max(len(slot.prompt_ids), len(slot.teacher_prompt_ids or ()))
        if longest + writer.max_tokens > writing.max_length:
            raise UserError(
                f"the prompt {slot.group!r} takes {longest} tokens and leaves no room for {writer.max_tokens} more in a"
                f" context of {writing.max_length}: shorten it, or lower the student's max_tokens"
            )
