"""Filling in templates, and parsing the replies. A reply is plain text: it is never used as a template itself."""

from __future__ import annotations

import re
from itertools import zip_longest

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
ITEM = re.compile(
    r"^[ \t]*+(?:[*#]{1,4}+[ \t]*+)?+(?:task|question|example|problem)?[ \t]*+(\d{1,3})[ \t]*+[.):][ \t]*(?:\*\*)?",
    re.IGNORECASE | re.MULTILINE,
)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*\s*$")


def fill(template: str, **fields: str) -> str:
    """The template with every `{name}` replaced by its field. A field's own text is not filled in again.

    Raises:
        KeyError: a placeholder without a field, which is a bug in this package.
    """
    return PLACEHOLDER.sub(lambda match: fields[match[1]], template)


def spans(mark: re.Pattern[str], text: str) -> list[tuple[re.Match[str], str]]:
    """Every match with the text between it and the next one."""
    matches = list(mark.finditer(text))
    return [
        (match, text[match.end() : following.start() if following else len(text)])
        for match, following in zip_longest(matches, matches[1:])
    ]


def numbered(texts: list[str], first: int = 1) -> str:
    """The texts as a numbered list, each on one line."""
    return "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(texts, first))


def items(text: str) -> list[tuple[int, str]]:
    """(number, text) of each entry of a numbered list. Text before the first number is left out."""
    return [(int(match[1]), entry.strip().strip("*").strip()) for match, entry in spans(ITEM, text)]


def parts(text: str, names: tuple[str, ...]) -> dict[str, str]:
    """The text after each `Name:` at the start of a line, up to the next of the names, by lower-case name. Of a name
    that occurs twice, the first counts."""
    mark = re.compile(rf"^[ \t*#]*({'|'.join(map(re.escape, names))})[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
    by_name: dict[str, str] = {}
    for match, part in spans(mark, text):
        by_name.setdefault(match[1].lower(), part.strip())
    return by_name


def words(text: str) -> list[str]:
    """The words of a text, lower-case."""
    return [match[0].lower() for match in WORD.finditer(text)]


def first_number(text: str, low: int, high: int) -> int | None:
    """The first whole number in the text if it is in the range, else None."""
    match = re.search(r"(?<![\d.])\d+(?![\d.]*\d)", text)
    value = int(match[0]) if match and len(match[0]) < 10 else None
    return value if value is not None and low <= value <= high else None


def ends_well(text: str) -> bool:
    """Whether the text ends in a whole sentence."""
    return bool(SENTENCE_END.search(text))
