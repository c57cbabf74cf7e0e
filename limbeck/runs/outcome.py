"""What a run in rounds leaves in its own folder: the student and the evaluation of the kept round, and a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe, as_yaml, parse
from limbeck.config.yaml_text import read_yaml
from limbeck.elicit.bills import Bills
from limbeck.evaluate.worth import bill
from limbeck.report.page import write_report
from limbeck.runs.named import input_name
from limbeck.storage.evaluation import SUMMARY, check_records, write_summary
from limbeck.storage.files import link_or_copy, new_directory, sweep, write_text
from limbeck.storage.manifest import MANIFEST
from limbeck.storage.metrics_log import read_json
from limbeck.storage.rounds import parts_of, round_folder, rounds_in


def publish(folder: Path, recipe: Recipe, kept: int, *, page: bool) -> None:
    """Put the student and the evaluation of the round that is kept into the run folder; files are linked where that is
    possible, so that they take no space. What the folder's evaluation has beside them stays."""
    home = round_folder(folder, kept)
    sweep(folder)
    if (home / "student").is_dir() and not _is_linked(home / "student", folder / "student"):
        with new_directory(folder / "student") as new:
            for file in (home / "student").iterdir():
                _link(file, new / file.name)
    summary = read_json(home / "evaluation" / "summary.json")
    if summary is None:
        return
    check_records(home / "evaluation")
    (folder / "evaluation").mkdir(exist_ok=True)
    sweep(folder / "evaluation")
    for file in (home / "evaluation").iterdir():
        if file.is_file() and file.name not in (SUMMARY, MANIFEST):
            _link(file, folder / "evaluation" / file.name)
    summary |= {"recipe": recipe.hash, "round": kept, **_bills(folder, recipe)}
    write_summary(folder / "evaluation", summary)
    if page:
        write_report(folder)


def _bills(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the servers of all rounds were paid until now, also for a round that is not kept; empty where no round says
    which models they have."""
    inputs: dict[str, Any] = {}
    for home in rounds_in(folder).values():
        inputs |= read_json(home / "inputs.json") or {}
    names = {name: input_name(name) for name, model in (recipe.models or {}).items() if model.server is not None}
    names |= {TEACHER: "teacher"}
    if not all(isinstance(inputs.get(name), str) for name in names.values()):
        return {}
    return bill(Bills(recipe, folder, lambda by: str(inputs[names[by]])))


def _is_linked(source: Path, target: Path) -> bool:
    """Whether a folder has the very files of another, or copies of them."""
    names = {file.name for file in source.iterdir()}
    if not target.is_dir() or {file.name for file in target.iterdir()} != names:
        return False
    return all(_is_same(source / name, target / name) for name in names)


def _is_same(source: Path, target: Path) -> bool:
    if source.samefile(target):
        return True
    ours, theirs = source.stat(), target.stat()  # a copy keeps both
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def _link(source: Path, target: Path) -> None:
    if not target.exists() or not _is_same(source, target):
        link_or_copy(source, target)


def follow(folder: Path, before: str, now: str) -> None:
    """Correct the paths of students in the recipes of the rounds, after the run folder was moved."""
    for home in parts_of(folder):
        file = home / "recipe.yaml"
        data = read_yaml(file) if file.exists() else None
        if isinstance(data, dict):  # else the round's own run says that it is damaged
            write_text(file, as_yaml(parse(_moved(data, before, now))))


def _moved(value: Any, before: str, now: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, before, now) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, before, now) for inner in value]
    places = tuple(f"{before}{os.sep}{part}{os.sep}" for part in ("rounds", "stages"))
    inside = isinstance(value, str) and value.startswith(places)
    return now + value[len(before) :] if inside else value


def started_from(home: Path, start: Mapping[str, str]) -> str:
    """What a round that begins from the base started from: the weights that are there, or what they were made of."""
    if "start" in start:
        return start["start"]
    inputs, choice = read_json(home / "inputs.json") or {}, read_json(home / "start.json") or {}
    layers = f", layers {choice['kept']}" if "kept" in choice else ""
    return f"made of {inputs.get('teacher')}{layers}"
