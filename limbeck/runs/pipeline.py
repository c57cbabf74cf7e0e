"""Runs a recipe's stages in order: elicit, train (student and controls), evaluate, report. Each is done once.

Finished work is reused by the next call: answers by their request keys, trainings by their checkpoints, exports and
measurements by files that are written whole. `limbeck run` on a killed run goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from limbeck.config.recipe import Recipe
from limbeck.progress import Reporter, Silent, StoppedError
from limbeck.report.page import write_report
from limbeck.runs.claim import run_folder
from limbeck.runs.fit import fitted
from limbeck.runs.measuring import ask_teacher, evaluate
from limbeck.runs.opening import begin, tell_prompts
from limbeck.runs.preflight import plan
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.runs.servers import look_at_writer
from limbeck.storage.files import exclusive
from limbeck.types import UserError

STAGES = ("elicit", "train", "evaluate", "report")


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    stages: Sequence[str] = STAGES,
    store: Path | None = None,
) -> Path:
    """Run the stages of a recipe without rounds that are not done yet. Returns the run folder.

    Args:
        out: the run folder; by default runs/NAME.
        stop: called between two steps; if it returns true, the state is saved and `StoppedError` raised.
        stages: which of elicit, train, evaluate, report; a stage also does what it needs of earlier ones.
        store: the folder of `store.sqlite`; by default the run folder.

    Raises:
        UserError: the recipe or the folder can't be used; finished work is kept.
    """
    assert recipe.rounds is None, "rounds are run by runs.rounds"
    method = resolve(recipe)
    estimate = plan(method)  # refuses what the models' configurations rule out
    method = fitted(method)
    reporter = reporter or Silent()
    folder = run_folder(recipe, out)
    with exclusive(folder / ".lock"), ExitStack() as at_the_end:
        job = Run(method, folder, reporter, stop, store=store)
        at_the_end.callback(job.models.named.release)
        if "train" in stages and not job.path("student").exists():
            look_at_writer(recipe)  # before the teacher's text is paid for
        job.claim()
        begin(folder, estimate.as_dict(), job.models.devices.facts()["device"], reporter)
        tell_prompts(folder, method.prompt_notes, reporter)
        if "elicit" in stages:
            reporter.stage("Teacher's text")
            job.tell_answers(held_out=not recipe.student.scores)
            if not recipe.fixed_writers and method.controls:
                job.text.by_others()
            _ask_early(job, stages)
            if recipe.teacher.cache is not None and "train" not in stages:  # a training does it itself
                reporter.stage("Teacher's distributions")
                job.fill_cache()
        if "train" in stages:
            if "elicit" not in stages and not job.path("student").exists():
                job.tell_answers(held_out=False)
            if "evaluate" in stages and not job.path("student").exists():
                # refused if none is left
                _ = job.preferences.task() if recipe.student.scores else job.questions.prompts
            reporter.stage("Student's start")
            job.models.choice()
            for name in ("student", *method.controls):
                reporter.stage(f"Training: {name}")
                job.train(name)
        if "evaluate" in stages:
            reporter.stage("Evaluation")
            evaluate(job)
        if "report" in stages:
            reporter.stage("Report")
            write_report(folder)
    return folder


def _ask_early(job: Run, stages: Sequence[str]) -> None:
    """Have a served teacher answer what the evaluation will ask, while its server is there; where it can't and a
    training follows, the evaluation asks again."""
    try:
        ask_teacher(job)
    except StoppedError:
        raise
    except UserError as error:
        if "train" not in stages:
            raise
        job.reporter.note(f"the evaluation will ask the teacher again: {error}")
