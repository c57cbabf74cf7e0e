"""Feedback: a judge's comparisons as training text, so that the student learns to judge (PandaLM)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.elicit.compare import Compare
from limbeck.elicit.flow import Pool, Questions, StepContext, Tally, new_prompt, prompt_of, with_answer
from limbeck.elicit.merit import answered_only
from limbeck.elicit.step import AskingStep, By, Estimate, TokenCount, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.elicit.two_orders import PREFER


@register("verdicts")
class VerdictsAsText(AskingStep):
    """The model `by` compares the answers to each prompt two by two, each pair in both orders, as `compare` does; then
    the question is the prompt and the reply the answer, in both orders, so that the student learns to write verdicts
    and sees each answer in either place. Pairs whose verdict changes with the order, or can't be read, are dropped. The
    student can then judge: name it under `models`, or in `evaluate.judge`. In the paper the judge also writes an answer
    of its own; here it gives reasons and the verdict."""

    kind = "feedback"
    paper = "Wang et al., arXiv:2306.05087"
    by: By = TEACHER
    prefer: str | Annotated[list[str], Field(min_length=1)] = PREFER
    reasons: bool = True
    max_tokens: TokenCount = 256

    @property
    def _compare(self) -> Compare:
        return Compare(by=self.by, prefer=self.prefer, reasons=self.reasons, max_tokens=self.max_tokens)

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        compared = yield from self._compare.comparisons(samples, context, tally)
        taught: Pool = []
        for pair, verdict in zip(compared.pairs, compared.verdicts, strict=True):
            first, second = samples[pair.first], samples[pair.second]
            if not verdict.parsed:
                tally.drop("too long" if verdict.outcome == "too_long" else "no verdict can be read", prompt_of(first))
                continue
            if not verdict.consistent:
                tally.drop("the verdict changes with the order", prompt_of(first))
                continue
            for messages, reply in zip(
                (pair.forward, pair.backward), compared.said[pair.first, pair.second], strict=True
            ):
                prompt = new_prompt(messages[0]["content"], [first, second], first.writer, kind="verdict")
                taught.append(with_answer(prompt, reply, outcome=verdict.outcome))
            tally.add(f"{verdict.outcome}_taught")
        return taught

    def estimate(self, samples: int) -> Estimate:
        return self.estimate_of(samples, max(1, samples // 2))

    def estimate_of(self, samples: int, prompts: int) -> Estimate:
        asked = self._compare.estimate_of(samples, prompts)
        return replace(asked, samples=asked.requests)

    def answer_tokens(self) -> float | None:
        return self._compare.max_tokens * 0.5 if self.reasons else 6.0

    def shows(self) -> StepPrompt | None:
        return VARIES if self.by == TEACHER else None

    def writes(self) -> frozenset[str]:
        return frozenset({"outcome"})
