"""An evaluation's folder: sealed with its summary, looked at before it is read."""

from __future__ import annotations

import json

import pytest

from limbeck.report.page import read_summary
from limbeck.storage.evaluation import check_records, open_records, write_summary
from limbeck.types import UserError


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "evaluation"
    where.mkdir()
    (where / "answers-student.jsonl").write_text('{"prompt_id": "a", "text": "b"}\n')
    write_summary(where, {"systems": {"student": {}}})
    return where


def test_what_was_written_is_read(folder):
    (folder / "harness.json").write_text("{}")  # comes later, and changes
    assert read_summary(folder.parent) == {"systems": {"student": {}}}
    (folder / f".prompts.jsonl.{'0' * 32}.tmp").write_text("")  # what a kill left
    open_records(folder)
    assert {file.name for file in folder.iterdir()} == {"answers-student.jsonl", "summary.json", "harness.json"}


@pytest.mark.parametrize("name", ["answers-student.jsonl", "summary.json", "manifest.json"])
def test_a_changed_byte_is_named(name, folder):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    for attempt in (lambda: read_summary(folder.parent), lambda: open_records(folder)):
        with pytest.raises(UserError, match=name):
            attempt()


def test_a_record_that_is_gone_is_missed_by_the_page_and_measured_again(folder):
    (folder / "answers-student.jsonl").unlink()
    with pytest.raises(UserError, match="answers-student"):
        check_records(folder)
    open_records(folder)


def test_a_folder_of_an_older_version_has_no_seal(folder):
    (folder / "manifest.json").unlink()
    (folder / "summary.json").write_text(json.dumps({"systems": {}}))
    assert read_summary(folder.parent) == {"systems": {}}
