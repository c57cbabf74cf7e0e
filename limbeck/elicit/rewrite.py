"""MetaMath's rewritings of questions with a known number as their answer: in other words, turned into a statement,
asked backwards."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.answer import ANSWER_SHARE, Temperature, Tokens, TopP
from limbeck.elicit.flow import (
    Asking,
    Bill,
    Kind,
    Pool,
    Scene,
    Tally,
    answer_of,
    ask,
    finished,
    new_prompt,
    prompt_of,
    user,
)
from limbeck.elicit.verify import NUMBER
from limbeck.elicit.wording import fill
from limbeck.types import Sample, Sampling

REPHRASE = (
    "Say this problem in other words. Keep every number and everything that is needed to solve it, and don't solve"
    " it.\n\nProblem: {question}\n\nIn other words:"
)
STATEMENT = (
    "Turn the question and its answer into one statement.\n\nQuestion: How many legs do three dogs have? Answer:"
    " 12\nStatement: Three dogs have 12 legs.\n\nQuestion: {question} Answer: {answer}\nStatement:"
)
MASKED = "What is the value of the unknown number x?"
KNOWING = "If we know that the answer to the question above is {answer}, what is the value of the unknown number x?"

Way = Literal["rephrase", "self_verification", "backward"]


def numbers(text: str) -> list[str]:
    """The numbers of a text in plain form, sorted."""
    return sorted(f"{float(found.replace(',', '')):g}" for found in NUMBER.findall(text))


def gold(sample: Sample) -> str | None:
    """The number that is the right answer, as the check or the given answers have it."""
    check = sample.meta.get("check") or {}
    if check.get("type") == "number":
        return f"{float(check['answer']):g}"
    found = NUMBER.findall(str((sample.meta.get("answers") or [""])[0]))
    return f"{float(found[-1].replace(',', '')):g}" if found else None


class Rewrite(Section):
    """New questions out of old ones whose answer is a number (MetaMath); answer them with `rationale` and keep what
    `verify` passes. `rephrase`: in other words, all numbers kept. `backward` (FOBAR): one number of the question
    becomes x, the answer is told, and x is asked for; nothing is asked of the writer. `self_verification`: the writer
    makes a statement of question and answer, in which x takes a number's place. Samples whose check changes get a new
    one. The old questions stay with `originals`."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "Yu et al., arXiv:2309.12284"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    how: Annotated[tuple[Way, ...], Field(min_length=1)] = ("rephrase", "self_verification", "backward")
    each: Annotated[int, Field(ge=1)] = 1
    originals: bool = True
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: Tokens = 160

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        known = [(sample, answer) for sample in pool if (answer := gold(sample)) is not None]
        for sample in pool:
            if gold(sample) is None:
                tally.drop("no number as its answer", prompt_of(sample))
        found = [sample for sample, _ in known] if self.originals else []
        if "rephrase" in self.how:
            found += yield from self._rephrased(known, scene, tally)
        if "self_verification" in self.how:
            found += yield from self._stated(known, scene, tally)
        if "backward" in self.how:
            for sample, answer in known:
                found += self._masked(sample, prompt_of(sample), fill(KNOWING, answer=answer), scene, tally, "backward")
        return found

    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)

    def _rephrased(self, known: list[tuple[Sample, str]], scene: Scene, tally: Tally) -> Asking[Pool]:
        turns = [(sample, number) for sample, _ in known for number in range(self.each)]
        asked = [
            scene.request((user(fill(REPHRASE, question=prompt_of(sample))),), self._sampling(), number)
            for sample, number in turns
        ]
        replies = yield from ask(asked)
        found: Pool = []
        for (sample, _), reply, whole in zip(turns, replies, finished(replies, tally), strict=True):
            text = (answer_of(reply) or "").strip()
            if whole and numbers(text) != numbers(prompt_of(sample)):
                tally.drop("numbers changed", text)
            elif whole and text.casefold() == prompt_of(sample).casefold():
                tally.drop("the same words", text)
            elif whole:
                kept = {
                    key: sample.meta[key]
                    for key in ("kind", "task", "weight", "check", "answers")
                    if key in sample.meta
                }
                found.append(new_prompt(text, [sample, reply], reply.writer, **kept, rewritten="rephrase"))
        return found

    def _stated(self, known: list[tuple[Sample, str]], scene: Scene, tally: Tally) -> Asking[Pool]:
        asked = [
            scene.request((user(fill(STATEMENT, question=prompt_of(s), answer=answer)),), self._sampling())
            for s, answer in known
        ]
        replies = yield from ask(asked)
        found: Pool = []
        for (sample, answer), reply, whole in zip(known, replies, finished(replies, tally), strict=True):
            text = (answer_of(reply) or "").strip().partition("\n")[0]
            if whole and answer not in numbers(text):
                tally.drop("the answer is not in the statement", text)
            elif whole:
                body = f"{_without_question(prompt_of(sample))} {text}".strip()
                found += self._masked(sample, body, MASKED, scene, tally, "self_verification", keep=answer)
        return found

    def _masked(
        self, sample: Sample, text: str, question: str, scene: Scene, tally: Tally, how: str, keep: str | None = None
    ) -> Pool:
        """The text with one of its numbers, drawn, as x; not the one that is the answer, where that stands in it."""
        places = [found for found in NUMBER.finditer(text) if f"{float(found[0].replace(',', '')):g}" != keep]
        if not places:
            tally.drop("no number to mask", text)
            return []
        hidden = scene.draw(how, sample.id).choice(places)
        value = float(hidden[0].replace(",", ""))
        asked = f"{text[: hidden.start()]}x{text[hidden.end() :]}\n{question}"
        meta = {key: sample.meta[key] for key in ("kind", "task", "weight") if key in sample.meta}
        check = {"type": "number", "answer": int(value) if value.is_integer() else value}
        return [
            replace(
                made := new_prompt(asked, [sample], sample.writer, **meta, rewritten=how),
                meta=made.meta | {"check": check},
            )
        ]

    def bill(self, taken: int) -> Bill:
        asked = taken * (self.each * ("rephrase" in self.how) + ("self_verification" in self.how))
        return Bill(
            asked,
            int(asked * self.max_tokens * ANSWER_SHARE),
            given=asked + taken * (("backward" in self.how) + self.originals),
        )


def _without_question(text: str) -> str:
    """The text without its last sentence, where that asks."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(sentences[:-1]) if sentences[-1].endswith("?") else text


STEPS: dict[str, type[Section]] = {"rewrite": Rewrite}
