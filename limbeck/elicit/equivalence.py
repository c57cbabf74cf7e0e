"""A verifier: an answer that equals the right one as mathematics (1/2, 0.5 and \\frac{1}{2} do), by the library
math-verify.

Algebra on a text that a model wrote may take for ever or all memory, so it happens in a process of its own, with bounds
on time and memory; one that goes beyond them is ended, and what it was asked has not passed. No part of the text is run
as code: LaTeX goes through a grammar, and of plain text only digits and operators are read.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS = 10.0
START_SECONDS = 60.0
MEMORY = 2 << 30
MAX_CHARS = 20_000


def equivalent(check: dict[str, Any], answer: str) -> bool:
    """The last mathematical statement of the answer (in a box, after "the answer is", in dollars, or a plain number)
    equals `check["answer"]`, which is LaTeX or a plain number. With `digits`, decimals are compared rounded to as many
    (6)."""
    return _WORKER.ask({"gold": check["answer"], "answer": answer[-MAX_CHARS:], "digits": check.get("digits", 6)})


def check_answer(check: dict[str, Any], place: str) -> None:
    """Refuse a right answer that can't be read."""
    from limbeck.types import UserError

    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{place}: a check of type 'math' needs the extra: pip install limbeck[math]")
    if not _WORKER.ask({"gold": check["answer"]}):
        raise UserError(f"{place}: {check['answer']!r} can't be read as mathematics; write LaTeX or a number")


class _Worker:
    """The process that does the algebra: started at the first question, and anew after one that it could not answer in
    time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, question: dict[str, Any]) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(  # noqa: S603 (this very file)
                    [sys.executable, "-I", str(Path(__file__).resolve())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={},
                )
                atexit.register(self.process.kill)
                self._answer(self.process, START_SECONDS)  # it says that it is ready
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                self.process.stdin.flush()
            except OSError:
                return False
            return self._answer(self.process, SECONDS) == b"true\n"

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Its next line; empty where it ended or was ended."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if selector.select(seconds):
                return process.stdout.readline()
        process.kill()
        process.wait()
        return b""


_WORKER = _Worker()


def _serve() -> None:
    """Answer questions, a JSON line each, with true or false."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify import verify as same

    how = (LatexExtractionConfig(), ExprExtractionConfig())
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        gold = asked["gold"] if "$" in asked["gold"] or "\\boxed" in asked["gold"] else f"${asked['gold']}$"
        try:
            wanted = parse(gold, how, parsing_timeout=None)
            if "answer" in asked:
                found = parse(asked["answer"], how, parsing_timeout=None)
                verdict = bool(wanted and found) and same(
                    wanted, found, float_rounding=asked["digits"], timeout_seconds=None
                )
            else:  # is this mathematics?
                verdict = any(not isinstance(part, str) for part in wanted)
        except Exception:  # noqa: BLE001 (whatever the algebra stumbles over: it has not passed)
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    _serve()
