"""How much text a run has, estimated before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.config.recipe import Recipe
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.step import ANSWER_SHARE, Estimate
from limbeck.runs.lengths import Lengths
from limbeck.types import STUDENTS


@dataclass(frozen=True)
class TextAmounts:
    """How much text a run has, estimated before it is written: tokens, and the writers' parts of them.

    Args:
        prompts: training prompts; `prompt_tokens` counts each once for every answer to it.
        response_tokens: of the training text.
        answer_tokens: of one answer to a held-out prompt.
        held_out_tokens: of all held-out prompts with their answers.
        by_teacher, by_untouched: answers per prompt; `by_all` those of all writers.
    """

    prompts: int
    prompt_tokens: int
    response_tokens: int
    answer_tokens: int
    held_out_tokens: int
    by_teacher: float
    by_untouched: float
    by_all: float

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
        lengths: Lengths,
        bills: Sequence[Estimate],
    ) -> TextAmounts:
        training, held_out = prompts
        fixed = recipe.fixed_writers
        own = recipe.student_writer
        count = bills[-1].samples if bills else len(training)
        answer_tokens = max(1, round(lengths.held_out))
        answers = [w.fixed_share * (_given(training) if w.by == "corpus" else 1.0) for w in fixed]
        of_prompt = sum(each * length for each, length in zip(answers, lengths.answers, strict=True))
        if not fixed and own is not None:
            of_prompt = own.max_tokens * ANSWER_SHARE
        by_writer: dict[str, float] = {} if fixed else {"student": 1.0}
        for writer, each in zip(fixed, answers, strict=True):
            by_writer[writer.by] = by_writer.get(writer.by, 0.0) + each
        by_all = sum(by_writer.values())
        return cls(
            prompts=count,
            prompt_tokens=int(lengths.prompt * count * by_all),
            response_tokens=max(1, int(of_prompt * count)),
            answer_tokens=answer_tokens,
            held_out_tokens=int(len(held_out) * (answer_tokens + lengths.prompt)),
            by_teacher=by_writer.get("teacher", 0.0),
            by_untouched=sum(by_writer.get(name, 0.0) for name in STUDENTS),
            by_all=by_all,
        )

    @property
    def tokens(self) -> int:
        """Prompts and responses of the training text."""
        return self.prompt_tokens + self.response_tokens


def _given(prompts: Sequence[Prompt]) -> float:
    """A corpus's answers to a prompt, on average."""
    return sum(len(prompt.answers) for prompt in prompts) / max(1, len(prompts)) or 1.0
