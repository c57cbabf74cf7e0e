"""A reasoning trace taken apart: its thinking, its answer, and what is wrong with its marks.

It reads the marks of `thinking.py`. Not covered: thinking without any marks, which is an answer like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from limbeck.elicit.thinking import (
    CHANNEL,
    CHANNEL_ENDS,
    CLOSES,
    FINAL_WITHOUT_MARKS,
    LATER,
    OPENS,
    after_thinking,
    boxed,
    closed_by,
)

ANY_OPEN = re.compile(OPENS.pattern.removeprefix(r"\s*"), re.IGNORECASE)


@dataclass(frozen=True)
class Trace:
    """A text as its thinking and its answer; `thinking` is None where no mark tells any, `answer` where the thinking
    never ends. `fault` says what is wrong with the marks, in a few plain words; empty if nothing is."""

    thinking: str | None
    answer: str | None
    fault: str = ""


def trace_of(text: str) -> Trace:
    """The text taken apart. Thinking may lack its opening mark, which then stood in the prompt."""
    answer = after_thinking(text)
    if CHANNEL.search(text):
        return _of_channels(text, answer)
    opened = OPENS.match(text)
    begins = opened.end() if opened else 0
    closed = _close_of(opened, text, begins)
    if closed is None:
        return _unclosed(text, answer, begins)
    thinking, rest = text[begins : closed.start()], text[closed.end() :]
    return Trace(thinking.strip(), answer, _fault(thinking, rest, answer, is_opened=opened is not None))


def _unclosed(text: str, answer: str | None, begins: int) -> Trace:
    """A text without a closing mark: no thinking, thinking that never ends, or channels whose marks a server left
    out."""
    if begins:
        return Trace(text[begins:].strip(), answer, "thinking without an end")
    if answer == text:
        return Trace(None, answer)
    if text.startswith("analysis"):
        final = FINAL_WITHOUT_MARKS.search(text, len("analysis"))
        thinking = text[len("analysis") : final.start() if final else len(text)].strip()
        return Trace(thinking, answer, "thinking without an end" if answer is None else "")
    return Trace(text, answer, "thinking in the wrong place")


def _close_of(opened: re.Match[str] | None, text: str, begins: int) -> re.Match[str] | None:
    """The mark that ends the thinking: the opening mark's own; without one any, as the prompt may have opened it."""
    if opened is None:
        return CLOSES.search(text)
    return re.compile(re.escape(closed_by(opened[0].strip())), re.IGNORECASE).search(text, begins)


def _fault(thinking: str, rest: str, answer: str | None, is_opened: bool) -> str:
    if answer is None:
        return "thinking without an end"
    before = None if is_opened else ANY_OPEN.search(thinking)
    if before is not None:
        return "thinking in the wrong place"  # words, then an opening mark
    if not thinking.strip():
        return "empty thinking"
    if OPENS.match(rest) or CLOSES.search(rest):
        return "thinking twice"
    if LATER.search(rest) and not LATER.search(answer):
        return "thinking twice"  # again, between the lines of the answer
    return "" if answer.strip() else "no answer after the thinking"


def _of_channels(text: str, answer: str | None) -> Trace:
    """A text of gpt-oss: the bodies of its analysis."""
    bodies = []
    for message in CHANNEL.finditer(text):
        end = CHANNEL_ENDS.search(text, message.end())
        if message[1].lower() == "analysis":
            bodies.append((text[message.end() : end.start() if end else len(text)].strip(), end is not None))
    if not bodies:
        return Trace(None, answer)
    thinking = "\n".join(body for body, _ in bodies).strip()
    if answer is None:
        return Trace(thinking, None, "no answer after the thinking" if bodies[-1][1] else "thinking without an end")
    return Trace(thinking, answer, "" if thinking else "empty thinking")


def only_in_thinking(trace: Trace) -> bool:
    """Whether the box that the thinking ends in holds what the answer never says, so that whoever reads the answer
    alone misses it."""
    found = boxed(trace.thinking or "")
    plain = re.sub(r"\s+", "", found or "")
    return bool(plain) and plain not in re.sub(r"\s+", "", trace.answer or "")
