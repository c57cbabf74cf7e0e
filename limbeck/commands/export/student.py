"""What is exported: the student of a run, or any folder that holds a model; and prompts to compare an export on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from limbeck.models.fingerprint import check_sealed, known_sha256, tokenizer_files
from limbeck.storage.files import read_jsonl, user_path
from limbeck.types import UserError, content_hash

WEIGHTS, ADAPTERS = "*.safetensors", "adapter_config.json"
PROMPTS = 4
OWN_PROMPTS = (
    "Why is the sky blue?",
    "Name three fruits.",
    "Write a short letter to a friend who has moved to another city.",
    "What is 17 plus 25?",
)


@dataclass(frozen=True)
class Exportable:
    """A model to export: its folder, a name for files, the run that made it if one did, and prompts."""

    folder: Path
    name: str
    run: Path | None
    prompts: tuple[str, ...]

    @property
    def content(self) -> str:
        """16 hex digits of a hash over all its files."""
        kinds = {".safetensors", ".json", ".jinja"}
        if not (self.folder / "tokenizer.json").exists():
            kinds.add(".model")
        files = sorted(file for file in self.folder.iterdir() if file.suffix in kinds) + tokenizer_files(self.folder)
        return content_hash({file.relative_to(self.folder).as_posix(): known_sha256(file) for file in files})[:16]

    @property
    def is_adapters(self) -> bool:
        return (self.folder / ADAPTERS).exists()


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").exists() or (folder / "student").is_dir()


def find_student(where: str | Path) -> Exportable:
    """The student of a run folder, or the model in a folder.

    Raises:
        UserError: there is no such folder, the run has no student yet, or the folder holds no model, or another than
            was exported.
    """
    place = user_path(where)
    if not place.is_dir():
        raise UserError(f"there is no folder {where}: give a run folder, or a model's folder in Hugging Face form")
    run = place if is_run(place) and not (place / "config.json").exists() else None
    if run is None and place.name == "student" and is_run(place.parent):
        run = place.parent
    folder = run / "student" if run else place
    if not folder.is_dir():
        raise UserError(f"{place} has no student yet: `limbeck run {place / 'recipe.yaml'} --out {place}` trains it")
    if not (folder / "config.json").exists() and not (folder / ADAPTERS).exists():
        raise UserError(f"{folder} has no config.json, so it is not a model in Hugging Face form")
    if not any(folder.glob(WEIGHTS)):
        raise UserError(f"{folder} has no weights in safetensors: save the model as safetensors first")
    check_sealed(folder, str(folder))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", (run or folder).resolve().name).strip("-.") or "student"
    return Exportable(folder, name, run, _held_out(run) or OWN_PROMPTS)


def _held_out(run: Path | None) -> tuple[str, ...]:
    """A few of the prompts that the run's evaluation held out, far apart in their file."""
    rows = read_jsonl(run / "evaluation" / "prompts.jsonl") if run else []
    prompts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    return tuple(prompts[:: max(1, len(prompts) // PROMPTS)][:PROMPTS])
