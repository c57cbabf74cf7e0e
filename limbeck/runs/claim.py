"""Binds a run folder to one recipe, text and teacher; a folder of another run is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.config.binding import training_part
from limbeck.config.older import FORMAT, FORMAT_NAME, INPUTS, filled
from limbeck.config.recipe import Recipe, as_yaml, parse
from limbeck.config.yaml_text import load_yaml
from limbeck.models.fingerprint import NAMING, names_by_edges
from limbeck.storage.evaluation import check_records, write_summary
from limbeck.storage.files import content_of, is_leftover, sweep, write_json, write_text
from limbeck.storage.metrics_log import read_json
from limbeck.types import NAME, RecipeError, UserError, content_hash

HELD_OUT = "held-out prompts"  # of the inputs the one that may change: what is asked of them is asked anew
TRAINING = "training"  # what the folder's checkpoints are named by
WHOLE = "weights"  # all bytes of the models, where the folder names them by the edges of their files
START = "start"  # the weights that the student starts from, where they are here
BEFORE_THE_RECIPE = frozenset(
    {".lock", INPUTS, "machine.json", "plan.json", "prompts.json", "answers.json", "start.json"}
    | {f"store.sqlite{end}" for end in ("", "-wal", "-shm", "-journal")}
)


def follow_names(*folders: Path | None) -> None:
    """Name models as these folders of a run do: those of older versions by the edges of their files."""
    files = [folder / INPUTS for folder in folders if folder is not None]
    there = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    NAMING.by_edges = any(map(names_by_edges, there))


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
        before = read(content_of(file).decode())
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{file} is damaged, so what the folder holds can't be told: give another --out, or remove it")
    return before


def _read(resolved: Any) -> Recipe | None:
    """A recipe that an older version wrote, in today's words; None for one that is none today."""
    try:
        return parse(resolved)
    except RecipeError:
        return None


def claim(
    folder: Path,
    recipe: Recipe,
    inputs: Callable[[], dict[str, str]],
    probe: Callable[[], None],
    *,
    older: Callable[[Recipe], tuple[str, str]] | None = None,
    kept: Callable[[Recipe], str] = lambda earlier: "",
) -> None:
    """Bind the folder to what this recipe's text and training depend on, and to these inputs. If the evaluation
    differs from the one before, its summary is removed, and its records stay.

    Args:
        inputs: hashes of the run's other inputs, by name.
        probe: called once, before the inputs are first written; raises if the run could not continue.
        older: returns a recipe's hashes of (all its prompts, as folders once were bound to; its training prompts).
        kept: called with the recipe before if the folder is refused; returns what becomes of its answers, in words.

    Raises:
        UserError: the folder belongs to another recipe or other inputs, or holds something else.
    """
    file = folder / "recipe.yaml"
    before: dict[str, Any] | None = None
    earlier: Recipe | None = None
    if file.exists() and not _is_empty(folder):
        sweep(folder)
        before = _settled(file, load_yaml)
        whole = filled(before, folder)
        earlier = _read(whole)
        if recipe.training_hash not in (content_hash(training_part(whole)), earlier and earlier.training_hash):
            now, then = training_part(recipe.resolved()), training_part(whole)
            changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
            raise UserError(
                f"{folder} holds a run of another recipe (it differs in {', '.join(changed)}): give another --out, or"
                f" remove the folder{'' if earlier is None else kept(earlier)}"
            )
    elif strangers := [] if file.exists() else [entry.name for entry in folder.iterdir() if not _is_ours(entry)]:
        raise UserError(f"{folder} is not empty and holds no run (there is {strangers[0]!r}): give another --out")
    facts = inputs()
    settled = _settled_inputs(folder, facts, earlier, older)
    if START in settled:  # weights that are not here any more are fetched where they are read
        facts = {START: settled[START]} | facts
    bound = (settled.keys() | facts.keys() if settled else set[str]()) - {HELD_OUT, TRAINING, FORMAT_NAME}
    if changed := sorted(key for key in bound if settled.get(key) != facts.get(key)):
        raise UserError(
            f"{folder} was made from other contents ({' and '.join(changed)} changed since): give another --out"
            f"{'' if earlier is None else kept(earlier)}"
        )
    _forget_summary(folder, recipe, earlier, settled.get(HELD_OUT, facts.get(HELD_OUT)) == facts.get(HELD_OUT))
    if not (folder / INPUTS).exists():
        probe()
    if before != recipe.resolved():
        write_text(file, as_yaml(recipe))
    facts = facts | {TRAINING: settled.get(TRAINING) or _training_key(before, recipe), FORMAT_NAME: str(FORMAT)}
    if read_json(folder / INPUTS) != facts:
        write_json(folder / INPUTS, facts)


def training_key(folder: Path, recipe: Recipe) -> str:
    """What the checkpoints of a claimed folder are named by; it stays when the recipe's evaluation changes."""
    return str((read_json(folder / INPUTS) or {}).get(TRAINING, recipe.training_hash))


def _is_empty(folder: Path) -> bool:
    """Whether a start ended before the folder was bound to anything but its recipe."""
    return not (folder / INPUTS).exists() and all(
        entry.name == "recipe.yaml" or _is_ours(entry) for entry in folder.iterdir()
    )


def _is_ours(entry: Path) -> bool:
    """Whether a start that was killed can have left this in a folder without a recipe; all of it is found by its key,
    or written again."""
    return entry.name in BEFORE_THE_RECIPE or is_leftover(entry)


def _settled_inputs(
    folder: Path, facts: dict[str, str], earlier: Recipe | None, older: Callable[[Recipe], tuple[str, str]] | None
) -> dict[str, Any]:
    """The inputs that the folder was bound to, in today's words; empty for a new folder."""
    if not (folder / INPUTS).exists():
        return {}
    settled = _settled(folder / INPUTS, json.loads)
    settled = {name: facts[name] for name in (WHOLE, START) if name in facts} | settled
    if HELD_OUT in facts and HELD_OUT not in settled and earlier is not None and older is not None:
        with contextlib.suppress(UserError):  # files that are gone: the prompts have changed
            together, training = older(earlier)
            if settled.get("prompts") == together:
                settled["prompts"] = training
    return settled


def _training_key(before: dict[str, Any] | None, recipe: Recipe) -> str:
    """The name of a folder's checkpoints: for a folder of an older version, which the hash of all of its recipe named,
    that hash."""
    if before is None:
        return recipe.training_hash
    teacher = before.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("server"), dict):
        server = {key: value for key, value in teacher["server"].items() if key != "tolerate"}
        before = before | {"teacher": teacher | {"server": server}}
    return content_hash(before)


def _forget_summary(folder: Path, recipe: Recipe, earlier: Recipe | None, same_questions: bool) -> None:
    """Remove the summary of another evaluation; name the recipe by its hash of today in one that is as it was."""
    file = folder / "evaluation" / "summary.json"
    summary = read_json(file)
    if summary is None or (summary.get("recipe") == recipe.hash and same_questions):
        return
    if earlier is None or earlier.evaluation_hash != recipe.evaluation_hash or not same_questions:
        file.unlink()
    else:
        check_records(file.parent)
        write_summary(file.parent, summary | {"recipe": recipe.hash})
