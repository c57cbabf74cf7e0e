"""A corpus's own answers, so that they can be scored and selected like those of a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from limbeck.elicit.flow import Pool, StepContext, Tally, with_new_answer
from limbeck.elicit.step import LocalStep, register


@register("given")
class CorpusAnswers(LocalStep):
    """Answers every prompt with the first `answers` that the corpus has for it, the best first. Drops prompts without
    any."""

    kind = "label"
    answers: Annotated[int, Field(ge=1)] = 1

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        answered: Pool = []
        for sample in pool:
            answers = sample.meta.get("answers") or ()
            if not answers:
                tally.drop("no answer is given", sample.messages[-1]["content"])
            cut = sample.meta.get("cut", ())
            answered += [
                with_new_answer(sample, answer, "corpus", finish="length" if rank in cut else "ok")
                for rank, answer in enumerate(answers[: self.answers])
            ]
        return answered
