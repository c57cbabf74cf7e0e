"""How long work tells of itself, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from limbeck.types import UserError


class Reporter(Protocol):
    """Where progress goes: a terminal, JSON lines, or nowhere."""

    def stage(self, title: str) -> None: ...

    def progress(self, done: int, total: int, detail: str = "") -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, title: str) -> None:
        pass

    def progress(self, done: int, total: int, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


class StoppedError(UserError):
    """The user asked to stop; what was done is kept."""


def training_progress(reporter: Reporter) -> Callable[[int, int, dict[str, Any]], None]:
    """What the reporter is told after every step: the loss, and the speed of the last ten."""
    recent: list[tuple[int, float]] = []

    def progress(step: int, steps: int, record: dict[str, Any]) -> None:
        for advice in record.get("rollout", {}).get("advice", ()):
            reporter.note(f"step {step}: {advice}")
        recent.append((record["tokens"], record["seconds"]))
        tokens, seconds = (sum(column) for column in zip(*recent[-10:], strict=True))
        reporter.progress(step, steps, f"loss {record['loss']:.3f} nats, {tokens / seconds:.0f} tokens a second")

    return progress
