"""Reports the progress of long-running work, and defines the error that ends it on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from limbeck.types import UserError

SPEED_STEPS = 10
SECONDS_BETWEEN_LINES = 10.0


class Reporter(Protocol):
    """Receives progress and prints it: to a terminal, as JSON lines, or nowhere."""

    def stage(self, title: str) -> None: ...

    def progress(self, done: int, total: int, detail: str = "") -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A `Reporter` that prints nothing."""

    def stage(self, title: str) -> None:
        pass

    def progress(self, done: int, total: int, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


class PrintingReporter:
    """A `Reporter` that prints plain lines to standard error: titles of stages, notes, and progress every `every`
    seconds: `limbeck.run("quickstart", reporter=limbeck.PrintingReporter())`."""

    def __init__(self, every: float = SECONDS_BETWEEN_LINES) -> None:
        self.every = every
        self.began = 0.0
        self.last = 0.0
        self.first = -1

    def stage(self, title: str) -> None:
        self.first = -1
        self.write(title)

    def progress(self, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if self.first < 0:
            self.first, self.began, self.last = done, now, -self.every
        if now - self.last >= self.every or done == total:
            self.last = now
            new = done - self.first
            left = f", {(now - self.began) / new * (total - done):.0f} s left" if new > 1 and done < total else ""
            self.write(f"  {done}/{total}{left}{'; ' + detail if detail else ''}")

    def note(self, text: str) -> None:
        self.write(f"  {text}")

    def write(self, line: str) -> None:
        """Print a line, without what could control a terminal."""
        print("".join(letter if letter.isprintable() else " " for letter in line), file=sys.stderr, flush=True)


class StoppedError(UserError):
    """The user asked to stop: `stop` returned true. Finished work is kept; the same call goes on."""


def training_progress(reporter: Reporter) -> Callable[[int, int, dict[str, Any]], None]:
    """Return a callback that reports every training step: its loss, and the speed of the last SPEED_STEPS steps."""
    timings: list[tuple[int, float]] = []

    def on_step(step: int, steps: int, record: dict[str, Any]) -> None:
        for advice in record.get("rollout", {}).get("advice", ()):
            reporter.note(f"step {step}: {advice}")
        timings.append((record["tokens"], record["seconds"]))
        tokens, seconds = (sum(column) for column in zip(*timings[-SPEED_STEPS:], strict=True))
        reporter.progress(step, steps, f"loss {record['loss']:.3f} nats, {tokens / seconds:.0f} tokens per second")

    return on_step
