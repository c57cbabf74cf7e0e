"""Whose a run folder is: made one recipe's with its text and its teacher, or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import yaml

from limbeck.storage.files import is_leftover, sweep, write_json, write_text
from limbeck.types import UserError, content_hash

if TYPE_CHECKING:
    from limbeck.runs.pipeline import Run


def claim(run: Run) -> None:
    """Make the folder this recipe's with this text and teacher, or refuse one that is another's."""
    folder = run.folder
    recipe = run.recipe
    file = folder / "recipe.yaml"
    if file.exists():
        sweep(folder)
        before = yaml.safe_load(file.read_text())
        if content_hash(before) != recipe.hash:
            now = recipe.resolved()
            changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
            raise UserError(
                f"{folder} holds a run of another recipe (it differs in {', '.join(changed)}): give another --out, or"
                " remove the folder"
            )
    elif strangers := [entry.name for entry in folder.iterdir() if entry.name != ".lock" and not is_leftover(entry)]:
        raise UserError(f"{folder} is not empty and holds no run (there is {strangers[0]!r}): give another --out")
    else:
        write_text(file, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
    inputs = {
        "teacher": run.teacher_identity,
        "prompts": content_hash([[prompt.facts for prompt in part] for part in run.text.given_prompts]),
    }
    if recipe.teacher.server is not None:
        inputs["server"] = run.writer_identity
    known = folder / "inputs.json"
    if known.exists() and (before := json.loads(known.read_text())) != inputs:
        changed = sorted(key for key in inputs if before.get(key) != inputs[key])
        raise UserError(
            f"{folder} was made from other contents ({' and '.join(changed)} changed since): give another --out"
        )
    if not known.exists():
        if run.scorer is not None:
            run.scorer.probe()
        write_json(known, inputs)
