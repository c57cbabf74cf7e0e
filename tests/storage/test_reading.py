"""Files that people, disks and kills may have changed: what is read of them, and what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from limbeck.storage.files import file_sha256, read_from, read_jsonl, read_object
from limbeck.types import UserError


@pytest.mark.parametrize("line", [b"{", b"7", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_line_of_a_log_is_named(line, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2"):
        read_jsonl(file)
    file.write_bytes(b'{"a": 1}\n{"a": ')  # what a kill leaves
    assert read_jsonl(file) == [{"a": 1}]


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"\xff{}", b"[" * 100_000, b'{"a": '])
def test_a_file_without_an_object_is_damaged(content, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is damaged.*: mend it"):
        read_object(file, "mend it")


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to(file)]
)
def test_what_is_no_file_is_not_opened(make, tmp_path):
    make(tmp_path / "x.json")
    for read in (read_object, read_jsonl, file_sha256):
        with pytest.raises(UserError, match="is no file"):
            read(tmp_path / "x.json")


def test_a_reader_that_trips_over_a_value_names_the_file(tmp_path):
    for trip in (
        lambda: {}["a"],
        lambda: 1 + "a",
        lambda: None.x,
        lambda: float("a"),
        lambda: 1 / 0,
        lambda: 10.0**400,
    ):
        with pytest.raises(UserError, match="one of its files is not as Limbeck wrote it"), read_from(tmp_path):
            trip()
    with pytest.raises(OSError, match="disk"), read_from(tmp_path):
        raise OSError("disk")
