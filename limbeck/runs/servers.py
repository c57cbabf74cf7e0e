"""Asks the servers that a recipe names whether they are there and what they can do, before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.config.recipe import Recipe
from limbeck.elicit.engine import in_its_place
from limbeck.models.api import ApiTeacher
from limbeck.models.vllm import look
from limbeck.runs.resolve import Method
from limbeck.runs.served import scorer_of, served
from limbeck.types import RecipeError, UserError


@dataclass(frozen=True)
class ServerFinding:
    """What a server of the recipe says. `place` is where the recipe names it; `fault` is empty, or what is wrong."""

    place: str
    seen: str
    fault: str = ""


def examine_servers(method: Method) -> list[ServerFinding]:
    """One finding for each server that the recipe names. None is asked for text, none is given weights."""
    findings = []
    api = served(method)
    if api is not None:
        try:
            scorer = scorer_of(method, api)
            seen = api.identity
            if scorer is not None:
                scorer.probe()
                seen += f", which {scorer.told}"
            findings.append(ServerFinding("teacher.server", _seen(api, seen)))
        except UserError as error:
            findings.append(ServerFinding("teacher.server", "", str(error)))
    for name, model in (method.recipe.models or {}).items():
        if model.server is not None:
            try:
                asked = ApiTeacher(model.server)
                findings.append(ServerFinding(f"models.{name}.server", _seen(asked, asked.identity)))
            except UserError as error:
                findings.append(
                    ServerFinding(f"models.{name}.server", "", str(in_its_place(error, f"models.{name}.server")))
                )
    try:
        if (writer := look_at_writer(method.recipe)) is not None:
            findings.append(ServerFinding("rollout.through", f"{writer}, which takes weights"))
    except RecipeError as error:
        findings.append(ServerFinding(error.path, "", str(error).removeprefix(f"{error.path}: ")))
    return findings


def _seen(api: ApiTeacher, seen: str) -> str:
    """What was seen of a server, with how many of several addresses answer."""
    urls, lost = api.endpoint.urls, api.lost
    if len(urls) == 1:
        return seen
    return f"{seen}, at {len(urls) - len(lost)} of {len(urls)} addresses" + (
        f" (not {', '.join(lost)})" if lost else ""
    )


def look_at_writer(recipe: Recipe) -> str | None:
    """The name of the model on the server that writes the student's text; None if the recipe names no such server.

    Raises:
        RecipeError: it is not there, wants a key, or takes no weights.
    """
    through = None if recipe.rollout is None else recipe.rollout.through
    if through is None or recipe.student_writer is None:
        return None
    try:
        return look(through.vllm, through.model)
    except UserError as error:
        raise RecipeError("rollout.through", str(error)) from error
