"""Two tokenizers on one text: the bytes that their tokens stand for, and where tokens of both begin and end together.

Bytes, not characters: a tokenizer may split a character between tokens, but never a byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from limbeck.models.model import vocab_size_of
from limbeck.types import UserError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"
BYTE_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}  # the alphabet of byte-level tokenizers


@dataclass(frozen=True)
class Tokens:
    """A vocabulary in bytes: the bytes of each id (None for control tokens and unused ids), and the id of some bytes.

    Where two ids have the same bytes, `ids` prefers a plain token to one that stands for a single byte.
    """

    bytes_of: tuple[bytes | None, ...]
    ids: dict[bytes, int]


def tokens_of(tokenizer: Any) -> Tokens:
    """The bytes of every token of a tokenizer.

    Raises:
        UserError: the tokenizer is neither byte-level nor SentencePiece-like.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = set(_kinds(core.get("decoder") or {}))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not kinds & {"ByteFallback", "Metaspace", "Replace"}:
        raise UserError(
            f"the bytes of the tokens of {type(tokenizer).__name__} are not known (its decoder is"
            f" {sorted(kinds) or 'missing'}): a bridge needs a byte-level or a SentencePiece-like tokenizer"
        )
    added = {token["content"]: token["special"] for token in core.get("added_tokens", ())}
    bytes_of: list[bytes | None] = [None] * vocab_size_of(tokenizer)
    plain: dict[bytes, int] = {}
    single_bytes: dict[bytes, int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if added.get(token):
            continue
        if token in added:
            value = token.replace(SPACE, " ").encode() if not byte_level else token.encode()
        else:
            value = _byte_level(token) if byte_level else _sentence_piece(token)
        bytes_of[number] = value
        (single_bytes if not byte_level and BYTE.fullmatch(token) else plain).setdefault(value, number)
    return Tokens(tuple(bytes_of), single_bytes | plain)


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder.get("type", "")
    for part in decoder.get("decoders", ()):
        yield from _kinds(part)


def _byte_level(token: str) -> bytes:
    if all(letter in BYTE_OF_LETTER for letter in token):
        return bytes(BYTE_OF_LETTER[letter] for letter in token)
    return token.encode()


def _sentence_piece(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


@dataclass(frozen=True)
class Segment:
    """A shortest run of tokens that begins and ends at the same bytes in both texts: the range of tokens in each."""

    ours: range
    theirs: range

    @property
    def single(self) -> bool:
        """One token in both."""
        return len(self.ours) == len(self.theirs) == 1


def segments(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[Segment]:
    """All segments from the beginning to where the bytes differ (or the end, where both are the same text).

    They cover both lists once, in order, without gaps.
    """
    agree = _common(b"".join(ours), b"".join(theirs))
    result = []
    our_start = 0  # where the present segment begins
    their_start = 0
    our_end = 0
    their_end = 0
    our_bytes = 0  # bytes up to the ends
    their_bytes = 0
    while our_end < len(ours) or their_end < len(theirs):
        if our_end < len(ours) and (our_bytes <= their_bytes or their_end == len(theirs)):
            our_bytes += len(ours[our_end])
            our_end += 1
        else:
            their_bytes += len(theirs[their_end])
            their_end += 1
        if our_bytes == their_bytes and our_end > our_start and their_end > their_start:
            if our_bytes > agree:
                break
            result.append(Segment(range(our_start, our_end), range(their_start, their_end)))
            our_start = our_end
            their_start = their_end
    return result


def _common(one: bytes, two: bytes) -> int:
    """How many bytes both begin with."""
    shorter = min(len(one), len(two))
    if one[:shorter] == two[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != two[at])
