"""Rationalisation: where no answer is right, the model is asked again with the right one as a hint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    complete_replies,
    prompt_messages,
    prompt_of,
    user,
    with_answer,
    with_scores,
)
from limbeck.elicit.rationale import final_of
from limbeck.elicit.step import AskingStep, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.elicit.verified import AnswerType, groups_by_prompt, verdict_of
from limbeck.elicit.wording import PLACEHOLDER, fill
from limbeck.types import Sample, Sampling

HINT = (
    "{prompt}\n\nThe right answer is {answer}. Explain step by step how to find it, and end with a line of the form:"
    " The answer is ..."
)


@register("rationalise")
class Rationalise(AskingStep):
    """STaR's rationalisation: keeps the answers that are right (by the prompt's check; `against` as in `verify`), and
    asks once more, `n` times, where none of a prompt's answers is, with the right one as a `hint`. What then is right
    becomes the answer to the prompt without the hint. Give it wrong answers, too: `answer` keeps them with `all`."""

    paper = "Zelikman et al., arXiv:2203.14465"
    against: AnswerType | None = None
    hint: str = HINT
    n: Annotated[int, Field(ge=1, le=1000)] = 1
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: TokenCount = 256

    @field_validator("hint")
    @classmethod
    def _names_both(cls, hint: str) -> str:
        if set(PLACEHOLDER.findall(hint)) != {"prompt", "answer"}:
            raise ValueError("hint must hold {prompt} and {answer}, and nothing else in braces")
        return hint

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        right, failed = self._sorted(pool, tally)
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        turns = [(sample, answer, number) for sample, answer in failed for number in range(self.n)]
        requests = [context.request(self._hinted(sample, answer), sampling, number) for sample, answer, number in turns]
        replies = yield from ask(requests)
        helped: Pool = []
        for (sample, _, _), reply in complete_replies(turns, replies, tally):
            new = with_answer(sample, reply, rationalised=True)
            if verdict_of(new, self.against)[0]:
                helped.append(with_scores(new, verified=1.0))
            else:
                tally.drop("wrong with the hint, too", answer_of(new) or "")
        tally.facts |= {
            "prompts_solved": len(groups_by_prompt(right)),
            "prompts_asked_again": len(failed),
            "prompts_solved_with_the_hint": len(groups_by_prompt(helped)),
        }
        return [*right, *helped]

    def _sorted(self, pool: Pool, tally: Tally) -> tuple[Pool, list[tuple[Sample, str]]]:
        """(the right answers, a sample and the right answer of every prompt without one)."""
        right: Pool = []
        failed: list[tuple[Sample, str]] = []
        for group in groups_by_prompt(pool):
            verdicts = [verdict_of(sample, self.against)[0] for sample in group]
            for sample, verdict in zip(group, verdicts, strict=True):
                if verdict:
                    right.append(with_scores(sample, verified=1.0))
                else:
                    reason = "wrong" if verdict is False else "no answer that can be checked"
                    tally.drop(reason, answer_of(sample) or "")
            answer = right_answer(group[0])
            if not any(verdicts) and answer is None:
                tally.drop("no right answer to give as a hint", prompt_of(group[0]))
            elif not any(verdicts) and answer is not None:
                failed.append((group[0], answer))
        return right, failed

    def _hinted(self, sample: Sample, answer: str) -> tuple[dict[str, str], ...]:
        """The conversation with the right answer beside its last question."""
        *before, _ = prompt_messages(sample)
        return (*before, user(fill(self.hint, prompt=prompt_of(sample), answer=answer)))

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples * self.n, self.max_tokens)

    def shows(self) -> StepPrompt:
        return VARIES


def right_answer(sample: Sample) -> str | None:
    """The right answer to a prompt, as its check or the corpus's first answer says; None where neither does."""
    stated = (sample.meta.get("check") or {}).get("answer")
    if isinstance(stated, list) and stated:
        stated = stated[0]
    if isinstance(stated, str | int | float):
        return str(stated)
    given = sample.meta.get("answers") or ()
    return (final_of(str(given[0])) or str(given[0])) if given else None
