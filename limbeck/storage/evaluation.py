"""The folder of an evaluation: sealed with its summary, so that a record which changes afterwards is found.

A kill before the summary leaves a folder without a manifest, whose records are not checked, as folders of older
versions are. Not covered: `harness.json`, which another command writes later.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.storage.files import sweep, write_json
from limbeck.storage.manifest import MANIFEST, damaged_file, read_manifest, seal
from limbeck.storage.metrics_log import read_json
from limbeck.types import UserError

SUMMARY = "summary.json"
LATER = ("harness.json",)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of the records in `folder`, and seal both, unless they are as they should be."""
    manifest = read_manifest(folder)
    if manifest is not None and read_json(folder / SUMMARY) == summary:
        names = {file.name for file in folder.iterdir() if file.is_file()} - {MANIFEST, *LATER}
        if names == manifest["files"].keys() and damaged_file(folder, manifest) is None:
            return
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(folder / SUMMARY, dict(summary))
    seal(folder, leave_out=LATER)


def check_records(folder: Path, whole: bool = True) -> None:
    """Refuse an evaluation whose files are not those that were sealed; one without a manifest passes. Unless it has to
    be `whole`, files may be missing.

    Raises:
        UserError: the message names the file.
    """
    if not (folder / MANIFEST).exists():
        return
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder / MANIFEST} is damaged, so it can't be told whether the records beside it are those that were"
            f" measured: remove {folder}, and `limbeck evaluate` measures all again"
        )
    files = {name: facts for name, facts in manifest["files"].items() if whole or (folder / name).exists()}
    wrong = damaged_file(folder, {"files": files})
    if wrong is not None:
        raise UserError(
            f"{folder / wrong} is not as it was measured: take a copy of it from before, or remove it and {SUMMARY}"
            " there, and `limbeck evaluate` measures it again"
        )


def open_records(folder: Path) -> None:
    """Take the seal off the records, which are about to be added to, and remove what a kill left half-written.

    Raises:
        UserError: as in `check_records`.
    """
    check_records(folder, whole=False)
    sweep(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
