"""A run: one method in one folder; its text, models, trainings and bench, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from limbeck.config.recipe import Recipe
from limbeck.data.batches import Row
from limbeck.elicit.run import TextSource
from limbeck.elicit.training_text import TrainingText
from limbeck.evaluate import run as evaluation
from limbeck.evaluate.measure import Bench
from limbeck.evaluate.preference import PreferenceBench
from limbeck.evaluate.shares import ALONE, Shares
from limbeck.models.load import load_config, load_model
from limbeck.models.model import Model
from limbeck.models.own_text import OwnTextTeacher
from limbeck.models.teacher_interface import TeacherParts
from limbeck.models.weights import context_length
from limbeck.objectives.term import make_term
from limbeck.progress import Reporter, StoppedError, training_progress
from limbeck.report.card import model_card
from limbeck.runs.answers import SharedTexts
from limbeck.runs.claim import follow_names, training_key
from limbeck.runs.encoding import Encoding
from limbeck.runs.exporting import exported, write_export
from limbeck.runs.memory import keeps_teacher
from limbeck.runs.models import RunModels
from limbeck.runs.opening import bind, tell_answers
from limbeck.runs.resolve import Method
from limbeck.storage import checkpoint
from limbeck.storage.files import new_directory, sweep, write_json
from limbeck.training import distributed, loop
from limbeck.training.controls import CONTROLS, ControlData
from limbeck.training.job import TrainingJob, tokens_beside, total_steps
from limbeck.training.setup import TrainingPlan, make_job
from limbeck.training.student_writer import StudentWriting
from limbeck.types import Sample


@dataclass
class Run:
    """One method in one folder: its text, models, trainings and measurements.

    The runs of a comparison share the teacher and the text of the run `shared`; rounds keep their text in one `store`,
    the folder of all of them.
    """

    method: Method
    folder: Path
    reporter: Reporter
    stop: Callable[[], bool] = lambda: False
    shared: Run | None = None
    store: Path | None = None

    def __post_init__(self) -> None:
        follow_names(self.folder if self.shared is None else self.shared.folder, self.store)

    @property
    def recipe(self) -> Recipe:
        return self.method.recipe

    @cached_property
    def models(self) -> RunModels:
        return RunModels(
            self.method,
            self.folder,
            self.reporter,
            calibration=lambda texts: self.encoding.calibration(texts),
            progress=self.progress,
            bills=lambda: self.text.bills,
            shared=None if self.shared is None else self.shared.models,
        )

    @cached_property
    def text(self) -> TrainingText:
        method = self.method
        source = TextSource(
            self.recipe,
            method.steps,
            method.training_prompts,
            method.held_out_prompts,
            show=None if self.recipe.teacher.server is None else method.prompt_context,
            step_prompt=method.fixed_step_prompt,
            holds_out_answers=method.holds_out_answers,
        )
        return TrainingText(
            source,
            self.library,
            self.folder,
            models=self.models,
            reporter=self.reporter,
            stop=self.stop,
            shared=self.shared_texts.open,
        )

    @cached_property
    def shared_texts(self) -> SharedTexts:
        """The answers that the runs of this user share."""
        return SharedTexts(
            self.recipe,
            self.models.writer_identity,
            self.method.prompt_context,
            self.reporter,
            rounds=None if self.store is None else self.store.resolve(),
            like=None if self.shared is None else self.shared.shared_texts,
        )

    def claim(self) -> None:
        """Bind the folder to this run's recipe, prompts and teacher, or refuse that of another run."""
        bind(self.folder, self.method, self.models, self.reporter)

    @property
    def library(self) -> Path:
        """The folder whose `store.sqlite` holds the text."""
        return (self.store or self.folder) if self.shared is None else self.shared.library

    @property
    def place(self) -> dict[str, Any]:
        """Where another rank finds this run."""
        return {"folder": str(self.folder), "store": self.store and str(self.store)}

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

    @cached_property
    def encoding(self) -> Encoding:
        return Encoding(self.method, self.models, self.text)

    def rows(self, samples: Sequence[Sample], student: Model) -> list[Row]:
        """Samples as rows of the student's token ids."""
        return self.encoding.rows(samples, student)

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
        distributed.call({"train": name, **self.place})
        if not loop.train(job, training_progress(self.reporter), self.stop):
            raise StoppedError(
                f"stopped; the checkpoint of the last step is in {job.folder / 'checkpoints'}, run it again to go on"
            )
        student = exported(self.models, student)
        with new_directory(job.folder / "student") as folder:
            write_export(student, folder, partial(model_card, self.recipe, name, self.models.teacher_identity))
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
        self.models.named.release()  # they have said what they had to say
        own_text = self.models.own_text(student, self.library) if name == "student" else None
        if name == "student":
            writing = self._writing(student)
            for control in self.method.controls:  # refused before the student is trained
                self.control_rows(control, rows, student)
            rows = rows if own_text is None else own_text.mark(rows, self._report_teacher)
        else:  # plain fine-tuning for as many steps
            steps = total_steps(rows, settings, any(term.unit == "group" for term in terms), tokens_beside(recipe))
            settings = settings.model_copy(update={"steps": steps, "epochs": None, "mixup": None})
            terms = (make_term("cross_entropy", {}),)
            rows = self.control_rows(name, rows, student)
        key = f"{training_key(self.folder, recipe)}/{name}"
        if tokens_beside(recipe) is not None and recipe.train.steps is None:
            key += "/every prompt"  # not the checkpoints of versions that counted fewer steps
        folder = self.home(name)
        folder.mkdir(parents=True, exist_ok=True)
        training_plan = TrainingPlan(
            terms,
            rows,
            settings,
            folder=folder,
            key=key,
            store=self.library / "store.sqlite",
            lora=recipe.student.lora,
            cache=recipe.teacher.cache,
            writing=writing,
            machine=recipe.machine,
        )
        parts = self._teacher_parts(student, own_text)
        teacher = cache(lambda: self.method.teacher_kind.prepare(recipe.teacher, parts))
        if not keeps_teacher(recipe, self.method.terms):
            self.models.release()
        job = make_job(training_plan, student, teacher, self.progress)
        self.models.tell_adapters(student)
        return job

    def _writing(self, student: Model) -> StudentWriting | None:
        """How the student writes during training, if it does."""
        if self.method.share is None or self.method.fresh is None:
            return None
        max_length = min(student.max_length, context_length(load_config(self.recipe.speaker)))
        rewards = self.method.rewards
        return StudentWriting(
            self.recipe,
            slots=self.encoding.slots(student),
            share=self.method.share,
            fresh=self.method.fresh,
            max_length=max_length,
            second_model=lambda: self.models.teacher.model,
            rewards=rewards and replace(rewards, load=self.models.reward_model, judge=self.text.judge),
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
        if distributed.rank() == 0:
            write_json(self.path(file), facts)
        self.reporter.note(text)

    def control_rows(self, name: str, rows: list[Row], student: Model) -> list[Row]:
        """The rows that a control is fine-tuned on; `rows` is the student's training text."""
        control = CONTROLS[name]
        assert control.rows is not None
        return control.rows(
            ControlData(
                student_rows=rows,
                prompts=self.method.training_prompts,
                others_text=self.text.by_others,
                encode=lambda samples: self.rows(samples, student),
                seed=self.recipe.text_seed,
                max_length=student.max_length,
            )
        )

    # Measuring

    @cached_property
    def preferences(self) -> PreferenceBench:
        """The bench of a student that gives scores."""
        return PreferenceBench(self.questions, self.path("evaluation"), self.progress)

    @cached_property
    def questions(self) -> evaluation.Questions:
        tasks, step = self.method.tasks, self.method.step_prompt
        return evaluation.Questions(self.recipe, tasks, self.text, self.models.devices, step_prompt=step)

    def bench(self, folder: Path, shares: Shares = ALONE, questions: evaluation.Questions | None = None) -> Bench:
        """The bench that measures systems, or this rank's share of their items, and keeps their records in `folder`."""
        return evaluation.bench(
            questions or self.questions,
            folder,
            teacher=self.models.reference,
            reader=self.models.reader,
            rows=self.encoding.held_out(),
            progress=self.progress,
            shares=shares,
        )

    def trained(self, name: str) -> Model:
        """The exported student, or a trained control."""
        return load_model(str(self.home(name) / "student"), placement=self.models.devices.student)
