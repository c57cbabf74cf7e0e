"""Import other tools' teacher log-probabilities into a recipe's cache, and export them: JSON lines, one text per line.

Three formats are read, each with `input_ids` (or `prompt_token_ids`) for prompt and response together:

- `prompt_logprobs`, as vLLM answers: for every token null, or {token id: {"logprob": nats}};
- `target_token_ids` and `target_logprobs`, as axolotl prepares them: for every token, the ids that might stand there;
- `logprobs`, as axolotl reads them: for the last tokens [{"token": "token_id:ID", "logprob": nats}].

In all of them, the numbers at a position are about the token at that position, given the tokens before it. The second
format is written; it loses nothing but the bucket (the probability that the named tokens leave). Not read:
DistillKit's compressed columns, whose packing was not confirmed.

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
from limbeck.config.rounds import without_rounds
from limbeck.data.batches import Row, make_batch
from limbeck.progress import Silent, StoppedError
from limbeck.runs.fit import prepared
from limbeck.runs.run import Run
from limbeck.signals.cache import SignalCache, ids_of, text_key
from limbeck.signals.forms import form_of
from limbeck.signals.sparse import TopK
from limbeck.storage.files import exclusive, user_path, write_text
from limbeck.training.setup import common_vocab_size
from limbeck.types import UserError, canonical_json

LARGEST_SUM = 1 + 1e-3  # of rounded probabilities
# shifted rows are refused if there are this many tokens, and at another position the rows fit the text this many times
# better and give its tokens at least this probability on average
LEAST_TOKENS = 16
TIMES_BETTER = 2
LEAST_FIT = 0.1
PADDING = -1e9  # the log-probability of an unused place: JSON has no infinity
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, StopIteration)
Named = list[tuple[int, float]]  # (token id, log-probability) of the tokens named at one position
Columns = dict[str, list[Any]]


def import_file(recipe: Recipe, folder: Path, file: Path) -> dict[str, int]:
    """Put a file's log-probabilities for this run's training text into its cache.

    The text must be there already: a corpus (which another tool has scored), or what `limbeck elicit` wrote.

    Returns:
        the number of `texts` in the run, how many of them the cache now `holds`, how many were `read` from the file,
        and how many lines were about `other` texts.

    Raises:
        UserError: a line that can't be read, numbers that are no probabilities, rows that are off by one, or no line
            about this run's text.
    """
    rows, cache = _open(recipe, folder)
    texts = {
        (*prompt, *response): (len(prompt), text_key(prompt, response))
        for row in rows
        for prompt, response in ids_of(make_batch([row]))
    }
    lengths = sorted({len(ids) for ids in texts})
    other = 0
    by_key: dict[str, tuple[tuple[int, ...], list[Named]]] = {}
    for place, ids, named in _read_lines(file):
        text = next((tuple(ids[:length]) for length in lengths if tuple(ids[:length]) in texts), None)
        if text is None:
            other += 1
            continue
        start, key = texts[text]
        if key not in cache:
            by_key[key] = text[start:], _sorted_rows(place, named[start : len(text)], cache.vocab_size)
    _refuse_shifted_rows(file, list(by_key.values()))
    with exclusive(cache.folder / "lock", wait=True):
        k = cache.form.server_tokens or 1
        for key, (response, rows_K) in by_key.items():
            cache.add([key], *_signal(response, rows_K, k), [len(response)])
        cache.flush()
    if not by_key and other:
        raise UserError(
            f"{file}: none of its {other} texts is one of this run's {len(texts)}: other prompts, template or tokenizer"
        )
    return {
        "texts": len(texts),
        "holds": sum(key in cache for _, key in texts.values()),
        "read": len(by_key),
        "other": other,
    }


def export_cache(recipe: Recipe, folder: Path, file: Path) -> dict[str, int]:
    """Write the cached log-probabilities of this run's training text, as axolotl's prepared columns.

    Returns:
        the number of `texts` written.

    Raises:
        UserError: the cache holds none of this run's texts.
    """
    rows, cache = _open(recipe, folder)
    lines = [line for row in rows if (line := _prepared_line(row, cache)) is not None]
    if not lines:
        raise UserError(f"{cache.folder} holds none of this run's texts; run `limbeck elicit` first")
    write_text(file, "".join(canonical_json(line) + "\n" for line in lines))
    return {"texts": len(lines)}


def _prepared_line(row: Row, cache: SignalCache) -> Columns | None:
    """One text as axolotl's columns; None if it is not in the cache."""
    batch = make_batch([row])
    prompt, response = next(ids_of(batch))
    if text_key(prompt, response) not in cache:
        return None
    signal = cache.view(batch).signal
    assert signal is not None
    ids_NK, log_prob_NK, count_N = (column.tolist() for column in signal.top_tokens())
    width = max(count_N)
    places = [(list(range(width)), [PADDING] * width, [0] * width)] * len(prompt)
    for ids_K, log_K, count in zip(ids_NK, log_prob_NK, count_N, strict=True):
        unused = width - count
        log_probs = [round(value, 6) for value in log_K[:count]]
        places.append((ids_K[:count] + [0] * unused, log_probs + [PADDING] * unused, [1] * count + [0] * unused))
    target_ids, target_logprobs, mask = (list(column) for column in zip(*places, strict=True))
    labels = [-100] * len(prompt) + response
    return {
        "input_ids": prompt + response,
        "attention_mask": [1] * len(labels),
        "labels": labels,
        "target_token_ids": target_ids,
        "target_logprobs": target_logprobs,
        "target_mask": mask,
    }


def _open(recipe: Recipe, folder: Path) -> tuple[list[Row], SignalCache]:
    """The run's training rows and its top-k cache."""
    form = recipe.teacher.cache
    if form is None or form_of(form).server_tokens is None:
        raise UserError("only a top-k cache can be imported or exported: set teacher.cache: {top_k: {k: 64}}")
    without_rounds(recipe.rounds, recipe.name, "name the recipe.yaml of one of its rounds, with --out of that round")
    run = Run(prepared(recipe), folder, Silent(), lambda: True)  # stops before it sends any request
    with exclusive(folder / ".lock"):
        run.claim()
    try:
        student = run.models.initial_student()
        rows = run.rows(run.text.training(), student)
    except StoppedError:
        raise UserError(f"{folder} does not hold its text yet; run `limbeck elicit` first, or use a corpus") from None
    teacher = run.models.server_scorer or run.models.teacher
    home = folder / "signals" if form.folder is None else user_path(form.folder)
    home.mkdir(parents=True, exist_ok=True)
    return rows, SignalCache(home, teacher.identity, common_vocab_size(student, teacher), form)


def _read_lines(file: Path) -> Iterator[tuple[str, list[int], list[Named | None]]]:
    """Yield (place for error messages, token ids, tokens named at each) for every line."""
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            try:
                data = json.loads(line)
                ids = [int(token) for token in data.get("input_ids") or data["prompt_token_ids"]]
                named = next(read(data, len(ids)) for column, read in FORMATS.items() if column in data)
            except MALFORMED as error:
                raise UserError(
                    f"{place} has none of the known formats ({type(error).__name__}: {error}): give input_ids with"
                    " prompt_logprobs, with target_token_ids and target_logprobs, or with logprobs"
                ) from None
            if len(named) != len(ids):
                raise UserError(
                    f"{place} has {len(ids)} tokens and log-probabilities at {len(named)} positions; give one for each"
                )
            yield place, ids, named


def _read_vllm(data: dict[str, Any], _: int) -> list[Named | None]:
    return [
        None if entry is None else [(int(token), float(facts["logprob"])) for token, facts in entry.items()]
        for entry in data["prompt_logprobs"]
    ]


def _read_prepared(data: dict[str, Any], _: int) -> list[Named | None]:
    rows = zip(data["target_token_ids"], data["target_logprobs"], strict=True)
    named = [[(int(token), float(log)) for token, log in zip(*row, strict=True) if log > PADDING] for row in rows]
    return [row or None for row in named]


def _read_last(data: dict[str, Any], length: int) -> list[Named | None]:
    rows = [
        [(int(str(choice["token"]).removeprefix("token_id:")), float(choice["logprob"])) for choice in choices]
        if choices
        else None
        for choices in data["logprobs"]
    ]
    return [None] * (length - len(rows)) + rows


FORMATS: dict[str, Callable[[dict[str, Any], int], list[Named | None]]] = {
    "prompt_logprobs": _read_vllm,
    "target_logprobs": _read_prepared,
    "logprobs": _read_last,
}


def _sorted_rows(place: str, response: Sequence[Named | None], vocab_size: int) -> list[Named]:
    """The tokens named at each response position, the likeliest first; UserError if they are no probabilities."""
    rows = []
    for number, named in enumerate(response, 1):
        if not named:
            raise UserError(f"{place} names no tokens for the response's token number {number}")
        is_wrong = any(not 0 <= token < vocab_size or not math.isfinite(log) for token, log in named)
        has_doubles = len(dict(named)) < len(named)
        if is_wrong or has_doubles or sum(math.exp(min(log, 1.0)) for _, log in named) > LARGEST_SUM:
            raise UserError(
                f"{place}: the numbers at the response's token {number} are no probabilities over {vocab_size} tokens"
            )
        rows.append(sorted(named, key=lambda pair: -pair[1]))
    return rows


def _refuse_shifted_rows(file: Path, texts: Sequence[tuple[tuple[int, ...], list[Named]]]) -> None:
    """Refuse rows that fit the tokens one position away far better than their own."""
    inner = [(response, rows, n) for response, rows in texts for n in range(1, len(response) - 1)]
    if len(inner) < LEAST_TOKENS:
        return
    fits = {
        shift: sum(math.exp(dict(rows[n + shift]).get(response[n], -math.inf)) for response, rows, n in inner)
        for shift in (0, 1, -1)
    }
    best = max(fits, key=lambda shift: fits[shift])
    if fits[best] > max(TIMES_BETTER * fits[0], LEAST_FIT * len(inner)):
        raise UserError(
            f"{file}: its rows are one {'before' if best < 0 else 'after'} the tokens that they are about; move them by"
            " one"
        )


def _signal(response: Sequence[int], rows: Sequence[Named], k: int) -> tuple[TopK, torch.Tensor]:
    """The `k` likeliest tokens at each position (fewer if a position names fewer), and the response's tokens."""
    k = min(k, *(len(row) for row in rows))
    ids_NK = torch.tensor([[token for token, _ in row[:k]] for row in rows])
    return TopK(ids_NK, torch.tensor([[log for _, log in row[:k]] for row in rows])), torch.tensor(response)
