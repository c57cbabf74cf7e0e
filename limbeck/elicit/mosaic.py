"""Mosaic-IT: several samples joined into one, with an instruction about the form of the answers, their order, or which
to leave out."""

from __future__ import annotations

import random
import re
from typing import Annotated

from pydantic import Field

from limbeck.elicit.flow import Pool, StepContext, Tally, answer_of, prompt_of, user
from limbeck.elicit.step import Estimate, LocalStep, register
from limbeck.types import Sample

FORMATS = {
    "numbers": ("Put the number of the task before each answer, as in `1. ...`.", "{number}. {answer}"),
    "answer": ("Begin each answer with `Answer N:`, where N is the task's number.", "Answer {number}: {answer}"),
    "brackets": (
        "Put the task's number in square brackets before each answer, as in `[1] ...`.",
        "[{number}] {answer}",
    ),
    "tags": ("Put each answer between `<answer>` and `</answer>`.", "<answer>{answer}</answer>"),
    "begin_end": ("Write `BEGIN` before and `END` after each answer.", "BEGIN {answer} END"),
}
ORDERS = {
    "reverse": "Do the tasks from the last to the first.",
    "alphabetical": "Do the tasks in the alphabetical order of their texts.",
    "alphabetical_reverse": "Do the tasks in the reverse alphabetical order of their texts.",
    "shortest": "Do the tasks from the one with the fewest characters to the one with the most.",
    "longest": "Do the tasks from the one with the most characters to the one with the fewest.",
    "fewest_words": "Do the tasks from the one with the fewest words to the one with the most.",
    "most_words": "Do the tasks from the one with the most words to the one with the fewest.",
    "odd_even": "Do the tasks with odd numbers first, then those with even numbers.",
    "even_odd": "Do the tasks with even numbers first, then those with odd numbers.",
    "fixed": "Do the tasks in this order: {order}.",
}
MASKS = {
    "fixed": "Leave out these tasks: {left_out}.",
    "longest": "Leave out the {count} tasks with the most characters.",
    "shortest": "Leave out the {count} tasks with the fewest characters.",
    "odd": "Leave out the tasks with odd numbers.",
    "even": "Leave out the tasks with even numbers.",
}
PLAIN = "Do all of these tasks, one after the other."


def ordered(name: str, texts: list[str], rng: random.Random) -> list[int]:
    """The places of the tasks in this order; equal ones stay as they stand."""
    places = list(range(len(texts)))
    keys = {
        "alphabetical": lambda place: texts[place],
        "shortest": lambda place: len(texts[place]),
        "longest": lambda place: -len(texts[place]),
        "fewest_words": lambda place: len(texts[place].split()),
        "most_words": lambda place: -len(texts[place].split()),
        "odd_even": lambda place: place % 2,
        "even_odd": lambda place: -(place % 2),
    }
    if name == "reverse":
        return places[::-1]
    if name == "alphabetical_reverse":
        return sorted(places, key=lambda place: texts[place], reverse=True)
    if name == "fixed":
        rng.shuffle(places)
        return places
    return sorted(places, key=keys[name])


def left_out(name: str, texts: list[str], rng: random.Random) -> list[int]:
    """The places of the tasks to leave out: 10 to 50 % of them, or the odd or even ones. At least one of two or more,
    and never all."""
    places = list(range(len(texts)))
    count = min(len(texts) - 1, max(1, round(rng.uniform(0.1, 0.5) * len(texts))))
    if name in ("odd", "even"):
        return places[0 if name == "odd" else 1 :: 2]
    if name == "fixed":
        return sorted(rng.sample(places, count))
    ranked = sorted(places, key=lambda place: (-len(texts[place]) if name == "longest" else len(texts[place]), place))
    return sorted(ranked[:count])


@register("mosaic")
class Mosaic(LocalStep):
    """Joins k ~ U{1..`most`} samples into one, in `passes` over the pool, with one drawn instruction: the form of the
    answers, their order, or which tasks to leave out (in our own words). Where k is 1 the sample stays as it is. A
    mosaic has at most `words` words; the paper limits tokens (2,000)."""

    kind = "transform"
    paper = "Li et al., arXiv:2405.13326"
    passes: Annotated[int, Field(ge=1)] = 4
    most: Annotated[int, Field(ge=2, le=50)] = 10
    words: Annotated[int, Field(ge=20)] = 1200

    def apply(self, pool: Pool, context: StepContext, tally: Tally) -> Pool:
        single_turn = []
        for sample in pool:
            if answer_of(sample) is None or len(sample.messages) != 2:
                tally.drop("not one question with its answer", prompt_of(sample))
            elif sample.meta.get("finish") == "length":
                tally.drop("answer: length", answer_of(sample) or "")
            else:
                single_turn.append(sample)
        mosaics: Pool = []
        for turn in range(self.passes):
            rng = context.rng("pass", turn)
            queue = list(single_turn)
            rng.shuffle(queue)
            while queue:
                group = self._take_group(queue, rng)
                joined = group[0] if len(group) == 1 else _joined(group, rng, f"{turn}/{len(mosaics)}")
                mosaics.append(joined)
                tally.add("joined" if len(group) > 1 else "alone")
        return mosaics

    def _take_group(self, queue: Pool, rng: random.Random) -> Pool:
        """Take samples off the front of the queue: a drawn number, or as many as fit."""
        count = rng.randint(1, self.most)
        group = [queue.pop(0)]
        size = _word_count(group[0])
        while queue and len(group) < count and size + _word_count(queue[0]) <= self.words:
            size += _word_count(queue[0])
            group.append(queue.pop(0))
        return group

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=max(1, round(self.passes * samples / ((1 + self.most) / 2))))


def _joined(group: Pool, rng: random.Random, name: str) -> Sample:
    texts = [prompt_of(sample).strip() for sample in group]
    answers = [(answer_of(sample) or "").strip() for sample in group]
    strategy = rng.choice(("format", "order", "mask"))
    form = "{answer}"
    places = list(range(len(group)))
    if strategy == "format":
        words, form = FORMATS[rng.choice(sorted(FORMATS))]
        instruction = f"{PLAIN} {words}"
    elif strategy == "order":
        order = rng.choice(sorted(ORDERS))
        places = ordered(order, texts, rng)
        instruction = ORDERS[order].replace("{order}", _numbers(places))
    else:
        mask = rng.choice(sorted(MASKS))
        masked = left_out(mask, texts, rng)
        places = [place for place in places if place not in masked]
        words = MASKS[mask].replace("{left_out}", _numbers(masked)).replace("{count}", str(len(masked)))
        instruction = f"{PLAIN} {words}"
    tasks = "\n\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    answer = "\n\n".join(_formatted(form, place + 1, answers[place]) for place in places)
    meta = {"prompt_id": f"mosaic-{name}", "kind": "mosaic", "mosaic": strategy, "finish": "ok"}
    messages = (user(f"{instruction}\n\n{tasks}"), {"role": "assistant", "content": answer})
    return Sample(messages, "mosaic", parents=tuple(sample.id for sample in group), meta=meta)


def _numbers(places: list[int]) -> str:
    return ", ".join(str(place + 1) for place in places)


def _formatted(form: str, number: int, answer: str) -> str:
    return re.sub(r"\{(number|answer)\}", lambda match: str(number) if match[1] == "number" else answer, form)


def _word_count(sample: Sample) -> int:
    return sum(len(message["content"].split()) for message in sample.messages)
