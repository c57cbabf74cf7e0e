"""Checkpoints that are complete or invisible: tensors in safetensors, and a manifest with sizes and SHA-256 written
last.

Tensors keep their shapes and types; nothing is pickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.storage.files import (
    crash_point,
    file_sha256,
    full_disk_as_os_error,
    new_directory,
    remove_directory,
    sweep,
    write_json,
)
from limbeck.types import UserError

MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-(\d{8})")
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on: the step, its tensors, and its state as plain JSON data."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write checkpoint `step` and remove all but the newest KEEP. `state` is plain JSON data."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with new_directory(folder / f"step-{step:08d}") as new:
        crash_point("checkpoint.before_tensors")
        with full_disk_as_os_error():
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, new / "tensors.safetensors"
            )
        crash_point("checkpoint.before_manifest")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in new.iterdir()}
        write_json(new / MANIFEST, {"step": step, "files": files, "state": dict(state)})
    crash_point("checkpoint.before_prune")
    prune(folder, KEEP)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    checkpoints = _complete(folder)
    for _, old in checkpoints[: len(checkpoints) - keep]:
        remove_directory(old)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint, None if there are no checkpoints. Damaged ones are skipped.

    Raises:
        UserError: all checkpoints are damaged.
    """
    checkpoints = _complete(folder)
    for step, path in reversed(checkpoints):
        manifest = json.loads((path / MANIFEST).read_text())
        if all(_intact(path / name, facts) for name, facts in manifest["files"].items()):
            return Checkpoint(step, load_file(path / "tensors.safetensors"), manifest["state"])
    if checkpoints:
        raise UserError(f"every checkpoint in {folder} is damaged; remove the folder to train again from the start")
    return None


def _intact(file: Path, facts: Mapping[str, Any]) -> bool:
    return file.exists() and file.stat().st_size == facts["bytes"] and file_sha256(file) == facts["sha256"]


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint with a readable manifest, oldest first."""
    checkpoints = []
    for path in folder.glob("step-*") if folder.exists() else []:
        match = FOLDER.fullmatch(path.name)
        try:
            readable = bool(match) and isinstance(json.loads((path / MANIFEST).read_text()), dict)
        except (OSError, ValueError):
            readable = False
        if match and readable:
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)
