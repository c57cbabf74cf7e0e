"""The models of a run by their role, each loaded once, when first needed; compared runs share the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from limbeck.config.named_models import PREVIOUS, TEACHER, UNTOUCHED
from limbeck.config.teacher import BridgedTeacher, ServedTeacher
from limbeck.elicit.bills import Bills
from limbeck.elicit.engine import Answerer
from limbeck.elicit.flow import Reader
from limbeck.models.api import ApiTeacher
from limbeck.models.bridge import has_other_tokens
from limbeck.models.compatibility import have_other_tokens
from limbeck.models.constrain import unheld
from limbeck.models.load import is_ready, load_model, load_tokenizer, model_identity
from limbeck.models.model import Model, header_of
from limbeck.models.own_text import OwnTextTeacher, probe
from limbeck.models.placement import FULL, Devices, Precision
from limbeck.models.prune import Calibration, LayerChoice
from limbeck.models.score import ServerScorer
from limbeck.models.scores import Scorer, load_scorer
from limbeck.models.start import adapters_told, begin, choose, merge_adapters, merge_into
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.teacher_interface import Teacher
from limbeck.models.workers import ModelOnWorker, place_of
from limbeck.progress import Reporter
from limbeck.runs.memory import teacher_precision
from limbeck.runs.named import NamedModels, reader_of
from limbeck.runs.resolve import Method
from limbeck.runs.served import own_text_of, scorer_of, served
from limbeck.storage.files import read_from, read_object, write_json
from limbeck.storage.metrics_log import read_json
from limbeck.training.controls import PROMPTED
from limbeck.training.scorer import ModelScorer
from limbeck.types import STUDENTS, AnswerForm, UserError


@dataclass
class RunModels:
    """The models of the run in `folder`.

    Args:
        calibration: returns so many texts by which a pruned student's layers are chosen.
        progress: called with (done, total, what) during long work; may raise StoppedError.
        bills: returns what servers were paid for so far.
        shared: the models of the run whose teacher this one shares.
    """

    method: Method
    folder: Path
    reporter: Reporter
    calibration: Callable[[int], Calibration]
    progress: Callable[[int, int, str], None]
    bills: Callable[[], Bills]
    shared: RunModels | None = None
    loaded: dict[str, InProcessTeacher] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)

    @cached_property
    def devices(self) -> Devices:
        return Devices(self.method.recipe.machine)

    # The teacher

    @cached_property
    def teacher_precision(self) -> Precision:
        return teacher_precision(self.method.recipe)

    @property
    def template(self) -> str | None:
        """The chat template that the recipe gives its teachers."""
        return getattr(self.method.recipe.teacher, "template", None)

    @property
    def teacher(self) -> InProcessTeacher:
        """The recipe's `teacher.model`, in process."""
        source = self.method.recipe.teacher.model
        assert source is not None
        return self.load(source)

    def load(self, source: str) -> InProcessTeacher:
        """A model as a teacher in process, with the recipe's prompt context."""
        if self.shared is not None:
            return self.shared.load(source)
        if source not in self.loaded:
            self.reporter.note(f"loading the teacher, {source}")
            model = load_model(source, self.teacher_precision, self.devices.teacher, self.template)
            self.loaded[source] = InProcessTeacher(model.with_context(self.method.prompt_context))
        return self.loaded[source]

    def release(self) -> None:
        """Drop the loaded teachers, unless they are another run's."""
        if self.shared is None:
            self.loaded.clear()
        self.named.release()

    @cached_property
    def other_tokens(self) -> bool:
        """Whether teacher and student differ in their tokens or template, so that they share only text."""
        recipe = self.method.recipe
        teacher = recipe.teacher
        start = recipe.student.start.pretrained
        if teacher.model is None or start is None:
            return False
        if isinstance(teacher, BridgedTeacher):
            return has_other_tokens(teacher, start, recipe.student.template)
        if self.method.teacher_reads_rows or (start, recipe.student.template) == (teacher.model, self.template):
            return False  # other tokens are refused
        ours = load_tokenizer(start, recipe.student.template)
        return have_other_tokens(load_tokenizer(teacher.model, self.template), ours)

    @property
    def teacher_is_away(self) -> bool:
        """Whether the teacher's weights are not here."""
        return self.method.recipe.teacher.model is None

    @property
    def reference(self) -> InProcessTeacher | None:
        """The teacher that systems are measured against, shown what it was shown when it taught; None if its weights
        are not here, or it has other tokens."""
        if self.teacher_is_away or self.other_tokens:
            return None
        if self.method.fixed_step_prompt is None:
            return self.teacher
        name = f"{self.method.recipe.teacher.model} as it is measured"
        if name not in self.loaded:
            self.loaded[name] = InProcessTeacher(self.teacher.model.with_context(self.method.measured_context))
        return self.loaded[name]

    @cached_property
    def reader(self) -> Model:
        """The model in whose tokens the held-out text is."""
        reference = self.reference
        return self.initial_student() if reference is None else reference.model

    @cached_property
    def teacher_identity(self) -> str:
        """The teacher's name in request keys, without loading its weights."""
        source = self.method.recipe.teacher.model
        if source is None:
            return Model.named(self.server_identity, self.method.prompt_context)
        if not is_ready(source):
            self.reporter.note(f"fetching and converting {source}, once")
        return Model.named(model_identity(source, self.teacher_precision, self.template), self.method.prompt_context)

    # The server

    @cached_property
    def server(self) -> ApiTeacher | None:
        """The server that writes the teacher's text, if there is one."""
        if self.shared is not None:
            return self.shared.server
        server = served(self.method)
        if server is not None:
            server.tell(self.reporter.note)
        if server is not None and server.identity != self.server_identity:
            raise UserError(
                f"the server's model is {server.identity}, and this run's text is {self.server_identity}'s: give"
                " another --out"
            )
        if server is not None:
            server.begin_with(*self.bills().paid(TEACHER)[1:], tries=self.bills().tries(TEACHER))
        return server

    @cached_property
    def server_identity(self) -> str:
        """The name of the served model. It is kept in `inputs.json`, so that a run whose text is complete does not need
        the server."""
        if self.shared is not None:
            return self.shared.server_identity
        inputs = read_json(self.folder / "inputs.json") or {}
        if "server" in inputs:
            return str(inputs["server"])
        server = served(self.method)
        assert server is not None
        return server.identity

    @cached_property
    def server_scorer(self) -> ServerScorer | StatesTeacher | None:
        """The server as a scorer of text, if the teacher's distribution is only known from there."""
        settings = self.method.recipe.teacher
        if not isinstance(settings, ServedTeacher) or not settings.reads_given_text or self.server is None:
            return None  # the server is not asked who it is
        return scorer_of(self.method, self.server, self.devices.student.device)

    def scoring_server(self) -> Teacher:
        assert self.server_scorer is not None
        return self.server_scorer

    def probe_server(self) -> None:
        """Check that the server says of text what the recipe needs."""
        if (scorer := self.server_scorer) is not None:
            scorer.probe()
        if self.server is not None and self.server.settings.logprobs is not None:
            probe(self.server)

    def own_text(self, student: Model, library: Path) -> OwnTextTeacher | None:
        """The server as a teacher of its own text, which `library` has with its log-probabilities; None if the recipe
        does not ask for them."""
        return own_text_of(self.method, self.writer_identity(TEACHER), library, student)

    # The student before training

    def choice(self) -> LayerChoice | None:
        """Which layers the student keeps: chosen once and stored in `start.json`."""
        file = self.folder / "start.json"
        if file.exists():
            with read_from(file):
                record = read_object(file)
                drops = tuple((layer, cost) for layer, cost in record.get("drops", ()))
                return LayerChoice(tuple(record["kept"]), drops) if record else None

        def calibration() -> Calibration:
            prune = self.method.recipe.student.start.prune
            assert prune is not None
            return self.calibration(prune.calibration)

        def progress(done: int, total: int) -> None:
            self.progress(done, total, "choosing which layers to keep")

        choice = choose(self.method.recipe.student, lambda: self.teacher.model, calibration, progress)
        write_json(file, asdict(choice) if choice else {})
        if choice and choice.drops:
            layers = ", ".join(f"{layer} ({cost:.2f})" for layer, cost in choice.drops)
            self.reporter.note(f"dropped layers {layers} (KL so far)")
        return choice

    def initial_student(self) -> Model:
        """The student before training, in float32."""
        return self._begin(FULL)

    def untrained(self, control: str) -> Model:
        """A control that is not trained: the student before training, with the teacher's prompt if that is the
        control."""
        student = self.initial_student()
        return student.with_context(self.method.measured_context) if control == PROMPTED else student

    def student_to_train(self) -> Model:
        """The student before training, with the weights under adapters in the precision of the recipe."""
        return self._begin(self.base_precision)

    @property
    def base_precision(self) -> Precision:
        """Of the student's weights while it trains: under adapters they may be rounded."""
        lora = self.method.recipe.student.lora
        return FULL if lora is None else Precision.of_base(lora.base)

    @property
    def student_is_adapted_teacher(self) -> bool:
        """Whether the student without its adapters is the teacher, to the bit."""
        recipe = self.method.recipe
        return (
            recipe.student.lora is not None
            and recipe.student.start.pretrained == recipe.teacher.model
            and self.base_precision == self.teacher_precision
        )

    def finished(self, trained: Model) -> Model:
        """A trained student as it is exported. Adapters are folded into weights that were never rounded."""
        lora = self.method.recipe.student.lora
        if lora is None:
            return trained
        if lora.base is None:
            merge_adapters(trained.net)
            return trained
        whole = self.initial_student()
        merge_into(whole.net, trained.net, lora)
        return whole

    def tell_adapters(self, student: Model) -> None:
        """Say which of the student's weights have adapters, if it has any."""
        if self.method.recipe.student.lora is not None:
            self.reporter.note(adapters_told(student.net))

    def _begin(self, precision: Precision) -> Model:
        recipe = self.method.recipe
        return begin(
            recipe.student,
            self._start,
            self.choice(),
            seed=recipe.train.seed,
            placement=self.devices.student,
            precision=precision,
        )

    def _start(self) -> Model:
        """The teacher in float32, to make a student from."""
        source = self.method.recipe.teacher.model
        assert source is not None
        return self.teacher.model if self.teacher_precision == FULL else load_model(source, template=self.template)

    @cached_property
    def initial_identity(self) -> str:
        """The identity of the student before training; equal weights have equal identities."""
        return self.initial_student().identity

    def reward_model(self, name: str) -> Scorer:
        """A reward model by its name in the recipe, beside the teacher."""
        if self.shared is not None:
            return self.shared.reward_model(name)
        if name not in self.scorers:
            self.reporter.note(f"loading the reward model, {name}")
            self.scorers[name] = load_scorer(name, self.devices.teacher)
        return self.scorers[name]

    # By the names in writers and steps of elicitation: see `elicit.text_models`

    @cached_property
    def named(self) -> NamedModels:
        """The models under the recipe's `models`."""
        return NamedModels(
            self.method.recipe,
            self.folder,
            self.reporter,
            placement=lambda: self.devices.teacher,
            bills=self.bills,
            teacher=self._teacher_itself,
        )

    def _teacher_itself(self, identity: str) -> Model | None:
        """The loaded teacher, if this is its identity without what it is shown beside the prompt."""
        if self.shared is not None:
            return self.shared._teacher_itself(identity)
        teacher = None if self.teacher_is_away else self.loaded.get(str(self.method.recipe.teacher.model))
        alone = None if teacher is None else teacher.model.with_context(None)
        return alone if alone is not None and alone.identity == identity else None

    def writer(self, name: str) -> Answerer:
        if name in STUDENTS:
            return InProcessTeacher(self._student(name))
        return self.named.writer(name) if name in self.named else self.server or self._writes_here()

    def _writes_here(self) -> Answerer:
        """The teacher in process, or as the workers that the recipe asks for have it."""
        model = ModelOnWorker(
            place_of(str(self.method.recipe.teacher.model)),
            self.teacher_precision,
            self.template,
            self.method.prompt_context,
            identity=self.teacher_identity,
            attention=self.devices.teacher.attention,
        )
        return self.named.by_workers(model) or self.teacher

    def writer_identity(self, name: str) -> str:
        if (previous := self._before(name)) is not None:
            return model_identity(previous)
        if name in STUDENTS:
            return self.initial_identity
        if name in self.named:
            return self.named.identity(name)
        if self.method.recipe.teacher.server is None:
            return self.teacher_identity
        return Model.named(self.server_identity, self.method.prompt_context)

    def _student(self, name: str) -> Model:
        """The student before training, or of the round before this one."""
        if (previous := self._before(name)) is not None:
            return load_model(previous, placement=self.devices.student)
        return self.initial_student()

    def _before(self, name: str) -> str | None:
        """The folder of the student of the round before this one, if that is whom the name means."""
        previous = self.method.recipe.previous
        return None if name != PREVIOUS or previous == UNTOUCHED else previous

    def as_reader(self, name: str) -> Reader:
        if name in self.named:
            return self.named.reader(name)
        recipe = self.method.recipe
        start = recipe.student.start.pretrained
        if name in STUDENTS and start is not None:
            return reader_of(start, recipe.student.template)
        written_here = recipe.teacher.model if recipe.teacher.server is None or name in STUDENTS else None
        return Reader(unheld=self.unheld) if written_here is None else reader_of(written_here, self.template)

    def scorer(self, by: str) -> ModelScorer:
        if by in STUDENTS:
            return ModelScorer(self._student(by))
        if by in self.named:
            return ModelScorer(self.named.loaded(by).model)
        return ModelScorer(load_model(by, placement=self.devices.teacher) if by else self.teacher.model)

    def scorer_identity(self, by: str) -> str:
        if by in STUDENTS or by in self.named:
            return self.writer_identity(by)
        return model_identity(by) if by else self.teacher_identity

    def header(self) -> str | None:
        recipe = self.method.recipe
        return header_of(load_tokenizer(recipe.speaker, recipe.speaker_template), served=bool(recipe.teacher.server))

    def unheld(self, form: AnswerForm) -> str:
        return unheld(form, self.method.recipe.teacher.server)
