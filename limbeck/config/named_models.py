"""The models of a recipe beside its teacher, by the names that steps, judges and rewards call them by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from limbeck.config.section import Section
from limbeck.config.server import Served
from limbeck.config.teacher import InProcess
from limbeck.types import RecipeError, nearest

TEACHER = "teacher"
UNTOUCHED = "untouched"  # the student before training
PREVIOUS = "previous"  # the student of the round before; in the first round, the student's start
NO_ROUNDS = "previous is the student of the round before, and there are no rounds: add rounds: {n: 3}"
RESERVED = (TEACHER, UNTOUCHED, "student", "corpus", "elicited", PREVIOUS)
MODEL_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
TEACHERS_ALONE = {
    "cache": "only a teacher's distributions are kept",
    "context": "what it is shown beside a prompt is the step's to say",
    "weights": "only a teacher can have the student's weights: write by: untouched for the student before training",
    "beside": "name each model by itself",
    "bridge": "only text is asked of it, whatever its tokens",
}


class NamedLocal(InProcess):
    """A model whose weights are here."""

    model: str

    @property
    def server(self) -> None:
        return None


class NamedServed(Section):
    """A model behind a server."""

    server: Served

    @property
    def model(self) -> None:
        return None


NamedModel = NamedLocal | NamedServed


def named_model(name: str, data: Any) -> tuple[type[Section], Any]:
    """(the section, its data) of one entry of a recipe's `models`, written as a local or served teacher is.

    Raises:
        RecipeError: a name that can't be one, or a setting that only a teacher has.
    """
    path = f"models.{name}"
    if name in RESERVED or not MODEL_NAME.fullmatch(name):
        why = f"there is a {name} already" if name in RESERVED else "a name is small letters and digits"
        raise RecipeError(path, f"{why}; give it another name, such as judge")
    if isinstance(data, NamedLocal | NamedServed):
        return type(data), data
    if isinstance(data, str):
        data = {"model": data}
    if not isinstance(data, Mapping):
        raise RecipeError(path, f"name a model, or a server ({{server: {{url: ..., name: ...}}}}); got {data!r}")
    data = {key: value for key, value in data.items() if value is not None and key != "kind"}
    for key, why in TEACHERS_ALONE.items():
        if key in data:
            raise RecipeError(f"{path}.{key}", f"{why}; leave it out")
    if ("model" in data) == ("server" in data):
        raise RecipeError(path, "give either a model, whose weights are here, or a server")
    if isinstance(server := data.get("server"), Mapping):
        for key in ("names", "logprobs"):
            if server.get(key) is not None:
                raise RecipeError(f"{path}.server.{key}", "only a teacher is asked for its distribution; leave it out")
    return (NamedServed if "server" in data else NamedLocal), data


def check_name(name: str, models: Mapping[str, NamedModel], path: str, previous: str | None = None) -> None:
    """Refuse a name that stands for no model of the recipe; `previous` is the folder of the student of the round
    before."""
    if name == PREVIOUS:
        if previous is None:
            raise RecipeError(path, NO_ROUNDS)
        return
    if name not in (TEACHER, UNTOUCHED) and name not in models:
        legal = [TEACHER, UNTOUCHED, *models]
        raise RecipeError(path, f"no model is named {name!r} under `models`{nearest(name, legal)}")


def named_models(value: Any, explain: Any) -> Any:
    """The entries of a recipe's `models`; `explain` puts an error of pydantic in words (see `recipe`)."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise RecipeError("models", "must be a mapping from names to models, such as {judge: MODEL}")
    sections = {}
    for name, data in value.items():
        section, data = named_model(str(name), data)
        try:
            sections[str(name)] = section.model_validate(data)
        except ValidationError as error:
            raise explain(error, section, f"models.{name}") from None
    return sections
