"""Lines of a file, whatever its encoding and compression: bytes in, numbered lines of text out, one at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from limbeck.types import UserError

LONGEST = 2**26  # bytes of a line, or of one value of a JSON file
HEAD = 4096
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
NEEDS_PYARROW = "needs pyarrow: pip install 'limbeck[data]'"


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. What compresses it is told by its first bytes, not by its name.

    Raises:
        UserError: it can't be read, is not whole, or needs a package that isn't here.
    """
    try:
        with file.open("rb") as raw:
            first = raw.read(4)
            raw.seek(0)
            if first.startswith(GZIP):
                yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
            elif first == ZSTD:
                arrow = pyarrow(f"{file} is compressed with zstd")
                yield io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(raw), "zstd"))
            else:
                yield raw
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{file} can't be read ({error}); is it whole?") from error


def pyarrow(why: str) -> Any:
    """The package pyarrow.

    Raises:
        UserError: it isn't installed; the message begins with `why` and names the command.
    """
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise UserError(f"{why}, which {NEEDS_PYARROW}") from error
    return arrow


def encoding_of(head: bytes) -> str:
    """The encoding that a file's first bytes tell: by its byte order mark, or by the zeros of UTF-16; else UTF-8."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[:8:2], head[1:8:2]
    if len(odd) > 1 and all(even) and not any(odd):
        return "utf-16-le"
    if len(odd) > 1 and all(odd) and not any(even):
        return "utf-16-be"
    return "utf-8"


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of all lines, from 1, each with its line feed. Only a line feed ends a line.

    Raises:
        UserError: it isn't text, or a line is longer than LONGEST; the message names the line.
    """
    with opened(file) as stream:
        head = stream.read(HEAD)
        encoding = encoding_of(head)
        rest: Any = io.BufferedReader(_Joined(head, stream))
        lines = _bytes_lines(rest, encoding) if encoding.startswith("utf-8") else _wide_lines(rest, encoding)
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if len(line) > LONGEST:
                    raise UserError(f"{file}, line {number} is longer than {LONGEST:,} bytes; split it")
                yield number, line
        except UnicodeError as error:
            raise UserError(
                f"{file}, line {number + 1} is not {encoding.upper().removesuffix('-SIG')} text ({error}); save the"
                " file as UTF-8"
            ) from error


class _Joined(io.RawIOBase):
    """The bytes that were read already, then the rest of the stream."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self.head = head
        self.rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.head[: len(buffer)] if self.head else self.rest.read(len(buffer))
        self.head = self.head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _bytes_lines(stream: Any, encoding: str) -> Iterator[str]:
    while line := stream.readline(LONGEST + 1):
        yield line.decode(encoding)
        encoding = "utf-8"


def _wide_lines(stream: Any, encoding: str) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding, newline="\n")
    while line := text.readline(LONGEST + 1):
        yield line
