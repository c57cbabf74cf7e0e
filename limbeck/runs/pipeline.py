"""A recipe's stages in order: elicit, begin, train (student and control), evaluate, report. Each is done once.

What a stage finished is found again by the next call: answers by their request keys, trainings by their checkpoints,
exports and measurements by files that are written whole. `limbeck run` on a killed run just goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import cast

from limbeck.config.recipe import Recipe
from limbeck.data import batches as data
from limbeck.data.batches import CHOSEN, MIXED, REJECTED
from limbeck.elicit.engine import Answerer
from limbeck.elicit.training_text import TrainingText
from limbeck.evaluate import run as evaluation
from limbeck.evaluate.measure import Bench, Measured
from limbeck.models.api import ApiTeacher
from limbeck.models.load import Model, header_of, is_ready, load_config, load_tokenizer, save_model
from limbeck.models.prune import Calibration, Choice
from limbeck.models.score import ServerScorer
from limbeck.models.self_teacher import Average, adapters_off, self_teacher
from limbeck.models.start import begin, choose, merge_adapters
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.loss import STUDENT
from limbeck.objectives.term import make_term
from limbeck.progress import Reporter, Silent, StoppedError, training_progress
from limbeck.report.card import model_card
from limbeck.report.page import write_report
from limbeck.runs import build
from limbeck.runs.claim import claim
from limbeck.runs.cost import trained_controls
from limbeck.runs.preflight import check
from limbeck.storage import checkpoint
from limbeck.storage.files import exclusive, new_directory, sweep, write_json, write_text
from limbeck.storage.metrics_log import read_json
from limbeck.training import controls
from limbeck.training import loop as training_loop
from limbeck.training.scorer import ModelScorer
from limbeck.training.setup import Teacher, let_write, make_job
from limbeck.types import Message, Sample, UserError

STAGES = ("elicit", "train", "evaluate", "report")


@dataclass
class Run:
    """One recipe in one folder. The heavy things are loaded when first needed, and once.

    Runs of one comparison share the teacher and the text of the run that they stand `beside`.
    """

    recipe: Recipe
    folder: Path
    reporter: Reporter
    stop: Callable[[], bool] = lambda: False
    beside: Run | None = None

    @cached_property
    def text(self) -> TrainingText:
        writers: dict[str, Callable[[], Answerer]] = {
            "teacher": lambda: self.served or self.teacher,
            "untouched": lambda: InProcessTeacher(self.untouched()),
        }
        identities = {"teacher": lambda: self.writer_identity, "untouched": lambda: self.untouched_identity}
        scorer = lambda by: ModelScorer(  # noqa: E731
            {"": lambda: self.teacher.model, "untouched": self.untouched}.get(by, lambda: build.judge(by))()
        )
        header = lambda: header_of(load_tokenizer(self.recipe.speaker))  # noqa: E731
        return TrainingText(
            self.recipe,
            self.library,
            self.folder,
            self.reporter,
            self.stop,
            writers,
            identities,
            scorer,
            self.judge,
            header,
        )

    @property
    def library(self) -> Path:
        """The folder whose `store.sqlite` holds the text."""
        return self.beside.library if self.beside else self.folder

    @cached_property
    def teacher(self) -> InProcessTeacher:
        if self.beside:
            return self.beside.teacher
        self.reporter.note(f"loading the teacher, {self.recipe.teacher.model}")
        return build.teacher(self.recipe)

    @cached_property
    def teachers(self) -> Teacher:
        """The teacher with those beside it."""
        return self.beside.teachers if self.beside else build.several(self.recipe, self.teacher)

    @property
    def bench_teacher(self) -> InProcessTeacher | None:
        """Whom systems are measured against; None where its weights are not here, or it has tokens of its own."""
        return None if self.recipe.teacher.model is None or self.other_tokens else self.teacher

    @cached_property
    def other_tokens(self) -> bool:
        """Whether the teacher has tokens of its own, so that student and teacher share text alone."""
        return build.other_tokens(self.recipe)

    @cached_property
    def reader(self) -> Model:
        """In whose tokens the held-out text is."""
        return self.teacher.model if self.bench_teacher else self.untouched()

    @cached_property
    def served(self) -> ApiTeacher | None:
        """The server that writes the teacher's text, where there is one."""
        if self.beside:
            return self.beside.served
        server = build.served(self.recipe)
        if server is not None and server.identity != self.writer_identity:
            raise UserError(
                f"the server's model is {server.identity}, and this run's text is {self.writer_identity}'s: give"
                " another --out"
            )
        if server is not None:
            server.begin_with(*self.text.bill())
        return server

    @cached_property
    def scorer(self) -> ServerScorer | None:
        """The server as one that scores text, where that is all there is of the teacher's distribution."""
        return (
            None
            if self.recipe.teacher.model is not None or self.served is None
            else build.scorer(self.recipe, self.served)
        )

    @cached_property
    def writer_identity(self) -> str:
        """Who writes the teacher's text; a server is asked once, so that a run whose text is there needs it no more."""
        if self.beside:
            return self.beside.writer_identity
        if self.recipe.teacher.server is None:
            return self.teacher_identity
        known = read_json(self.path("inputs.json")) or {}
        return str(known["server"]) if "server" in known else cast(ApiTeacher, build.served(self.recipe)).identity

    @cached_property
    def teacher_identity(self) -> str:
        if self.recipe.teacher.model is None:
            return self.writer_identity
        if not is_ready(self.recipe.teacher.model):
            self.reporter.note(f"fetching and converting {self.recipe.teacher.model}, once")
        return build.teacher_identity(self.recipe)

    def judge(self, by: str) -> str:
        """The identity of whom `Score.by` names."""
        return (
            self.teacher_identity
            if not by
            else self.untouched_identity
            if by == "untouched"
            else build.judge_identity(by)
        )

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def progress(self, done: int, total: int, detail: str) -> None:
        """Tell the reporter, and end here if the user asked to (for stages that keep nothing half-done)."""
        self.reporter.progress(done, total, detail)
        if self.stop():
            raise StoppedError(f"stopped; what was finished is kept in {self.folder}, run it again to go on")

    # The student

    def rows(self, samples: Sequence[Sample], student: Model) -> list[data.Row]:
        """Samples in token ids: the sampled ones as they are; a text is encoded, and ends with the end token unless it
        was cut off."""

        def response_ids(sample: Sample) -> Sequence[int]:
            if sample.response_ids is not None and (not self.other_tokens or sample.writer == self.untouched_identity):
                return sample.response_ids
            ids = student.text_ids(sample.messages[-1]["content"])
            return ids if sample.meta.get("finish") == "length" else [*ids, student.tokenizer.eos_token_id]

        return data.make_rows(
            samples, student.with_context(None).prompt_ids, response_ids, student.max_length, self.shown(student)
        )

    def shown(self, student: Model) -> Callable[[tuple[Message, ...]], list[int]] | None:
        """The prompt as the teacher sees it, in its tokens; None where that is as the student sees it."""
        if self.other_tokens:
            return self.teacher.model.prompt_ids
        prompt_context = build.prompt_context(self.recipe)
        return None if prompt_context is None else student.with_context(prompt_context).prompt_ids

    def slots(self, student: Model) -> list[data.Row]:
        """The training prompts as rows that wait for the student's answer."""
        shown = self.shown(student)
        return [
            data.Row(
                prompt.id,
                tuple(student.prompt_ids(prompt.messages)),
                (),
                frozenset({prompt.task} - {""}),
                prompt.id,
                prompt.weight,
                teacher_prompt_ids=None if shown is None else tuple(shown(prompt.messages)),
            )
            for prompt in self.text.prompts[0]
        ]

    def choice(self) -> Choice | None:
        """Which layers the student keeps: decided once, kept in `start.json`."""
        file = self.path("start.json")
        if file.exists():
            found = json.loads(file.read_text())
            return (
                Choice(tuple(found["kept"]), tuple((layer, cost) for layer, cost in found["drops"])) if found else None
            )

        def calibration() -> Calibration:
            prune = self.recipe.student.start.prune
            assert prune is not None
            rows = self.rows(self.text.by_others(prune.calibration), self.teacher.model)
            batch = data.make_batch(rows, tuple(range(len(rows))))
            positions_BT = batch.mask_BT.roll(-1, 1)
            positions_BT[:, -1] = False
            return Calibration(batch.tokens_BT, positions_BT)

        def progress(done: int, total: int) -> None:
            self.progress(done, total, "choosing which layers to keep")

        chosen = choose(self.recipe.student, lambda: self.teacher.model, calibration, progress)
        write_json(file, asdict(chosen) if chosen else {})
        if chosen and chosen.drops:
            self.reporter.note(
                "dropped layers " + ", ".join(f"{layer} ({cost:.2f})" for layer, cost in chosen.drops) + " (KL so far)"
            )
        return chosen

    def untouched(self) -> Model:
        """The student before training."""
        return begin(self.recipe.student, lambda: self.teacher.model, self.choice(), self.recipe.train.seed)

    @cached_property
    def untouched_identity(self) -> str:
        """What the student before training is known by; the same weights have the same name."""
        return self.untouched().identity

    def train(self, name: str) -> None:
        """Train `student` or `sft_control` unless its export is there already."""
        home = self.home(name)
        checkpoints = self.path(home, "checkpoints")
        keep = 1 if name == "student" else 0
        sweep(self.path(home))
        if self.path(home, "student").exists():
            checkpoint.prune(checkpoints, keep)
            return
        student = self.untouched()
        job = self.job(name, student)
        progress = training_progress(self.reporter)
        if not training_loop.train(job, progress, self.stop):
            raise StoppedError(
                f"stopped; the checkpoint of the last step is in {job.folder / 'checkpoints'}, run it again to go on"
            )
        if self.recipe.student.lora is not None:
            merge_adapters(student.net)
        with new_directory(job.folder / "student") as folder:
            save_model(student.net, student.tokenizer, folder)
            write_text(folder / "README.md", model_card(self.recipe, name, self.teacher_identity))
        checkpoint.prune(checkpoints, keep)

    def keep(self) -> None:
        """Have the teacher's distributions over the training text computed and kept, where the recipe keeps them."""
        if not self.path("student").exists():
            self.job("student", self.untouched())

    def job(self, name: str, student: Model) -> training_loop.TrainingJob:
        """The training called `name`, ready to start or to go on."""
        recipe = self.recipe
        terms = build.terms(self.recipe)
        settings = self.recipe.train
        rows = self.rows(self.text.training(), student) if recipe.fixed_writers else []
        if name != "student":  # for as many steps, and plainly
            steps = training_loop.total_steps(rows, settings, any(term.unit == "group" for term in terms))
            settings = settings.model_copy(update={"steps": steps, "epochs": None, "mixup": None})
            terms, rows = [make_term("cross_entropy", {})], self.control_rows(name, rows, student)
        folder = self.path(self.home(name))
        folder.mkdir(parents=True, exist_ok=True)
        store = self.library / "store.sqlite"
        key = f"{recipe.hash}/{name}"
        average = Average(recipe.teacher.decay) if recipe.teacher.weights == "average" and name == "student" else None
        teacher = cache(lambda: self.taught_by(student, average))
        slots = self.slots(student) if name == "student" and recipe.student_writer is not None else []
        written = {tag for slot in slots for tag in slot.tags} | {STUDENT} if slots else set()
        if slots and recipe.all_answer:
            written |= {CHOSEN if recipe.writer[0].by == STUDENT else REJECTED}
        written |= {MIXED} if settings.mixup is not None else set()
        job = make_job(
            terms,
            student,
            rows,
            teacher,
            recipe.student.lora,
            settings,
            folder,
            key,
            store,
            self.progress,
            written,
            recipe.teacher.cache,
        )
        if average is not None:
            average.start(student.net)
            job.average = average
        if slots:
            context = min(student.max_length, load_config(recipe.speaker).max_position_embeddings)
            let_write(job, student, slots, recipe, lambda: self.teacher, context, self.stop)
        return job

    def taught_by(self, student: Model, average: Average | None) -> Teacher:
        """Who teaches `student` while it trains: the teacher, or the student's own modules with other numbers in
        them."""
        recipe = self.recipe
        prompt_context = build.prompt_context(self.recipe)
        if recipe.teacher.bridge is not None:
            return self.over_the_bridge(student)
        if recipe.teacher.weights == "live":
            return self_teacher(student, prompt_context, nullcontext)
        if average is not None:
            return self_teacher(student, prompt_context, average.in_place)
        if (
            recipe.student.lora is not None
            and recipe.student.start.pretrained == recipe.teacher.model
            and not recipe.teacher.beside
        ):
            if self.beside is None:
                # what was loaded to write text; from here on no second copy of its weights is held
                self.__dict__.pop("teacher", None)
            return self_teacher(student, prompt_context, partial(adapters_off, student.net))
        return self.scorer or self.teachers

    def over_the_bridge(self, student: Model) -> Teacher:
        """The teacher as one that reads the student's text in its own tokens; how much the two share is told, and kept
        in `bridge.json`."""
        bridged = build.bridged(self.recipe, self.teacher, student)
        rows = []
        if self.recipe.fixed_writers:
            rows = self.rows(self.text.training(), student)
        facts = bridged.facts([row.response_ids for row in rows])
        write_json(self.path("bridge.json"), facts)
        text = (
            f"; of the text's tokens {facts['aligned_share']:.1%} are aligned, {facts['single_share']:.1%} one in both"
            if rows
            else ""
        )
        self.reporter.note(
            f"{facts['common_tokens']:,} of {facts['student_tokens']:,} tokens are the teacher's, too{text}"
        )
        return bridged

    def control_rows(self, name: str, rows: list[data.Row], student: Model) -> list[data.Row]:
        """What a control is fine-tuned on; `rows` is the student's own training text."""
        if name == "gold_control":
            return self.rows(controls.gold_samples(self.text.prompts[0]), student)
        answers = controls.preferred(rows) if rows else self.rows(self.text.by_others(), student)
        return (
            controls.shuffled(answers, self.recipe.text_seed, student.max_length)
            if name == "shuffled_control"
            else answers
        )

    def home(self, name: str) -> str:
        return "." if name == "student" else f"controls/{name}"

    def controls(self) -> list[str]:
        """The trainings beside the student's. Fine-tuning as its own control would be the same run twice."""
        return trained_controls(self.recipe, build.terms(self.recipe))

    # Measuring

    def evaluate(self) -> None:
        """Measure every system on the held-out prompts; writes `evaluation/`."""
        if self.path("evaluation", "summary.json").exists():
            return
        for name in ("student", *self.controls()):
            if not self.path(self.home(name), "student").exists():
                raise UserError(f"{name} is not trained yet: run `limbeck train` (or `limbeck run`) first")
        bench = self.bench(self.path("evaluation"))
        systems = {"teacher": [self.measured_teacher(bench)]}
        if "untouched" in self.recipe.evaluate.controls:
            systems["untouched"] = [bench.measure("untouched", self.untouched)]
        for name in (*self.controls(), "student"):
            systems[name] = [bench.measure(name, partial(self.trained, name), lens=name == "student")]
        evaluation.write_summary(self.recipe, bench, self.text, systems)

    def bench(self, folder: Path) -> Bench:
        """Where systems are measured, and their records kept."""
        return evaluation.bench(
            self.recipe, folder, self.bench_teacher, self.reader, self.text, self.held_out_rows(), self.progress
        )

    def measured_teacher(self, bench: Bench) -> Measured:
        """The teacher as a system: in process, or by what its server says."""
        if self.bench_teacher is None:
            return bench.by_text("teacher", self.text.said)
        return bench.measure("teacher", lambda: self.teacher.model)

    def trained(self, name: str) -> Model:
        """The exported student, or a trained control."""
        return build.model(self.path(self.home(name), "student"))

    def held_out_rows(self) -> list[data.Row]:
        """The teacher's answers to the held-out prompts; each row's id is its prompt's."""
        samples = self.text.held_out()
        rows = {row.sample_id: row for row in self.rows(samples, self.reader)}
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
    """Do all that the recipe asks for and that is not done yet. Returns the run folder.

    Args:
        out: the run folder; by default runs/NAME.
        stop: asked between two steps; when true, the state is saved and `StoppedError` raised.
        stages: which of elicit, train, evaluate, report; each does what it needs of the earlier ones.

    Raises:
        UserError: the recipe or the folder can't be used; nothing that was done is lost.
    """
    check(recipe)
    reporter = reporter or Silent()
    folder = build.run_folder(recipe, out)
    with exclusive(folder / ".lock"):
        job = Run(recipe, folder, reporter, stop)
        claim(job)
        if "elicit" in stages:
            reporter.stage("Teacher's text")
            job.text.training()
            if not recipe.fixed_writers and job.controls():
                job.text.by_others()
            job.text.held_out()
            if recipe.teacher.cache is not None and "train" not in stages:  # a training does it itself
                reporter.stage("Teacher's distributions")
                job.keep()
        if "train" in stages:
            reporter.stage("Student's start")
            job.choice()
            for name in ("student", *job.controls()):
                reporter.stage(f"Training: {name}")
                job.train(name)
        if "evaluate" in stages:
            reporter.stage("Evaluation")
            job.evaluate()
        if "report" in stages:
            reporter.stage("Report")
            job.report()
    return folder
