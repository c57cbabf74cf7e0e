"""Read a recipe: YAML in, a frozen `Recipe` with a hash out. A recipe is data: it can't name code.

Every error says the path in the file, the value there, and the nearest legal name. Types and ranges are checked here;
names and parameters of losses are checked later, by `limbeck.runs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from limbeck.config import recipe_file
from limbeck.config.binding import evaluation_part, training_part
from limbeck.config.machine import Machine
from limbeck.config.named_models import NamedModel, named_models
from limbeck.config.older import INPUTS, filled
from limbeck.config.rounds import Rounds, check_previous, check_stages, round_data, stage_data
from limbeck.config.section import Section
from limbeck.config.sections import (
    Elicit,
    Evaluate,
    LossEntry,
    Prompts,
    Rollout,
    Student,
    Train,
    Writer,
    check_shares,
)
from limbeck.config.shorthand import expand
from limbeck.config.teacher import TEACHER_KINDS, TeacherSettings, kind_of, teacher_data
from limbeck.config.yaml_text import dump_yaml
from limbeck.types import NAME, RecipeError, content_hash, nearest

NOT_KEYS = ("literal[", "list[", "dict[", "constrained")  # what pydantic adds between the keys of a path


class Recipe(Section):
    """All settings of one distillation. Equal recipes have equal hashes, whatever the order of their keys."""

    name: str
    title: str = ""
    paper: str = ""
    teacher: TeacherSettings
    previous: str | None = None  # in a round's recipe: the folder of the student before it, or `untouched`
    models: dict[str, NamedModel] | None = None
    student: Student
    prompts: Prompts
    elicit: Annotated[list[Elicit], Field(min_length=1)] | None = None
    writer: Annotated[list[Writer], Field(min_length=1, default_factory=lambda: [Writer(by="teacher")])]
    rollout: Rollout | None = None
    loss: Annotated[list[LossEntry], Field(min_length=1)]
    train: Train
    rounds: Rounds | None = None
    evaluate: Evaluate = Evaluate()
    machine: Annotated[Machine, Field(exclude=True)] = Machine()  # not in the hash: see `config.machine`

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} must be at most 64 lower-case letters, digits, '.', '_' or '-'")
        if len(set(map(str, self.writer))) < len(self.writer):
            raise ValueError(
                "two writers have the same settings, so they would write the same text; change one or remove it"
            )
        check_shares(self.writer)
        if any(writer.by == "elicited" for writer in self.writer) and not self.elicit:
            raise ValueError(
                "the writer `elicited` needs steps under `elicit`, and there are none; add some, or use another writer"
            )
        if any(writer.by == "corpus" for writer in self.writer) and self.elicit:
            raise ValueError(
                "with steps under `elicit`, write {by: elicited}: a corpus's own answers go through the steps, too"
            )
        if self.rollout is not None and self.student_writer is None:
            raise ValueError(
                "rollout says how the student writes, but no writer is the student; add {by: student} or remove rollout"
            )
        check_previous(
            self.rounds,
            self.teacher,
            self.models or {},
            start=self.student.start.pretrained,
            writers=[writer.by for writer in self.writer],
            previous=self.previous,
        )
        check_stages(self.rounds, self.models or {})
        return self

    @field_validator("teacher", mode="plain")
    @classmethod
    def _by_kind(cls, teacher: Any) -> Any:
        data = teacher_data(teacher)
        section = TEACHER_KINDS[kind_of(data)]
        try:
            return section.model_validate(data)
        except ValidationError as error:
            raise explain(error, section, "teacher") from None

    @field_validator("models", mode="plain")
    @classmethod
    def _named(cls, models: Any) -> Any:
        return named_models(models, explain)

    @field_serializer("teacher")
    def _as_short_as_possible(self, teacher: TeacherSettings) -> Any:
        """Write a teacher that is only a model as the model's name."""
        settings = teacher.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return teacher.model if set(settings) == {"model"} else settings

    @field_serializer("models")
    def _named_as_data(self, models: dict[str, NamedModel] | None) -> Any:
        return models and {name: model.model_dump(mode="json", exclude_none=True) for name, model in models.items()}

    @property
    def speaker(self) -> str:
        """The model whose tokenizer and template all text uses: the teacher, or the student's initial model if the
        teacher's weights are not here."""
        return str(self.teacher.model or self.student.start.pretrained)

    @property
    def speaker_template(self) -> str | None:
        """The chat template that the recipe gives to the speaker."""
        return self.student.template if self.teacher.model is None else getattr(self.teacher, "template", None)

    @property
    def student_writer(self) -> Writer | None:
        """The writer that is the student, if there is one."""
        return next((writer for writer in self.writer if writer.by == "student"), None)

    @property
    def written_share(self) -> float:
        """About what share of the training text the student writes. Of a schedule, the mean of its ends."""
        share = self.student_writer.share if self.student_writer is not None else 0.0
        if self.all_answer and share:
            return 1 / len(self.writer)
        return (share["from"] + share["to"]) / 2 if isinstance(share, dict) else share

    @property
    def fixed_writers(self) -> list[Writer]:
        """The writers whose text exists before training, with shares that add up to 1 or are all 1."""
        fixed = [writer for writer in self.writer if writer.by != "student"]
        if self.student_writer is None or all(writer.share == 1 for writer in fixed):
            return fixed
        total = sum(writer.fixed_share for writer in fixed)
        return [writer.model_copy(update={"share": writer.fixed_share / total}) for writer in fixed]

    @property
    def all_answer(self) -> bool:
        """Does every prompt go to all writers?"""
        return len(self.writer) > 1 and all(writer.share == 1 for writer in self.writer)

    @property
    def text_seed(self) -> int:
        """The seed for drawing prompts, writers and answers."""
        return self.train.seed if self.prompts.seed is None else self.prompts.seed

    @property
    def held_out_writer(self) -> Writer:
        """The writer whose sampling settings held-out text is drawn with.

        Of the teacher's writers, the one with the largest share; among equals, one that samples rather than a greedy
        one.
        """
        by_teacher = [writer for writer in self.fixed_writers if writer.by == "teacher"]
        others = self.fixed_writers or [Writer(by="teacher", max_tokens=self.writer[0].max_tokens)]
        return max(by_teacher or others, key=lambda writer: (writer.share, writer.temperature > 0))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the resolved recipe, but for what may change in a run's folder."""
        data = self.resolved()
        for model in (data["teacher"], *data.get("models", {}).values()):
            if isinstance(model, dict):
                model.get("server", {}).pop("tolerate", None)
        return content_hash(data)

    @property
    def training_hash(self) -> str:
        """SHA-256 (hex) of what a run folder is bound to."""
        return content_hash(training_part(self.resolved()))

    @property
    def evaluation_hash(self) -> str:
        """SHA-256 (hex) of what the evaluation's summary depends on beside the training."""
        return content_hash(evaluation_part(self.resolved()))

    def resolved(self) -> dict[str, Any]:
        """All settings that have a value, defaults included, as plain data."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def of_round(
        self, number: int, student: str | None, base: str | None = None, stages: Mapping[str, str] | None = None
    ) -> Recipe:
        """Round `number` as an ordinary recipe (see `rounds.round_data`)."""
        data = round_data(self.resolved(), number, student, base, stages=stages)
        return parse(data).model_copy(update={"machine": self.machine})

    def of_stage(self, name: str, student: str | None, before: Mapping[str, str] | None = None) -> Recipe:
        """A stage of the rounds as an ordinary recipe (see `rounds.stage_data`)."""
        return parse(stage_data(self.resolved(), name, student, before)).model_copy(update={"machine": self.machine})


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), machine: str | Path | None = None, *, scale: str | None = None
) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, or the name of a built-in recipe.
        overrides: `a.b=c` pairs as given to `--set`; `c` is read as YAML.
        machine: a YAML file with the `machine` section, which replaces keys of the recipe's own, or the name of a
            built-in one.
        scale: `full` puts in the sizes of the paper that the file states under `full`; overrides replace them.

    Raises:
        RecipeError: the file is missing, malformed or has an invalid setting; the message names the place.
    """
    file = recipe_file.find(path)
    data = recipe_file.read(file)
    sizes = recipe_file.take_full(data, file)
    if file.name == "recipe.yaml" and (file.parent / INPUTS).is_file():  # of a run
        data = filled(data, file.parent)
    data = expand(data)
    if machine is not None:
        settings = recipe_file.read(_machine_file(machine), "give it settings, such as `device: cuda`")
        settings = settings["machine"] if settings.keys() == {"machine"} else settings
        if not isinstance(settings, dict) or not isinstance(data.get("machine", {}), dict | None):
            raise RecipeError("machine", "must be a mapping, such as {device: cuda}")
        data["machine"] = (data.get("machine") or {}) | settings
    if scale is not None:
        recipe_file.scale_up(data, scale, sizes, file)
    for override in overrides:
        recipe_file.set_value(data, override)
    try:
        return parse(data)
    except RecipeError as error:
        guilty = recipe_file.blamed(error, sizes or {}, overrides) if scale is not None else None
        if guilty is None:
            raise
        raise RecipeError(f"{recipe_file.FULL}.{guilty}", f"of {file}: {error}") from error


def _machine_file(machine: str | Path) -> Path:
    """The file, or the built-in one of that name."""
    from limbeck.config.builtin import machine_files

    known = machine_files()
    if Path(machine).is_file() or str(machine) in known:
        return Path(machine) if Path(machine).is_file() else known[str(machine)]
    raise RecipeError(
        "", f"there is no file {str(machine)!r} and no built-in machine of that name{nearest(str(machine), known)}"
    )


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `load_recipe` reads."""
    return dump_yaml(recipe.resolved())


def parse(data: Mapping[str, Any]) -> Recipe:
    """Make a Recipe from plain data, in which short forms such as `evaluate: [fidelity]` are expanded first."""
    _check_text(data)
    try:
        return Recipe.model_validate(expand(dict(data)))
    except ValidationError as error:
        raise explain(error, Recipe) from None


def _check_text(data: Mapping[str, Any]) -> None:
    """Refuse what no file can hold: half characters, which YAML can spell, and a list that is its own entry."""
    try:
        json.dumps(data, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RecipeError(
            _place_of(data, half) or "", f"holds half a character, {half!r}, that no UTF-8 can hold; remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError("", "holds a list or mapping that is an entry of itself; write it out") from error


def _place_of(value: Any, text: str, path: str = "") -> str | None:
    """The path of the first text in `value`, whose own is `path`, that has `text` in it."""
    if isinstance(value, str):
        return path if text in value else None
    entries: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    places = (
        _place_of(entry, text, f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip("."))
        for key, entry in entries
    )
    return next((place for place in places if place is not None), None)


def explain(error: ValidationError, root: type[Section], path: str = "") -> RecipeError:
    """Turn pydantic's first error about the section at `path` into our own: place, value, and what would be legal."""
    first = error.errors(include_url=False)[0]
    if isinstance(refusal := first.get("ctx", {}).get("error"), RecipeError):
        return refusal
    location = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith(NOT_KEYS))]
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    kind = first["type"]
    value = first.get("input")
    if kind == "extra_forbidden":
        key, legal = str(location[-1]), _legal_keys(root, location[:-1])
        place = path.removesuffix(key).replace("[", ".").replace("]", "")
        inside = f"; parameters stand under {place}params.{key}" if "params" in legal else ""
        return RecipeError(path, f"unknown key{nearest(key, legal)}{inside}")
    if kind == "list_type" and value is not None:
        text = f"{{by: {value}}}" if path.endswith("writer") else value
        cure = f"such as [{text}]" if isinstance(value, str) else "with its entries in [ ]"
        return RecipeError(path, f"must be a list, {cure}; got {value!r}")
    if kind == "too_short" and value == []:
        return RecipeError(path, f"is an empty list; {'write null for none' if path == 'elicit' else 'give an entry'}")
    if kind == "missing":
        return RecipeError(path, "is required")
    if kind == "literal_error":
        legal = [word.strip("' ") for word in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(value, legal) if isinstance(value, str) else f"; legal: {', '.join(legal)}"
        return RecipeError(path, f"{value!r} is not allowed here{hint}")
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(path, message if kind == "value_error" else f"{message}; got {value!r}")


def _legal_keys(root: type[Section], location: Sequence[str | int]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        if part not in fields:
            return []
        section = _section_in(fields[part].annotation) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if section := _section_in(inner):
            return section
    return None
