"""The evaluation of a run: all its systems on the held-out prompts and tasks, by all its ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from limbeck.evaluate import run as evaluation
from limbeck.evaluate.measure import Bench
from limbeck.evaluate.records import SystemRecords
from limbeck.evaluate.shares import Shares
from limbeck.models.fingerprint import check_sealed
from limbeck.models.load import load_config, load_tokenizer
from limbeck.models.model import Model
from limbeck.models.weights import empty_model
from limbeck.runs.run import Run
from limbeck.storage.metrics_log import steps_made
from limbeck.training import distributed
from limbeck.training.controls import CONTROLS
from limbeck.types import UserError


def evaluate(run: Run) -> None:
    """Measure every system on the held-out prompts, into `evaluation/`.

    Raises:
        UserError: a system is not trained yet.
    """
    if run.path("evaluation", "summary.json").exists():
        return
    for name in ("student", *run.method.controls):
        if not (run.home(name) / "student").exists():
            raise UserError(f"{name} is not trained yet: run `limbeck train` (or `limbeck run`) first")
        check_sealed(run.home(name) / "student", f"{run.home(name) / 'student'}")
    if run.recipe.student.scores:
        run.preferences.evaluate(run.models.initial_student, run.path("student"), steps=steps_made(run.folder))
        return
    bench = run.bench(run.path("evaluation"), Shares(distributed.world_size() > 1))
    if bench.outdated:
        run.reporter.note(f"measured anew, since the questions changed: {', '.join(bench.outdated)}")
    served = {} if run.models.reference is not None else {"teacher": [measured_teacher(run, bench)]}
    distributed.call({"evaluate": "systems", **run.place})
    systems = bench.timed(served | measured(run, bench), measure=run.recipe.evaluate.speeds is not False)
    evaluation.write_summary(run.questions, bench, systems, steps=steps_made(run.folder))


def ask_teacher(run: Run) -> None:
    """Have a served teacher write what the evaluation will ask of it, so that its server may be gone by then.

    Raises:
        UserError: no held-out answer is left to measure on, or the server fails.
    """
    recipe, models = run.recipe, run.models
    is_measured_here = not (models.teacher_is_away or models.other_tokens)
    if recipe.teacher.server is None or recipe.student.scores or is_measured_here:
        return
    if run.path("evaluation", "summary.json").exists():
        return
    tokenizer = load_tokenizer(recipe.speaker, recipe.speaker_template)
    reader = Model(empty_model(load_config(recipe.speaker)), tokenizer, "none")  # what it counts is not kept
    with TemporaryDirectory() as folder:
        where = Path(folder)
        bench = evaluation.bench(run.questions, where, teacher=None, reader=reader, rows=(), progress=run.progress)
        bench.by_text("teacher", run.text.said)


def take_part(run: Run) -> None:
    """Measure this rank's share of what rank 0 evaluates."""
    bench = run.bench(run.path("evaluation"), Shares(over_ranks=True))
    distributed.wait()  # for rank 0's call
    measured(run, bench)


def measured(run: Run, bench: Bench) -> dict[str, list[SystemRecords]]:
    """The records of every system whose weights are here; the teacher's first, the student's last."""
    systems = {} if run.models.reference is None else {"teacher": [measured_teacher(run, bench)]}
    for name in run.recipe.evaluate.controls:
        if not CONTROLS[name].is_trained:
            systems[name] = [bench.measure(name, partial(run.models.untrained, name))]
    for name in (*run.method.controls, "student"):
        systems[name] = [bench.measure(name, partial(run.trained, name), lens=name == "student")]
    return systems


def measured_teacher(run: Run, bench: Bench) -> SystemRecords:
    """The records of the teacher: in process, or by the text of its server."""
    reference = run.models.reference
    if reference is None:
        return bench.by_text("teacher", run.text.said)
    return bench.measure("teacher", lambda: reference.model)
