"""The lock of a folder: one holder at a time, named in the error, free again when the holder ends, however it ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from limbeck.storage.files import exclusive
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
