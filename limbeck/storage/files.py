"""Files that are whole or absent: atomic writes, directories that appear at once, append-only records, one lock.

The rule everywhere: write beside, fsync, rename. A name that exists is a file that is complete. Not covered: disks
that acknowledge an fsync they did not do, and network file systems without rename semantics.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from limbeck.types import UserError

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.(?:tmp|old)")


def crash_point(name: str) -> None:
    """For fault tests only: end the process at once where LIMBECK_CRASH_AT says `name` or `name:n` (the n-th time)."""
    wanted = os.environ.get("LIMBECK_CRASH_AT")
    if not wanted:
        return
    label, _, count = wanted.partition(":")
    if label != name:
        return
    left = int(count or 1) - 1
    if left == 0:
        os._exit(137)
    os.environ["LIMBECK_CRASH_AT"] = f"{label}:{left}"


def fsync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either the old bytes or all the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and vanishes when it does not.

    An existing `path` is replaced; between the two renames a crash leaves it absent, never mixed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir()
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        fsync_directory(beside)
        crash_point("directory.before_rename")
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old)
        else:
            beside.rename(path)
    finally:
        if beside.exists():
            shutil.rmtree(beside, ignore_errors=True)
    fsync_directory(path.parent)


def is_leftover(path: Path) -> bool:
    """Is this a name that `new_directory` or `write_bytes` gives to what is not whole yet?"""
    return LEFTOVER.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what a killed process of ours left half-written in `folder`; no other name is touched."""
    for left in folder.iterdir() if folder.is_dir() else []:
        if is_leftover(left):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Make a folder vanish at once: renamed first, so that a kill half-way leaves no half folder under its name."""
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    path.rename(old)
    shutil.rmtree(old)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSONL file. A torn last line of an earlier crash is cut off by `read_jsonl`."""
    with path.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file of ours; a torn last line is dropped."""
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if any(rest.strip() for rest in lines[number + 1 :]):
                raise
    return records


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = False) -> Iterator[None]:
    """One process at a time. The kernel frees the lock when its holder ends, however it ends.

    Raises:
        UserError: another process holds it, and `wait` is false; or a file stands where the folder should be.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path.parent} is a file, not a folder: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{path.parent} is in use by another limbeck process; wait for it or choose another --out"
            ) from None
        yield


@contextlib.contextmanager
def full_disk_as_os_error() -> Iterator[None]:
    """The tensor library has an error of its own for a disk without room; the rest of us knows OSError."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code:
            raise OSError(int(code[1]), str(error)) from error
        raise
