"""What the command line prints (progress on a terminal, lines in a log, or JSON lines), and how it stops and fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from limbeck.config import ranks
from limbeck.progress import PrintingReporter
from limbeck.types import UserError

USER_ERROR = 2
LONGEST_MESSAGE = 4000  # characters
STOPPING = b"stopping after this step, or the answers under way; Ctrl-C again stops now\n"
STOPPED = "stopped; finished work is kept, run it again to go on"
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EROFS: "the disk is read-only",
    errno.EDQUOT: "the disk quota is used up",
}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Terminal(PrintingReporter):
    """A reporter with progress bars; without a terminal, it prints lines."""

    def __init__(self) -> None:
        super().__init__()
        self.live = err.is_terminal
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def stage(self, title: str) -> None:
        self.close()
        self.first = -1
        err.print(f"[bold]{title}[/bold]")

    def progress(self, done: int, total: int, detail: str = "") -> None:
        if self.live:
            self._draw(done, total, detail)
        else:
            super().progress(done, total, detail)

    def _draw(self, done: int, total: int, detail: str) -> None:
        if self.bar is None:
            columns = (
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self.bar = Progress(TextColumn("  "), *columns, console=err)
            self.bar.start()
            self.task = self.bar.add_task("", total=total, detail=detail)
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=total, detail=detail)

    def write(self, line: str) -> None:
        err.print(line, markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class JsonLines:
    """A reporter that writes one JSON object per event to standard error. The result goes to standard output."""

    def stage(self, title: str) -> None:
        self._write({"event": "stage", "title": title})

    def progress(self, done: int, total: int, detail: str = "") -> None:
        self._write({"event": "progress", "done": done, "total": total, "detail": detail})

    def note(self, text: str) -> None:
        self._write({"event": "note", "text": text})

    def close(self) -> None:
        pass

    def _write(self, event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False), file=sys.stderr, flush=True)


class StopRequest:
    """A flag that the first Ctrl-C or SIGTERM sets; the second one ends the process."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self) -> bool:
        return self.received

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        def on_signal(number: int, _: object) -> None:
            if self.received:
                raise UserError(STOPPED)
            self.received = True
            if number == signal.SIGTERM and ranks.BY_COMMAND in os.environ:
                return  # another rank has died, of which the launcher tells
            if not err.quiet:
                with contextlib.suppress(OSError):  # past `err`, which may be in the middle of a line itself
                    os.write(2, STOPPING)

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def long_work(as_json: bool) -> Iterator[tuple[JsonLines | Terminal, StopRequest]]:
    """Yield a reporter, and the flag that the work checks to know whether it should stop."""
    reporter = JsonLines() if as_json else Terminal()
    with StopRequest().listening() as stop:
        try:
            yield reporter, stop
        finally:
            reporter.close()


@contextlib.contextmanager
def error_messages() -> Iterator[None]:
    """Turn errors that the user can fix into one message and exit status 2. Bugs keep their traceback and status 1."""
    err.quiet = out.quiet = ranks.rank() > 0  # rank 0 speaks for all
    try:
        signal.signal(signal.SIGINT, _interrupted)
        yield
    except UserError as error:
        raise _exit_with(str(error)) from error
    except (OSError, sqlite3.DatabaseError) as error:
        reason = _unusable(error)
        if reason is None:
            raise
        raise _exit_with(reason) from error
    except (RuntimeError, MemoryError) as error:
        from limbeck.models.placement import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise _exit_with(
            f"memory ran out ({str(error).splitlines()[0]}); finished work is kept: set teacher.dtype or"
            " teacher.quantise, machine.checkpointing, machine.micro_tokens, machine.cache_gib or machine.head_mib, and"
            " run it again"
        ) from error


def _interrupted(*_: object) -> None:
    """Handle Ctrl-C outside of long work. (The command-line library would swallow a KeyboardInterrupt.)"""
    raise UserError(STOPPED)


def _unusable(error: OSError | sqlite3.DatabaseError) -> str | None:
    """Which file or store can't be used, and what helps; None where the error names none."""
    if (reason := _no_room(error)) is not None:
        return f"{reason}; finished work is kept: make room and run it again, or choose another --out"
    if isinstance(error, sqlite3.DatabaseError):
        return (
            f"a store of answers (store.sqlite of a run folder, or the one that runs share) can't be used ({error}):"
            " wait if another process holds it, else take a copy of it from before, or move it away"
        )
    if error.filename is None:
        return None
    words = "no permission to read or write it" if isinstance(error, PermissionError) else error.strerror
    return f"{error.filename}: {words}; put it right, or name another file or --out; finished work is kept"


def _no_room(error: Exception) -> str | None:
    if "disk is full" in str(error):  # SQLite's message, which comes without an errno
        return NO_ROOM[errno.ENOSPC]
    return NO_ROOM.get(getattr(error, "errno", 0) or 0)


def one_line(message: str) -> str:
    """A message as one line of bounded length that a terminal can show, whatever it quotes."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} [...] {message[-LONGEST_MESSAGE // 4 :]}"
    lines = (line.strip() for line in message.splitlines())
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(filter(None, lines)))


def _exit_with(message: str) -> SystemExit:
    err.print("[bold red]limbeck:[/bold red] ", end="")
    err.print(one_line(message), markup=False)
    return SystemExit(USER_ERROR)
