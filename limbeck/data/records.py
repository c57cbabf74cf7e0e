"""Rows of users' files, one at a time, in plain data: JSON lines, JSON, CSV and TSV, Parquet, a folder that `datasets`
saved, or plain text.

What a file is follows from what it begins with; its name decides only where that leaves a choice. Nothing in a file is
taken as code or as a path. Memory holds one row (of Parquet and Arrow, a batch of rows).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from limbeck.data.encodings import LONGEST, lines_of, opened, pyarrow
from limbeck.types import UserError

PROMPT = "prompt"  # what a line of plain text is
ROW_BATCH = 256
DELIMITERS = ",;\t|"
PARQUET = b"PAR1"
ARROW_FILE = b"ARROW1"
TEXT_NAMES = (".txt", ".text", ".md")
TABLE_NAMES = (".csv", ".tsv", ".tab")
PACKED_NAMES = (".gz", ".zst", ".zstd")
SPACE = " \t\r\n"
IsRow = Callable[[Set[str]], bool]  # whether an object with these columns is a row


@dataclass(frozen=True, slots=True)
class Record:
    """A row: its number (of its line, of the item of a list, or of the row in a file without lines), and its values by
    column. An item's line is that on which it begins."""

    unit: str
    number: int
    values: dict[str, Any]
    line: int = 0

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}" + (f" (line {self.line})" if self.line else "")


def records(path: Path, content: frozenset[str] = frozenset(), is_row: IsRow | None = None) -> Iterator[Record]:
    """The rows of a file, or of a folder that `datasets` saved, in order.

    Args:
        content: columns that hold content. An object that has none of them but one list of objects is a wrapper, if it
            is all that its file holds.
        is_row: says of an object without content whether its columns make it a row all the same.

    Raises:
        UserError: the file can't be read, or a row is malformed; the message names the file and the line.
    """
    if path.is_dir():
        return _folder(path)
    with opened(path) as stream:
        first = stream.read(6)
    if first.startswith(PARQUET) or first == ARROW_FILE:
        return _arrow(path, first)

    def is_known(columns: Set[str]) -> bool:
        return bool(content & columns) or (is_row is not None and is_row(columns))

    return _text_rows(path, is_known)


def _text_rows(file: Path, is_row: IsRow) -> Iterator[Record]:
    lines = lines_of(file)
    blank: list[tuple[int, str]] = []
    for number, line in lines:
        blank.append((number, line))
        if line.strip():
            break
    if not blank or not blank[-1][1].strip():
        return iter(())
    number, first = blank[-1]
    rest = chain([(number, first)], lines)
    suffix = _suffix(file)
    value = _json_or_none(first)
    if isinstance(value, dict):
        return _json_lines(file, rest, is_row)
    if suffix in TABLE_NAMES:
        return _table(file, rest, suffix)
    if suffix in TEXT_NAMES:
        return _plain(file, rest)
    if (value is None and first.lstrip()[0] in "[{") or isinstance(value, list):
        return _json_values(file, rest, is_row)
    return _json_lines(file, rest, is_row)


def _suffix(file: Path) -> str:
    names = [suffix.lower() for suffix in file.suffixes]
    return next((name for name in reversed(names) if name not in PACKED_NAMES), "")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _json_or_none(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _json_lines(file: Path, lines: Iterator[tuple[int, str]], is_row: IsRow) -> Iterator[Record]:
    objects = _objects(file, lines)
    begun = [next(objects)]
    wrapped = _wrapped(begun[0][1], is_row)
    if wrapped is not None:
        begun += islice(objects, 1)
    if wrapped is not None and len(begun) == 1:
        yield from _items(file, begun[0][0], wrapped)
        return
    for number, value in chain(begun, objects):
        yield Record("line", number, value)


def _objects(file: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, the object in it)"""
    for number, line in lines:
        if not line.strip(SPACE):
            continue
        try:
            value = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f'{file}, line {number}: not an object with columns, such as {{"prompt": ...}}')
        yield number, value


def _wrapped(value: dict[str, Any], is_row: IsRow) -> list[Any] | None:
    """The rows in an object that is no row itself: its only list of objects."""
    lists = [entry for entry in value.values() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
    return lists[0] if len(lists) == 1 and not is_row(value.keys()) else None


def _items(file: Path, line: int, items: list[Any]) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{file}, line {line}: item {number} of the list is no object with columns")
        yield Record("item", number, item, line)


def _json_values(file: Path, lines: Iterator[tuple[int, str]], is_row: IsRow) -> Iterator[Record]:
    """The objects of an array over many lines, or those that stand one after another, each told by its first line."""
    parts = _Values(file, lines)
    is_array = parts.take("[")
    number = 0
    while not (parts.take("]") if is_array else parts.at_end()):
        line, value = parts.value()
        if not isinstance(value, dict):
            raise UserError(f'{file}, line {line}: not an object with columns, such as {{"prompt": ...}}')
        is_first = number == 0 and not is_array
        wrapped = _wrapped(value, is_row) if is_first and parts.at_end() else None
        if wrapped is None:
            number += 1
            yield Record("item", number, value, line)
        else:
            yield from _items(file, line, wrapped)
        if is_array and not parts.take(",") and not parts.peek("]"):
            raise UserError(f"{file}, line {parts.line}: not JSON (a comma or ] is missing)")
    if not parts.at_end():
        raise UserError(f"{file}, line {parts.line}: not JSON (there is more after the array)")


class _Values:
    """JSON values of a stream of lines; memory holds one value."""

    def __init__(self, file: Path, lines: Iterator[tuple[int, str]]) -> None:
        self.file = file
        self.lines = lines
        self.line = 0
        self.text = ""
        self.at = 0

    def _more(self) -> bool:
        number, line = next(self.lines, (0, ""))
        if not number:
            return False
        self.text = self.text[self.at :] + line
        self.at = 0
        self.line = self.line or number
        return True

    def _skip(self) -> bool:
        """To the next character that isn't space; false at the end."""
        while True:
            while self.at < len(self.text):
                letter = self.text[self.at]
                if letter not in SPACE:
                    return True
                self.line += letter == "\n"
                self.at += 1
            if not self._more():
                return False

    def peek(self, mark: str) -> bool:
        return self._skip() and self.text[self.at] == mark

    def take(self, mark: str) -> bool:
        found = self.peek(mark)
        self.at += found
        return found

    def at_end(self) -> bool:
        return not self._skip()

    def value(self) -> tuple[int, Any]:
        """(the line on which it begins, the next value)"""
        self._skip()
        waited = 1
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                is_cut = isinstance(error, json.JSONDecodeError) and self._grow(waited)
                if not is_cut:
                    raise UserError(f"{self.file}, line {self.line}: not JSON ({error})") from error
                waited *= 2
                continue
            line = self.line
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return line, value

    def _grow(self, lines: int) -> bool:
        """Read as many lines more; twice as many each time, so that a long value is not parsed for each of them."""
        grown = [self._more() for _ in range(lines) if len(self.text) - self.at <= LONGEST]
        return any(grown)


def _plain(file: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    for number, line in lines:
        if "\0" in line:
            raise UserError(f"{file}, line {number} holds a zero byte, so it is no text; give a text file")
        if line.strip():
            yield Record("line", number, {PROMPT: line.rstrip("\r\n")})


def _table(file: Path, lines: Iterator[tuple[int, str]], suffix: str) -> Iterator[Record]:
    number, header = next(lines)
    delimiter = "\t" if suffix != ".csv" else max(DELIMITERS, key=lambda mark: (header.count(mark), mark == ","))
    last = number

    def counted() -> Iterator[str]:
        nonlocal last
        for at, line in chain([(number, header)], lines):
            last = at
            yield line

    rows = csv.reader(counted(), delimiter=delimiter, strict=True)
    try:
        columns = next(rows)
        if repeated := sorted({name for name in columns if columns.count(name) > 1 or not name.strip()}):
            raise UserError(f"{file}, line {number}: the column {repeated[0]!r} stands twice, or a column has no name")
        begin = last + 1
        for row in rows:
            if row and len(row) != len(columns):
                raise UserError(
                    f"{file}, line {begin}: {len(row)} fields under {len(columns)} columns; put text that holds"
                    f" {delimiter!r} in quotation marks"
                )
            if row:
                yield Record("line", begin, dict(zip(columns, map(_cell, row), strict=True)))
            begin = last + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {last}: not a table ({error}); save it as JSON lines") from error


def _cell(text: str) -> Any:
    """A cell's text; None if it is empty; messages, where it is a list of them as JSON."""
    if text.startswith("[{"):
        value = _json_or_none(text)
        if isinstance(value, list) and all(
            isinstance(entry, dict) and {"role", "from"} & entry.keys() for entry in value
        ):
            return value
    return text or None


def _folder(folder: Path) -> Iterator[Record]:
    splits = [child.parent.name for child in sorted(folder.glob("*/state.json"))]
    if not (folder / "state.json").is_file():
        if len(splits) == 1:
            return _folder(folder / splits[0])
        how = (
            f"give one of its parts, such as {folder / splits[0]}" if splits else "give its files, as in FOLDER/*.jsonl"
        )
        raise UserError(f"{folder} is a folder{' of several parts' if splits else ''}; {how}")
    files = sorted(file for file in folder.glob("*.arrow") if not file.name.startswith("cache-"))
    return _numbered(chain.from_iterable(_arrow_rows(file, b"") for file in files))


def _arrow(file: Path, first: bytes) -> Iterator[Record]:
    return _numbered(_arrow_rows(file, first))


def _numbered(rows: Iterator[dict[str, Any]]) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        yield Record("row", number, row)


def _arrow_rows(file: Path, first: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file. Its structs have every key that some row has; those without a value go."""
    arrow = pyarrow(f"{file} is a Parquet or Arrow file")
    try:
        with file.open("rb") as stream:
            for batch in _batches(arrow, stream, first):
                for begin in range(0, batch.num_rows, ROW_BATCH):
                    for row in batch.slice(begin, ROW_BATCH).to_pylist():
                        yield {name: _without_nulls(value) for name, value in row.items()}
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} can't be read ({error}); is it whole?") from error


def _batches(arrow: Any, stream: Any, first: bytes) -> Iterator[Any]:
    if first.startswith(PARQUET):
        from pyarrow import parquet

        yield from parquet.ParquetFile(stream).iter_batches(batch_size=ROW_BATCH)
    elif first == ARROW_FILE:
        reader = arrow.ipc.open_file(stream)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from arrow.ipc.open_stream(stream)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
