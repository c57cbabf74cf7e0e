"""Files that are complete or absent: atomic writes, directories that appear at once, append-only records, a lock.

The rule everywhere: write under a temporary name, fsync, rename. So a file that exists is complete. Not covered: disks
that report an fsync they did not do, and network file systems without atomic renames.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with accelerate
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from limbeck.types import UserError

NETWORKED = frozenset("9p afs beegfs ceph cifs glusterfs gpfs lustre nfs nfs4 smb3 smbfs".split())  # and fuse.*
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.(?:tmp|old)")


def crash_point(name: str) -> None:
    """For fault tests only: end the process here if LIMBECK_CRASH_AT is `name`, or `name:n` (the n-th time). With
    LIMBECK_CRASH_RANK only that rank ends, with LIMBECK_CRASH_BY by the signal of that name (SIGSTOP: it hangs)."""
    crash_at = os.environ.get("LIMBECK_CRASH_AT")
    if not crash_at:
        return
    label, _, count = crash_at.partition(":")
    if label != name or os.environ.get("LIMBECK_CRASH_RANK", (rank := os.environ.get("RANK"))) != rank:
        return
    left = int(count or 1) - 1
    os.environ["LIMBECK_CRASH_AT"] = f"{label}:{left}" if left else ""
    if left == 0 and (number := os.environ.get("LIMBECK_CRASH_BY")):
        os.kill(os.getpid(), signal.Signals[number])
    elif left == 0:
        os._exit(137)


def on_network(path: Path) -> bool:
    """Whether the file is, or would be, on a file system that several machines may have mounted."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    kind = next((mounts[folder] for folder in (resolved, *resolved.parents) if folder in mounts), "")
    return kind in NETWORKED or kind.startswith("fuse.")


def user_path(name: str | Path) -> Path:
    """A path as a user wrote it, with `~` replaced.

    Raises:
        UserError: no file can have this name.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError as error:
        raise UserError(f"{str(name)[:80]!r}: there is no such user's home here; write the folder itself") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{str(name)[:80]!r}...: this is longer than a file's name can be; shorten it") from error
        return path
    return path


def fsync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that `path` has either the old bytes or all the new ones, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        crash_point(f"write {path.name}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    temporary.replace(target)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill. It becomes `path` when the block ends, and is removed if the block raises.

    An existing `path` is replaced; a crash between the two renames leaves it absent, never mixed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        fsync_directory(temporary)
        crash_point("directory.before_rename")
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    fsync_directory(path.parent)


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary name that `new_directory` or `write_bytes` gives."""
    return LEFTOVER.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`. Files of other names stay."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if is_leftover(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a crash leaves no half-removed folder under its name."""
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    path.rename(old)
    shutil.rmtree(old)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSONL file. If a crash truncates the line, `read_jsonl` ignores it."""
    with path.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def check_regular(path: Path) -> None:
    """Refuse what is no file and no lack of one, before it is opened: a pipe would be waited for, a device read for
    ever.

    Raises:
        UserError: a folder, a pipe, a device, or a link to one of them or to nothing.
    """
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise UserError(f"{path} is no file (but a folder, a pipe, a device, or a link to nothing): put it right")


def content_of(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: something else stands there (see `check_regular`).
    """
    check_regular(path)
    return path.read_bytes()


def read_object(path: Path, remedy: str = "take a copy of it from before") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is damaged: no JSON, or no object in it. It names the file and the remedy.
    """
    try:
        value = json.loads(content_of(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no object): {remedy}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a truncated last line is ignored.

    Raises:
        UserError: another line is damaged: no JSON, or no object.
    """
    if not path.exists() and not path.is_symlink():
        return []
    records = []
    lines = content_of(path).split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == last and number == len(lines) - 1:  # without its line feed
                break
            raise UserError(_damaged(path, number, error)) from error
        if not isinstance(record, dict):
            raise UserError(_damaged(path, number, "no object"))
        records.append(record)
    return records


def _damaged(path: Path, number: int, reason: object) -> str:
    return (
        f"{path}, line {number + 1} is damaged ({reason}): take a copy of the file from before; of an evaluation's, the"
        " file can be removed, and `limbeck evaluate` measures it again"
    )


@contextlib.contextmanager
def read_from(place: Path) -> Iterator[None]:
    """Blame a file, or the files of a folder, for what the reader of their values trips over: text where a number
    should be, a key that is missing.

    Raises:
        UserError: it did; the message names the place.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        what = "it is" if place.is_file() else "one of its files is"
        raise UserError(
            f"{place}: {what} not as Limbeck wrote it ({type(error).__name__}: {str(error)[:200]}): take a copy from"
            " before; if nobody changed it, please report this"
        ) from error


def file_sha256(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while the block runs. The kernel releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds the lock, and `wait` is false; or the folder's name is that of a file.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path.parent} is a file, not a folder: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise UserError(
            f"{path.parent} is in use by another limbeck process; wait for it or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def full_disk_as_os_error() -> Iterator[None]:
    """Turn the error that safetensors raises when it can't write into the OSError that everyone else raises."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code:
            raise OSError(int(code[1]), str(error)) from error
        raise
