"""Runs a recipe's stages in order: elicit, train (student and controls), evaluate, report. Each is done once.

Finished work is reused by the next call: answers by their request keys, trainings by their checkpoints, exports and
measurements by files that are written whole. `limbeck run` on a killed run goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from limbeck.config.recipe import Recipe
from limbeck.data.batches import Row, make_batch, make_rows
from limbeck.elicit.run import TextSource
from limbeck.elicit.training_text import TrainingText
from limbeck.evaluate import run as evaluation
from limbeck.evaluate.measure import Bench
from limbeck.evaluate.records import SystemRecords
from limbeck.models.export import export
from limbeck.models.load import load_config, load_model
from limbeck.models.model import Model
from limbeck.models.own_text import OwnTextTeacher
from limbeck.models.prune import Calibration
from limbeck.models.teacher_interface import TeacherParts
from limbeck.models.template_names import template_suffix
from limbeck.models.weights import context_length
from limbeck.objectives.term import make_term
from limbeck.progress import Reporter, Silent, StoppedError, training_progress
from limbeck.report.card import model_card
from limbeck.report.page import write_report
from limbeck.runs.claim import claim, run_folder
from limbeck.runs.fit import fitted
from limbeck.runs.models import RunModels
from limbeck.runs.opening import settle, tell_answers, tell_prompts
from limbeck.runs.preflight import plan
from limbeck.runs.resolve import Method, resolve
from limbeck.runs.servers import look_at_writer
from limbeck.storage import checkpoint
from limbeck.storage.files import exclusive, new_directory, sweep, write_json, write_text
from limbeck.training import loop
from limbeck.training.controls import CONTROLS, ControlData
from limbeck.training.job import TrainingJob, total_steps
from limbeck.training.setup import TrainingPlan, make_job
from limbeck.training.student_writer import StudentWriting
from limbeck.types import Message, Sample, UserError

STAGES = ("elicit", "train", "evaluate", "report")


@dataclass
class Run:
    """One method in one folder: its text, models, trainings and measurements.

    The runs of a comparison share the teacher and the text of the run `shared`.
    """

    method: Method
    folder: Path
    reporter: Reporter
    stop: Callable[[], bool] = lambda: False
    shared: Run | None = None

    @property
    def recipe(self) -> Recipe:
        return self.method.recipe

    @cached_property
    def models(self) -> RunModels:
        return RunModels(
            self.method,
            self.folder,
            self.reporter,
            calibration=self._calibration,
            progress=self.progress,
            billed=lambda: self.text.bill(),
            shared=None if self.shared is None else self.shared.models,
        )

    @cached_property
    def text(self) -> TrainingText:
        method = self.method
        source = TextSource(self.recipe, method.steps, method.training_prompts, method.held_out_prompts)
        return TrainingText(
            source, self.library, self.folder, models=self.models, reporter=self.reporter, stop=self.stop
        )

    @property
    def library(self) -> Path:
        """The folder whose `store.sqlite` holds the text."""
        return self.folder if self.shared is None else self.shared.library

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def home(self, name: str) -> Path:
        """The folder of the student's training, or of a control's."""
        return self.folder if name == "student" else self.folder / "controls" / name

    def progress(self, done: int, total: int, detail: str) -> None:
        """Report progress; raise StoppedError if the user asked to stop. For stages that can stop at any point."""
        self.reporter.progress(done, total, detail)
        if self.stop():
            raise StoppedError(f"stopped; what was finished is kept in {self.folder}, run it again to go on")

    def tell_answers(self, held_out: bool = True) -> None:
        """Have the training text and the held-out text written, and say how the answers ended."""
        parts = {"training text": self.text.training()} if self.recipe.fixed_writers else {}
        parts |= {"held-out text": self.text.held_out()} if held_out else {}
        tell_answers(self.folder, parts, self.reporter)

    # Text in tokens

    def rows(self, samples: Sequence[Sample], student: Model) -> list[Row]:
        """Samples as rows of token ids. Sampled ids are used as they are; text without ids is encoded, without what the
        prompt opens already, and gets the end token of the template unless it was cut off."""

        def response_ids(sample: Sample) -> Sequence[int]:
            same_tokens = not self.models.other_tokens or sample.writer == self.models.initial_identity
            if sample.response_ids is not None and same_tokens:
                return sample.response_ids
            return alone.answer_ids(sample.messages[-1]["content"], sample.meta.get("finish") == "length")

        alone = student.with_context(None)
        shown = self._teacher_prompt_ids(student)
        return make_rows(samples, alone.prompt_ids, response_ids, student.max_length, teacher_prompt_ids=shown)

    def _teacher_prompt_ids(self, student: Model) -> Callable[[tuple[Message, ...]], list[int]] | None:
        """Encodes the prompt as the teacher sees it, in its tokens; None if it sees the same as the student."""
        if self.models.other_tokens:
            return self.models.teacher.model.prompt_ids
        context = self.method.prompt_context
        return None if context is None else student.with_context(context).prompt_ids

    def slots(self, student: Model) -> list[Row]:
        """The training prompts as rows without a response."""
        teacher_prompt_ids = self._teacher_prompt_ids(student)
        return [
            Row(
                prompt.id,
                tuple(student.prompt_ids(prompt.messages)),
                (),
                tags=frozenset({prompt.task} - {""}),
                group=prompt.id,
                weight=prompt.weight,
                teacher_prompt_ids=None if teacher_prompt_ids is None else tuple(teacher_prompt_ids(prompt.messages)),
            )
            for prompt in self.text.prompts[0]
        ]

    def _calibration(self, texts: int) -> Calibration:
        """So many texts not by the student, by which the layers of a pruned student are chosen."""
        rows = self.rows(self.text.by_others(texts), self.models.teacher.model)
        batch = make_batch(rows)
        positions_BT = batch.mask_BT.roll(-1, 1)
        positions_BT[:, -1] = False
        return Calibration(batch.tokens_BT, positions_BT)

    # Training

    def train(self, name: str) -> None:
        """Train `student` or a control unless its export is there already."""
        home = self.home(name)
        checkpoints_left = 1 if name == "student" else 0
        sweep(home)
        if (home / "student").exists():
            checkpoint.prune(home / "checkpoints", checkpoints_left)
            return
        student = self.models.student_to_train()
        job = self.job(name, student)
        if not loop.train(job, training_progress(self.reporter), self.stop):
            raise StoppedError(
                f"stopped; the checkpoint of the last step is in {job.folder / 'checkpoints'}, run it again to go on"
            )
        student = self.models.finished(student)
        with new_directory(job.folder / "student") as folder:
            export(student, folder)
            write_text(folder / "README.md", model_card(self.recipe, name, self.models.teacher_identity))
        checkpoint.prune(home / "checkpoints", checkpoints_left)

    def fill_cache(self) -> None:
        """Compute and cache the teacher's distributions over the training text, if the recipe has a cache."""
        if not self.path("student").exists():
            self.job("student", self.models.student_to_train())

    def job(self, name: str, student: Model) -> TrainingJob:
        """The training of the student or a control, ready to start or to go on."""
        recipe = self.recipe
        terms = self.method.terms
        settings = recipe.train
        rows = self.rows(self.text.training(), student) if recipe.fixed_writers else []
        writing = None
        own_text = self.models.own_text(student, self.library) if name == "student" else None
        if name == "student":
            writing = self._writing(student)
            rows = rows if own_text is None else own_text.mark(rows, self._report_teacher)
        else:  # plain fine-tuning for as many steps
            steps = total_steps(rows, settings, any(term.unit == "group" for term in terms))
            settings = settings.model_copy(update={"steps": steps, "epochs": None, "mixup": None})
            terms = (make_term("cross_entropy", {}),)
            rows = self.control_rows(name, rows, student)
        folder = self.home(name)
        folder.mkdir(parents=True, exist_ok=True)
        training_plan = TrainingPlan(
            terms,
            rows,
            settings,
            folder=folder,
            key=f"{recipe.hash}/{name}",
            store=self.library / "store.sqlite",
            lora=recipe.student.lora,
            cache=recipe.teacher.cache,
            writing=writing,
            machine=recipe.machine,
        )
        parts = self._teacher_parts(student, own_text)
        teacher = cache(lambda: self.method.teacher_kind.prepare(recipe.teacher, parts))
        job = make_job(training_plan, student, teacher, self.progress)
        self.models.tell_adapters(student)
        return job

    def _writing(self, student: Model) -> StudentWriting | None:
        """How the student writes during training, if it does."""
        if self.method.share is None or self.method.fresh is None:
            return None
        max_length = min(student.max_length, context_length(load_config(self.recipe.speaker)))
        return StudentWriting(
            self.recipe,
            slots=self.slots(student),
            share=self.method.share,
            fresh=self.method.fresh,
            max_length=max_length,
            second_model=lambda: self.models.teacher.model,
            rewards=self.method.rewards,
            prompts={prompt.id: prompt for prompt in self.text.prompts[0]},
            stop=self.stop,
        )

    def _teacher_parts(self, student: Model, own_text: OwnTextTeacher | None) -> TeacherParts:
        return TeacherParts(
            student=student,
            student_is_adapted_teacher=self.models.student_is_adapted_teacher,
            prompt_context=self.method.prompt_context,
            load=self.models.load,
            release=self.models.release,
            scorer=self.models.scoring_server,
            own_text=own_text,
            responses=partial(self._responses, student),
            report_facts=self._report_teacher,
        )

    def _responses(self, student: Model) -> list[tuple[int, ...]]:
        """The responses of the training text, in the student's tokens."""
        return (
            [row.response_ids for row in self.rows(self.text.training(), student)] if self.recipe.fixed_writers else []
        )

    def _report_teacher(self, file: str, facts: dict[str, Any], text: str) -> None:
        write_json(self.path(file), facts)
        self.reporter.note(text)

    def control_rows(self, name: str, rows: list[Row], student: Model) -> list[Row]:
        """The rows that a control is fine-tuned on; `rows` is the student's training text."""
        control = CONTROLS[name]
        assert control.rows is not None
        return control.rows(
            ControlData(
                student_rows=rows,
                prompts=self.text.prompts[0],
                others_text=self.text.by_others,
                encode=lambda samples: self.rows(samples, student),
                seed=self.recipe.text_seed,
                max_length=student.max_length,
            )
        )

    # Measuring

    def evaluate(self) -> None:
        """Measure every system on the held-out prompts, into `evaluation/`."""
        if self.path("evaluation", "summary.json").exists():
            return
        for name in ("student", *self.method.controls):
            if not (self.home(name) / "student").exists():
                raise UserError(f"{name} is not trained yet: run `limbeck train` (or `limbeck run`) first")
        bench = self.bench(self.path("evaluation"))
        systems = {"teacher": [self.measured_teacher(bench)]}
        for name in self.recipe.evaluate.controls:
            if not CONTROLS[name].is_trained:
                systems[name] = [bench.measure(name, self.models.initial_student)]
        for name in (*self.method.controls, "student"):
            systems[name] = [bench.measure(name, partial(self.trained, name), lens=name == "student")]
        evaluation.write_summary(self.questions, bench, systems)

    @property
    def questions(self) -> evaluation.Questions:
        return evaluation.Questions(self.recipe, self.method.tasks, self.text, self.models.devices)

    def bench(self, folder: Path) -> Bench:
        """The bench that measures systems and keeps their records in `folder`."""
        return evaluation.bench(
            self.questions,
            folder,
            teacher=self.models.reference,
            reader=self.models.reader,
            rows=self.held_out_rows(),
            progress=self.progress,
        )

    def measured_teacher(self, bench: Bench) -> SystemRecords:
        """The records of the teacher: in process, or by the text of its server."""
        reference = self.models.reference
        if reference is None:
            return bench.by_text("teacher", self.text.said)
        return bench.measure("teacher", lambda: reference.model)

    def trained(self, name: str) -> Model:
        """The exported student, or a trained control."""
        return load_model(str(self.home(name) / "student"), placement=self.models.devices.student)

    def held_out_rows(self) -> list[Row]:
        """The teacher's answers to the held-out prompts; each row has its prompt's id."""
        samples = self.text.held_out()
        rows = {row.sample_id: row for row in self.rows(samples, self.models.reader)}
        pairs = zip(samples, self.text.prompts[1], strict=True)
        return [replace(rows[sample.id], sample_id=prompt.id) for sample, prompt in pairs if sample.id in rows]

    def report(self) -> None:
        """Write `report.html` from the folder alone."""
        write_report(self.folder)


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    stages: Sequence[str] = STAGES,
) -> Path:
    """Run the stages of a recipe that are not done yet. Returns the run folder.

    Args:
        out: the run folder; by default runs/NAME.
        stop: called between two steps; if it returns true, the state is saved and `StoppedError` raised.
        stages: which of elicit, train, evaluate, report; a stage also does what it needs of earlier ones.

    Raises:
        UserError: the recipe or the folder can't be used; finished work is kept.
    """
    method = resolve(recipe)
    plan(method)  # refuses what the models' configurations rule out
    method = fitted(method)
    reporter = reporter or Silent()
    folder = run_folder(recipe, out)
    with exclusive(folder / ".lock"):
        job = Run(method, folder, reporter, stop)
        if "train" in stages and not job.path("student").exists():
            look_at_writer(recipe)  # before the teacher's text is paid for
        claim_run(job)
        tell_prompts(folder, method.prompt_notes, reporter)
        if "elicit" in stages:
            reporter.stage("Teacher's text")
            job.tell_answers()
            if not recipe.fixed_writers and method.controls:
                job.text.by_others()
            if recipe.teacher.cache is not None and "train" not in stages:  # a training does it itself
                reporter.stage("Teacher's distributions")
                job.fill_cache()
        if "train" in stages:
            if "elicit" not in stages and not job.path("student").exists():
                job.tell_answers(held_out=False)
            reporter.stage("Student's start")
            job.models.choice()
            for name in ("student", *method.controls):
                reporter.stage(f"Training: {name}")
                job.train(name)
        if "evaluate" in stages:
            reporter.stage("Evaluation")
            job.evaluate()
        if "report" in stages:
            reporter.stage("Report")
            job.report()
    return folder


def claim_run(run: Run) -> None:
    """Bind the run's folder to its recipe, prompts and teacher, or refuse that of another run."""

    def inputs() -> dict[str, str]:
        facts = {"teacher": run.models.teacher_identity, "prompts": run.method.prompts_key}
        if run.recipe.student.template is not None:
            facts["student's template"] = template_suffix(run.recipe.student.template)
        if run.recipe.teacher.server is not None:
            facts["server"] = run.models.server_identity
        return facts

    claim(run.folder, run.recipe, inputs, run.models.probe_server)
    settle(run.folder, run.recipe.machine, run.models.devices.facts(), run.reporter)
