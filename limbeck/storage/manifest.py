"""`manifest.json`: the size and SHA-256 of every file of a folder, written last, with a hash of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.storage.files import content_of, file_sha256, write_json
from limbeck.types import content_hash

MANIFEST = "manifest.json"
OWN = "sha256"  # of all that stands beside it
WITHOUT_OWN = {"step", "files", "state"}  # what older versions wrote


def seal(
    folder: Path,
    facts: Mapping[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    sha256: Callable[[Path], str] = file_sha256,
) -> None:
    """Write the manifest of a folder, with `facts` (plain JSON). Files of these names or suffixes may change later."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and not {file.suffix, file.name} & {*leave_out, MANIFEST}
    }
    body = json.loads(json.dumps({**(facts or {}), "files": files}, allow_nan=False))
    write_json(folder / MANIFEST, {**body, OWN: content_hash(body)})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None where there is none, or it is not what was written."""
    try:
        manifest = json.loads(content_of(folder / MANIFEST))
        own = manifest.pop(OWN, None)
        is_whole = set(manifest) == WITHOUT_OWN if own is None else own == content_hash(manifest)
        return manifest if is_whole and isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None


def is_foreign(folder: Path) -> bool:
    """Whether the folder's `manifest.json` is another program's: JSON with neither our hash nor our list of files."""
    try:
        manifest = json.loads(content_of(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return False
    return not isinstance(manifest, dict) or (OWN not in manifest and not isinstance(manifest.get("files"), dict))


def damaged_file(folder: Path, manifest: Mapping[str, Any], sha256: Callable[[Path], str] = file_sha256) -> str | None:
    """The first file that is not as the manifest says; None if all are."""
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
            return str(name)
    return None
