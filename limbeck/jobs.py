"""From a recipe's terms to a training that is ready to start: what they read is computed or wired up here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from limbeck import train
from limbeck.data import BEST, Row
from limbeck.models.load import Model, head_of
from limbeck.models.start import add_adapters
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.match import Match, MatchSettings, wanted
from limbeck.objectives.term import Term
from limbeck.objectives.total import Taps
from limbeck.plan import TEACHER_READS
from limbeck.prepare import fill_bank, learn_filters, response_log_probs, with_reference
from limbeck.progress import Reporter
from limbeck.recipe import Recipe
from limbeck.store import Store
from limbeck.types import Evidence, UserError


def make_job(
    terms: Sequence[Term],
    student: Model,
    rows: Sequence[Row],
    teacher: Callable[[], InProcessTeacher],
    recipe: Recipe,
    folder: Path,
    key: str,
    store: Path,
    reporter: Reporter,
) -> train.Job:
    """The training of `student` (as it is before any training) on `rows`. The teacher is loaded only where a term reads it.

    Args:
        folder: receives checkpoints and metrics.
        key: names the job in its checkpoints.
        store: where frozen models' opinions of the text are kept.
    """
    if any(term.unit == "group" for term in terms):
        rows = _whole_groups(rows)
    for name in sorted({read.removeprefix("reference_") for term in terms for read in term.reads if read.startswith("reference_")}):
        judge = student if name == "start" else teacher().model
        rows = with_reference(rows, name, _known_log_probs(store, judge, rows, reporter))
    matches = {term.label: _bind(term.match, student.net, teacher().model.net, recipe.train.seed) for term in terms if term.match}
    if recipe.student.lora is not None:
        add_adapters(student.net, recipe.student.lora, recipe.train.seed)
    job = train.Job(student.net, rows, terms, train.no_teacher, recipe.train, folder, key, matches)
    if any(term.reads & TEACHER_READS for term in terms):
        view, taps = teacher().view, [Taps(*map(frozenset, wanted(list(matches.values()), side))) for side in (0, 1)]
        job.vocabulary = min(head_of(student.net).vocabulary, head_of(teacher().model.net).vocabulary)
        job.taps = taps[0]
        job.teacher = lambda batch: view(batch, taps[1], job.vocabulary)
        job.bank_rows = {row.sample_id: number for number, row in enumerate(rows)}
        job.prepare = lambda: _prepare(job, teacher().model.net, reporter)
    return job


def _whole_groups(rows: Sequence[Row]) -> list[Row]:
    """Only prompts whose preferred answer is there: without it, the next one would pass for the best."""
    led = {row.group for row in rows if BEST in row.tags}
    kept = [row for row in rows if row.group in led]
    if not kept:
        raise UserError("no prompt has its preferred answer (all were empty), so there is nothing to compare; look at the store's answers")
    return kept


def _known_log_probs(store: Path, judge: Model, rows: Sequence[Row], reporter: Reporter) -> dict[str, float]:
    """log p(response) under a frozen model, from the store or computed now and kept there."""

    def progress(done: int, total: int) -> None:
        reporter.progress(done, total, "answers scored by the reference")

    with Store(store) as opened:
        known = {e.sample_id: float(e.value) for e in opened.evidence("log_prob") if e.judge == judge.identity}
        if missing := [row for row in rows if row.sample_id not in known]:
            found = response_log_probs(judge.net, missing, progress)
            for sample_id, value in found.items():
                opened.write_evidence(Evidence(sample_id, "log_prob", judge.identity, value))
            known |= found
    return known


def _prepare(job: train.Job, teacher: PreTrainedModel, reporter: Reporter) -> None:
    for label, match in job.matches.items():
        progress = partial(_tell, reporter, f"{label}: getting ready")
        if match.settings.name == "filtered_match":
            learn_filters(match, (job.net, teacher), job.rows, job.settings.tokens_per_step, job.settings.seed, progress)
        if match.settings.name == "contrast":
            fill_bank(match, teacher, job.rows, job.bank_rows, progress)


def _tell(reporter: Reporter, detail: str, done: int, total: int) -> None:
    reporter.progress(done, total, detail)


def _bind(settings: MatchSettings, student: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> Match:
    ours, theirs = (net.config.get_text_config() for net in (student, teacher))
    layers, widths = (ours.num_hidden_layers, theirs.num_hidden_layers), (ours.hidden_size, theirs.hidden_size)
    return Match(settings, layers, widths, seed)
