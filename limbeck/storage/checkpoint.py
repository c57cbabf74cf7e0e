"""Checkpoints that are complete or invisible: tensors in safetensors, and a manifest with sizes and SHA-256 written
last.

Tensors keep their shapes and types; nothing is pickled. Tensors that are divided by their rows among several processes
lie in a file of each process, `part-NUMBER-of-ALL.safetensors`; whoever reads the checkpoint sees them whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.storage.files import (
    crash_point,
    file_sha256,
    full_disk_as_os_error,
    new_directory,
    remove_directory,
    sweep,
)
from limbeck.storage.manifest import damaged_file, read_manifest, seal
from limbeck.types import UserError

FOLDER = re.compile(r"step-(\d{8})")
KEEP = 2
WHOLE = "tensors.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on: the step, its tensors, and its state as plain JSON data."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each read when it is asked for; the parts of a divided one are joined."""

    def __init__(self, folder: Path) -> None:
        files = [folder / WHOLE, *sorted(folder.glob("part-*-of-*.safetensors"))]
        self._files = [safe_open(file, framework="pt") for file in files]
        self._homes: dict[str, list[Any]] = {}
        for file in self._files:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                self._homes.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file in self._homes[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def save_part(folder: Path, tensors: Mapping[str, Tensor], number: int, of: int) -> tuple[str, str]:
    """Write this process's rows of divided tensors beside those of the others.

    Args:
        folder: the new checkpoint, which another process has begun.
        tensors: consecutive rows of each, in the order of the processes.
        number: of this process, from 0.

    Returns:
        (name of the file, its SHA-256)
    """
    file = folder / f"part-{number + 1:05d}-of-{of:05d}.safetensors"
    crash_point("checkpoint.before_part")
    with full_disk_as_os_error():
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return file.name, file_sha256(file)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    parts: Callable[[Path], Mapping[str, str]] = lambda new: {},
) -> None:
    """Write checkpoint `step` and remove all but the newest KEEP.

    Args:
        state: plain JSON data.
        parts: has all processes write their parts of divided tensors into the new folder (see `save_part`); the
            SHA-256 of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with new_directory(folder / f"step-{step:08d}") as new:
        crash_point("checkpoint.before_tensors")
        with full_disk_as_os_error():
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, new / WHOLE)
        hashes = parts(new)
        crash_point("checkpoint.before_manifest")
        seal(new, {"step": step, "state": dict(state)}, sha256=lambda file: hashes.get(file.name) or _sha256(file))
    crash_point("checkpoint.before_prune")
    prune(folder, KEEP)


def prune(folder: Path, keep: int) -> None:
    """Remove all that is older than the newest `keep` checkpoints that are whole, and what a kill left half-written or
    half-removed; what is damaged counts for none."""
    sweep(folder)
    whole = 0
    for _, path in reversed(_all(folder)):
        if whole >= keep:
            remove_directory(path)
        elif keep > 0 and _whole(path, _sha256) is not None:
            whole += 1


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None if there are no checkpoints. Damaged ones are skipped.

    Raises:
        UserError: all checkpoints are damaged.
    """
    checkpoints = _all(folder)
    for step, path in reversed(checkpoints):
        if (manifest := _whole(path)) is not None:
            return Checkpoint(step, StoredTensors(path), manifest["state"])
    if checkpoints:
        raise UserError(f"every checkpoint in {folder} is damaged; remove the folder to train again from the start")
    return None


def _whole(path: Path, sha256: Callable[[Path], str] = file_sha256) -> dict[str, Any] | None:
    """The manifest of a checkpoint that is as it was written."""
    manifest = read_manifest(path)
    if manifest is None or manifest.get("step") != int(path.name.removeprefix("step-")) or "state" not in manifest:
        return None
    return manifest if damaged_file(path, manifest, sha256) is None else None


_HASHES: dict[tuple[int, ...], str] = {}  # of files that this process has read


def _sha256(file: Path) -> str:
    """The hash of a file, which is read again only if it was written again, under whatever name."""
    stat = file.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _HASHES:
        while len(_HASHES) >= 8 * KEEP:
            del _HASHES[next(iter(_HASHES))]
        _HASHES[key] = file_sha256(file)
    return _HASHES[key]


def _all(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every folder of a checkpoint, whole or not, oldest first."""
    found = [(FOLDER.fullmatch(path.name), path) for path in (folder.glob("step-*") if folder.exists() else [])]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())
