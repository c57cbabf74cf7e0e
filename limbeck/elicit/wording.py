"""Filling in our templates, and reading what a model wrote in answer to them. What a model wrote is text: it's never a
template itself."""

from __future__ import annotations

import re
from itertools import zip_longest

PLACE = re.compile(r"\{([a-z_]+)\}")
ITEM = re.compile(
    r"^[ \t]*(?:[*#]{0,4}[ \t]*)?(?:task|question|example|problem)?[ \t]*(\d{1,3})[ \t]*[.):][ \t]*(?:\*\*)?",
    re.IGNORECASE | re.MULTILINE,
)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*\s*$")


def fill(template: str, **fields: str) -> str:
    """The template with every `{name}` replaced once and literally; a value that looks like a place is left as it is.

    Raises:
        KeyError: a place that no field fills, which is our mistake.
    """
    return PLACE.sub(lambda found: fields[found[1]], template)


def spans(mark: re.Pattern[str], text: str) -> list[tuple[re.Match[str], str]]:
    """Every match with what stands between it and the next one."""
    marks = list(mark.finditer(text))
    return [
        (here, text[here.end() : later.start() if later else len(text)])
        for here, later in zip_longest(marks, marks[1:])
    ]


def numbered(texts: list[str], first: int = 1) -> str:
    """The texts as a numbered list, each on one line."""
    return "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(texts, first))


def items(text: str) -> list[tuple[int, str]]:
    """(number, text) of each entry of a numbered list; what stands before the first number is left out."""
    return [(int(mark[1]), said.strip().strip("*").strip()) for mark, said in spans(ITEM, text)]


def parts(text: str, names: tuple[str, ...]) -> dict[str, str]:
    """What stands after each `Name:` at the start of a line, up to the next of the names. Of a name that stands twice
    the first counts."""
    mark = re.compile(rf"^[ \t*#]*({'|'.join(map(re.escape, names))})[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
    found: dict[str, str] = {}
    for here, said in spans(mark, text):
        found.setdefault(here[1].lower(), said.strip())
    return found


def words(text: str) -> list[str]:
    """The words of a text, lower-case."""
    return [found[0].lower() for found in WORD.finditer(text)]


def first_number(text: str, low: int, high: int) -> int | None:
    """The first whole number in the text, if it lies in the range; None where there is none, or another."""
    found = re.search(r"(?<![\d.])\d+(?![\d.]*\d)", text)
    value = int(found[0]) if found and len(found[0]) < 10 else None
    return value if value is not None and low <= value <= high else None


def ends_well(text: str) -> bool:
    """Whether the last sentence is closed."""
    return bool(SENTENCE_END.search(text))
