"""A recipe: YAML in, one frozen and hashed `Recipe` out. A recipe is data: it can name no code.

Every error says the path in the file, the value found there, and the nearest legal name. Shapes and ranges are
checked here; what needs the losses (their names and parameters) is checked in `build`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from limbeck.types import NAME, RecipeError, UserError, content_hash, nearest

Keep = Literal["importance", "block_influence", "uniform", "first"]
MAX_BYTES = 256 * 1024
NOT_KEYS = ("literal[", "list[", "dict[", "constrained")  # what pydantic puts between the keys of a path


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prune(_Section):
    """Start as the teacher with `layers` layers left; `keep` chooses them (or lists them: `keep: [0, 1, 29]`)."""

    layers: Annotated[int, Field(ge=1)] | None = None
    keep: Keep | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = "importance"
    calibration: Annotated[int, Field(ge=1)] = 6  # teacher answers to judge layers on

    @field_validator("keep", mode="before")
    @classmethod
    def _not_last(cls, keep: Any) -> Any:
        if keep == "last":
            raise ValueError("to drop the last layers, keep the first: write keep: first")
        return keep

    @model_validator(mode="after")
    def _agree(self) -> Prune:
        if isinstance(self.keep, list):
            if self.keep != sorted(set(self.keep)):
                raise ValueError(f"keep must list rising layer numbers, each once; got {self.keep}")
            if self.layers not in (None, len(self.keep)):
                raise ValueError(f"layers is {self.layers}, but keep lists {len(self.keep)}; leave layers out")
        elif self.layers is None:
            raise ValueError("layers is missing: how many layers should the student have?")
        return self


class Scratch(_Section):
    """Start from random weights in the teacher's shape, with these settings of its configuration replaced."""

    config: dict[str, int | float | bool] = {}


class Lora(_Section):
    """Train low-rank adapters (arXiv:2106.09685) instead of all weights; they are merged on export."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32


class Start(_Section):
    """How the student begins: exactly one of the three."""

    pretrained: str | None = None
    prune: Prune | None = None
    scratch: Scratch | None = None

    @model_validator(mode="after")
    def _one(self) -> Start:
        given = [name for name in ("pretrained", "prune", "scratch") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of pretrained, prune, scratch; got {given or 'none'}")
        return self


class Student(_Section):
    start: Start
    lora: Lora | None = None


class Prompts(_Section):
    """`from` is `builtin/NAME` or a JSONL file with a `prompt` (and, for a corpus, an `answer`) on every line.

    `seed` draws the text; left out, it is the training's. With a seed of its own the text stays while the training varies.
    """

    source: str = Field(alias="from")
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class Writer(_Section):
    """Who writes the text the student trains on, and how it is drawn. `untouched` is the student before training.

    Shares add up to 1 (each prompt goes to one writer), or are all 1 (each prompt goes to all, the preferred writer first).
    """

    by: Literal["teacher", "corpus", "untouched"]
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(ge=1)] = 128


class Loss(_Section):
    """One term: its name, its weight (a number or a schedule) and its own parameters."""

    name: str
    weight: Annotated[float, Field(gt=0)] | dict[str, Any] = 1.0
    params: dict[str, Any] = {}


class Train(_Section):
    """`steps` updates of about `tokens_per_step` response tokens; AdamW, warm-up, cosine to `final_lr` x lr."""

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens_per_step: Annotated[int, Field(ge=1)] = 1024
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    clip: Annotated[float, Field(gt=0)] = 1.0
    save_seconds: Annotated[float, Field(ge=0)] = 60.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Evaluate(_Section):
    """What is measured: `fidelity` to the teacher, and tasks by name. `limit` bounds the held-out prompts.

    Every system also writes text of its own to the first `own_prompts` of them (left out: OWN_PROMPTS). Controls that are trained:
    `sft_control` on the teacher's text, `gold_control` on the prompts' own answers, `shuffled_control` on the teacher's text with
    the answers dealt to other prompts; all for as many steps and tokens as the student.
    """

    metrics: list[str] = ["fidelity"]
    prompts: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 96
    own_prompts: Annotated[int, Field(ge=1)] | None = None
    controls: list[Literal["untouched", "sft_control", "gold_control", "shuffled_control"]] = ["untouched", "sft_control"]


class Recipe(_Section):
    """One distillation, whole. Equal recipes have equal hashes, whatever the order of their keys."""

    name: str
    title: str = ""
    paper: str = ""
    teacher: str
    student: Student
    prompts: Prompts
    writer: Annotated[list[Writer], Field(min_length=1)] = [Writer(by="teacher")]
    loss: Annotated[list[Loss], Field(min_length=1)]
    train: Train
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} must be lower-case letters, digits, '.', '_' or '-', at most 64")
        total = sum(writer.share for writer in self.writer)
        if abs(total - 1) > 1e-9 and any(writer.share != 1 for writer in self.writer):
            raise ValueError(f"the writers' shares add up to {total:g}, not 1 (and are not all 1, for every writer to answer every prompt)")
        if len(set(map(str, self.writer))) < len(self.writer):
            raise ValueError("two writers are the same in everything, so they would write the same text; change one, or leave it out")
        return self

    @property
    def text_seed(self) -> int:
        """What prompts, writers and answers are drawn with."""
        return self.train.seed if self.prompts.seed is None else self.prompts.seed

    @property
    def held_out_writer(self) -> Writer:
        """Whose sampling held-out text is drawn with: of the teacher's, the largest share, rather random than greedy."""
        by_teacher = [writer for writer in self.writer if writer.by == "teacher"] or self.writer
        return max(by_teacher, key=lambda writer: (writer.share, writer.temperature > 0))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the resolved recipe."""
        return content_hash(self.resolved())

    def resolved(self) -> dict[str, Any]:
        """Every setting that has a value, defaults included, as plain data."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, or the name of a built-in recipe.
        overrides: `a.b=c` pairs as `--set` takes them; `c` is read as YAML.

    Raises:
        RecipeError: the file is missing or malformed, or says something that can't be; the message names the place.
    """
    file = Path(path)
    if not file.is_file():
        from limbeck.builtin import recipe_files

        built_in = recipe_files()
        if str(path) not in built_in:
            raise RecipeError("", f"there is no recipe file {str(path)!r} and no built-in one{nearest(str(path), built_in)}")
        file = built_in[str(path)]
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError("", f"{file} is larger than {MAX_BYTES} bytes; that is no recipe")
    try:
        data = yaml.load(file.read_text(), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader underneath)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError("", f"{file} is not valid YAML: {error}") from error
    if data is None:
        raise RecipeError("", f"{file} is empty; start from a built-in recipe, such as recipes/quickstart.yaml")
    if not isinstance(data, dict):
        raise RecipeError("", f"{file} must hold a mapping of settings, not {type(data).__name__}")
    data = _write_out(data)
    for override in overrides:
        _set(data, override)
    return parse(data)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse(data: Mapping[str, Any]) -> Recipe:
    """Plain data to a Recipe. Short forms are written out first: `- forward_kl`, `evaluate: [fidelity]`."""
    try:
        return Recipe.model_validate(_write_out(dict(data)))
    except ValidationError as error:
        raise _explain(error) from None


def _write_out(data: dict[str, Any]) -> dict[str, Any]:
    if isinstance(data.get("loss"), list):
        data["loss"] = [_loss(entry, f"loss[{index}]") for index, entry in enumerate(data["loss"])]
    if isinstance(data.get("evaluate"), list):
        data["evaluate"] = {"metrics": data["evaluate"]}
    return data


def _loss(entry: Any, path: str) -> Any:
    if isinstance(entry, str):
        return {"name": entry}
    if isinstance(entry, dict) and "name" not in entry:
        if len(entry) != 1:
            raise RecipeError(path, f"one loss per list entry, such as `- jsd: {{teacher_share: 0.5}}`; got {entry!r}")
        ((name, params),) = entry.items()
        if not isinstance(params, dict | None):
            raise RecipeError(f"{path}.{name}", f"its parameters must be a mapping; got {params!r}")
        rest = dict(params or {})
        weight = {"weight": rest.pop("weight")} if "weight" in rest else {}
        return {"name": name, "params": rest, **weight}
    return entry


def _set(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; list entries are numbers, as in `loss.0.weight=2`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form a.b=c, such as --set train.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path}: {text!r} is not a YAML value: {error}") from error
    *parents, last = path.split(".")
    at: Any = data
    for key in parents:
        if isinstance(at, list) and key.isdigit() and int(key) < len(at):
            at = at[int(key)]
        elif isinstance(at, dict):
            at = at.setdefault(key, {})
        else:
            raise UserError(f"--set {path}: there is nothing to set under {key!r}")
    if isinstance(at, list) and last.isdigit() and int(last) < len(at):
        at[int(last)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise UserError(f"--set {path}: {last!r} can't be set there")


def _explain(error: ValidationError) -> RecipeError:
    """The first complaint of pydantic in our words: place, value, what would do."""
    first = error.errors(include_url=False)[0]
    location = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith(NOT_KEYS))]
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        return RecipeError(path, f"unknown key{nearest(str(location[-1]), _legal_keys(location[:-1]))}")
    if kind == "missing":
        return RecipeError(path, "is required")
    if kind == "literal_error":
        legal = [word.strip("' ") for word in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(value, legal) if isinstance(value, str) else f"; legal: {', '.join(legal)}"
        return RecipeError(path, f"{value!r} is not possible here{hint}")
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(path, message if kind == "value_error" else f"{message}; got {value!r}")


def _legal_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the section that `location` leads to."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        if part not in fields:
            return []
        section = _section_in(fields[part].annotation) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _section_in(inner):
            return found
    return None
