"""A recipe's `rounds`, and what each of them is as an ordinary recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from limbeck.config.named_models import NO_ROUNDS, PREVIOUS, UNTOUCHED
from limbeck.config.sections import Section
from limbeck.types import RecipeError, UserError, nearest

TEXT = ("elicit", "writer", "rollout")  # how text is made: `first` replaces all of it or nothing
IN_FIRST = (*TEXT, "loss", "train", "prompts")
NAMING = ("by", "author", "teacher", "student", "reference")  # the settings by which steps name models


class Rounds(Section):
    """`n` rounds: the recipe run again and again, where the student that a round trains is the next one's `previous`.

    A round starts from the `base`, which is the first round's start, or from the `previous` student. With `stop`, a
    metric such as sums/pass_rate, no round follows one whose student is not better by it than the student before.
    `first` has sections of the recipe (loss, writer, ...) for a training before the rounds, round 0; its student is
    then their base.
    """

    n: Annotated[int, Field(ge=1, le=100)]
    restart: Literal["base", "previous"] = "base"
    stop: str | None = None
    first: Annotated[dict[str, Any], Field(min_length=1)] | None = None

    @field_validator("first")
    @classmethod
    def _known(cls, first: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in first or {}:
            if key not in IN_FIRST:
                raise ValueError(f"{key!r} can't be other than in the rounds{nearest(key, IN_FIRST)}")
        return first

    @property
    def numbers(self) -> range:
        """The numbers of the rounds; 0 is the training before them."""
        return range(1 if self.first is None else 0, self.n + 1)


def check_previous(rounds: Rounds | None, teacher: Any, models: Mapping[str, Any], start: str | None) -> None:
    """Refuse a `previous` student that no round leaves.

    Args:
        models: those that the recipe names beside its teacher.

    Raises:
        RecipeError: with the place in the recipe and the cure.
    """
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
    resolved: Mapping[str, Any], number: int, student: str | None, base: str | None = None
) -> dict[str, Any]:
    """A round of a resolved recipe as the data of an ordinary one.

    Args:
        number: of the round, from 1; 0 for the training before the rounds.
        student: the folder of the student before it; None where there is none.
        base: the folder of the student that the rounds start from, where it was trained before them.
    """
    data: dict[str, Any] = {key: value for key, value in resolved.items() if key != "rounds"}
    own = data["student"]
    data["title"] = f"{data.get('title') or data['name']}, {f'round {number}' if number else 'before the rounds'}"
    if number == 0:
        first = resolved["rounds"]["first"]
        data = {key: value for key, value in data.items() if key not in TEXT or first.keys().isdisjoint(TEXT)} | first
    start = student if resolved["rounds"]["restart"] == PREVIOUS else base
    asked = PREVIOUS if student not in (None, start) else UNTOUCHED  # whom steps and writers ask as the previous one
    names_it = any(writer["by"] == PREVIOUS for writer in data["writer"])
    if "elicit" in data:
        names_it = names_it or data["elicit"] != [_naming(entry, UNTOUCHED) for entry in data["elicit"]]
        data["elicit"] = [_naming(entry, asked) for entry in data["elicit"]]
    previous = own["start"].get("pretrained") if student is None else student
    template = own.get("template") if student is None else None  # a trained student has its own
    data["teacher"] = _taught_by(data["teacher"], previous, template)
    if "models" in data:
        models = {
            name: _as_previous(model, previous, template)
            for name, model in data.pop("models").items()
            if _names(data, name) or not _names(resolved, name) | _names(resolved["rounds"].get("first", {}), name)
        }
        data |= {"models": models} if models else {}
    if start is not None:
        rest = {key: value for key, value in own.items() if key != "template"}
        data["student"] = rest | {"start": {"pretrained": start}}
    if names_it and asked == PREVIOUS:
        data["previous"] = student
    return data


def _names(data: Mapping[str, Any], name: str) -> bool:
    """Whether a part of a recipe's data that names models names this one."""

    def leaves(value: Any) -> list[Any]:
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
        return [value] if inside is None else [leaf for each in inside for leaf in leaves(each)]

    judge = data.get("evaluate", {}).get("judge")
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
