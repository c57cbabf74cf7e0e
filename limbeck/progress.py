"""How long work tells of itself, and how it is asked to stop."""

from __future__ import annotations

from typing import Protocol

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
