"""Labelling: a model answers prompts, once or several times, with or without instructions that the student won't
see."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    by_conversation,
    complete_replies,
    prompt_messages,
    unjudged,
    with_answer,
    with_scores,
    written_replies,
)
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import PLAIN, VARIES, StepPrompt, with_system
from limbeck.types import Sample, Sampling, content_hash

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
    message that the writer gets (prompt erasure), unless `keep_system`. `by` is the teacher, a model under `models`,
    `untouched` (the student before training), or several of them, each of which answers `n` times. Answers that the
    samples have already give way; with `add` they stay, and new ones to each prompt follow them. With `all`, repeated
    answers stay, and so do those that were cut off, are empty or nothing but thinking, so that `pass_rate` counts them;
    `verify` drops them after it."""

    by: By | Annotated[list[By], Field(min_length=1)] = TEACHER
    n: Annotated[int, Field(ge=1, le=1000)] = 1
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: TokenCount = 256
    system: str | None = None
    keep_system: bool = False
    add: bool = False
    all: bool = False

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        groups = by_conversation(pool) if self.add else _prompts(pool)
        turns = [(place, by, number) for place in range(len(groups)) for by in self.asks() for number in range(self.n)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        requests = [
            context.request(with_system(prompt_messages(groups[place][0]), self.system), sampling, number, by=by)
            for place, by, number in turns
        ]
        replies = yield from ask(requests)
        answered: list[Pool] = [[sample for sample in group if answer_of(sample) is not None] for group in groups]
        answered = answered if self.add else [[] for _ in groups]
        asked = list(zip(turns, requests, strict=True))
        written = written_replies if self.all else complete_replies
        for ((place, by, _), request), reply in written(asked, replies, tally):
            sample = self._unanswered(groups[place][0])
            prompt = replace(sample, messages=request.messages) if self.keep_system else sample
            new = with_answer(prompt, reply, **self._told(by))
            text = new.messages[-1]["content"]
            if not self.all and any(text == other.messages[-1]["content"] for other in answered[place]):
                tally.drop("the same answer again", text)
            else:
                answered[place].append(new)
        return [sample for group in answered for sample in group]

    def _unanswered(self, sample: Sample) -> Sample:
        """The sample without what was said of an answer that another takes the place of, or follows. How often a prompt
        is solved is said of the prompt, and stays where its answers go."""
        if self.add:
            return unjudged(sample, "by")
        if answer_of(sample) is None:
            return sample
        rate = {name: value for name, value in sample.meta.get("scores", {}).items() if name == "pass_rate"}
        return with_scores(unjudged(sample, "by"), **rate) if rate else unjudged(sample, "by")

    def _told(self, by: str) -> dict[str, str]:
        """Who wrote an answer, where it is not the teacher alone."""
        return {} if self.asks() == (TEACHER,) and not self.add else {"by": by}

    def estimate(self, samples: int) -> Estimate:
        asked = Estimate.of_answers(samples * self.n * len(self.asks()), self.max_tokens)
        return replace(asked, samples=asked.samples + samples) if self.add else asked

    def shows(self) -> StepPrompt | None:
        if TEACHER not in self.asks():
            return None
        if self.add and self.system is not None:
            return VARIES
        return StepPrompt(self.system) if not self.keep_system else PLAIN

    def writes(self) -> frozenset[str]:
        return frozenset({"by"} if self._told(TEACHER) else ())


def _prompts(pool: Pool) -> list[Pool]:
    """One group for every prompt. Answers that the pool has to the same conversation are of one."""
    groups: dict[str, Pool] = {}
    for place, sample in enumerate(pool):
        waits = answer_of(sample) is None
        groups.setdefault(str(place) if waits else content_hash(list(prompt_messages(sample))), []).append(sample)
    return list(groups.values())


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
