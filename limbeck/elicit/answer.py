"""Labelling: a model answers prompts, once or several times, with or without instructions that the student won't
see."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    complete_replies,
    prompt_messages,
    with_answer,
    written_replies,
)
from limbeck.elicit.step import AskingStep, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import PLAIN, VARIES, StepPrompt, with_system
from limbeck.types import Sampling

EXPLAINING = (
    "You are a patient teacher. Say what the question is about, then explain each part of your answer.",
    "Answer as you would for a ten-year-old: simple words, one idea after the other, an example where it helps.",
    "Work it out step by step, say why each step follows, and end with the result on a line of its own.",
    "First name what is known and what is asked. Then answer, and say how you know.",
    "Give a complete answer, so that nobody has to look anything up to understand it.",
    "Answer, then justify the answer: which facts does it rest on, and could they be wrong?",
    "Think it through before you answer, and write down the thoughts that matter.",
    "Answer precisely. Use a list where there are several points, and explain each in a sentence.",
    "You help people who want to learn. Do the task, then point out how they could have done it themselves.",
    "Describe the task in your own words, follow its instructions one by one, and show the outcome.",
    "If there are several ways to see this, compare them before you decide, and give your reasons.",
    "Take the role of an expert who explains to a colleague from another field.",
    "Break the problem into smaller ones, solve each, and put the solutions together.",
    "Give the answer first. After it, explain why it is right and what a likely mistake would be.",
    "Write clearly and fully; define every uncommon word that you use.",
    "Check your answer before you give it, and mention how you checked it.",
)


@register("answer")
class AnswerPrompts(AskingStep):
    """Answers every prompt `n` times; repeated answers to a prompt are dropped. The student doesn't see the `system`
    message that the writer gets (prompt erasure), unless `keep_system`. With `all`, repeated answers stay, and so do
    those that were cut off, are empty or nothing but thinking, so that `pass_rate` counts them; `verify` drops them
    after it."""

    n: Annotated[int, Field(ge=1, le=1000)] = 1
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: TokenCount = 256
    system: str | None = None
    keep_system: bool = False
    all: bool = False

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        turns = [(sample, number) for sample in pool for number in range(self.n)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        requests = [
            context.request(with_system(prompt_messages(sample), self.system), sampling, number)
            for sample, number in turns
        ]
        replies = yield from ask(requests)
        answered: Pool = []
        texts: set[tuple[int, str]] = set()  # (prompt, answer)
        asked = list(zip(turns, requests, strict=True))
        written = written_replies if self.all else complete_replies
        for ((sample, number), request), reply in written(asked, replies, tally):
            prompt = replace(sample, messages=request.messages) if self.keep_system else sample
            new = with_answer(prompt, reply)
            text = new.messages[-1]["content"]
            if number and not self.all and (id(sample), text) in texts:
                tally.drop("the same answer again", text)
                continue
            texts.add((id(sample), text))
            answered.append(new)
        return answered

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples * self.n, self.max_tokens)

    def shows(self) -> StepPrompt:
        return StepPrompt(self.system) if not self.keep_system else PLAIN


@register("explain")
class Explain(AskingStep):
    """Explanation traces: one of 16 system messages, drawn for each prompt, asks for an explained answer. The student
    is trained without it (prompt erasure, as in Orca 2), or with it where `keep_system` is set (Orca). The wording of
    the 16 messages is ours, not the paper's."""

    paper = "Mukherjee et al., arXiv:2306.02707; erasure: Mitra et al., arXiv:2311.11045"
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: TokenCount = 384
    keep_system: bool = False

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        systems = [EXPLAINING[context.rng("system", sample.id).randrange(len(EXPLAINING))] for sample in pool]
        requests = [
            context.request(with_system(prompt_messages(sample), system), sampling)
            for sample, system in zip(pool, systems, strict=True)
        ]
        replies = yield from ask(requests)
        turns = list(zip(pool, requests, strict=True))
        return [
            with_answer(replace(sample, messages=request.messages) if self.keep_system else sample, reply)
            for (sample, request), reply in complete_replies(turns, replies, tally)
        ]

    def shows(self) -> StepPrompt:
        return VARIES if not self.keep_system else PLAIN
