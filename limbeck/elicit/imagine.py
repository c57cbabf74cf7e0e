"""Prompts that a model makes up: from nothing, for a person or a topic, or for a text that would answer them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    complete_replies,
    new_prompt,
    prompt_of,
    said_by,
    user,
    with_answer,
    with_new_answer,
    with_scores,
)
from limbeck.elicit.similar import Novelty
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, Estimate, Temperature, TokenCount, TopP, register
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


@register("magpie")
class Magpie(AskingStep):
    """Gives the model the beginning of a user's turn in its own chat format and nothing more, so that it writes what it
    expects users to ask; then it answers that, greedily. The user's turn ends at its first line break, as in the
    original. The pool doesn't matter: `count` turns are asked for. The paper also tags the prompts with other models
    (quality, difficulty, reward); that is left to other steps."""

    kind = "expand"
    paper = "Xu et al., arXiv:2406.08464"
    needs = frozenset({"text", "raw"})
    count: Annotated[int, Field(ge=1)] = 100
    header: str | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    prompt_tokens: TokenCount = 96
    max_tokens: TokenCount = 256
    least_words: Annotated[int, Field(ge=1)] = 3
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7

    def run(self, _: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        header = self.header if self.header is not None else context.header
        if header is None:
            raise UserError(
                "magpie: how this writer's chat format begins a user's turn is not known; give its text in `header`"
            )
        sampling = Sampling(self.temperature, self.top_p, self.prompt_tokens, stop=("\n",))
        requests = [context.request((), sampling, number, raw=header) for number in range(self.count)]
        turns = yield from ask(requests)
        novelty = Novelty(self.threshold)
        prompts: Pool = []
        for _request, turn in complete_replies(requests, turns, tally):
            text = said_by(turn).strip()
            if text.lower().startswith(ROLES):
                tally.drop("speaks in a role's name", text)
            elif len(text.split()) < self.least_words:
                tally.drop("too short", text)
            elif not novelty.add(text):
                tally.drop("like another one", text)
            else:
                prompts.append(new_prompt(text, [turn], turn.writer, kind="magpie"))
        tally.facts["prompts"] = len(prompts)
        replies = yield from ask(
            [context.request(prompt.messages, Sampling(0.0, 1.0, self.max_tokens)) for prompt in prompts]
        )
        return [with_answer(prompt, reply) for prompt, reply in complete_replies(prompts, replies, tally)]

    def estimate(self, _: int) -> Estimate:
        tokens = self.count * (self.prompt_tokens + self.max_tokens)
        return Estimate(2 * self.count, int(tokens * ANSWER_SHARE), samples=self.count)


@register("imagine")
class Imagine(AskingStep):
    """Asks for new prompts that a person would write (`of: personas`) or that are about a topic (`of: topics`), `each`
    for every person or topic in the pool, and of every one of the `kinds` for persons. Drops prompts that resemble
    another."""

    kind = "expand"
    paper = "personas: Ge et al., arXiv:2406.20094; topics: Wu et al., arXiv:2304.14402"
    of: Literal["personas", "topics"] = "personas"
    kinds: Annotated[tuple[Literal["instruction", "math", "logic", "knowledge"], ...], Field(min_length=1)] = (
        "instruction",
    )
    each: Annotated[int, Field(ge=1)] = 1
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: TokenCount = 128

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        kinds: tuple[str, ...] = self.kinds if self.of == "personas" else ("topic",)
        turns = [(sample, kind, number) for sample in pool for kind in kinds for number in range(self.each)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask(
            [context.request(_question(sample, kind), sampling, number) for sample, kind, number in turns]
        )
        novelty = Novelty(self.threshold)
        prompts: Pool = []
        for (sample, kind, _), reply in complete_replies(turns, replies, tally):
            text = said_by(reply).strip().strip('"').strip()
            if novelty.add(text):
                prompts.append(new_prompt(text, [sample, reply], reply.writer, kind=kind))
            else:
                tally.drop("like another one", text)
        return prompts

    def estimate(self, samples: int) -> Estimate:
        kinds = len(self.kinds) if self.of == "personas" else 1
        return Estimate.of_answers(samples * self.each * kinds, self.max_tokens)


def _question(sample: Sample, kind: str) -> tuple[Message, ...]:
    if kind == "topic":
        return (user(fill(ABOUT, topic=prompt_of(sample))),)
    return (user(fill(KINDS[kind], who=prompt_of(sample).rstrip(".")) + " Write it and nothing else."),)


@register("backtranslate")
class Backtranslate(AskingStep):
    """Takes the pool's prompts as texts: the model writes the request that each would answer, and the text becomes its
    answer (Humback). The model then rates the pair from 1 to 5, and pairs below `least` are dropped. The paper trains a
    model for the first part and repeats the second; here the model is just asked."""

    kind = "expand"
    paper = "Li et al., arXiv:2308.06259"
    scores = frozenset({"fit"})
    least: Annotated[int, Field(ge=1, le=5)] = 5
    temperature: Temperature = 0.7
    top_p: TopP = 0.9
    max_tokens: TokenCount = 96

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask(
            [context.request((user(fill(ANSWERED_BY, text=prompt_of(sample))),), sampling) for sample in pool]
        )
        pairs = []
        for sample, reply in complete_replies(pool, replies, tally):
            request = said_by(reply).strip().strip('"')
            prompt = new_prompt(request, [sample, reply], reply.writer, kind="backtranslated")
            pairs.append(with_new_answer(prompt, prompt_of(sample), "corpus", finish="ok"))
        verdicts = yield from ask([context.request((user(_how_good(pair)),), Sampling(0.0, 1.0, 8)) for pair in pairs])
        good: Pool = []
        for pair, verdict in zip(pairs, verdicts, strict=True):
            rating = first_number(said_by(verdict), 1, 5)
            if rating is None:
                tally.drop("no score", said_by(verdict))
            elif rating < self.least:
                tally.drop(f"score below {self.least}", prompt_of(pair))
            else:
                good.append(with_scores(pair, fit=float(rating)))
        return good

    def estimate(self, samples: int) -> Estimate:
        return Estimate(2 * samples, int(samples * (self.max_tokens * ANSWER_SHARE + 4)), samples=samples)


def _how_good(pair: Sample) -> str:
    return fill(HOW_GOOD, prompt=prompt_of(pair), answer=answer_of(pair) or "")
