"""Two tokenizers on one text: what their tokens stand for in bytes, and where the tokens of both begin and end
together.

Bytes, not characters: a character may be split between tokens, and no tokenizer splits a byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.types import UserError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# bytes that byte-level tokenizers write as themselves
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SPACE = "\u2581"


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: bytes that can't be printed are the letters from U+0100 on, in their
    order."""
    others = [byte for byte in range(256) if byte not in PRINTED]
    return {chr(byte): byte for byte in PRINTED} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


LETTERS = _byte_of_letter()


@dataclass(frozen=True)
class Tokens:
    """A vocabulary in bytes: `bytes_of` each id (None for control tokens and ids without a token), and the id that is
    best taken for some bytes (`ids`; a token that stands for a lone byte gives way to a plain one)."""

    bytes_of: tuple[bytes | None, ...]
    ids: dict[bytes, int]


def tokens_of(tokenizer: Any) -> Tokens:
    """What every token of a tokenizer stands for.

    Raises:
        UserError: a tokenizer of neither of the two kinds that are known, byte-level and SentencePiece-like.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = set(_kinds(core.get("decoder") or {}))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not kinds & {"ByteFallback", "Metaspace", "Replace"}:
        raise UserError(
            f"what the tokens of {type(tokenizer).__name__} stand for is not known (its decoder is"
            f" {sorted(kinds) or 'missing'}): a bridge needs a byte-level or a SentencePiece-like tokenizer"
        )
    added = {token["content"]: token["special"] for token in core.get("added_tokens", ())}
    found: list[bytes | None] = [None] * len(tokenizer)
    plain: dict[bytes, int] = {}
    lone: dict[bytes, int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if added.get(token):
            continue
        if token in added:
            value = token.replace(SPACE, " ").encode() if not byte_level else token.encode()
        else:
            value = _byte_level(token) if byte_level else _sentence_piece(token)
        found[number] = value
        (lone if not byte_level and BYTE.fullmatch(token) else plain).setdefault(value, number)
    return Tokens(tuple(found), lone | plain)


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder.get("type", "")
    for part in decoder.get("decoders", ()):
        yield from _kinds(part)


def _byte_level(token: str) -> bytes:
    if all(letter in LETTERS for letter in token):
        return bytes(LETTERS[letter] for letter in token)
    return token.encode()


def _sentence_piece(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


@dataclass(frozen=True)
class Segment:
    """The least run of tokens that begins and ends at the same bytes in both: ours from `ours` on, theirs from `theirs`
    on."""

    ours: range
    theirs: range

    @property
    def single(self) -> bool:
        """One token in both."""
        return len(self.ours) == len(self.theirs) == 1


def segments(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[Segment]:
    """All segments from the beginning to where the bytes part (the end, where both are one text).

    Both lists are covered once, in order, without gaps.
    """
    agree = _common(b"".join(ours), b"".join(theirs))
    found = []
    first = 0
    second = 0  # where the present segment begins
    here = 0
    there = 0
    mine = 0
    other = 0  # tokens and bytes taken of each
    while here < len(ours) or there < len(theirs):
        if here < len(ours) and (mine <= other or there == len(theirs)):
            mine += len(ours[here])
            here += 1
        else:
            other += len(theirs[there])
            there += 1
        if mine == other and here > first and there > second:
            if mine > agree:
                break
            found.append(Segment(range(first, here), range(second, there)))
            first = here
            second = there
    return found


def _common(one: bytes, two: bytes) -> int:
    """How many bytes both begin with."""
    least = min(len(one), len(two))
    if one[:least] == two[:least]:
        return least
    return next(at for at in range(least) if one[at] != two[at])
