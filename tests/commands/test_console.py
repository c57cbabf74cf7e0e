"""How the command line is stopped, and what it says of errors: one line that a terminal can show, about the file that is wrong."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3

import pytest

from limbeck.commands.console import LONGEST_MESSAGE, STOPPED, StopRequest, error_messages, one_line
from limbeck.types import UserError


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.promise("R14")
def test_the_first_signal_asks_and_the_second_stops_at_once(first, second, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(first)
        assert stop() and "stopping after this step, or the answers under way" in capfd.readouterr().err
        with pytest.raises(UserError, match=STOPPED):
            signal.raise_signal(second)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_in_the_middle_of_a_line_is_no_fault(monkeypatch):
    """What a handler prints through the same stream is refused by Python: "reentrant call"."""
    with StopRequest().listening() as stop:

        def printed(*_, **__):
            raise RuntimeError("reentrant call")

        monkeypatch.setattr("limbeck.commands.console.err.print", printed)
        signal.raise_signal(signal.SIGTERM)
        assert stop()


def said(error, capsys):
    with pytest.raises(SystemExit) as end, error_messages():
        raise error
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "a/b.json"), "a/b.json: Is a directory"),
        (PermissionError(errno.EACCES, "x", "a/b.json"), "a/b.json: no permission to read or write it"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "a" * 300), "File name too long"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a"), "a: No such file"),
        (OSError(errno.ENOSPC, "x", "a"), "the disk is full"),
        (sqlite3.DatabaseError("database disk image is malformed"), "malformed"),
        (sqlite3.OperationalError("database is locked"), "database is locked"),
        (sqlite3.OperationalError("database or disk is full"), "the disk is full"),
    ],
)
def test_errors_of_files_name_the_file(error, words, capsys):
    assert words in said(error, capsys)


def test_an_error_without_a_file_is_ours():
    with pytest.raises(OSError, match="odd"), error_messages():
        raise OSError("odd")


def test_a_message_is_one_line_without_control_characters(capsys):
    assert one_line("a\n  b\x1b[31m\x07\u202ec\n\n") == "a b [31m  c"
    assert len(one_line("x" * 10**6)) <= LONGEST_MESSAGE
    assert said(UserError("first\nsecond \x1b]0;x\x07"), capsys) == "limbeck: first second ]0;x"
