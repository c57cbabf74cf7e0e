"""Other tools' teacher distributions into a recipe's cache, and out of it: JSON lines, one text a line.

Read are three shapes, each beside `input_ids` (or `prompt_token_ids`), prompt and response together:

- `prompt_logprobs`, as vLLM answers: for every token null, or {token id: {"logprob": nats}};
- `target_token_ids` and `target_logprobs`, as axolotl prepares them: for every token the ids that might stand there;
- `logprobs`, as axolotl reads them: for the last tokens [{"token": "token_id:ID", "logprob": nats}].

In all of them the numbers at a place are about the token at that place, given those before. Written is the second,
which loses nothing but the bucket (what the named tokens leave of 1). Not read: DistillKit's compressed columns, whose
packing was not confirmed.

Shapes: N response positions, K tokens named at a position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.config.recipe import Recipe
from limbeck.data.batches import Row, make_batch
from limbeck.progress import Silent, StoppedError
from limbeck.runs.claim import claim
from limbeck.runs.pipeline import Run
from limbeck.runs.validate import validate
from limbeck.signals.cache import SignalCache, ids_of, text_key
from limbeck.signals.forms import form_of
from limbeck.signals.sparse import TopK
from limbeck.storage.files import exclusive, write_text
from limbeck.training.setup import common_vocab_size
from limbeck.types import UserError, canonical_json

MOST = 1 + 1e-3  # what rounded probabilities may add up to
ENOUGH = 16
MUCH_BETTER = 2
LIKELY = 0.1  # tokens to see misplaced rows by, by how much those must fit the text better, and how well
ABSENT = -1e9  # the log-probability that fills a place without one: JSON has no infinity
Named = list[tuple[int, float]]


def bring_in(recipe: Recipe, folder: Path, file: Path) -> dict[str, int]:
    """Put the file's distributions over this run's training text into its cache. The text must be there: a corpus, as
    text that another tool has scored is, or what `limbeck elicit` left.

    Returns:
        how many `texts` of the run there are, how many the cache `holds` now, how many were `read` from the file, and
        how many lines were about `other` texts.

    Raises:
        UserError: a line that can't be read, numbers that are no probabilities, rows that are one off, or no line about
            this run's text.
    """
    rows, cache = _opened(recipe, folder)
    wanted = {
        (*prompt, *response): (len(prompt), text_key(prompt, response))
        for row in rows
        for prompt, response in ids_of(make_batch([row]))
    }
    lengths = sorted({len(ids) for ids in wanted})
    other = 0
    found: dict[str, tuple[tuple[int, ...], list[Named]]] = {}
    for place, ids, named in _lines(file):
        whole = next((tuple(ids[:length]) for length in lengths if tuple(ids[:length]) in wanted), None)
        if whole is None:
            other += 1
            continue
        start, key = wanted[whole]
        if key not in cache:
            found[key] = whole[start:], _named(place, named[start : len(whole)], cache.vocab_size)
    _check_places(file, list(found.values()))
    with exclusive(cache.folder / "lock", wait=True):
        for key, (written, rows_K) in found.items():
            cache.add([key], *_signal(written, rows_K, cache.form.server_tokens or 1), [len(written)])
        cache.flush()
    read = len(found)
    if not read and other:
        raise UserError(
            f"{file}: none of its {other} texts is one of this run's {len(wanted)}: other prompts, template or"
            " tokenizer"
        )
    return {
        "texts": len(wanted),
        "holds": sum(key in cache for _, key in wanted.values()),
        "read": read,
        "other": other,
    }


def take_out(recipe: Recipe, folder: Path, file: Path) -> dict[str, int]:
    """Write what the cache holds of this run's training text, as axolotl's prepared columns. Returns how many `texts`
    were written.

    Raises:
        UserError: the cache holds none of them.
    """
    rows, cache = _opened(recipe, folder)
    lines = []
    for row in rows:
        batch = make_batch([row])
        prompt, response = next(ids_of(batch))
        if text_key(prompt, response) not in cache:
            continue
        signal = cache.view(batch).signal
        assert signal is not None
        ids_NK, log_NK, count_N = (column.tolist() for column in signal.top_tokens())
        most = max(count_N)
        beside = [(list(range(most)), [ABSENT] * most, [0] * most)] * len(prompt)
        for ids_K, log_K, count in zip(ids_NK, log_NK, count_N, strict=True):
            absent = most - count
            logs = [round(value, 6) for value in log_K[:count]]
            beside.append((ids_K[:count] + [0] * absent, logs + [ABSENT] * absent, [1] * count + [0] * absent))
        names = ("target_token_ids", "target_logprobs", "target_mask")
        columns = {name: list(column) for name, column in zip(names, zip(*beside, strict=True), strict=True)}
        labels = [-100] * len(prompt) + response
        lines.append({"input_ids": prompt + response, "attention_mask": [1] * len(labels), "labels": labels, **columns})
    if not lines:
        raise UserError(f"{cache.folder} holds none of this run's texts; run `limbeck elicit` first")
    write_text(file, "".join(canonical_json(line) + "\n" for line in lines))
    return {"texts": len(lines)}


def _opened(recipe: Recipe, folder: Path) -> tuple[list[Row], SignalCache]:
    """(the run's training rows, its cache of likeliest tokens)."""
    validate(recipe)
    form = recipe.teacher.cache
    if form is None or form_of(form).server_tokens is None:
        raise UserError(
            "named tokens with their probabilities are kept in one form: set teacher.cache: {top_k: {k: 64}}"
        )
    run = Run(recipe, folder, Silent(), lambda: True)  # it stops before it asks anybody anything
    with exclusive(folder / ".lock"):
        claim(run)
    try:
        student = run.untouched()
        rows = run.rows(run.text.training(), student)
    except StoppedError:
        raise UserError(f"{folder} does not hold its text yet; run `limbeck elicit` first, or give a corpus") from None
    teacher = run.scorer or run.teachers
    home = folder / "signals" if form.folder is None else Path(form.folder).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return rows, SignalCache(home, teacher.identity, common_vocab_size(student, teacher), form)


def _lines(file: Path) -> Iterator[tuple[str, list[int], list[Named | None]]]:
    """(where it stands, token ids, what is named at each) of every line."""
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            try:
                data = json.loads(line)
                ids = [int(token) for token in data.get("input_ids") or data["prompt_token_ids"]]
                named = next(read(data, len(ids)) for column, read in SHAPES.items() if column in data)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
                raise UserError(
                    f"{place} is of none of the known shapes ({type(error).__name__}: {error}): give input_ids beside"
                    " prompt_logprobs, target_token_ids and target_logprobs, or logprobs"
                ) from None
            if len(named) != len(ids):
                raise UserError(
                    f"{place} has {len(ids)} tokens and log-probabilities at {len(named)} places; give one for each"
                )
            yield place, ids, named


def _vllm(data: dict[str, Any], _: int) -> list[Named | None]:
    return [
        None if at is None else [(int(token), float(one["logprob"])) for token, one in at.items()]
        for at in data["prompt_logprobs"]
    ]


def _prepared(data: dict[str, Any], _: int) -> list[Named | None]:
    rows = zip(data["target_token_ids"], data["target_logprobs"], strict=True)
    there = [[(int(token), float(log)) for token, log in zip(*row, strict=True) if log > ABSENT] for row in rows]
    return [named or None for named in there]


def _last(data: dict[str, Any], length: int) -> list[Named | None]:
    found = [
        None if not at else [(int(str(one["token"]).removeprefix("token_id:")), float(one["logprob"])) for one in at]
        for at in data["logprobs"]
    ]
    return [None] * (length - len(found)) + found


SHAPES: dict[str, Callable[[dict[str, Any], int], list[Named | None]]] = {
    "prompt_logprobs": _vllm,
    "target_logprobs": _prepared,
    "logprobs": _last,
}


def _named(place: str, response: Sequence[Named | None], vocab_size: int) -> list[Named]:
    """What is named at each place of the response, the likeliest first."""
    rows = []
    for number, at in enumerate(response, 1):
        if not at:
            raise UserError(f"{place} names no tokens for the response's token number {number}")
        wrong = any(not 0 <= token < vocab_size or not math.isfinite(log) for token, log in at)
        if wrong or len(dict(at)) < len(at) or sum(math.exp(min(log, 1.0)) for _, log in at) > MOST:
            raise UserError(
                f"{place}: what stands at the response's token {number} are no probabilities over {vocab_size} tokens"
            )
        rows.append(sorted(at, key=lambda pair: -pair[1]))
    return rows


def _check_places(file: Path, texts: Sequence[tuple[tuple[int, ...], list[Named]]]) -> None:
    """Refuse rows that fit the tokens beside them far better than their own."""
    inner = [(written, rows, n) for written, rows in texts for n in range(1, len(written) - 1)]
    if len(inner) < ENOUGH:
        return
    shares = {
        shift: sum(math.exp(dict(rows[n + shift]).get(written[n], -math.inf)) for written, rows, n in inner)
        for shift in (0, 1, -1)
    }
    best = max(shares, key=lambda shift: shares[shift])
    if shares[best] > max(MUCH_BETTER * shares[0], LIKELY * len(inner)):
        raise UserError(
            f"{file}: its rows stand one {'before' if best < 0 else 'after'} the tokens that they are about; move them"
            " by one"
        )


def _signal(written: Sequence[int], rows: Sequence[Named], k: int) -> tuple[TopK, torch.Tensor]:
    """The `k` likeliest at each place, or as many as at the one with the fewest, and the written tokens."""
    k = min(k, *(len(row) for row in rows))
    ids_NK = torch.tensor([[token for token, _ in row[:k]] for row in rows])
    return TopK(ids_NK, torch.tensor([[log for _, log in row[:k]] for row in rows])), torch.tensor(written)
