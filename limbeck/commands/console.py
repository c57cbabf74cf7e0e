"""How the command speaks: progress on a terminal, plain lines in a log, JSON lines for a machine; and how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from limbeck.types import UserError

SECONDS_BETWEEN_LINES = 10.0
USER_ERROR = 2
STOPPED = "stopped; what was finished is kept, run it again to go on"
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EROFS: "the disk is read-only",
    errno.EDQUOT: "the disk quota is used up",
}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Terminal:
    """Bars on a terminal; where there is none, a line every SECONDS_BETWEEN_LINES."""

    def __init__(self) -> None:
        self.live = err.is_terminal
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.title = ""
        self.began = 0.0
        self.last = 0.0
        self.first = 0

    def stage(self, title: str) -> None:
        self.close()
        self.title = title
        self.began = time.monotonic()
        self.last = 0.0
        self.first = -1
        err.print(f"[bold]{title}[/bold]")

    def progress(self, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if self.first < 0:
            self.first = done
            self.began = now
        if self.live:
            self._draw(done, total, detail)
        elif now - self.last >= SECONDS_BETWEEN_LINES or done == total:
            self.last = now
            fresh = done - self.first
            left = f", {(now - self.began) / fresh * (total - done):.0f} s left" if fresh > 1 and done < total else ""
            err.print(f"  {done}/{total}{left}{'; ' + detail if detail else ''}", markup=False)

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

    def note(self, text: str) -> None:
        err.print(f"  {text}", markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class JsonLines:
    """One JSON object per event on standard error; the result goes to standard output."""

    def stage(self, title: str) -> None:
        self._say({"event": "stage", "title": title})

    def progress(self, done: int, total: int, detail: str = "") -> None:
        self._say({"event": "progress", "done": done, "total": total, "detail": detail})

    def note(self, text: str) -> None:
        self._say({"event": "note", "text": text})

    def close(self) -> None:
        pass

    def _say(self, event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False), file=sys.stderr, flush=True)


class StopAsked:
    """True after the first Ctrl-C or SIGTERM; the second ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopAsked]:
        def note(*_: object) -> None:
            if self.asked:
                raise UserError(STOPPED)
            self.asked = True
            err.print("stopping after this step; once more to stop at once", markup=False)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _interrupted(*_: object) -> None:
    """Ctrl-C outside the long stages. (A KeyboardInterrupt would be swallowed by the command-line library.)"""
    raise UserError(STOPPED)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Turn what the user can mend into one message and exit status 2; our own faults keep their traceback, status 1."""
    try:
        signal.signal(signal.SIGINT, _interrupted)
        yield
    except UserError as error:
        raise _end(str(error)) from error
    except (OSError, sqlite3.OperationalError) as error:
        reason = NO_ROOM.get(getattr(error, "errno", 0) or 0) or (
            "the disk is full" if "disk is full" in str(error) else None
        )
        if isinstance(error, PermissionError):
            reason = f"no permission to write {error.filename}"
        if reason is None:
            raise
        raise _end(
            f"{reason}; what was finished is kept: make room and run it again, or choose another --out"
        ) from error


def _end(message: str) -> SystemExit:
    err.print("[bold red]limbeck:[/bold red] ", end="")
    err.print(message, markup=False)
    return SystemExit(USER_ERROR)
