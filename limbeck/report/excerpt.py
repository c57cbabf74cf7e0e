"""The answers that are embedded in a page as JSON: a part of the item files, of limited size.

However large the run, the page stays small: long texts are shortened first, then prompts are left out evenly. Both are
counted, so that the page can say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.storage.files import read_jsonl

ANSWER_BYTES = 3_200_000
LENS_BYTES = 700_000
LENGTHS = (4000, 1200, 400)
LENS_TOKENS = 400
FIRST = 24
FIRST_LENGTH = 1200

Item = dict[str, Any]


@dataclass(frozen=True)
class Excerpt:
    """Prompts with every system's answer.

    Attributes:
        systems: the names, in the order of each item's answers.
        items: {"id", "kind", "prompt", "answers": [[text, tokens, finished, passed, characters] or None, ...],
            "lens": {writer: [[token, nats, teacher's choices, student's choices], ...]}}. A choice is [text,
            probability or None]. Characters are those of the text before it was shortened.
        prompts: the number of prompts in the run.
        shortened: the number of answers here that were shortened.
        lenses_left_out: the number of prompts whose token lens did not fit.
    """

    systems: list[str]
    items: list[Item]
    prompts: int
    shortened: int
    lenses_left_out: int

    def first(self, systems: Sequence[str]) -> list[Item]:
        """The first prompts with the answers of `systems`, for browsers without scripts."""
        columns = [(name, self.systems.index(name)) for name in systems]
        return [
            item | {"answers": [(name, _shortened(item["answers"][column], FIRST_LENGTH)) for name, column in columns]}
            for item in self.items[:FIRST]
        ]


def read_excerpt(folder: Path, order: Sequence[str], only: Collection[str] | None = None) -> Excerpt | None:
    """The excerpt of an `evaluation` folder, or None if it has no answers.

    Args:
        order: the systems that come first, in this order; the others follow by name.
        only: the systems that are shown; by default all.
    """
    files = {file.stem.removeprefix("answers-"): file for file in sorted(folder.glob("answers-*.jsonl"))}
    files = {name: file for name, file in files.items() if only is None or name in only}
    systems = [*(name for name in order if name in files), *(name for name in files if name not in order)]
    answers = {name: {record["prompt_id"]: record for record in read_jsonl(files[name])} for name in systems}
    prompts = {record["prompt_id"]: record for record in read_jsonl(folder / "prompts.jsonl")}
    ids = list(dict.fromkeys([*prompts, *(prompt_id for records in answers.values() for prompt_id in records)]))
    ids = [prompt_id for prompt_id in ids if any(prompt_id in records for records in answers.values())]
    if not ids:
        return None
    lenses = _lenses(folder)
    ids.sort(key=lambda prompt_id: prompt_id not in lenses)
    items = [
        _item(prompt_id, prompts.get(prompt_id, {}), [answers[name].get(prompt_id) for name in systems])
        for prompt_id in ids
    ]
    shown = _fitting(items, sum(prompt_id in lenses for prompt_id in ids))
    left_out = _add_lenses(shown, lenses)
    shortened = sum(len(answer[0]) < answer[4] for item in shown for answer in item["answers"] if answer)
    return Excerpt(systems, shown, prompts=len(ids), shortened=shortened, lenses_left_out=left_out)


def embedded(value: Any) -> str:
    """JSON for a `<script>` element: no character in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _item(prompt_id: str, prompt: Item, records: Sequence[Item | None]) -> Item:
    some = next(record for record in records if record)
    answers = [
        (
            [record["text"], record.get("tokens"), record.get("finished"), record.get("passed"), len(record["text"])]
            if record
            else None
        )
        for record in records
    ]
    kind = prompt.get("kind") or some.get("kind") or ""
    return {"id": prompt_id, "kind": kind, "prompt": prompt.get("prompt", prompt_id), "answers": answers}


def _fitting(items: list[Item], first: int) -> list[Item]:
    """Shorten the texts until they fit into ANSWER_BYTES; if the shortest don't fit, leave out items evenly.

    The `first` items, which have a token lens, are always included.
    """
    cut = items
    for length in LENGTHS:
        cut = [_cut(item, length) for item in items]
        weights = [_weight(item) for item in cut]
        if sum(weights) <= ANSWER_BYTES:
            return cut
    rest = count = len(cut) - first
    places = list(range(len(cut)))
    while count and sum(weights[n] for n in places) > ANSWER_BYTES:
        count = count * 9 // 10
        places = [*range(first), *(first + n * rest // count for n in range(count))]
    return [cut[n] for n in places]


def _cut(item: Item, length: int) -> Item:
    prompt = item["prompt"] if len(item["prompt"]) <= length else item["prompt"][:length] + "…"
    return item | {"prompt": prompt, "answers": [_shortened(answer, length) for answer in item["answers"]]}


def _shortened(answer: list[Any] | None, length: int) -> list[Any] | None:
    return answer and [answer[0][:length], *answer[1:]]


def _weight(value: Any) -> int:
    return len(embedded(value).encode(errors="replace"))


def _lenses(folder: Path) -> dict[str, dict[str, list[Any]]]:
    lenses: dict[str, dict[str, list[Any]]] = {}
    for record in read_jsonl(folder / "lens.jsonl"):
        tokens = [_token(*token) for token in record["tokens"][:LENS_TOKENS]]
        lenses.setdefault(record["prompt_id"], {})[record["writer"]] = tokens
    return lenses


def _token(text: str, nats: float, teacher: Any, student: Any) -> list[Any]:
    shown = round(nats, 3) if nats is not None and math.isfinite(nats) else None
    return [text[:200], shown, _choices(teacher), _choices(student)]


def _choices(choices: Any) -> list[list[Any]]:
    """Choices as a list of [text, probability]. They are stored so, or as the text of the first choice alone."""
    if isinstance(choices, str):
        return [[choices[:80], None]]
    return [[text[:80], round(probability, 4) if math.isfinite(probability) else None] for text, probability in choices]


def _add_lenses(items: list[Item], lenses: dict[str, dict[str, list[Any]]]) -> int:
    """Add token lenses to the items while there is room. Returns how many did not fit."""
    room = LENS_BYTES
    left_out = 0
    for item in items:
        lens = lenses.get(item["id"], {})
        weight = _weight(lens) if lens else 0
        fits = weight <= room
        item["lens"] = lens if fits else {}
        room -= weight if fits else 0
        left_out += not fits
    return left_out
