"""Why an answer is not found, or a folder is refused: which field of what is asked differs from what is stored."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.config.binding import evaluation_part, training_part
from limbeck.config.older import INPUTS
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.elicit.run import prompts_of
from limbeck.elicit.stored import what_is_asked
from limbeck.progress import Silent
from limbeck.runs.claim import HELD_OUT, TRAINING
from limbeck.runs.fit import fitted
from limbeck.runs.opening import inputs_of
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.storage.metrics_log import read_json
from limbeck.storage.rounds import has_rounds, parts_of, whole_of
from limbeck.storage.store import Store
from limbeck.training.guilty import FILE as GUILTY
from limbeck.types import STUDENTS, Request, UserError, canonical_json

KEY = re.compile(r"[0-9a-f]{6,64}")
Asked = dict[str, Any]


def why_key(prefix: str, runs: list[Path]) -> dict[str, Any]:
    """What a stored request is, and in which fields the most similar one of its run differs.

    Raises:
        UserError: no store has it, or several requests begin so.
    """
    found = [
        (run, key, questions)
        for run in runs
        for questions in [_questions(run)]
        for key in questions
        if key.startswith(prefix)
    ]
    if not found:
        places = ", ".join(map(str, runs)) or "runs/: there is none"
        raise UserError(f"no request {prefix} is stored in {places}: give its run folder with --run")
    if len({key for _, key, _ in found}) > 1:
        raise UserError(f"{prefix} begins {len(found)} keys: give more of it")
    run, key, questions = found[0]
    asked, finish = questions.pop(key)
    result: dict[str, Any] = {"run": str(run), "key": key, "finish": finish, "asked": asked}
    other = _most_like(asked, questions)
    if other is not None:
        result["nearest"] = {"key": other, "differs": _listed(questions[other][0], asked)}
    return result


def why_run(folder: Path, recipe: Recipe | None, store: Path | None = None) -> dict[str, Any]:
    """In what a recipe (by default the folder's own) differs from what the folder holds: fields, other inputs, and the
    requests that it would ask again, by the fields in which they differ from stored ones. Asks no server for text.

    In a folder of rounds it says the former of the whole, and all of each round and stage by its own recipe.

    Args:
        store: the folder of its `store.sqlite`, by default the run's own.

    Raises:
        UserError: no run folder.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run folder (it has no recipe.yaml)")
    stored = load_recipe(folder / "recipe.yaml")
    now = recipe or stored
    result: dict[str, Any] = {"run": str(folder), "recipe": _recipe_fields(stored, now)}
    if has_rounds(folder):
        return result | {"parts": [_why_part(part, folder) for part in parts_of(folder)]}
    run = Run(fitted(resolve(now)), folder, Silent(), lambda: True, store=store or whole_of(folder))
    try:
        inputs = inputs_of(run.method, run.models)
        before = read_json(folder / INPUTS) or {}
        shared = (before.keys() & inputs.keys()) - {TRAINING}
        result["inputs"] = [
            {"field": name, "then": before[name], "now": inputs[name], "refused": name != HELD_OUT}
            for name in sorted(shared)
            if before[name] != inputs[name]
        ]
        result["requests"] = _asked_by(run)
    except (UserError, sqlite3.Error) as error:  # such as a server that is away, or a store of an older version
        result["not_looked_at"] = str(error)
    guilty = [path for path in (folder, *sorted((folder / "controls").glob("*"))) if (path / GUILTY).is_file()]
    if guilty:
        result["not_finite"] = {str(path / GUILTY): read_json(path / GUILTY) for path in guilty}
    return result


def _why_part(part: Path, whole: Path) -> dict[str, Any]:
    """What there is to say of a round or a stage."""
    try:
        return why_run(part, None, store=whole)
    except UserError as error:  # such as one that has only begun
        return {"run": str(part), "recipe": [], "not_looked_at": str(error)}


def _recipe_fields(then: Recipe, now: Recipe) -> list[dict[str, Any]]:
    """The fields that differ, and what becomes of the folder by them."""
    before, after = then.resolved(), now.resolved()
    bound = {name for name, _, _ in differences(training_part(before), training_part(after))}
    measured = evaluation_part(before) != evaluation_part(after)
    fields = []
    for name, old, new in differences(before, after):
        effect = "the folder is refused" if name in bound else "nothing"
        if name not in bound and measured and name.startswith("evaluate"):
            effect = "measured anew"
        fields.append({"field": name, "then": old, "now": new, "effect": effect})
    return fields


def _asked_by(run: Run) -> dict[str, Any]:
    """What the run would ask for its training text: the steps of elicitation, up to the first that lacks an answer,
    and then its writers."""
    text, file = run.text, run.text.folder / "store.sqlite"
    stored = _questions(run.text.folder)
    if not run.method.steps:
        return _requests(text.questions(text.prompts[0]), stored)
    if not file.is_file():
        return {"answered": 0, "would_be_asked": None, "because_of": {}, "step": run.method.steps[0][0], "unscored": 0}
    by = {name for _, step in run.method.steps for name in step.asks()}
    if by & set(STUDENTS) and not (run.folder / "start.json").is_file():
        raise UserError("a step asks the student before training, whose start is not in the folder yet")
    server = run.recipe.teacher.server
    tolerates = (server.tolerate if server is not None else None) or 0.0
    with Store(file, read_only=True) as store:
        asked = what_is_asked(text.elicitation, store, text.models.scorer_identity, tolerates)
    if (pool := text.elicitation.finished()) is not None:  # the run reads this back, and asks no step again
        requests = [request for request in asked.asked if request.key in stored]
        return _requests([*requests, *text.questions(prompts_of(pool)[0])], stored)
    requests = [*asked.asked, *text.questions(prompts_of(asked.pool)[0])]
    left = {key: entry for key, entry in stored.items() if key not in asked.again}
    return _requests(requests, left) | {"step": asked.step, "unscored": asked.unscored}


def _requests(now: list[Request], stored: Mapping[str, tuple[Asked, str]]) -> dict[str, Any]:
    """How many requests have their answer, and why the others have none."""
    missing = {request.key: request.asked for request in now if request.key not in stored}
    by_text: dict[str, dict[str, tuple[Asked, str]]] = {}
    for key, entry in stored.items():
        by_text.setdefault(canonical_json(entry[0].get("messages")), {})[key] = entry
    reasons: dict[str, dict[str, Any]] = {}
    for key, asked in missing.items():
        other = _most_like(asked, by_text.get(canonical_json(asked["messages"]), {}))
        fields = [] if other is None else _listed(stored[other][0], asked)
        name = ", ".join(field["field"] for field in fields) or "a prompt that was not asked before"
        reason = reasons.setdefault(name, {"requests": 0, "example": key, "nearest": other, "differs": fields})
        reason["requests"] += 1
    total = len({request.key for request in now})
    return {"answered": total - len(missing), "would_be_asked": len(missing), "because_of": reasons}


def _questions(folder: Path) -> dict[str, tuple[Asked, str]]:
    file = folder / "store.sqlite"
    try:
        return Store.questions(file) if file.is_file() else {}
    except (sqlite3.Error, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): it is damaged, or no store of Limbeck") from error


def _most_like(asked: Asked, others: Mapping[str, tuple[Asked, str]]) -> str | None:
    """The key of the request that differs in the fewest fields."""
    return min(others, key=lambda key: len(list(differences(others[key][0], asked))), default=None)


def _listed(then: Asked, now: Asked) -> list[dict[str, Any]]:
    return [{"field": name, "then": old, "now": new} for name, old, new in differences(then, now)]


def differences(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value then, value now) of every field in which two values differ; None where there is no such field."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted(then.keys() | now.keys(), key=str):
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for place, (old, new) in enumerate(zip(then, now, strict=True)):
            yield from differences(old, new, f"{path}[{place}]")
    elif then != now or type(then) is not type(now):
        yield path, then, now
