"""A run's part in the answers that runs share: where they are, which teacher's they are, and what happens if they can't
be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from limbeck.config.named_models import TEACHER, NamedModel
from limbeck.config.recipe import Recipe
from limbeck.config.teacher import TeacherSettings
from limbeck.models.context import PromptContext
from limbeck.models.load import model_contents
from limbeck.progress import Reporter
from limbeck.storage.answers import SharedAnswers, UnreadableAnswersError, answers_folder
from limbeck.storage.metrics_log import read_json
from limbeck.storage.store import Store
from limbeck.types import UserError

WRITING = 1  # raise it when models in process would write the same request otherwise: old answers are then left alone


@dataclass
class SharedText:
    """The shared answers of one model of a recipe, opened when a run first misses an answer.

    Args:
        settings: the recipe's teacher, or another model that it names.
        place: the folder of shared answers; None where none are shared.
        identity: returns the model's name in request keys.
        context: what it is shown in addition to the prompts.
    """

    settings: TeacherSettings | NamedModel
    place: Path | None
    identity: Callable[[], str]
    context: PromptContext | None
    reporter: Reporter
    _added: set[Path] = field(default_factory=set)

    def open(self, store: Store) -> SharedAnswers | None:
        """The shared answers, None where none are shared. What the run's own store has is put there first.

        Raises:
            UserError: they can't be read, and the model costs money.
        """
        shared = self._answers
        if shared is not None and store.path not in self._added:
            self._added.add(store.path)
            shared.add_from(store, self.identity())
        return shared

    @cached_property
    def _answers(self) -> SharedAnswers | None:
        origin = None if self.place is None else origin_of(self.settings)
        if self.place is None or origin is None:
            return None
        try:
            return SharedAnswers(self.place, origin, self.context, self.reporter.note)
        except UnreadableAnswersError as error:
            if self.settings.server is not None:
                raise UserError(
                    f"{error}: move it away, or set machine.answers to another folder, or to none to ask (and pay) for"
                    " what this run's folder does not have"
                ) from error
            self.reporter.note(f"{error}: this run writes all of its text itself")
            return None


@dataclass
class SharedTexts:
    """The shared answers of every model that a run asks.

    Args:
        identity: returns a model's name in request keys, by its name in the recipe.
        context: what the teacher is shown in addition to the prompts.
        rounds: the folder of all rounds, whose students write text that no other run can use.
        like: those of the run whose teacher this one shares.
    """

    recipe: Recipe
    identity: Callable[[str], str]
    context: PromptContext | None
    reporter: Reporter
    rounds: Path | None = None
    like: SharedTexts | None = None
    _by_name: dict[str, SharedText] = field(default_factory=dict)

    def open(self, by: str, store: Store) -> SharedAnswers | None:
        """The shared answers of the model of this name; None where none are shared."""
        model = self._settings(by).model
        if self.rounds is not None and model is not None and Path(model).is_relative_to(self.rounds):
            return None
        return self._of(by).open(store)

    def _settings(self, by: str) -> TeacherSettings | NamedModel:
        return self.recipe.teacher if by == TEACHER else (self.recipe.models or {})[by]

    def _of(self, by: str) -> SharedText:
        if self.like is not None and by == TEACHER:
            return self.like._of(by)
        if by not in self._by_name:
            self._by_name[by] = SharedText(
                self._settings(by),
                answers_folder(self.recipe.machine.answers),
                partial(self.identity, by),
                self.context if by == TEACHER else None,
                reporter=self.reporter,
            )
        return self._by_name[by]


def origin_of(settings: TeacherSettings | NamedModel) -> str | None:
    """What tells a model from others of its name: a server's (first) address, or what the weights contain. None for
    weights that can't be looked at: their answers are not shared."""
    if settings.server is not None:
        return settings.server.urls[0].rstrip("/")
    try:
        return f"weights {model_contents(str(settings.model))[:16]}, writing {WRITING}"
    except UserError:
        return None


def keep_for_others(folder: Path, earlier: Recipe, now: Recipe) -> str:
    """Share what a folder's teacher has answered before the folder is refused to another recipe. Returns what to say of
    it: nothing where the other recipe has another teacher, or nothing can be shared."""
    place = answers_folder(now.machine.answers)
    if place is None or _speaker(earlier) != _speaker(now) or not (folder / "store.sqlite").exists():
        return ""
    try:
        _, there = add_run(folder, earlier, place)
    except UserError:
        return ""
    if not there:
        return ""
    return f" (its {there:,} answers are kept in {place} for all runs: another --out asks for none of them again)"


def _speaker(recipe: Recipe) -> tuple[object, ...]:
    """Who writes the teacher's text, as far as a recipe says it."""
    server = recipe.teacher.server
    return (recipe.teacher,) if server is None else (server.urls[0], server.name, server.kind, server.options)


def add_run(folder: Path, recipe: Recipe, place: Path, library: Path | None = None) -> tuple[int, int]:
    """Share the answers of a run's teacher, which are in its folder or in `library`. Returns (how many were new, how
    many of them are shared now).

    Raises:
        UserError: the folder is not bound to a teacher, or its teacher's answers can't be shared.
    """
    inputs = read_json(folder / "inputs.json") or {}
    identity = inputs.get("teacher" if recipe.teacher.server is None else "server")
    origin = origin_of(recipe.teacher)
    context = recipe.teacher.context
    if not isinstance(identity, str) or origin is None:
        raise UserError(f"{folder} does not say whose its answers are: run it again, and they are shared")
    if context is not None and context.reads:  # it stands in files that may have changed since
        raise UserError(
            f"what the teacher of {folder} was shown beside the prompts is not in the folder: run it again, and its"
            " answers are shared"
        )
    shown = None if context is None else PromptContext(context.system, context.user)
    with Store((library or folder) / "store.sqlite") as store:
        shared = SharedAnswers(place, origin, shown)
        added = shared.add_from(store, identity)
        there = sum(1 for _ in shared.take([request for request, _ in store.answers_of(identity)]))
        shared.close()
    return added, there
