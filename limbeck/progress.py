"""Reports the progress of long-running work, and defines the error that ends it on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from limbeck.types import UserError

SPEED_STEPS = 10


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


class StoppedError(UserError):
    """The user asked to stop. Finished work is kept."""


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
