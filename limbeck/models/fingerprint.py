"""What a model's folder is told by: a hash of every byte of its files, each read once as long as it stays as it is.

Hashes of files are kept in `hashes.sqlite` in `home()`, by path, size, inode and the times of the last change. A file
that changed within the last seconds is not kept: a clock may not tell the next change from it. Not covered: somebody
who writes into that cache, and file systems that change a file without its times.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.models.named import home
from limbeck.storage.files import file_sha256
from limbeck.storage.manifest import MANIFEST, damaged_file, is_foreign, read_manifest, seal
from limbeck.types import UserError, content_hash

NAMED_BY = (".json", ".jinja", ".model")  # files beside the weights that make the model what it is
VOCABULARIES = ("merges.txt", "vocab.txt")  # read where there is no tokenizer.json
TEMPLATES = "additional_chat_templates"  # a folder of further .jinja files, as transformers saves them
CACHE = "hashes.sqlite"
SETTLED = 2.0  # seconds without a change, after which a file's times tell the next one
EDGE = 2**20  # bytes at both ends of a weight file, for names of old
OLD_NAME = re.compile(r"@[0-9a-f]{16}(?![0-9a-f])")


@dataclass
class Naming:
    """How models are named in this process. `by_edges`: as versions did that hashed the ends of weight files alone, for
    a run folder whose answers have such names."""

    by_edges: bool = False


NAMING = Naming()


def fingerprint(folder: Path) -> str:
    """The part of a model's identity that stands for its files: 32 hex digits (16 where `NAMING.by_edges`)."""
    return _by_edges(folder) if NAMING.by_edges else contents(folder)[:32]


def contents(folder: Path) -> str:
    """A hash over all bytes of the weights, the configuration and the tokenizer."""
    return content_hash({file.relative_to(folder).as_posix(): known_sha256(file) for file in _files(folder)})


def tokenizer_files(folder: Path) -> list[Path]:
    """What a tokenizer is read from beside the folder's own .json, .jinja and .model files."""
    vocabularies = [] if (folder / "tokenizer.json").exists() else [folder / name for name in VOCABULARIES]
    return [file for file in vocabularies if file.is_file()] + sorted((folder / TEMPLATES).glob("*.jinja"))


def _files(folder: Path) -> list[Path]:
    """What makes the model; the manifest of an export says nothing that these don't."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", *NAMED_BY)]
    return [file for file in files if file.name != MANIFEST] + tokenizer_files(folder)


def seal_export(folder: Path) -> None:
    """Write the manifest of an exported student, whose card alone may change later."""
    seal(folder, leave_out=(".md",))


def check_sealed(folder: Path, source: str) -> None:
    """Refuse an exported student whose files are not those that were exported; one without our manifest passes.

    Raises:
        UserError: the message names the file.
    """
    if not (folder / MANIFEST).exists() or is_foreign(folder):
        return
    manifest = read_manifest(folder)
    wrong: str | None = MANIFEST
    if manifest is not None:
        own = [file for file in _files(folder) if file.parent == folder]  # a manifest has no files of folders inside
        strangers = [file.name for file in own if file.name not in manifest["files"]]
        wrong = damaged_file(folder, manifest, known_sha256) or next(iter(strangers), None)
    if wrong is not None:
        raise UserError(
            f"{source}: {wrong} is not as it was exported: copy the folder again (or, if you changed it yourself,"
            f" remove its {MANIFEST})"
        )


def names_by_edges(text: str) -> bool:
    """Whether a text names a model as older versions did."""
    return OLD_NAME.search(text) is not None


def _by_edges(folder: Path) -> str:
    """Configuration, tokenizer, and the size, first and last MiB of every weight file: 16 hex digits."""
    parts: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            with file.open("rb") as weights:
                head = weights.read(EDGE)
                weights.seek(max(0, file.stat().st_size - EDGE))
                parts[file.name] = [file.stat().st_size, content_hash([head.hex(), weights.read(EDGE).hex()])]
        elif file.suffix in NAMED_BY:
            parts[file.name] = file_sha256(file)
    return content_hash(parts)[:16]


def known_sha256(file: Path) -> str:
    """The SHA-256 of a file, from the cache where it has not changed since it was last read."""
    path, facts = str(file.resolve()), _facts(file)
    with contextlib.suppress(OSError, RuntimeError, sqlite3.Error), closing(_cache()) as cache:
        kept = cache.execute("select sha256 from files where path = ? and facts = ?", (path, facts)).fetchone()
        if kept is not None:
            return str(kept[0])
    digest = file_sha256(file)
    if _facts(file) == facts and time.time() - max(file.stat().st_mtime, file.stat().st_ctime) > SETTLED:
        with contextlib.suppress(OSError, RuntimeError, sqlite3.Error), closing(_cache()) as cache:
            cache.execute("insert or replace into files values (?, ?, ?)", (path, facts, digest))
    return digest


def _facts(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _cache() -> sqlite3.Connection:
    """The cache, made where it is missing. Whatever fails costs another reading of a file and nothing more."""
    home().mkdir(parents=True, exist_ok=True)
    cache = sqlite3.connect(os.fspath(home() / CACHE), timeout=1.0, isolation_level=None)
    try:
        cache.execute("create table if not exists files (path text primary key, facts text, sha256 text)")
    except BaseException:
        cache.close()
        raise
    return cache
