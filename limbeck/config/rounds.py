"""A recipe's `rounds`, and what each of them is as an ordinary recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from limbeck.config.named_models import MODEL_NAME, NO_ROUNDS, PREVIOUS, RESERVED, UNTOUCHED
from limbeck.config.section import Section
from limbeck.types import RecipeError, UserError, nearest

TEXT = ("elicit", "writer", "rollout")  # how text is made: `first` replaces all of it or nothing
IN_FIRST = (*TEXT, "loss", "train", "prompts")
IN_STAGES = ("student", "prompts", "elicit", "writer", "loss", "train", "evaluate")
OF_EVALUATION = ("prompts", "limit", "max_tokens")  # what a stage without `evaluate` has in common with the recipe
WRITES = {"metrics": ["fidelity"], "controls": ["untouched"]}  # and what else is measured of a model that writes
NAMING = ("by", "author", "teacher", "student", "reference")  # the settings by which steps name models


class Rounds(Section):
    """`n` rounds: the recipe run again and again, where the student that a round trains is the next one's `previous`.

    A round starts from the `base`, which is the first round's start, or from the `previous` student. With `stop`, a
    metric such as sums/pass_rate, no round follows one whose student is not better by it than the student before.
    `first` has sections of the recipe (loss, writer, ...) for a training before the rounds, round 0; its student is
    then their base. With `at_once`, one more run asks for as much text and takes as many steps as all rounds together,
    in a single round: the control that says whether it is the rounds.

    `stages` are trainings of other models before each round's own, by name, made of sections in the place of the
    recipe's own. A stage with the name of one of the recipe's `models` trains that model, which writes, and the round's
    steps ask the trained one by the name. Any other trains a reward model (`student` with `head: scalar`), which the
    round's rewards call by the stage's name.
    """

    n: Annotated[int, Field(ge=1, le=100)]
    restart: Literal["base", "previous"] = "base"
    stop: str | None = None
    first: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    at_once: Annotated[Literal[True] | None, BeforeValidator(lambda value: value or None)] = None
    stages: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] | None = None

    @field_validator("first")
    @classmethod
    def _known(cls, first: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in first or {}:
            if key not in IN_FIRST:
                raise ValueError(f"{key!r} can't be other than in the rounds{nearest(key, IN_FIRST)}")
        return first

    @model_validator(mode="after")
    def _stages_are_complete(self) -> Rounds:
        for name, stage in (self.stages or {}).items():
            path = f"rounds.stages.{name}"
            if not MODEL_NAME.fullmatch(name) or name in RESERVED:
                raise RecipeError(path, "a stage is called by its name: small letters and digits, such as judge")
            for key in stage:
                if key not in IN_STAGES:
                    raise RecipeError(path, f"{key!r} is no section of a stage{nearest(key, IN_STAGES)}")
            for key in ("writer", "loss", "train"):
                if key not in stage and not (key == "writer" and "elicit" in stage):
                    raise RecipeError(path, f"{key} is missing: a stage has its own")
        if self.stages and self.at_once:
            raise ValueError("at_once is one training, and stages are several; leave one of them out")
        return self

    @property
    def numbers(self) -> range:
        """The numbers of the rounds; 0 is the training before them."""
        return range(1 if self.first is None else 0, self.n + 1)


def check_stages(rounds: Rounds | None, models: Mapping[str, Any]) -> None:
    """Refuse a stage that trains neither a reward model nor one of the `models` whose weights are here.

    Raises:
        RecipeError: with the place in the recipe and the cure.
    """
    for name, stage in (rounds.stages or {} if rounds is not None else {}).items():
        path = f"rounds.stages.{name}"
        own = stage.get("student", {})
        start = own.get("start") if isinstance(own, Mapping) else None
        if name not in models:
            if "student" not in stage:
                cure = f"give it, or name {name} under `models`, to train that model"
                raise RecipeError(path, f"student is missing: {cure}")
            if not isinstance(start, Mapping) or "pretrained" not in start or own.get("head") != "scalar":
                raise RecipeError(
                    path,
                    "student must be a reward model: {start: {pretrained: ...}, head: scalar}; a stage that trains a"
                    " model that writes has its name from `models`",
                )
            continue
        source = models[name].model
        if source is None or source == PREVIOUS:
            who = "the student" if source == PREVIOUS else "behind a server"
            raise RecipeError(path, f"{name} is {who}, and no stage can train it: name weights in models.{name}.model")
        for key in ("start", "head", "template"):
            if isinstance(own, Mapping) and key in own:
                raise RecipeError(f"{path}.student", f"the stage trains models.{name}, as that is; leave {key} out")


def check_previous(
    rounds: Rounds | None,
    teacher: Any,
    models: Mapping[str, Any],
    *,
    start: str | None,
    writers: Sequence[str] = (),
    previous: str | None = None,
) -> None:
    """Refuse a `previous` student that no round leaves.

    Args:
        models: those that the recipe names beside its teacher.
        start: the student's pretrained start; None where it is made of the teacher.
        writers: by whom the recipe's text is.
        previous: whom a round's own recipe calls so.

    Raises:
        RecipeError: with the place in the recipe and the cure.
    """
    if rounds is None and previous is None and PREVIOUS in writers:
        raise RecipeError(f"writer[{list(writers).index(PREVIOUS)}].by", NO_ROUNDS)
    taught = PREVIOUS in (teacher.model, *(other.model for other in getattr(teacher, "beside", ())))
    places = ["teacher.model"] if taught else []
    places += [f"models.{name}.model" for name, model in models.items() if model.model == PREVIOUS]
    if not places:
        return
    if rounds is None:
        raise RecipeError(places[0], f"{NO_ROUNDS}; a folder of this name is ./previous")
    if start is None:
        what = "be taught by its previous round" if taught else "be a model of that kind in the first round"
        raise RecipeError("student.start", f"a student that is made of the teacher can't {what}: give start.pretrained")


def without_rounds(rounds: Rounds | None, name: str, instead: str) -> None:
    """Refuse a recipe with rounds for what is done with an ordinary one.

    Raises:
        UserError: it has rounds.
    """
    if rounds is not None:
        raise UserError(f"{name} has rounds, and this is for one training: {instead}")


def round_data(
    resolved: Mapping[str, Any],
    number: int,
    student: str | None,
    base: str | None = None,
    stages: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A round of a resolved recipe as the data of an ordinary one.

    Args:
        number: of the round, from 1; 0 for the training before the rounds.
        student: the folder of the student before it; None where there is none.
        base: the folder of the student that the rounds start from, where it was trained before them.
        stages: the run folders of its stages, by name.
    """
    data: dict[str, Any] = {key: value for key, value in resolved.items() if key != "rounds"}
    own = data["student"]
    data["title"] = f"{data.get('title') or data['name']}, {f'round {number}' if number else 'before the rounds'}"
    if number == 0:
        first = resolved["rounds"]["first"]
        data = {key: value for key, value in data.items() if key not in TEXT or first.keys().isdisjoint(TEXT)} | first
    start = student if resolved["rounds"]["restart"] == PREVIOUS else base
    asked = PREVIOUS if student not in (None, start) else UNTOUCHED  # whom steps and writers ask as the previous one
    names_it = writes = PREVIOUS in _writers(data)
    if isinstance(data.get("elicit"), list):
        names_it = names_it or data["elicit"] != [_naming(entry, UNTOUCHED) for entry in data["elicit"]]
        data["elicit"] = [_naming(entry, asked) for entry in data["elicit"]]
    previous = own["start"].get("pretrained") if student is None else student
    template = own.get("template") if student is None else None  # a trained student has its own
    data["teacher"] = _taught_by(data["teacher"], previous, template)
    data = _with_models(data, resolved, previous, template, trained=stages or {})
    if stages and isinstance(data.get("rollout"), Mapping) and "rewards" in data["rollout"]:
        rewards = [_with_folder(entry, stages) for entry in data["rollout"]["rewards"]]
        data["rollout"] = data["rollout"] | {"rewards": rewards}
    if start is not None:
        rest = {key: value for key, value in own.items() if key != "template"}
        data["student"] = rest | {"start": {"pretrained": start}}
    if names_it and asked == PREVIOUS:
        data["previous"] = student
    elif writes:  # a writer keeps its name, which losses read
        data["previous"] = UNTOUCHED
    return data


def stage_data(
    resolved: Mapping[str, Any], name: str, student: str | None, before: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A stage of a resolved recipe as the data of an ordinary one.

    Args:
        student: the folder of the student before the round; None where that is the recipe's start.
        before: the run folders of the stages of the round before, by name: so are the models that its steps ask, and
            where rounds go on from the previous student, so does the model that it trains.

    Raises:
        RecipeError: the stage reads a previous student, and there is none yet.
    """
    stage = resolved["rounds"]["stages"][name]
    data: dict[str, Any] = {key: value for key, value in resolved.items() if key not in ("rounds", *TEXT)}
    data |= stage
    data["title"] = f"{data.get('title') or data['name']}, {name}"
    start = resolved["student"]["start"].get("pretrained") if student is None else student
    data["teacher"] = _taught_by(data["teacher"], start, None)
    data = _with_models(data, resolved, start, None, trained=before or {})
    if name in (resolved.get("models") or {}):
        goes_on = before if resolved["rounds"]["restart"] == PREVIOUS else None
        data["student"] = stage.get("student", {}) | _start_of(resolved["models"][name], (goes_on or {}).get(name))
    steps = data.get("elicit")
    asks = isinstance(steps, list) and any(entry != _naming(entry, UNTOUCHED) for entry in steps)
    if asks or PREVIOUS in _writers(data):
        if start is None:
            raise RecipeError("rounds.first", "there is no student before round 1: give first, or start.pretrained")
        data["previous"] = start
    if "evaluate" not in stage:
        common = {key: resolved["evaluate"][key] for key in OF_EVALUATION if key in resolved["evaluate"]}
        data["evaluate"] = common | (WRITES if name in (resolved.get("models") or {}) else {})
    return data


def _writers(data: Mapping[str, Any]) -> list[Any]:
    """By whom the text is, in a part of a recipe that is not checked yet."""
    writers = data.get("writer")
    return [writer.get("by") for writer in writers if isinstance(writer, Mapping)] if isinstance(writers, list) else []


def asked_for(resolved: Mapping[str, Any], name: str) -> bool:
    """Whether the rounds, or a stage of another name, ask the model of `models` that the stage `name` trains."""
    others = [stage for other, stage in resolved["rounds"]["stages"].items() if other != name]
    return any(_names(part, name) for part in (resolved, *others))


def _start_of(model: Mapping[str, Any], folder: str | None) -> dict[str, Any]:
    """What a stage's student starts as: the model itself, or what an earlier stage made of it."""
    if folder is not None:
        return {"start": {"pretrained": _student_in(folder)}}
    template = {key: model[key] for key in ("template",) if key in model}
    return {"start": {"pretrained": model["model"]}, **template}


def _student_in(folder: str) -> str:
    """The student of a run folder."""
    return str(Path(folder) / "student")


def _with_folder(reward: dict[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    folder = folders.get(reward["params"].get("path", "")) if reward["name"] == "model" else None
    return reward if folder is None else reward | {"params": reward["params"] | {"path": folder}}


def _with_models(
    data: Mapping[str, Any],
    resolved: Mapping[str, Any],
    previous: str | None,
    template: str | None,
    *,
    trained: Mapping[str, str],
) -> dict[str, Any]:
    """A part of the recipe without the `models` that others alone name. What no part names stays, to be refused.
    `trained` are the run folders of stages, by the names of the models that they trained."""
    rounds = resolved["rounds"]
    parts = (resolved, rounds.get("first") or {}, *(rounds.get("stages") or {}).values())
    models = {
        name: _as_previous(_as_trained(model, trained.get(name)), previous, template)
        for name, model in (resolved.get("models") or {}).items()
        if _names(data, name) or not any(_names(part, name) for part in parts)
    }
    return {key: value for key, value in data.items() if key != "models"} | ({"models": models} if models else {})


def _names(data: Mapping[str, Any], name: str) -> bool:
    """Whether a part of a recipe's data that names models names this one."""

    def leaves(value: Any) -> list[Any]:
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
        return [value] if inside is None else [leaf for each in inside for leaf in leaves(each)]

    evaluate = data.get("evaluate")
    judge = evaluate.get("judge") if isinstance(evaluate, Mapping) else None
    return name in (judge, *leaves([data.get("elicit"), data.get("rollout")]))


def _taught_by(teacher: Any, previous: str | None, template: str | None) -> Any:
    """The teacher with the previous student in the place of its name."""
    if teacher == PREVIOUS:
        teacher = {"model": PREVIOUS}
    if not isinstance(teacher, dict):
        return teacher
    teacher = _as_previous(teacher, previous, template)
    if "beside" in teacher:
        beside = [other | {"model": previous} if other["model"] == PREVIOUS else other for other in teacher["beside"]]
        teacher = teacher | {"beside": beside}
    return teacher


def _as_previous(model: dict[str, Any], previous: str | None, template: str | None) -> dict[str, Any]:
    """The settings of a model with the previous student in the place of its name."""
    if model.get("model") != PREVIOUS:
        return model
    framed = model.get("template") or template if template is not None else None
    rest = {key: value for key, value in model.items() if key != "template"}
    return rest | {"model": previous} | ({} if framed is None else {"template": framed})


def _as_trained(model: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """The settings of a model as the stage in this run folder made it."""
    if folder is None:
        return model
    return {key: value for key, value in model.items() if key != "template"} | {"model": _student_in(folder)}


def _naming(entry: Any, name: str) -> Any:
    """A step of elicitation that asks `name` where it asks the previous student, written long or short."""
    if not isinstance(entry, dict):
        return entry
    return {key: _renamed(value, name) if isinstance(value, dict) else value for key, value in entry.items()}


def _renamed(params: dict[str, Any], name: str) -> dict[str, Any]:
    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(each) for each in value]
        return name if value == PREVIOUS else value

    return {key: told(value) if key in NAMING else value for key, value in params.items()}
