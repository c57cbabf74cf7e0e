"""Binds a run folder to one recipe, text and teacher; a folder of another run is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from limbeck.config.recipe import Recipe, as_yaml, parse
from limbeck.storage.files import is_leftover, sweep, write_json, write_text
from limbeck.types import NAME, RecipeError, UserError, content_hash


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """The folder of a run: `out`, else runs/NAME.

    Raises:
        UserError: the recipe's name can't be a folder's name.
    """
    if out is None and not NAME.fullmatch(recipe.name):
        raise UserError(f"the recipe's name {recipe.name!r} can't be a folder's name; give --out")
    return Path(out) if out is not None else Path("runs") / recipe.name


def _settled(file: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """What a run folder was bound to."""
    try:
        before = read(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{file} is damaged, so what the folder holds can't be told: give another --out, or remove it")
    return before


def _hash_now(resolved: Any) -> str | None:
    """The hash of a recipe that an older version wrote, in today's words; None for one that is none today."""
    try:
        return parse(resolved).hash
    except RecipeError:
        return None


def claim(folder: Path, recipe: Recipe, inputs: Callable[[], dict[str, str]], probe: Callable[[], None]) -> None:
    """Bind the folder to this recipe and these inputs.

    Args:
        inputs: hashes of the run's other inputs, by name.
        probe: called once, before the inputs are first written; raises if the run could not continue.

    Raises:
        UserError: the folder belongs to another recipe or other inputs, or holds something else.
    """
    file = folder / "recipe.yaml"
    if file.exists():
        sweep(folder)
        before = _settled(file, yaml.safe_load)
        if recipe.hash not in (content_hash(before), _hash_now(before)):
            now = recipe.resolved()
            changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
            raise UserError(
                f"{folder} holds a run of another recipe (it differs in {', '.join(changed)}): give another --out, or"
                " remove the folder"
            )
        if recipe.hash == _hash_now(before) and recipe.resolved() != before:  # in what is no part of the hash
            write_text(file, as_yaml(recipe))
    elif strangers := [entry.name for entry in folder.iterdir() if entry.name != ".lock" and not is_leftover(entry)]:
        raise UserError(f"{folder} is not empty and holds no run (there is {strangers[0]!r}): give another --out")
    else:
        write_text(file, as_yaml(recipe))
    inputs_file = folder / "inputs.json"
    facts = inputs()
    if inputs_file.exists():
        before = _settled(inputs_file, json.loads)
        if changed := sorted(key for key in facts.keys() | before.keys() if before.get(key) != facts.get(key)):
            raise UserError(
                f"{folder} was made from other contents ({' and '.join(changed)} changed since): give another --out"
            )
    else:
        probe()
        write_json(inputs_file, facts)
