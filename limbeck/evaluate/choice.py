"""Tasks that are scored by the probability of given text: multiple choice, classification, ranking by query likelihood.

The prompt and each continuation are tokenised apart and joined as ids, so the boundary is the same for every choice and
no token spans it. For byte-level BPE (SmolLM, Qwen, Llama 3) this gives the tokens of the joined text where the
continuation begins with a space; a tokenizer of the SentencePiece kind that puts a space before every text may give
another split, the same one for every choice. Log-probabilities are over the whole head, in fp32 or better, in nats.

Shapes: B rows of a batch, N scored positions of a batch, I items, L labels, C choices, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limbeck.evaluate.calibration import brier
from limbeck.evaluate.items import ChoiceItem, RankingItem, RankingSettings, Scored, Wording
from limbeck.evaluate.statistics import LEVEL, RESAMPLES, Interval, ndcg
from limbeck.models.model import Model, head_of, hidden_states
from limbeck.objectives.head import token_log_probs
from limbeck.training.memory import keep_freed_memory
from limbeck.types import UserError

TOKENS_TOGETHER = 1024
COUNTS_TOGETHER = 2**22
Progress = Callable[[int, int], None]


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


def prompt_ids(system: Model, wording: Wording, fields: dict[str, str] | ChoiceItem) -> tuple[int, ...]:
    """The filled template as token ids: never none of them.

    In plain format a begin-of-sequence token comes first where the tokenizer puts one by default.
    """
    text = wording.fill(fields.fields if isinstance(fields, ChoiceItem) else fields)
    if wording.format == "chat":
        return tuple(system.prompt_ids(({"role": "user", "content": text},)))
    ids = text_ids(system, text)
    bos = system.tokenizer.bos_token_id
    default = list(system.tokenizer(text)["input_ids"])
    if bos is not None and default[:1] == [bos] and ids[:1] != [bos]:
        ids = [bos, *ids]
    return tuple(ids or [first_id(system)])


def log_probs(
    system: Model, wanted: Sequence[Continuation], progress: Progress = lambda done, total: None
) -> list[float]:
    """log q(continuation | prompt) in nats, summed over the continuation's tokens, in the order of `wanted`.

    Where the inputs of one continuation begin those of another (short choices after one prompt), the model runs the
    longer one only: attention is causal, so its hidden states serve both.

    Raises:
        UserError: an item that does not fit the model's context, or a log-probability that is not finite.
    """
    for continuation in wanted:
        if not continuation.ids:
            raise UserError(f"{continuation.item}: a text to be scored has no token; give it some text")
        if len(continuation.inputs) > system.max_length:
            raise UserError(
                f"{continuation.item} takes {len(continuation.inputs)} tokens, and the model's context is"
                f" {system.max_length}: shorten it"
            )
    keep_freed_memory()
    served = _served(wanted)
    found: dict[int, float] = {}
    training = system.net.training
    system.net.eval()
    try:
        for carriers in _batches([wanted[index].inputs for index in served], list(served)):
            for index, value in _run(system, wanted, {carrier: served[carrier] for carrier in carriers}):
                if not np.isfinite(value):
                    raise UserError(
                        f"{wanted[index].item}: the model gives it a log-probability that is not finite; its weights"
                        " may be damaged"
                    )
                found[index] = value
            progress(len(found), len(wanted))
    finally:
        system.net.train(training)
    return [found[index] for index in range(len(wanted))]


def _served(wanted: Sequence[Continuation]) -> dict[int, list[int]]:
    """Which rows are run, and whose positions each of them holds. In lexical order a prefix stands right before its
    extensions."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index].inputs)
    served: dict[int, list[int]] = {}
    carrier = -1
    for index in reversed(order):
        own = wanted[index].inputs
        if carrier < 0 or wanted[carrier].inputs[: len(own)] != own:
            carrier = index
        served.setdefault(carrier, []).append(index)
    return served


def _batches(inputs: Sequence[tuple[int, ...]], carriers: Sequence[int]) -> list[list[int]]:
    """Rows of like length together, at most TOKENS_TOGETHER with their padding."""
    batches: list[list[int]] = []
    for ids, carrier in sorted(zip(inputs, carriers, strict=True), key=lambda pair: len(pair[0])):
        if batches and (len(batches[-1]) + 1) * len(ids) <= TOKENS_TOGETHER:
            batches[-1].append(carrier)
        else:
            batches.append([carrier])
    return batches


@torch.no_grad()
def _run(system: Model, wanted: Sequence[Continuation], served: dict[int, list[int]]) -> list[tuple[int, float]]:
    """(index, log-probability) of every continuation that the rows serve. Padded on the right, which causal attention
    never sees."""
    net = system.net
    width = max(len(wanted[carrier].inputs) for carrier in served)
    tokens_BT = torch.zeros(len(served), width, dtype=torch.long)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (carrier, indices) in enumerate(served.items()):
        tokens_BT[row, : len(wanted[carrier].inputs)] = torch.tensor(wanted[carrier].inputs)
        for index in indices:
            start = len(wanted[index].prompt_ids) - 1
            ids = wanted[index].ids
            rows += [row] * len(ids)
            positions += range(start, start + len(ids))
            targets += ids
            owners += [index] * len(ids)
    hidden_BTD = hidden_states(net, tokens_BT.to(net.device))
    targets_N = torch.tensor(targets, device=net.device)
    values_N: Tensor = token_log_probs(hidden_BTD[rows, positions], head_of(net), targets_N).double().cpu()
    sums: dict[int, float] = {}
    for owner, value in zip(owners, values_N.tolist(), strict=True):
        sums[owner] = sums.get(owner, 0.0) + value
    return list(sums.items())


def score_choices(items: Sequence[ChoiceItem], wording: Wording, system: Model, progress: Progress) -> list[Scored]:
    """Multiple choice and classification, by the log-probability of every choice after the item's prompt.

    `acc`: the most likely choice is the right one. `acc_norm`: the same with the log-probability divided by the
    choice's UTF-8 bytes; lm-evaluation-harness calls that acc_bytes, and its acc_norm divides by characters, which is
    the same for ASCII. `probability`: that of the right choice among the choices (softmax of their log-probabilities).
    `brier`: the sum over choices of (probability - truth)^2, 0 to 2. Of equal choices the first is taken.
    """
    wanted = []
    for item in items:
        prompt = prompt_ids(system, wording, item)
        wanted += [
            Continuation(item.id, prompt, tuple(text_ids(system, wording.joint + choice))) for choice in item.choices
        ]
    values = iter(log_probs(system, wanted, progress))
    return [_scored_choice(item, np.array([next(values) for _ in item.choices])) for item in items]


def _scored_choice(item: ChoiceItem, log_prob_C: np.ndarray) -> Scored:
    bytes_C = np.array([len(choice.encode()) for choice in item.choices])
    odds_C = np.exp(log_prob_C - log_prob_C.max())
    prob_C = odds_C / odds_C.sum()
    chosen = int(log_prob_C.argmax())
    scores = {
        "acc": float(chosen == item.answer),
        "acc_norm": float(int((log_prob_C / bytes_C).argmax()) == item.answer),
        "probability": float(prob_C[item.answer]),
        "brier": float(brier(prob_C[None], np.array([item.answer]))),
    }
    facts = {
        "log_probs": log_prob_C.tolist(),
        "probabilities": prob_C.tolist(),
        "chosen": chosen,
        "answer": item.answer,
    }
    return Scored(item.id, scores, {}, item.choices[chosen], facts)


def macro_f1(truth_I: np.ndarray, chosen_I: np.ndarray, labels: int, seed: int = 0) -> Interval:
    """The mean over labels of F1 = 2 TP / (2 TP + FP + FN), with its bootstrap interval over items.

    A label that is neither true nor chosen anywhere (in the data, or in a resample) has no F1 and is left out of the
    mean.

    Args:
        truth_I, chosen_I: numbers of labels, 0 to `labels` - 1.
    """
    truth_IL = np.eye(labels)[truth_I]
    chosen_IL = np.eye(labels)[chosen_I]
    hits_IL = truth_IL * chosen_IL
    named_IL = truth_IL + chosen_IL

    def of(counts_RI: np.ndarray) -> np.ndarray:
        hits_RL = counts_RI @ hits_IL
        named_RL = counts_RI @ named_IL
        f1_RL = np.divide(2 * hits_RL, named_RL, out=np.zeros_like(hits_RL), where=named_RL > 0)
        return np.asarray(f1_RL.sum(1) / (named_RL > 0).sum(1))

    count = len(truth_I)
    noise = np.random.default_rng(seed)
    shares_I = np.full(count, 1 / count)
    size = max(1, COUNTS_TOGETHER // count)
    resampled = [
        of(noise.multinomial(count, shares_I, min(size, RESAMPLES - start))) for start in range(0, RESAMPLES, size)
    ]
    low, high = np.quantile(np.concatenate(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(of(np.ones((1, count)))[0]), float(low), float(high), count)


def score_rankings(
    items: Sequence[RankingItem], settings: RankingSettings, system: Model, progress: Progress
) -> list[Scored]:
    """Documents ordered by the query's log-probability per token after each of them (query likelihood, Ponte and Croft
    1998).

    Of documents with equal scores the earlier one comes first.
    """
    wanted = []
    for item in items:
        query = tuple(text_ids(system, settings.joint + item.query))
        wanted += [
            Continuation(item.id, prompt_ids(system, settings, {"document": text}), query) for text in item.documents
        ]
    values = log_probs(system, wanted, progress)
    scored = []
    at = 0
    for item in items:
        own = [values[at + place] / len(wanted[at + place].ids) for place in range(len(item.documents))]
        at += len(own)
        order = sorted(range(len(own)), key=lambda place: -own[place])
        ranked = [item.relevances[place] for place in order]
        scores = {f"ndcg@{k}": float(ndcg(ranked, k)) for k in settings.k}
        scored.append(Scored(item.id, scores, {}, item.documents[order[0]], {"log_probs": own, "order": order}))
    return scored
