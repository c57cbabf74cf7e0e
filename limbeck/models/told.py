"""What a server says of the tokens of its own text: read from its reply, checked, and kept as plain data.

A position is kept as [bytes of the written token, its id, its log-probability, [[bytes, id, log-probability], ...]],
the likeliest tokens last. Bytes are text in Latin-1, one letter a byte, so that any bytes are JSON. Ids are kept where
the server gives them (llama.cpp) and may be null.

A token whose bytes the server does not say (text with a replacement character in the place of a piece of a letter) is
kept as `UNKNOWN` where it was written, which ends what can be aligned, and is left out of the likeliest tokens, so its
probability goes to the bucket. Nothing here is trusted; a position with impossible numbers names no tokens.
"""

from __future__ import annotations

import math
from typing import Any

from limbeck.models.http import as_dicts

Kept = list[list[Any]]
UNKNOWN = "\xff"  # no text in UTF-8 has this byte
REPLACED = "\ufffd"
ROUNDING = 1e-3  # by how much probabilities may pass 1
LEAST = -1000.0  # some servers say -9999 of a token that is not among the likeliest
MOST_TOKENS = 2**20


def keep(content: Any, most: int) -> Kept | None:
    """The positions in a reply's `logprobs.content`; None where it has none, or a written token is missing.

    Args:
        most: how many likely tokens of a position are kept.
    """
    if not isinstance(content, list) or not 0 < len(content) <= MOST_TOKENS:
        return None
    positions: Kept = []
    for entry in content:
        if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
            return None
        written = _token(entry)
        named = [token for other in as_dicts(entry.get("top_logprobs")) if (token := _token(other)) is not None]
        named = sorted((token for token in named if token[2] > LEAST), key=lambda token: -float(token[2]))[:most]
        total = sum(math.exp(token[2]) for token in named)
        if total > 1 + ROUNDING or (named and named[0][2] > ROUNDING):
            named = []
        value, number, log_prob = written if written is not None else [UNKNOWN, None, LEAST]
        positions.append([value, number, log_prob, named])
    return positions


def _token(entry: dict[str, Any]) -> list[Any] | None:
    """[bytes, id, log-probability] of one token; None where the server does not say which bytes, or how likely."""
    value = _value(entry)
    log_prob = entry.get("logprob")
    number = entry.get("id")
    if value is None or not isinstance(log_prob, int | float) or not math.isfinite(log_prob):
        return None
    return [
        value,
        number if type(number) is int and number >= 0 else None,
        float(f"{log_prob:.9g}"),
    ]  # as many digits as fp32 has


def _value(entry: dict[str, Any]) -> str | None:
    """The token's bytes as Latin-1: those that the server gives, or those of its text."""
    octets = entry.get("bytes")
    text = entry.get("token")
    if isinstance(octets, list) and all(type(octet) is int and 0 <= octet < 256 for octet in octets):
        value = bytes(octets)
    elif isinstance(text, str):
        value = text.encode("utf-8", "replace")
    else:
        return None
    return None if REPLACED.encode() in value else value.decode("latin-1")
