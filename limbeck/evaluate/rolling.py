"""Perplexity of documents by rolling log-likelihood: every token of every document is scored exactly once.

A document longer than the window is read in windows that move on by `stride`; after the first, a window scores only the
tokens that no earlier one scored, each with at least window - stride tokens before it. The first token is predicted
from the begin-of-sequence token (end-of-sequence where there is no other). Bytes and words do not depend on the
tokenizer, so these numbers can be compared between models of different vocabularies; perplexity per token can't.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from limbeck.evaluate.choice import Continuation, Progress, first_id, log_probs, text_ids
from limbeck.evaluate.items import Passage, PassageSettings, Scored
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.models.model import Model
from limbeck.types import UserError

LARGEST = 700.0  # exp of more is no longer a double


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first, end) of every window over a document of so many tokens, which stand at 1 to `tokens`; 0 is the
    start token.

    A window holds positions begin to end - 1, at most `window` of them, and scores first to end - 1.
    """
    found = []
    begin = 0
    first = 1
    while first <= tokens:
        end = min(begin + window, tokens + 1)
        found.append((begin, first, end))
        begin = begin + stride
        first = end
    return found


def score_passages(
    items: Sequence[Passage], settings: PassageSettings, system: Model, progress: Progress
) -> list[Scored]:
    """Bits per byte of every document; the item's weight is its UTF-8 bytes. Words are parted by white space."""
    window = min(settings.window, system.max_length)
    stride = min(settings.stride or max(1, window // 2), window - 1)
    wanted = []
    owners = []
    counts = {}
    for number, item in enumerate(items):
        counts[number] = len(ids := text_ids(system, item.text))
        if not ids:
            raise UserError(f"{item.id}: the text has no token in this model's vocabulary; leave it out")
        sequence = (first_id(system), *ids)
        for begin, first, end in windows(len(ids), window, stride):
            wanted.append(Continuation(item.id, sequence[begin:first], sequence[first:end]))
            owners.append(number)
    nats = [0.0] * len(items)
    for number, value in zip(owners, log_probs(system, wanted, progress), strict=True):
        nats[number] -= value
    scored = []
    for number, item in enumerate(items):
        size = len(item.text.encode())
        facts = {"nats": nats[number], "tokens": counts[number], "bytes": size, "words": len(item.text.split())}
        facts |= {"window": window, "stride": stride}
        scored.append(
            Scored(item.id, {"bits_per_byte": nats[number] / math.log(2)}, {"bits_per_byte": float(size)}, "", facts)
        )
    return scored


def perplexity(scored: Sequence[Scored], unit: str) -> Interval | None:
    """exp of nats per `unit` ("bytes" or "words"), over all documents together; None where it exceeds any number."""
    nats = ratio_interval([item.facts["nats"] for item in scored], [item.facts[unit] for item in scored])
    if nats.high > LARGEST:
        return None
    return Interval(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), nats.n)
