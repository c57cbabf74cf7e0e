"""Commands as a shell runs them, in this process: what they print and their exit status."""

from __future__ import annotations

import contextlib
import io
import signal
import sys

from limbeck.cli import main


def called(*arguments: object) -> tuple[int, str]:
    """(exit status, what was printed)"""
    content = io.BytesIO()
    printed = io.TextIOWrapper(content, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
    before, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ["limbeck", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
        signal.signal(signal.SIGINT, handler)
    return status, content.getvalue().decode(errors="replace")
