"""Mosaic-IT: several samples put into one, with an instruction about the form, the order or the leaving out of the
answers."""

from __future__ import annotations

import random
import re
from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answer_of, prompt_of, user
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


def ordered(name: str, texts: list[str], noise: random.Random) -> list[int]:
    """The tasks' places in this order; equal ones as they stand."""
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
        noise.shuffle(places)
        return places
    return sorted(places, key=keys[name])


def left_out(name: str, texts: list[str], noise: random.Random) -> list[int]:
    """The places of the tasks that are left out: 10 to 50 % of them, or those of a kind; never all, and at least one of
    two or more."""
    places = list(range(len(texts)))
    count = min(len(texts) - 1, max(1, round(noise.uniform(0.1, 0.5) * len(texts))))
    if name in ("odd", "even"):
        return places[0 if name == "odd" else 1 :: 2]
    if name == "fixed":
        return sorted(noise.sample(places, count))
    ranked = sorted(places, key=lambda place: (-len(texts[place]) if name == "longest" else len(texts[place]), place))
    return sorted(ranked[:count])


class Mosaic(Section):
    """Joins k ~ U{1..`most`} samples into one, `passes` times over the pool: with an instruction that sets the form of
    the answers, their order, or which tasks are left out (one of the three, drawn), in our own words. Lone samples stay
    as they are. A mosaic is cut short where it would have more than `words` words; the paper counts tokens (2,000)."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = "Li et al., arXiv:2405.13326"
    needs: ClassVar[frozenset[str]] = frozenset()
    passes: Annotated[int, Field(ge=1)] = 4
    most: Annotated[int, Field(ge=2, le=50)] = 10
    words: Annotated[int, Field(ge=20)] = 1200

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        whole = []
        for sample in pool:
            if answer_of(sample) is None or len(sample.messages) != 2:
                tally.drop("not one question with its answer", prompt_of(sample))
            else:
                whole.append(sample)
        found: Pool = []
        for turn in range(self.passes):
            noise = scene.draw("pass", turn)
            order = list(whole)
            noise.shuffle(order)
            while order:
                group = self._group(order, noise)
                found.append(group[0] if len(group) == 1 else self._joined(group, noise, f"{turn}/{len(found)}"))
                tally.add("joined" if len(group) > 1 else "alone")
        return found

    def _group(self, order: Pool, noise: random.Random) -> Pool:
        """The next samples off the list, as many as drawn, or as fit."""
        wanted = noise.randint(1, self.most)
        group = [order.pop(0)]
        size = 0
        size = _size(group[0])
        while order and len(group) < wanted and size + _size(order[0]) <= self.words:
            size += _size(order[0])
            group.append(order.pop(0))
        return group

    def _joined(self, group: Pool, noise: random.Random, name: str) -> Sample:
        texts = [prompt_of(sample).strip() for sample in group]
        answers = [(answer_of(sample) or "").strip() for sample in group]
        strategy = noise.choice(("format", "order", "mask"))
        told = PLAIN
        form = "{answer}"
        places = list(range(len(group)))
        if strategy == "format":
            words, form = FORMATS[noise.choice(sorted(FORMATS))]
            told = f"{PLAIN} {words}"
        elif strategy == "order":
            how = noise.choice(sorted(ORDERS))
            places = ordered(how, texts, noise)
            told = ORDERS[how].replace("{order}", ", ".join(str(place + 1) for place in places))
        else:
            how = noise.choice(sorted(MASKS))
            gone = left_out(how, texts, noise)
            places = [place for place in places if place not in gone]
            named = (
                MASKS[how]
                .replace("{left_out}", ", ".join(str(place + 1) for place in gone))
                .replace("{count}", str(len(gone)))
            )
            told = f"{PLAIN} {named}"
        tasks = "\n\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
        said = "\n\n".join(_formed(form, place + 1, answers[place]) for place in places)
        meta = {"prompt_id": f"mosaic-{name}", "kind": "mosaic", "mosaic": strategy, "finish": "ok"}
        messages = (user(f"{told}\n\n{tasks}"), {"role": "assistant", "content": said})
        return Sample(messages, "mosaic", None, tuple(sample.id for sample in group), meta)

    def bill(self, taken: int) -> Bill:
        return Bill(given=max(1, round(self.passes * taken / ((1 + self.most) / 2))))


def _formed(form: str, number: int, answer: str) -> str:
    return re.sub(r"\{(number|answer)\}", lambda found: str(number) if found[1] == "number" else answer, form)


def _size(sample: Sample) -> int:
    return sum(len(message["content"].split()) for message in sample.messages)


STEPS: dict[str, type[Section]] = {"mosaic": Mosaic}
