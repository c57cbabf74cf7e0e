"""Labelling with reasons: worked solutions, several different ones, and reasons for one answer rather than another.

An answered sample has the whole text as its answer; its meta has `rationale` (the reasons) and `final` (the answer that
they end in).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    complete_replies,
    prompt_messages,
    prompt_of,
    said_by,
    user,
    with_answer,
)
from limbeck.elicit.similar import jaccard
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.elicit.thinking import boxed
from limbeck.elicit.verify import verify
from limbeck.elicit.wording import fill, words
from limbeck.types import Message, Sample, Sampling

THINK = "{prompt}\n\nLet's think step by step."
CONCLUDE = "Therefore, the answer is"
IN_ONE = "{prompt}\n\nThink step by step, and end with a line of the form: The answer is ..."
STATED_ANSWER = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*[:*]*[ \t]*", re.IGNORECASE)
MAX_FINAL_CHARS = 200


WHY = "Question: {prompt}\nAnswer: {answer}\n\nExplain in a few sentences why this is the answer."


def final_of(text: str) -> str | None:
    """What follows the last "the answer is" (or "answer:"), without the closing period. A text without these words
    counts by its last box; None if it has neither."""
    stated = list(STATED_ANSWER.finditer(text))
    last = text[stated[-1].end() :].partition("\n")[0] if stated else boxed(text) or ""
    last = boxed(last) or last
    last = re.sub(r"[\s.*$]+$", "", last.strip("*$ "))
    return last if last and len(last) <= MAX_FINAL_CHARS else None


def with_rationale(prompt: Sample, reply: Sample, text: str, *, rationale: str, final: str) -> Sample:
    """The prompt with an answer that gives reasons and ends in `final`."""
    changed = text if text != reply.messages[-1]["content"] else None
    return with_answer(prompt, reply, changed, rationale=rationale, final=final)


@register("rationale")
class Rationale(AskingStep):
    """Zero-shot chains of thought (Fine-tune-CoT): the model thinks step by step, and in a second call says what the
    answer therefore is. With `calls: 1` it does both at once and ends with "The answer is ...". `n` solutions per
    question are the paper's diverse reasoning."""

    paper = "Ho et al., arXiv:2212.10071; Kojima et al., arXiv:2205.11916"
    n: Annotated[int, Field(ge=1, le=1000)] = 1
    calls: Annotated[int, Field(ge=1, le=2)] = 2
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: TokenCount = 256
    final_tokens: TokenCount = 32

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        samples = [(sample, number) for sample in pool for number in range(self.n)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        template = THINK if self.calls == 2 else IN_ONE
        requests = [context.request(_rephrased(sample, template), sampling, number) for sample, number in samples]
        replies = yield from ask(requests)
        turns = [(sample, request.messages) for (sample, _), request in zip(samples, requests, strict=True)]
        thoughts = complete_replies(turns, replies, tally)
        if self.calls == 1:
            answered = [_from_one_call(sample, reply, tally) for (sample, _), reply in thoughts]
            return [sample for sample in answered if sample is not None]
        closing = Sampling(0.0, 1.0, self.final_tokens)
        conclusions = yield from ask(
            [
                context.request((*messages, reply.messages[-1], user(CONCLUDE)), closing)
                for (_, messages), reply in thoughts
            ]
        )
        answered = [
            _from_two_calls(sample, reply, conclusion, tally)
            for ((sample, _), reply), conclusion in complete_replies(thoughts, conclusions, tally)
        ]
        return [sample for sample in answered if sample is not None]

    def estimate(self, samples: int) -> Estimate:
        answers = samples * self.n
        tokens = int(answers * self.max_tokens * ANSWER_SHARE)
        tokens += answers * self.final_tokens if self.calls == 2 else 0
        return Estimate(answers * self.calls, tokens, samples=answers)

    def shows(self) -> StepPrompt:
        return VARIES

    def writes(self) -> frozenset[str]:
        return frozenset({"rationale", "final"})


def _rephrased(sample: Sample, template: str) -> tuple[Message, ...]:
    """The conversation with its last question put into the template."""
    *before, _ = prompt_messages(sample)
    return (*before, user(fill(template, prompt=prompt_of(sample))))


def _from_one_call(sample: Sample, reply: Sample, tally: Tally) -> Sample | None:
    text = reply.messages[-1]["content"]
    final = final_of(said_by(reply))
    if final is None:
        tally.drop("no answer at the end of the reasons", text)
        return None
    stated = list(STATED_ANSWER.finditer(text))
    rationale = text[: stated[-1].start()].strip() if stated else text
    return with_rationale(sample, reply, text, rationale=rationale or text, final=final)


def _from_two_calls(sample: Sample, reply: Sample, conclusion: Sample, tally: Tally) -> Sample | None:
    rationale = reply.messages[-1]["content"].strip()
    text = said_by(conclusion).strip()
    final = final_of(text) or re.sub(r"[\s.*$]+$", "", text.splitlines()[0]).lstrip("*$: ")
    if not final or len(final) > MAX_FINAL_CHARS:
        tally.drop("no short answer after the reasons", text)
        return None
    answered = with_rationale(sample, reply, f"{rationale}\n\n{CONCLUDE} {final}.", rationale=rationale, final=final)
    return replace(answered, parents=(*answered.parents, conclusion.id))


@register("diverse_rationales")
class DiverseRationales(AskingStep):
    """Several different rationales per question (MCC-KD): of `n` samples, keeps the first `keep` that are right (by the
    prompt's check, where it has one) and of which no two share more than `similar` of their `gram`-grams (Jaccard).
    With the loss `consistency` the student learns to predict the same answer after each of them."""

    paper = "Chen et al., arXiv:2310.14747"
    n: Annotated[int, Field(ge=2, le=1000)] = 8
    keep: Annotated[int, Field(ge=1)] = 5
    similar: Annotated[float, Field(gt=0, le=1)] = 0.5
    gram: Annotated[int, Field(ge=1, le=8)] = 3
    calls: Annotated[int, Field(ge=1, le=2)] = 1
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: TokenCount = 256

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        rationales = Rationale(
            n=self.n, calls=self.calls, temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens
        )
        answered = yield from rationales.run(pool, context, tally)
        groups: dict[str, list[tuple[Sample, set[tuple[str, ...]]]]] = {}
        for sample in answered:
            text = sample.messages[-1]["content"]
            group = groups.setdefault(str(sample.meta.get("prompt_id", prompt_of(sample))), [])
            if sample.meta.get("check") is not None and not verify(sample.meta["check"], text):
                tally.drop("wrong answer", text)
                continue
            grams = _grams(sample.meta["rationale"], self.gram)
            if any(jaccard(grams, other) > self.similar for _, other in group):
                tally.drop("too like another rationale", text)
            elif len(group) == self.keep:
                tally.drop("enough rationales", text)
            else:
                group.append((sample, grams))
        return [sample for group in groups.values() for sample, _ in group]

    def estimate(self, samples: int) -> Estimate:
        answers = samples * self.n
        tokens = int(answers * self.max_tokens * ANSWER_SHARE)
        return Estimate(answers * self.calls, tokens, samples=min(samples * self.keep, answers))

    def shows(self) -> StepPrompt:
        return VARIES

    def writes(self) -> frozenset[str]:
        return frozenset({"rationale", "final"})


def _grams(text: str, size: int) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[at : at + size]) for at in range(max(1, len(tokens) - size + 1))}


@register("contrastive")
class Contrastive(AskingStep):
    """Reasons that follow from one answer and not from another (SCOTT): explains the prompt's first answer in the
    corpus, sampling from log p(token | right answer) - `strength` log p(token | other answer). With `counterfactual` a
    wrong answer (another prompt's, drawn) is explained as well, in a sample that has `counterfactual: true`. The paper
    decodes greedily from GPT-NeoX-20B with few-shot demonstrations; here the writer gets none."""

    paper = "Wang et al., arXiv:2305.01879"
    needs = frozenset({"text", "contrast"})
    strength: Annotated[float, Field(ge=0, le=2)] = 0.5
    against: Literal["wrong", "empty"] = "wrong"
    counterfactual: bool = True
    max_tokens: TokenCount = 128

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        turns = self._turns(pool, context, tally)
        sampling = Sampling(0.0, 1.0, self.max_tokens)
        requests = [
            context.request(_why(sample, answer), sampling, against=_why(sample, other), contrast=self.strength)
            for sample, answer, other, _ in turns
        ]
        replies = yield from ask(requests)
        explained: Pool = []
        for (sample, answer, _, is_wrong), reply in complete_replies(turns, replies, tally):
            rationale = reply.messages[-1]["content"].strip()
            text = f"{rationale}\n\n{CONCLUDE} {answer}."
            new = with_rationale(sample, reply, text, rationale=rationale, final=answer)
            explained.append(replace(new, meta=new.meta | ({"counterfactual": True} if is_wrong else {})))
        return explained

    def _turns(self, pool: Pool, context: StepContext, tally: Tally) -> list[tuple[Sample, str, str, bool]]:
        """(sample, the answer to explain, the answer to contrast it with, whether the former is wrong)"""
        answers = [(sample, str(sample.meta["answers"][0])) for sample in pool if sample.meta.get("answers")]
        for sample in pool:
            if not sample.meta.get("answers"):
                tally.drop("no answer is given", prompt_of(sample))
        turns = []
        for sample, answer in answers:
            others = sorted({other for _, other in answers} - {answer})
            wrong = context.rng("wrong", sample.id).choice(others) if others else "unknown"
            turns.append((sample, answer, wrong if self.against == "wrong" else "", False))
            if self.counterfactual and others:
                turns.append((sample, wrong, answer if self.against == "wrong" else "", True))
        return turns

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples * (2 if self.counterfactual else 1), self.max_tokens)

    def shows(self) -> StepPrompt:
        return VARIES

    def writes(self) -> frozenset[str]:
        return frozenset({"rationale", "final", "counterfactual"})


def _why(sample: Sample, answer: str) -> tuple[Message, ...]:
    return (user(fill(WHY, prompt=prompt_of(sample), answer=answer)),)
