"""MetaMath's rewriting of questions that have a number as their answer: in other words, as a statement, and
backwards."""

from __future__ import annotations

import re
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    complete_replies,
    inherited,
    new_prompt,
    prompt_of,
    said_by,
    user,
)
from limbeck.elicit.numbers import WrittenNumber, final_number, numbers_in
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.thinking import after_thinking
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
INHERITED = ("kind", "task", "weight")

RewriteWay = Literal["rephrase", "self_verification", "backward"]


def numbers(text: str) -> list[str]:
    """The numbers in a text in plain form, sorted."""
    return sorted(number.plain for number in numbers_in(text))


def right_number(sample: Sample) -> str | None:
    """The number that is the right answer, from the sample's check or the corpus; None if there is none."""
    check = sample.meta.get("check") or {}
    if check.get("type") == "number":
        return f"{float(check['answer']):.15g}"
    number = final_number(after_thinking(str((sample.meta.get("answers") or [""])[0])) or "")
    return number.plain if number else None


@register("rewrite")
class Rewrite(AskingStep):
    """Makes new questions from old ones whose answer is a number (MetaMath); answer them with `rationale` and keep what
    `verify` passes. `rephrase`: in other words, with the same numbers. `backward` (FOBAR): a number in the question
    becomes x, the answer is stated, and x is asked for; no model is asked. `self_verification`: the model joins
    question and answer into a statement, and a number in it becomes x. The last two have a new check. `originals` keeps
    the old questions."""

    kind = "curate"
    paper = "Yu et al., arXiv:2309.12284"
    how: Annotated[tuple[RewriteWay, ...], Field(min_length=1)] = ("rephrase", "self_verification", "backward")
    each: Annotated[int, Field(ge=1)] = 1
    originals: bool = True
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: TokenCount = 160

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        solved = [(sample, answer) for sample in pool if (answer := right_number(sample)) is not None]
        for sample in pool:
            if right_number(sample) is None:
                tally.drop("no number as its answer", prompt_of(sample))
        questions = [sample for sample, _ in solved] if self.originals else []
        if "rephrase" in self.how:
            questions += yield from self._rephrase(solved, context, tally)
        if "self_verification" in self.how:
            questions += yield from self._state(solved, context, tally)
        if "backward" in self.how:
            for sample, answer in solved:
                text = prompt_of(sample)
                hidden = _choose_number(text, context.rng("backward", sample.id), tally)
                if hidden is not None:
                    questions.append(
                        _masked(sample, text, hidden, question=fill(KNOWING, answer=answer), how="backward")
                    )
        return questions

    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)

    def _rephrase(self, solved: list[tuple[Sample, str]], context: StepContext, tally: Tally) -> Questions[Pool]:
        turns = [(sample, number) for sample, _ in solved for number in range(self.each)]
        replies = yield from ask(
            [
                context.request((user(fill(REPHRASE, question=prompt_of(sample))),), self._sampling(), number)
                for sample, number in turns
            ]
        )
        questions: Pool = []
        for (sample, _), reply in complete_replies(turns, replies, tally):
            text = said_by(reply).strip()
            if numbers(text) != numbers(prompt_of(sample)):
                tally.drop("numbers changed", text)
            elif text.casefold() == prompt_of(sample).casefold():
                tally.drop("the same words", text)
            else:
                meta = inherited(sample, *INHERITED, "check", "answers") | {"rewritten": "rephrase"}
                questions.append(new_prompt(text, [sample, reply], reply.writer, **meta))
        return questions

    def _state(self, solved: list[tuple[Sample, str]], context: StepContext, tally: Tally) -> Questions[Pool]:
        texts = [fill(STATEMENT, question=prompt_of(sample), answer=answer) for sample, answer in solved]
        replies = yield from ask([context.request((user(text),), self._sampling()) for text in texts])
        questions: Pool = []
        for (sample, answer), reply in complete_replies(solved, replies, tally):
            statement = said_by(reply).strip().partition("\n")[0]
            if answer not in numbers(statement):
                tally.drop("the answer is not in the statement", statement)
                continue
            text = f"{_without_question(prompt_of(sample))} {statement}".strip()
            rng = context.rng("self_verification", sample.id)
            hidden = _choose_number(text, rng, tally, keep=answer)
            if hidden is not None:
                questions.append(_masked(sample, text, hidden, question=MASKED, how="self_verification"))
        return questions

    def estimate(self, samples: int) -> Estimate:
        requests = samples * (self.each * ("rephrase" in self.how) + ("self_verification" in self.how))
        unasked = samples * (("backward" in self.how) + self.originals)
        return Estimate(requests, int(requests * self.max_tokens * ANSWER_SHARE), samples=requests + unasked)

    def writes(self) -> frozenset[str]:
        return frozenset({"rewritten"})


def _choose_number(text: str, rng: Random, tally: Tally, keep: str | None = None) -> WrittenNumber | None:
    """A drawn number in the text, other than `keep`; None, and counted as dropped, if there is none."""
    places = [number for number in numbers_in(text) if number.plain != keep]
    if not places:
        tally.drop("no number to mask", text)
        return None
    return rng.choice(places)


def _masked(sample: Sample, text: str, hidden: WrittenNumber, *, question: str, how: RewriteWay) -> Sample:
    """A prompt with x in place of the hidden number of the text, and a check for that number."""
    value = hidden.value
    check = {"type": "number", "answer": int(value) if value.is_integer() else value}
    meta = inherited(sample, *INHERITED) | {"rewritten": how, "check": check}
    masked = f"{text[: hidden.start]}x{text[hidden.end :]}\n{question}"
    return new_prompt(masked, [sample], sample.writer, **meta)


def _without_question(text: str) -> str:
    """The text without its last sentence, if that is a question."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(sentences[:-1]) if sentences[-1].endswith("?") else text
