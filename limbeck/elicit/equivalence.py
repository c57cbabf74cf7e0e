"""A verifier: whether an answer equals the right one mathematically (as 1/2, 0.5 and \\frac{1}{2} do), by the library
math-verify.

Algebra on text that a model wrote may take for ever or all memory, so it runs in a process of its own with limits on
time and memory. A process that exceeds them is killed, and its answer has failed. No part of the text is run as code:
LaTeX goes through a grammar, and only digits and operators of plain text are read.
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
    """Whether the last mathematical expression in the answer (in a box, after "the answer is", in dollars, or a plain
    number) equals `check["answer"]`, which is LaTeX or a plain number. Decimals are compared to `digits` places (6).
    What is denied ("not 12") does not count, and neither does one of two numbers ("12 or 13")."""
    from limbeck.elicit.written_math import readable, readable_gold, undecided  # not above: this runs by itself, too

    end = answer[-MAX_CHARS:]
    if undecided(check["answer"], end):
        return False
    return _WORKER.ask(
        {"gold": readable_gold(check["answer"]), "answer": readable(end), "digits": check.get("digits", 6)}
    )


def check_answer(check: dict[str, Any], place: str) -> None:
    """Refuse a right answer that can't be parsed, or that no answer would equal, not even itself."""
    from limbeck.elicit.written_math import readable_gold
    from limbeck.types import UserError

    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{place}: a check of type 'math' needs the extra: pip install limbeck[math]")
    gold = readable_gold(check["answer"])
    said = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    if not (_WORKER.ask({"gold": gold}) and _WORKER.ask({"gold": gold, "answer": said, "digits": 6})):
        raise UserError(f"{place}: {check['answer']!r} can't be parsed as mathematics; write LaTeX or a number")


class _Worker:
    """The process that does the algebra: started by the first question, and again after one that took too long."""

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
                self._answer(self.process, START_SECONDS)  # its first line says that it is ready
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                self.process.stdin.flush()
            except OSError:
                return False
            return self._answer(self.process, SECONDS) == b"true\n"

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line of the process; empty if it ended or was killed."""
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
    """Read questions, one JSON object a line, and answer each with true or false."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify import verify as same

    formats = (LatexExtractionConfig(), ExprExtractionConfig())
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        gold = question["gold"]
        try:
            right = parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$", formats, parsing_timeout=None)
            if "answer" in question:
                answer = parse(question["answer"], formats, parsing_timeout=None)
                verdict = bool(right and answer) and same(
                    right,
                    answer,
                    float_rounding=question["digits"],
                    timeout_seconds=None,
                    allow_set_relation_comp=True,  # x <= 3 is an interval
                )
            else:  # is this mathematics?
                verdict = any(not isinstance(part, str) for part in right)
        except Exception:  # noqa: BLE001 (whatever the algebra fails on, the answer has not passed)
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    _serve()
