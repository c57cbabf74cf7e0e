"""Answers under a budget of thinking, judged by their prompts' checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limbeck.elicit.prompts import Prompt
from limbeck.elicit.thinking import after_thinking
from limbeck.elicit.verify import verify
from limbeck.evaluate.thinking_settings import ThinkingSettings
from limbeck.models.forcing import Forcing, write_within
from limbeck.models.generate import GenerationJob
from limbeck.models.model import Model


@dataclass(frozen=True)
class BudgetedAnswer:
    """An answer under a budget, judged by its prompt's check. `text` is all of it, `said` the part that is judged.
    `tokens` are all that the model wrote, of which `thinking_tokens` were thought; `forced_tokens` were put there and
    are not among them."""

    text: str
    said: str
    tokens: int
    finished: bool
    passed: bool | None
    answered: bool
    thinking_tokens: int
    forced_tokens: int
    cut_thinking: bool
    waits: int


def answers_within(
    system: Model,
    prompts: Sequence[Prompt],
    jobs: Sequence[GenerationJob],
    thinking: ThinkingSettings,
    *,
    most: int,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[BudgetedAnswer]:
    """The system's answer of every job at a budget; job i asks prompt i.

    Args:
        most: tokens of thinking. max_tokens: of the answer.
    """
    forcing = Forcing(
        most, max_tokens, thinking.waits, thinking.wait, begin=thinking.begin or "", cue=thinking.cue or ""
    )
    answers = []
    for prompt, job, written in zip(prompts, jobs, write_within(system, jobs, forcing, progress), strict=True):
        text = system.opens_thinking(job.prompt_ids) + system.decode(written.ids)
        said = thinking.said(text)
        answers.append(
            BudgetedAnswer(
                text=text,
                said=said,
                tokens=written.thinking_tokens + written.answer_tokens,
                finished=written.finished,
                passed=verify(prompt.check, said),
                answered=after_thinking(said) is not None,
                thinking_tokens=written.thinking_tokens,
                forced_tokens=written.forced_tokens,
                cut_thinking=written.is_cut,
                waits=written.waits,
            )
        )
    return answers
