"""From a recipe's terms to a training that is ready to start: what they read is computed or wired up here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.config.recipe import Recipe
from limbeck.config.sections import Lora, Rollout, Server, Train
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import CHOSEN, FixedText, Row, make_batch
from limbeck.models import generate as generation
from limbeck.models.bridge import BridgedTeacher
from limbeck.models.copy import Copy
from limbeck.models.generate import Completion, Decoding, SecondModel, write
from limbeck.models.model import Model, head_of
from limbeck.models.score import ServerScorer
from limbeck.models.several import SeveralTeachers
from limbeck.models.start import add_adapters
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.vllm import VllmWriter
from limbeck.models.vllm_protocol import StudentTokens
from limbeck.objectives.dual import DualSpace
from limbeck.objectives.match import Match, wanted
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.term import Term
from limbeck.objectives.total import Learned, Taps, TeacherView
from limbeck.progress import StoppedError
from limbeck.runs import build
from limbeck.runs.cost import TEACHER_EVIDENCE
from limbeck.signals.cache import SignalCache
from limbeck.signals.dense import DenseSignal
from limbeck.storage.files import exclusive
from limbeck.storage.store import Store
from limbeck.training import distributed
from limbeck.training import loop as train
from limbeck.training.prepare import (
    Remembered,
    even_batches,
    fill_bank,
    fill_cache,
    learn_filters,
    response_log_probs,
    with_columns,
    with_reference,
)
from limbeck.training.rollout import Rollouts
from limbeck.training.rollout_stats import teachers_view
from limbeck.types import Batch, Evidence, UserError, content_hash

Progress = Callable[[int, int, str], None]
Teacher = InProcessTeacher | SeveralTeachers | ServerScorer | BridgedTeacher


def make_job(
    terms: Sequence[Term],
    student: Model,
    rows: Sequence[Row],
    teacher: Callable[[], Teacher],
    lora: Lora | None,
    settings: Train,
    folder: Path,
    key: str,
    store: Path,
    progress: Progress = lambda done, total, detail: None,
    written: Collection[str] = (),
    cache: CacheSettings | None = None,
) -> train.TrainingJob:
    """The training of `student` (as it is before any training) on `rows`. The teacher is loaded only where a term reads
    it.

    Args:
        written: the tags of what the student will write, where it does (see `let_write`).
        lora: adapters to train instead of all weights; they are added here, after references were scored.
        folder: receives checkpoints and metrics.
        key: names the job in its checkpoints.
        store: where frozen models' opinions of the text are kept.
        cache: the form in which the teacher's distributions are kept beside it, where they are.

    Raises:
        UserError: no text for a term.
    """
    if any(term.family == "ranking" for term in terms):
        rows = _whole_groups(rows, least=1 if written else 2, without_preferred=CHOSEN in written)
    for term in terms:
        if term.only is not None and term.only not in written and not any(term.only in row.tags for row in rows):
            raise UserError(f"{term.label}: no text is left by or for {term.only!r} (its answers were empty)")
    reads = {read for term in terms for read in term.reads}
    with_teacher = bool(reads & TEACHER_EVIDENCE) or "reference_teacher" in reads
    if with_teacher and (missing := sorted((reads & TEACHER_EVIDENCE) - teacher().can)):
        raise UserError(
            f"the teacher {teacher().identity} can't give {missing[0].replace('_', ' ')}, which a loss reads: choose"
            " losses on text (cross_entropy), or a teacher that runs in process"
        )
    vocab_size = common_vocab_size(student, teacher()) if with_teacher else None
    for name in sorted(read.removeprefix("reference_") for read in reads if read.startswith("reference_")):
        judge = student if name == "start" else _weights(teacher)
        read = rows if name == "start" else [_as_the_teacher_sees(row) for row in rows]
        rows = with_reference(rows, name, _known_log_probs(store, judge, read, vocab_size, progress))
    matches = {
        term.label: _bind(term, student.net, _weights(teacher).net, settings.seed)
        for term in terms
        if term.match or term.divergence
    }
    if lora is not None:
        add_adapters(student.net, lora, settings.seed)
    job = train.TrainingJob(
        student.net, rows, terms, train.no_teacher, settings, folder, key, matches, vocab_size=vocab_size
    )
    if reads & TEACHER_EVIDENCE:
        view = teacher().view
        taps = [Taps(*map(frozenset, wanted(list(matches.values()), side))) for side in (0, 1)]
        job.taps = taps[0]
        live = partial(view, taps=taps[1], vocab_size=vocab_size)
        job.teacher = (
            live
            if cache is None
            else _cached(cache, teacher(), live, rows, vocab_size, store.parent, student, progress)
        )
        job.bank_rows = {
            sample_id: number for number, sample_id in enumerate(dict.fromkeys(row.sample_id for row in rows))
        }
        job.prepare = lambda: _prepare(job, teacher, progress)
    return job


def common_vocab_size(student: Model, teacher: Teacher) -> int:
    """How many tokens are compared: those that have a name. What a head is padded with means nothing, in either
    model."""
    return min(head_of(student.net).vocab_size, teacher.vocab_size, student.vocab_size)


def _weights(teacher: Callable[[], Teacher]) -> Model:
    """The teacher's model; `can` and `validate` saw to it that it is here."""
    found = teacher()
    assert not isinstance(found, ServerScorer)
    return found.model


def _cached(
    form: CacheSettings,
    teacher: Teacher,
    live: Callable[[Batch], TeacherView],
    rows: Sequence[Row],
    vocab_size: int | None,
    home: Path,
    student: Model,
    progress: Progress,
) -> Callable[[Batch], TeacherView]:
    """The teacher's side of a batch as it was kept; what is not there yet is computed now."""
    assert vocab_size is not None
    folder = home / "signals" if form.folder is None else Path(form.folder).expanduser()
    with exclusive(folder / "lock", wait=True):  # runs that share it fill it one after the other
        cache = SignalCache(folder, teacher.identity, vocab_size, form, student.net.device)
        fill_cache(
            cache, live, rows, lambda done, total: progress(done, total, "keeping what the teacher knows of the text")
        )
    return cache.view


def _as_the_teacher_sees(row: Row) -> Row:
    return (
        row
        if row.teacher_prompt_ids is None
        else replace(row, prompt_ids=row.teacher_prompt_ids, teacher_prompt_ids=None)
    )


def let_write(
    job: train.TrainingJob,
    student: Model,
    slots: Sequence[Row],
    recipe: Recipe,
    teacher: Callable[[], InProcessTeacher],
    context: int,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Let the student write its share of the job's text.

    Args:
        slots: the training prompts as rows without a response.
        teacher: the frozen teacher, whose model joins in where the recipe has two write one text.
        context: how many tokens student and teacher both can read.

    Raises:
        UserError: a prompt that leaves no room for an answer, or too little other text for an adaptive share to watch.
    """
    writer = recipe.student_writer
    settings = recipe.rollout or Rollout()
    assert writer is not None
    _check_room(slots, writer.max_tokens, context)
    share, fresh = build.shares(recipe)
    watched, slots = _watched(job, slots, settings.validation.prompts) if share.shape == "plateau" else (None, slots)
    fixed = None
    # the student's text is the rest
    part = len(recipe.fixed_writers) / len(recipe.writer) if recipe.all_answer else 1.0
    if job.rows:
        fixed = FixedText(
            job.rows, job.settings.seed, max(1, round(part * job.settings.tokens_per_step)), recipe.all_answer
        )
    beside = None if settings.joint is None else SecondModel(teacher().model.net, build.joint(settings.joint))
    copy = None if settings.dtype is None else Copy(student.net, getattr(torch, settings.dtype))
    ask = partial(_ask, student, settings.rows, beside, copy, stop)
    if settings.through is not None:
        server = _server(settings.through, student, job.folder / "vllm", settings.rows)
        if distributed.rank() == 0:  # so that a server that can't do it is found out now
            server.sync(student.net, student.tokenizer)
            server.probe(student.net, slots[0].prompt_ids)
        ask = partial(_ask_server, student, server, stop)
    order = [each.by for each in recipe.writer] if recipe.all_answer else []
    job.source = Rollouts(
        slots,
        fixed,
        ask,
        writer,
        settings,
        share,
        fresh,
        job.settings.seed,
        job.settings.tokens_per_step,
        student.eos_ids,
        order,
        _columns(job),
        watched,
    )
    job.monitor = teachers_view


def _watched(job: train.TrainingJob, slots: Sequence[Row], prompts: int) -> tuple[Callable[[float], float], list[Row]]:
    """The loss on the text of so many prompts, which neither the job's rows nor the slots hold from here on."""
    groups = sorted(
        {row.group for row in job.rows}, key=lambda group: content_hash([job.settings.seed, "watched", group])
    )
    if len(groups) < 2 * prompts:
        raise UserError(
            f"an adaptive share watches the text of {prompts} prompts, and there are {len(groups)}: add prompts"
        )
    held = set(groups[:prompts])
    steps = train.total_steps(job.rows, job.settings, job.together)  # as many as without watching
    job.settings = job.settings.model_copy(update={"steps": steps, "epochs": None})
    kept, job.rows = [row for row in job.rows if row.group in held], [row for row in job.rows if row.group not in held]
    batches = [make_batch(kept, micro_batch) for micro_batch in even_batches(kept)]
    return partial(train.loss_on, job, batches), [slot for slot in slots if slot.group not in held]


def _columns(job: train.TrainingJob) -> Callable[[list[Row], float], list[Row]]:
    """Adds what the job's policies read of whole responses."""
    spanning = [
        (POLICIES[term.name], term)
        for term in job.terms
        if term.name in POLICIES and POLICIES[term.name].prepare is not None
    ]
    if not spanning:
        return lambda rows, _: rows
    remembered = Remembered(job.teacher)
    if not job.matches:  # which read more of the teacher than is remembered
        job.teacher = remembered

    def columns(rows: list[Row], progress: float) -> list[Row]:
        return with_columns(
            rows, remembered, [(policy, term.at_step(progress, job.states).params) for policy, term in spanning]
        )

    return columns


def _ask(
    student: Model,
    rows: int,
    beside: SecondModel | None,
    copy: Copy | None,
    stop: Callable[[], bool],
    jobs: Sequence[generation.GenerationJob],
) -> list[Completion]:
    """The student's answers, in the order of the jobs; each rank writes its part."""
    mine = jobs[distributed.rank() :: distributed.world_size()]
    training = student.net.training
    student.net.eval()
    net = student.net if copy is None else copy.now()
    asked_to_stop = stop if distributed.world_size() == 1 else lambda: False
    decoding = Decoding(batch_rows=rows, record=True, second=beside)
    answers = write(net, mine, student.eos_ids, student.vocab_size, decoding=decoding, stop=asked_to_stop)
    found = {answer.index: answer for answer in answers}
    student.net.train(training)
    if len(found) < len(mine):
        raise StoppedError("stopped while the student wrote; the step has not begun")
    parts = [iter(part) for part in distributed.gather([found[index] for index in range(len(mine))])]
    return [next(parts[number % len(parts)]) for number in range(len(jobs))]


def _server(through: Server, student: Model, folder: Path, rows: int) -> VllmWriter:
    tokens = StudentTokens(student.eos_ids, student.vocab_size, head_of(student.net).vocab_size)
    return VllmWriter(through.vllm, folder, tokens, through.model, server_folder=through.folder_there, concurrency=rows)


def _ask_server(
    student: Model, server: VllmWriter, stop: Callable[[], bool], jobs: Sequence[generation.GenerationJob]
) -> list[Completion]:
    """The same from a server that is given the student's weights first; the first rank asks for all."""
    found: list[Completion] = []
    if distributed.rank() == 0:
        server.sync(student.net, student.tokenizer)
        found = server.write(jobs, stop)
    found = distributed.gather(found)[0]
    if len(found) < len(jobs):
        raise StoppedError("stopped while the student wrote; the step has not begun")
    return found


def _check_room(slots: Sequence[Row], max_tokens: int, context: int) -> None:
    for slot in slots:
        longest = max(len(slot.prompt_ids), len(slot.teacher_prompt_ids or ()))
        if longest + max_tokens > context:
            raise UserError(
                f"the prompt {slot.group!r} takes {longest} tokens and leaves no room for {max_tokens} more in a"
                f" context of {context}: shorten it, or lower the student's max_tokens"
            )


def _whole_groups(rows: Sequence[Row], least: int = 2, without_preferred: bool = False) -> list[Row]:
    """Only prompts whose preferred answer is there and has another beside it; of equal answers the better placed one.
    Where the student will write the other one, or the preferred one (`without_preferred`), that may lack.

    Without its preferred answer, a prompt's next one would pass for the best; a lone answer is compared with nothing.
    """
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.group, {}).setdefault(row.sample_id, row)
    whole = [
        each
        for each in groups.values()
        if len(each) >= least and (without_preferred or CHOSEN in next(iter(each.values())).tags)
    ]
    kept = [row for group in whole for row in group.values()]
    if not kept:
        raise UserError(
            "no prompt has two different answers with the preferred one among them; look at the store's answers"
        )
    return kept


def _known_log_probs(
    store: Path, judge: Model, rows: Sequence[Row], vocab_size: int | None, progress: Progress
) -> dict[str, float]:
    """log p(response) under a frozen model, from the store or computed now and kept there."""
    kind = "log_prob" if vocab_size is None else f"log_prob of {vocab_size} tokens"
    with Store(store) as opened:
        known = {e.sample_id: float(e.value) for e in opened.evidence(kind) if e.judge == judge.identity}
        if missing := [row for row in rows if row.sample_id not in known]:
            found = response_log_probs(
                judge.net, missing, vocab_size, partial(_tell, progress, "answers scored by the reference")
            )
            opened.write_evidence(
                *(Evidence(sample_id, kind, judge.identity, value) for sample_id, value in found.items())
            )
            known |= found
    return known


def _prepare(job: train.TrainingJob, teacher: Callable[[], Teacher], progress: Progress) -> None:
    for label, match in job.matches.items():
        if not isinstance(match, Match):
            continue
        tell = partial(_tell, progress, f"{label}: getting ready")
        if match.settings.name == "filtered_match":
            learn_filters(
                match, (job.net, _weights(teacher).net), job.rows, job.settings.tokens_per_step, job.settings.seed, tell
            )
        if match.settings.name == "contrast":
            fill_bank(match, _weights(teacher).net, job.rows, job.bank_rows, tell)


def _tell(progress: Progress, detail: str, done: int, total: int) -> None:
    progress(done, total, detail)


def _bind(term: Term, student: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> Learned:
    """What the term learns beside the student."""
    ours, theirs = (net.config.get_text_config() for net in (student, teacher))
    layers = (ours.num_hidden_layers, theirs.num_hidden_layers)
    widths = (ours.hidden_size, theirs.hidden_size)
    if term.match is not None:
        return Match(term.match, layers, widths, seed).to(student.device)
    embed: Any = student.get_input_embeddings()
    dual = DualSpace(
        widths, term.divergence, term.projection_rate, seed, lambda token_N: embed(token_N).detach(), DenseSignal
    )
    return dual.to(student.device)
