"""The models that a recipe names beside its teacher (`models:`), each loaded or asked for when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limbeck.config.named_models import NamedLocal, NamedModel, NamedServed
from limbeck.config.recipe import Recipe
from limbeck.elicit.bills import Bills
from limbeck.elicit.engine import in_its_place
from limbeck.elicit.flow import Reader
from limbeck.models.api import ApiTeacher
from limbeck.models.batch import BatchTeacher
from limbeck.models.constrain import unheld
from limbeck.models.load import load_config, load_model, load_tokenizer, model_identity
from limbeck.models.model import Model
from limbeck.models.placement import Placement, Precision
from limbeck.models.ray_pool import RayPool
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.template import prompt_ids
from limbeck.models.weights import context_length
from limbeck.models.workers import ModelOnWorker, WorkerTeacher, place_of
from limbeck.progress import Reporter
from limbeck.storage.metrics_log import read_json
from limbeck.types import Message, UserError


def input_name(name: str) -> str:
    """What the identity of a named model is called among the inputs that a run folder is bound to."""
    return f"model {name}"


@dataclass
class NamedModels:
    """The models under `models` of the run in `folder`.

    Args:
        placement: of those whose weights are here.
        bills: returns what servers were paid for so far.
        teacher: returns the loaded teacher where it is this very model, so that no second copy is loaded.
    """

    recipe: Recipe
    folder: Path
    reporter: Reporter
    placement: Callable[[], Placement]
    bills: Callable[[], Bills]
    teacher: Callable[[str], Model | None] = lambda identity: None
    _loaded: dict[str, InProcessTeacher] = field(default_factory=dict)
    _by_workers: dict[str, WorkerTeacher] = field(default_factory=dict)
    _servers: dict[str, ApiTeacher] = field(default_factory=dict)
    _identities: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in (self.recipe.models or {})

    def settings(self, name: str) -> NamedModel:
        return (self.recipe.models or {})[name]

    def identity(self, name: str) -> str:
        """The model's name in request keys. That of a served one is kept in `inputs.json`, so that a run whose text is
        complete does not need the server."""
        if name not in self._identities:
            settings = self.settings(name)
            if isinstance(settings, NamedLocal):
                identity = model_identity(settings.model, _precision(settings), settings.template)
            else:
                kept = (read_json(self.folder / "inputs.json") or {}).get(input_name(name))
                identity = self.server(name).identity if kept is None else str(kept)
            self._identities[name] = identity
        return self._identities[name]

    def writer(self, name: str) -> ApiTeacher | InProcessTeacher | WorkerTeacher:
        """The model as one that answers requests.

        Raises:
            UserError: it is not there, or is another than the run's text is from.
        """
        settings = self.settings(name)
        if not isinstance(settings, NamedLocal):
            return self.server(name)
        model = ModelOnWorker(
            place_of(settings.model),
            _precision(settings),
            settings.template,
            context=None,
            identity=self.identity(name),
            attention=self.placement().attention,
        )
        return self.by_workers(model) or self.loaded(name)

    def by_workers(self, model: ModelOnWorker) -> WorkerTeacher | None:
        """A model as the workers have it that the recipe asks for; None if it asks for none."""
        workers = self.recipe.machine.workers
        if workers is None:
            return None
        for identity, other in self._by_workers.items():
            if identity != model.identity:
                other.release()  # they would hold what these need, and one model is asked at a time
        if model.identity not in self._by_workers:
            self.reporter.note(f"{model.source} writes on {workers.count} workers")
            pool = RayPool(model, workers)
            self._by_workers[model.identity] = WorkerTeacher(pool, model.identity, workers.count, self.reporter.note)
        return self._by_workers[model.identity]

    def loaded(self, name: str) -> InProcessTeacher:
        """A model whose weights are here."""
        settings = self.settings(name)
        assert isinstance(settings, NamedLocal)
        identity = self.identity(name)
        if identity not in self._loaded:
            model = self.teacher(identity)
            if model is None:
                self.reporter.note(f"loading {name}, {settings.model}")
                model = load_model(settings.model, _precision(settings), self.placement(), settings.template)
            self._loaded[identity] = InProcessTeacher(model.with_context(None))
        return self._loaded[identity]

    def server(self, name: str) -> ApiTeacher:
        """A model behind a server."""
        if name not in self._servers:
            settings = self.settings(name)
            assert isinstance(settings, NamedServed)
            try:
                server = BatchTeacher(settings.server) if settings.server.batch else ApiTeacher(settings.server)
                server.tell(self.reporter.note)
                identity = server.identity
            except UserError as error:
                place = f"models.{name}.server"
                said = str(in_its_place(error, place))
                raise UserError(said if place in said else f"{place}: {said}") from error
            kept = (read_json(self.folder / "inputs.json") or {}).get(input_name(name))
            if kept not in (None, identity):
                raise UserError(
                    f"models.{name}: the server's model is {identity}, and this run's text is {kept}'s: give another"
                    " --out"
                )
            self._identities[name] = identity
            server.begin_with(*self.bills().paid(name)[1:], tries=self.bills().tries(name))
            self._servers[name] = server
        return self._servers[name]

    def reader(self, name: str) -> Reader:
        """What is known of the model as a reader of others' texts; nothing of a served one."""
        settings = self.settings(name)
        if isinstance(settings, NamedLocal):
            return reader_of(settings.model, settings.template)
        return Reader(unheld=lambda form: unheld(form, settings.server))

    def release(self) -> None:
        """Drop the loaded weights, and stop the workers."""
        self._loaded.clear()
        while self._by_workers:
            self._by_workers.popitem()[1].release()


def reader_of(source: str, template: str | None) -> Reader:
    """A model as a reader, by its tokenizer and configuration."""
    tokenizer = load_tokenizer(source, template)
    longest = context_length(load_config(source))

    def fits(messages: Sequence[Message], tokens: int) -> bool:
        return len(prompt_ids(tokenizer, messages)) + tokens <= longest

    return Reader(list(tokenizer.get_added_vocab()), fits, lambda form: unheld(form, None))


def _precision(settings: NamedLocal) -> Precision:
    return Precision.named(settings.dtype, settings.quantise)
