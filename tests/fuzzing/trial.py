"""One wrong input: what is wrong, the call that reads it, and what accepting it would have to mean."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable
from dataclasses import dataclass

from limbeck.commands.console import error_messages


@dataclass(frozen=True)
class Trial:
    """`call` gives (exit status, what was printed); `silence` says why an accepted input should not have been."""

    what: str
    call: Callable[[], tuple[int, str]]
    silence: Callable[[str], str | None]


def as_command(read: Callable[[], object]) -> tuple[int, str]:
    """What a command that does this would end with, and print."""
    printed, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    try:
        with contextlib.redirect_stderr(printed), error_messages():
            read()
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    finally:
        signal.signal(signal.SIGINT, handler)
    return 0, printed.getvalue()
