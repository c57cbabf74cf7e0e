"""Log-probabilities of given text after a prompt.

The prompt and each continuation are tokenised apart and joined as ids, so the boundary is the same for every choice and
no token spans it. For byte-level BPE (SmolLM, Qwen, Llama 3) this gives the tokens of the joined text where the
continuation begins with a space; a tokenizer of the SentencePiece kind that puts a space before every text may give
another split, the same one for every choice. Log-probabilities are over the whole head, in fp32 or better, in nats.

Shapes: B rows of a batch, N scored positions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limbeck.evaluate.items import TemplateSettings
from limbeck.evaluate.records import Progress
from limbeck.models.model import Model, head_of
from limbeck.models.states import SHORTEST_PREFIX, shared_states, shares_prefixes
from limbeck.objectives.log_probs import token_log_probs
from limbeck.training.memory import keep_freed_memory
from limbeck.types import UserError

TOKENS_TOGETHER = 1024
CACHED_TOGETHER = 8 * 1024  # where the prompt is read once, and its keys and values are there for each row
LEAST_SAVED = 64  # tokens that reading a prompt once must spare: it takes a pass of its own


@dataclass(frozen=True)
class Continuation:
    """Text to be scored after a prompt, both as token ids and neither empty. `item` is named in errors."""

    item: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: everything but the last token, which is only predicted."""
        return self.prompt_ids + self.ids[:-1]


def first_id(system: Model) -> int:
    """The token before any text: begin-of-sequence, or end-of-sequence where the tokenizer has no other."""
    tokenizer = system.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def text_ids(system: Model, text: str) -> list[int]:
    """A text's tokens without any special ones around them."""
    return list(system.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(system: Model, settings: TemplateSettings, fields: Mapping[str, str]) -> tuple[int, ...]:
    """The filled template as token ids, at least one.

    In plain format a begin-of-sequence token comes first where the tokenizer puts one by default.
    """
    text = settings.fill(fields)
    if settings.format == "chat":
        return tuple(system.prompt_ids(({"role": "user", "content": text},)))
    ids = text_ids(system, text)
    bos = system.tokenizer.bos_token_id
    default = list(system.tokenizer(text)["input_ids"])
    if bos is not None and default[:1] == [bos] and ids[:1] != [bos]:
        ids = [bos, *ids]
    return tuple(ids or [first_id(system)])


def log_probs(
    system: Model, continuations: Sequence[Continuation], progress: Progress = lambda done, total: None
) -> list[float]:
    """log q(continuation | prompt) in nats, summed over the continuation's tokens, in the order of `continuations`.

    Where the inputs of one continuation begin those of another (short choices after one prompt), the model runs the
    longer one only: attention is causal, so its hidden states serve both. A prompt of several continuations is read
    once, and its keys and values serve all, where the model keeps such.

    Raises:
        UserError: an item that does not fit the model's context, or a log-probability that is not finite.
    """
    for continuation in continuations:
        if not continuation.ids:
            raise UserError(f"{continuation.item}: a text to be scored has no token; give it some text")
        if len(continuation.inputs) > system.max_length:
            raise UserError(
                f"{continuation.item} takes {len(continuation.inputs)} tokens, and the model's context is"
                f" {system.max_length}: shorten it"
            )
    keep_freed_memory()
    shared = _shared_rows(continuations)
    values: dict[int, float] = {}
    training = system.net.training
    system.net.eval()
    try:
        for rows in _batches(system, continuations, shared):
            for index, value in _run(system, continuations, {row: shared[row] for row in rows}):
                if not np.isfinite(value):
                    raise UserError(
                        f"{continuations[index].item}: the model gives it a log-probability that is not finite; its"
                        " weights may be damaged"
                    )
                values[index] = value
            progress(len(values), len(continuations))
    finally:
        system.net.train(training)
    return [values[index] for index in range(len(continuations))]


def _shared_rows(continuations: Sequence[Continuation]) -> dict[int, list[int]]:
    """{continuation to run: continuations whose positions it holds}. In lexical order a prefix comes right before its
    extensions."""
    order = sorted(range(len(continuations)), key=lambda index: continuations[index].inputs)
    shared: dict[int, list[int]] = {}
    row = -1
    for index in reversed(order):
        inputs = continuations[index].inputs
        if row < 0 or continuations[row].inputs[: len(inputs)] != inputs:
            row = index
        shared.setdefault(row, []).append(index)
    return shared


def _batches(system: Model, continuations: Sequence[Continuation], shared: dict[int, list[int]]) -> Iterator[list[int]]:
    """The rows that are run together: those after one prompt, which is read once, and the others by their lengths."""
    lengths = {row: len(continuations[row].inputs) for row in shared}
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row in shared if shares_prefixes(system.net) else ():
        by_prompt.setdefault(continuations[row].prompt_ids, []).append(row)
    for prompt, rows in by_prompt.items():
        if len(prompt) >= SHORTEST_PREFIX and len(prompt) * (len(rows) - 1) >= LEAST_SAVED:
            yield from _like_long({row: lengths.pop(row) for row in rows}, CACHED_TOGETHER)
    yield from _like_long(lengths, TOKENS_TOGETHER)


def _like_long(lengths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Rows of like length together, at most `limit` tokens with their padding."""
    batches: list[list[int]] = []
    for row, length in sorted(lengths.items(), key=lambda item: item[1]):
        if batches and (len(batches[-1]) + 1) * length <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@torch.no_grad()
def _run(system: Model, continuations: Sequence[Continuation], shared: dict[int, list[int]]) -> list[tuple[int, float]]:
    """(index, log-probability) of every continuation that the rows hold. Padded on the right, which causal attention
    never sees."""
    net = system.net
    width = max(len(continuations[row].inputs) for row in shared)
    tokens_BT = torch.zeros(len(shared), width, dtype=torch.long)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (longest, indices) in enumerate(shared.items()):
        tokens_BT[row, : len(continuations[longest].inputs)] = torch.tensor(continuations[longest].inputs)
        for index in indices:
            start = len(continuations[index].prompt_ids) - 1
            ids = continuations[index].ids
            rows += [row] * len(ids)
            positions += range(start, start + len(ids))
            targets += ids
            owners += [index] * len(ids)
    hidden_BTD = shared_states(net, tokens_BT)
    targets_N = torch.tensor(targets, device=net.device)
    values_N: Tensor = token_log_probs(hidden_BTD[rows, positions], head_of(net), targets_N).cpu().double()
    sums: dict[int, float] = {}
    for owner, value in zip(owners, values_N.tolist(), strict=True):
        sums[owner] = sums.get(owner, 0.0) + value
    return list(sums.items())
