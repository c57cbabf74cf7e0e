"""Perplexity of documents, and of given answers in conversations, by rolling log-likelihood: every token is scored
exactly once.

A document longer than the window is read in windows that move on by `stride`; after the first, a window scores only the
tokens that no earlier one scored, each with at least window - stride tokens before it. The first token is predicted
from the begin-of-sequence token (end-of-sequence where there is no other), that of an answer from its conversation in
the model's own chat template, of which no token is scored. Bytes and words do not depend on the
tokenizer, so these numbers can be compared between models of different vocabularies; perplexity per token can't.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from limbeck.elicit.conversation import spoken_text
from limbeck.evaluate.items import Passage, PassageSettings, parse_passage
from limbeck.evaluate.likelihood import Continuation, first_id, log_probs, text_ids
from limbeck.evaluate.metrics import TaskMetric
from limbeck.evaluate.records import ItemResult, Progress
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.evaluate.task import GreedyAnswers, Task, TaskKind
from limbeck.models.model import Model
from limbeck.types import UserError

LARGEST = 700.0  # exp of more is no longer a double


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first, end) of every window over a document; its tokens have positions 1 to `tokens`, and 0 is the start
    token.

    A window holds positions begin to end - 1, at most `window` of them, and scores first to end - 1.
    """
    result = []
    begin = 0
    first = 1
    while first <= tokens:
        end = min(begin + window, tokens + 1)
        result.append((begin, first, end))
        begin = begin + stride
        first = end
    return result


def score_passages(
    items: Sequence[Passage], settings: PassageSettings, system: Model, progress: Progress
) -> list[ItemResult]:
    """Bits per byte of every text; the item's weight is its UTF-8 bytes. Words are separated by white space."""
    window = min(settings.window, system.max_length)
    stride = min(settings.stride or max(1, window // 2), window - 1)
    continuations = []
    owners = []
    counts = []
    for number, item in enumerate(items):
        ids = text_ids(system, item.text)
        counts.append(len(ids))
        if not ids:
            raise UserError(f"{item.id}: the text has no token in this model's vocabulary; leave it out")
        before = tuple(system.prompt_ids(item.messages)) if item.messages else (first_id(system),)
        sequence = (*before, *ids)
        for begin, first, end in windows(len(sequence) - 1, window, stride):
            first = max(first, len(before))  # the conversation is read, not scored
            if first >= end:
                continue
            continuations.append(Continuation(item.id, sequence[begin:first], sequence[first:end]))
            owners.append(number)
    nats = [0.0] * len(items)
    for number, value in zip(owners, log_probs(system, continuations, progress), strict=True):
        nats[number] -= value
    results = []
    for item, tokens, total in zip(items, counts, nats, strict=True):
        size = len(item.text.encode())
        facts = {"nats": total, "tokens": tokens, "bytes": size, "words": len(item.text.split())}
        facts |= {"window": window, "stride": stride}
        scores = {"bits_per_byte": total / math.log(2)}
        results.append(ItemResult(item.id, scores, {"bits_per_byte": float(size)}, facts=facts))
    return results


def perplexity(results: Sequence[ItemResult], unit: str) -> Interval | None:
    """exp of nats per `unit` ("bytes" or "words"), over all documents together; None where it exceeds any number."""
    nats = ratio_interval([item.facts["nats"] for item in results], [item.facts[unit] for item in results])
    if nats.high > LARGEST:
        return None
    return Interval(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), nats.n)


class PerplexityKind(TaskKind):
    name = "perplexity"
    settings = PassageSettings
    metrics = {  # noqa: RUF012
        "bits_per_byte": TaskMetric("Bits per byte", "low"),
        "byte_perplexity": TaskMetric(
            "Perplexity per byte", "low", interval=lambda _, results: perplexity(results, "bytes")
        ),
        "word_perplexity": TaskMetric(
            "Perplexity per word", "low", interval=lambda _, results: perplexity(results, "words")
        ),
    }

    def parse(self, data: dict[str, Any], ident: str, place: str, settings: Any) -> Passage:
        return parse_passage(data, ident, place)

    def texts(self, item: Any) -> Sequence[str]:
        return (spoken_text(item.messages) if item.messages else item.text,)

    def score(self, task: Task, system: Model, progress: Progress, answers: GreedyAnswers) -> list[ItemResult]:
        return score_passages(task.items, task.protocol, system, progress)
