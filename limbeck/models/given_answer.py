"""A given answer as the token ids that a model would have written: with what the template puts around answers, and with
the marks of thinking, channels and calls as the tokens that they are.

Only in answers: in a prompt such marks are text (see `template.py`). Not covered: reasoning between `<think>` marks for
a template with channels, which is taught as the text that it is.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.elicit.thinking import CHANNEL_MARKERS, OPENS, closed_by
from limbeck.models.template import ANCHORS, Frame, continued, encoded, end_of_turn, frame_of, read, text_ids

CHANNEL, START = "<|channel|>", "<|start|>"
REPLACED = "\ufffd"  # what stands for a piece of a character


def answer_ids(tokenizer: Tokenizer, answer: str, mark: str = "", is_cut: bool = False) -> list[int]:
    """A given answer as token ids that go on from a prompt, with the end of its turn unless it was cut off.

    Args:
        mark: what opens the thinking at the end of the prompt (see `opened`).
        is_cut: it was cut off, within a character perhaps.
    """
    frame = frame_of(tokenizer)
    whole = answer.rstrip(REPLACED) or answer if is_cut else answer  # a row is never empty
    text = continued(mark, whole, is_cut)
    parts = _parts(frame, text, mark, is_cut)
    if parts == ("", "", text, "") and not any(content in text for content in frame.marks.keys() & frame.controls):
        ids = text_ids(tokenizer, text)
    else:
        ids = _ids(tokenizer, frame, parts)
    return ids if is_cut else [*ids, end_of_turn(tokenizer)]


def closing_ids(tokenizer: Tokenizer) -> list[int]:
    """What the chat template puts after the token that ends an answer, where a conversation ends with it."""
    return read(tokenizer, frame_of(tokenizer).rest) if tokenizer.chat_template else []


def _parts(frame: Frame, text: str, mark: str, is_cut: bool) -> tuple[str, str, str, str]:
    """(thinking, what the template opens an answer with, the answer, what it closes it with). An answer that opens a
    part itself, such as a call, gets no other."""
    begin = _beginning(frame, text, mark) if frame.before or frame.after else None
    if begin is None:
        return "", "", text, ""
    said = text[begin:].lstrip()
    first = frame.pattern.match(frame.before.lstrip())
    is_open = first is not None and said.startswith(first[0])
    if not is_open and said.startswith((*frame.marks,)):
        return "", "", text, ""
    is_closed = is_cut or said.rstrip().endswith(frame.after.strip())
    return text[:begin], "" if is_open else frame.before, text[begin:], "" if is_closed else frame.after


def _beginning(frame: Frame, text: str, mark: str) -> int | None:
    """Where the answer begins: after its thinking, where the model has marks for it. None where that has no end."""
    found = None if mark else OPENS.match(text)
    opens = mark if found is None else found[0].strip()
    if opens not in frame.marks and not mark:
        return 0
    close = closed_by(opens)
    at = text.find(close)
    after = text[at + len(close) :]
    return None if at < 0 else len(text) - len(after.lstrip())


def _ids(tokenizer: Tokenizer, frame: Frame, parts: tuple[str, str, str, str]) -> list[int]:
    """The token ids of an answer's parts. In its own text marks alone are tokens."""
    has_channels = parts[2].lstrip().startswith(CHANNEL)
    text = ""
    harmless = ""
    taken = []
    for part, is_own in zip(parts, (True, False, True, False), strict=True):
        end = 0
        for found in frame.pattern.finditer(part) if is_own else ():
            if not _is_mark(frame, found, has_channels):
                taken.append((len(text) + found.start(), len(text) + found.end()))
                harmless += f"{part[end : found.start()]}x"
                end = found.end()
        harmless += part[end:]
        text += part
    expected = read(tokenizer, harmless)
    same = (anchor for anchor in ANCHORS if encoded(tokenizer, frame, harmless, [], anchor=anchor) == expected)
    return encoded(tokenizer, frame, text, taken, anchor=next(same, ANCHORS[0]))


def _is_mark(frame: Frame, found: re.Match[str], has_channels: bool) -> bool:
    """Whether a control token in an answer's own text is one. The marks of channels are where it begins with one, and
    then never the beginning of another's turn."""
    if found[0] not in CHANNEL_MARKERS:
        return found[0] in frame.marks
    begins_other = found[0] == START and not found.string.startswith("assistant", found.end())
    return has_channels and found[0] in frame.marks and not begins_other
