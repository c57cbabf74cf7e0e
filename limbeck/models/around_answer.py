"""What a chat template puts around an answer, read from renderings of a short conversation."""

from __future__ import annotations

import re

from limbeck.elicit.thinking import MARKERS

MARK = r"[<\[]/?[^<>\[\]\s]{0,40}(?:think|thought|reason)[^<>\[\]\s]{0,40}[>\]]"
THINKING_MARK = re.compile(rf"{MARK}\Z", re.IGNORECASE)
FIRST_MARKS = re.compile(rf"\s*{MARK}(?:\s|{MARK})*", re.IGNORECASE)
LONGEST_MARK = 90


def header_between(prompt: str, before: str) -> str:
    """What stands before an answer in a conversation and not at the end of a prompt, thinking left out."""
    stem, whole = (without_thinking_marks(text) for text in (prompt, before))
    if not whole.startswith(stem):
        return ""
    header = before[len(prompt) :] if before.startswith(prompt) else before[len(stem) :].lstrip()
    if marks := FIRST_MARKS.match(header):
        header = header[marks.end() :]
    ends = without_thinking_marks(header)
    return header if ends and ends == header.rstrip() else ends


def end_in(after: str, controls: re.Pattern[str]) -> re.Match[str] | None:
    """The token that ends an answer, in what the template puts after one: the first control token, or the first after
    the marks that close a part of the answer. None where other text stands before it."""
    first = None
    at = 0
    for found in controls.finditer(after):
        if after[at : found.start()].strip():
            break
        first = first or found
        if found[0] not in MARKERS:
            return found
        at = found.end()
    return first


def without_thinking_marks(text: str) -> str:
    """The text without the marks of thinking, and the blanks, that it ends with."""
    text = text.rstrip()
    end = len(text)
    while mark := THINKING_MARK.search(text, max(0, end - LONGEST_MARK), end):
        end = mark.start()
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]
