"""JSON in a text that a model wrote: in a fence, with prose around it, or alone. Stray braces are passed over.

Only JSON itself is read: no NaN, no name that stands twice in one object with two values, no Python's quotes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

FENCE = re.compile(r"```[ \t]*+([\w+.-]*+)[^\n`]*+\n(.*?)(?:\n[ \t]{0,40}```|```|\Z)", re.DOTALL)
INLINE_FENCE = re.compile(r"```(?:json)?\s*+([\[{].*?)```", re.DOTALL | re.IGNORECASE)
BEGUN = re.compile(r"\{\s*\"|\[\s*[\[{\"]")  # unlike a stray brace of prose
BRACKET = re.compile(r"[\[\]{}]")
TRIES = 64  # places where a value may begin


class NotJSONError(ValueError):
    """A text that is no JSON."""


def read_json(text: str) -> Any:
    """The value that the whole text is.

    Raises:
        NotJSONError: it is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise NotJSONError(str(error)) from error


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block; a block that is not closed goes to the end."""
    blocks = [(match[1].lower(), match[2]) for match in FENCE.finditer(text)]
    return blocks or [("json", match[1].rstrip()) for match in INLINE_FENCE.finditer(text)]


def values_in(text: str, opens: str = "{[") -> list[Any]:
    """The JSON objects and lists (or what begins with one of `opens`) in a text, in their order, none inside of
    another, nor inside of what begins as JSON and is broken."""
    decoder = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object)
    values = []
    at = failed = 0
    start = re.compile(f"[{re.escape(opens)}]")
    while failed < TRIES and (match := start.search(text, at)):
        try:
            value, at = decoder.raw_decode(text, match.start())
            values.append(value)
        except (ValueError, RecursionError):
            failed += 1
            begun = BEGUN.match(text, match.start())
            at = _closing(text, match.start()) if begun else match.end()
    return values


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` is closed; the text's end if it isn't."""
    depth = 0
    for match in BRACKET.finditer(text, start):
        depth += 1 if match[0] in "{[" else -1
        if depth == 0:
            return match.end()
    return len(text)


def objects_in(text: str) -> list[dict[str, Any]]:
    """The JSON objects of an answer: those of its first fenced block that has any, else all of them."""
    for _, block in fenced(text):
        if found := [value for value in values_in(block, "{") if isinstance(value, dict)]:
            return found
    return [value for value in values_in(text, "{") if isinstance(value, dict)]


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0 but not true, text is compared without case and outer whitespace and
    in one Unicode form, lists in order, objects by all their names."""
    if isinstance(one, str) and isinstance(other, str):
        return plain(one) == plain(other)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().casefold()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values and values[name] != value:
            raise ValueError(f"{name!r} stands twice with two values")
        values[name] = value
    return values
