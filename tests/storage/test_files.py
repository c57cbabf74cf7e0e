"""The lock of a folder: one holder at a time, named in the error, free again when the holder ends, however it ends. And
records of which the last was cut off."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from limbeck.storage.files import append_json, exclusive, read_jsonl, user_path
from limbeck.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from limbeck.storage.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """(lock file, the process that holds it)"""
    path = tmp_path / "run" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield path, process
        process.kill()


@pytest.mark.promise("R16")
def test_a_folder_in_use_is_refused_by_its_name_until_the_holder_is_killed(held):
    path, process = held
    with pytest.raises(UserError, match="run is in use by another limbeck process"), exclusive(path):
        pass
    process.kill()
    process.wait()
    with exclusive(path):
        pass


def test_who_waits_gets_the_lock_when_the_holder_ends(held):
    path, process = held
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    with exclusive(path, wait=True):
        assert time.monotonic() - began >= 0.3


@pytest.mark.promise("R16")
def test_the_lock_is_free_after_the_block_and_after_an_error(tmp_path):
    path = tmp_path / "new" / ".lock"
    with pytest.raises(KeyError), exclusive(path):
        raise KeyError
    with exclusive(path), pytest.raises(UserError, match="in use"), exclusive(path):
        pass


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file, not a folder"), exclusive(tmp_path / "out" / ".lock"):
        pass


@pytest.mark.promise("R18")
def test_of_records_that_were_cut_at_any_byte_the_whole_ones_are_read(tmp_path):
    file, records = tmp_path / "records.jsonl", [{"n": n, "text": "é\u2028" * n} for n in range(4)]
    for record in records:
        append_json(file, record)
    content = file.read_bytes()
    for cut in range(len(content) + 1):
        file.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert read_jsonl(file) in (records[:whole], records[: whole + 1]), cut  # the last may lack its line feed alone
        assert len(read_jsonl(file)) == whole or content[cut : cut + 1] == b"\n"


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "a" * 300, "a/" * 3000, "*" + "a" * 300])
def test_what_can_be_no_path_is_refused(name):
    with pytest.raises(UserError, match=r"no such user's home here|longer than a file's name can be"):
        user_path(name)


def test_a_users_home_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x" and str(user_path("a/~")) == "a/~" and str(user_path("a\0b")) == "a\0b"
