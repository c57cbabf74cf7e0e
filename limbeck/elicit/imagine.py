"""Prompts out of nothing but a model's own idea of its users, of a person, of a topic, or of a text that would answer
them."""

from __future__ import annotations

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
    answered,
    ask,
    finished,
    new_prompt,
    prompt_of,
    rewritten,
    scored,
    user,
)
from limbeck.elicit.similar import Novelty
from limbeck.elicit.wording import fill, first_number
from limbeck.types import Message, Sample, Sampling, UserError

ROLES = ("user", "assistant", "system")
KINDS = {
    "instruction": "Write a request that {who} would make to an assistant.",
    "math": (
        "Write a math word problem that {who} would meet in everyday life or work. It must have one number as its"
        " answer."
    ),
    "logic": "Write a logic puzzle set in the world of {who}. It must have one answer.",
    "knowledge": "Write a question that {who} would ask to learn something of their field.",
}
ABOUT = "Write one question or task about this topic for an assistant, and nothing else.\n\nTopic: {topic}"
ANSWERED_BY = (
    "Below is a text. Write the request to which this text would be a perfect answer. Write the request and nothing"
    " else.\n\nText: {text}\n\nRequest:"
)
HOW_GOOD = (
    "How well does the answer fit the request? 1: not at all, 3: in part, 5: a perfect answer by an expert. Say one"
    " digit.\n\nRequest: {prompt}\n\nAnswer: {answer}\n\nDigit:"
)


class Magpie(Section):
    """The writer is given the beginning of a user's turn in its own chat format and nothing more, and so writes what it
    takes users to ask; then it answers, greedily. The user's turn ends at its first line break, as in the original. The
    pool it is given does not
    matter: `count` turns are asked for. The paper's tags by other models (quality, difficulty, reward) are left to
    other steps."""

    kind: ClassVar[Kind] = "expand"
    paper: ClassVar[str] = "Xu et al., arXiv:2406.08464"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "raw"})
    count: Annotated[int, Field(ge=1)] = 100
    header: str | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    prompt_tokens: Tokens = 96
    max_tokens: Tokens = 256
    least_words: Annotated[int, Field(ge=1)] = 3
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7

    def run(self, _: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        header = self.header if self.header is not None else scene.header
        if header is None:
            raise UserError(
                "magpie: how this writer's chat format begins a user's turn is not known; give its text in `header`"
            )
        sampling = Sampling(self.temperature, self.top_p, self.prompt_tokens, stop=("\n",))
        turns = yield from ask([scene.request((), sampling, number, raw=header) for number in range(self.count)])
        known = Novelty(self.threshold)
        prompts = list[Sample]()
        for turn, whole in zip(turns, finished(turns, tally), strict=True):
            text = (answer_of(turn) or "").strip()
            if not whole:
                continue
            if text.lower().startswith(ROLES):
                tally.drop("speaks in a role's name", text)
            elif len(text.split()) < self.least_words:
                tally.drop("too short", text)
            elif not known.add(text):
                tally.drop("like another one", text)
            else:
                prompts.append(new_prompt(text, [turn], turn.writer, kind="magpie"))
        tally.facts["prompts"] = len(prompts)
        replies = yield from ask(
            [scene.request(prompt.messages, Sampling(0.0, 1.0, self.max_tokens)) for prompt in prompts]
        )
        return [
            answered(p, reply)
            for p, reply, whole in zip(prompts, replies, finished(replies, tally), strict=True)
            if whole
        ]

    def bill(self, _: int) -> Bill:
        return Bill(
            2 * self.count, int(self.count * (self.prompt_tokens + self.max_tokens) * ANSWER_SHARE), given=self.count
        )


class Imagined(Section):
    """For every prompt of the pool, which names a person (`from: personas`) or a topic (`from: topics`), so many new
    prompts as that person would write them, or about that topic."""

    kind: ClassVar[Kind] = "expand"
    paper: ClassVar[str] = "personas: Ge et al., arXiv:2406.20094; topics: Wu et al., arXiv:2304.14402"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    of: Literal["personas", "topics"] = "personas"
    kinds: Annotated[tuple[Literal["instruction", "math", "logic", "knowledge"], ...], Field(min_length=1)] = (
        "instruction",
    )
    each: Annotated[int, Field(ge=1)] = 1
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: Tokens = 128

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        kinds: tuple[str, ...] = self.kinds if self.of == "personas" else ("topic",)
        turns = [(sample, kind, number) for sample in pool for kind in kinds for number in range(self.each)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        asked = [scene.request(_imagine(sample, kind), sampling, number) for sample, kind, number in turns]
        replies = yield from ask(asked)
        known = Novelty(self.threshold)
        found = list[Sample]()
        for (sample, kind, _), reply, whole in zip(turns, replies, finished(replies, tally), strict=True):
            text = (answer_of(reply) or "").strip().strip('"').strip()
            if whole and not known.add(text):
                tally.drop("like another one", text)
            elif whole:
                found.append(new_prompt(text, [sample, reply], reply.writer, kind=kind))
        return found

    def bill(self, taken: int) -> Bill:
        times = taken * self.each * (len(self.kinds) if self.of == "personas" else 1)
        return Bill(times, int(times * self.max_tokens * ANSWER_SHARE), given=times)


def _imagine(sample: Sample, kind: str) -> tuple[Message, ...]:
    if kind == "topic":
        return (user(fill(ABOUT, topic=prompt_of(sample))),)
    return (user(fill(KINDS[kind], who=prompt_of(sample).rstrip(".")) + " Write it and nothing else."),)


class Backtranslate(Section):
    """The pool's prompts are texts; the writer names the request that each would answer, and the text becomes the
    answer (Humback). Then it judges the pair from 1 to 5, and what has fewer than `least` goes. The paper trains a
    model for the first and iterates the second; here the writer is asked."""

    kind: ClassVar[Kind] = "expand"
    paper: ClassVar[str] = "Li et al., arXiv:2308.06259"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    least: Annotated[int, Field(ge=1, le=5)] = 5
    temperature: Temperature = 0.7
    top_p: TopP = 0.9
    max_tokens: Tokens = 96

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask(
            [scene.request((user(fill(ANSWERED_BY, text=prompt_of(sample))),), sampling) for sample in pool]
        )
        pairs = []
        for sample, reply, whole in zip(pool, replies, finished(replies, tally), strict=True):
            if whole:
                prompt = new_prompt(
                    (answer_of(reply) or "").strip().strip('"'), [sample, reply], reply.writer, kind="backtranslated"
                )
                pairs.append(rewritten(prompt, prompt_of(sample), "corpus", finish="ok"))
        verdicts = yield from ask([scene.request((user(_how_good(pair)),), Sampling(0.0, 1.0, 8)) for pair in pairs])
        found: Pool = []
        for pair, verdict in zip(pairs, verdicts, strict=True):
            value = first_number(answer_of(verdict) or "", 1, 5)
            if value is None:
                tally.drop("no score", answer_of(verdict) or "")
            elif value < self.least:
                tally.drop(f"score below {self.least}", prompt_of(pair))
            else:
                found.append(scored(pair, fit=float(value)))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(2 * taken, int(taken * (self.max_tokens * ANSWER_SHARE + 4)), given=taken)


def _how_good(pair: Sample) -> str:
    return fill(HOW_GOOD, prompt=prompt_of(pair), answer=answer_of(pair) or "")


STEPS: dict[str, type[Section]] = {"magpie": Magpie, "imagine": Imagined, "backtranslate": Backtranslate}
