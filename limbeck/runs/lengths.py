"""How long a run's prompts and answers are, for estimates: counted where they are there, assumed where they aren't."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from limbeck.config.recipe import Recipe
from limbeck.config.sections import Writer
from limbeck.elicit.ask import Ask
from limbeck.elicit.flow import StepContext, Tally
from limbeck.elicit.prompt import Prompt
from limbeck.elicit.run import prompt_sample
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, ElicitStep
from limbeck.models.context import PromptContext
from limbeck.storage.store import Store
from limbeck.types import Message, Request, UserError

CHARS_PER_TOKEN = 4
TEMPLATE_TOKENS = 30
COUNTED = 64  # prompts whose tokens are counted
RENDERED = 8  # prompts that a step's question is written for
ASKED_TOKENS = 200  # length of a question of a step of elicitation, where it is not known
LEAST_STORED = 8  # answers of the store that stand for those to come
ASSUMED = f"assumed, {ANSWER_SHARE:.0%} of max_tokens"


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens of a conversation (in its template) and of a text; both by their letters where there is no
    tokenizer."""

    of_conversation: Callable[[Sequence[Message]], int]
    of_text: Callable[[str], int]

    @classmethod
    def by_letters(cls) -> TokenCounter:
        def conversation(messages: Sequence[Message]) -> int:
            return sum(len(message["content"]) for message in messages) // CHARS_PER_TOKEN + TEMPLATE_TOKENS

        return cls(conversation, lambda text: -(-len(text) // CHARS_PER_TOKEN))


@dataclass(frozen=True)
class Lengths:
    """Means in tokens: of a training prompt in its template, of the answers of each writer whose text exists before
    training (in the recipe's order), and of a held-out answer. `source` says where the answers' lengths are from,
    `held_out_given` that held-out answers are the data's, so that nobody writes them. `shown` is the length of a prompt
    as the teacher is shown it when nobody elicits, `questions` that of a question of each step of elicitation."""

    prompt: float
    answers: tuple[float, ...]
    held_out: float
    source: str
    held_out_given: bool = False
    shown: float = 0.0
    questions: tuple[float, ...] = ()


def shown_length(prompts: Sequence[Prompt], show: PromptContext | None, tokens: TokenCounter) -> float:
    """The mean length of a prompt as the teacher is shown it."""
    some = [prompt.messages for prompt in _some(prompts)]
    lengths = [tokens.of_conversation(messages if show is None else show(messages)) for messages in some]
    return sum(lengths) / len(lengths)


def question_lengths(
    steps: Sequence[tuple[str, ElicitStep]],
    prompts: Sequence[Prompt],
    *,
    show: PromptContext | None,
    tokens: TokenCounter,
) -> tuple[float, ...]:
    """The mean length of each step's question. Those of `ask` are written for some prompts; of other steps, and of
    templates that read what earlier steps write, no more is known than what they show of a prompt.

    Args:
        show: what the teacher is shown beside every conversation.
    """
    some = prompts[:: -(-len(prompts) // RENDERED)]
    plain = shown_length(some, show, tokens)

    def length(step: ElicitStep) -> float:
        if isinstance(step, Ask):
            context = StepContext("", 0, "elicit", show=show, named=lambda name: name)
            pool = [prompt_sample(prompt) for prompt in some]
            asked = [each for each in next(step.run(pool, context, Tally("")), ()) if isinstance(each, Request)]
            if asked:
                return sum(tokens.of_conversation(each.shown or each.messages) for each in asked) / len(asked)
        own = step.shows() if isinstance(step, AskingStep) else None
        fixed = own is not None and not own.varies
        shown = shown_length(some, replace(show or PromptContext(), step=own), tokens) if fixed else plain
        return max(shown, ASKED_TOKENS)

    return tuple(length(step) for _, step in steps)


def lengths_of(
    recipe: Recipe,
    steps: Sequence[tuple[str, ElicitStep]],
    prompts: Sequence[Prompt],
    *,
    tokens: TokenCounter,
    store: Path | None = None,
    given: Sequence[Prompt] = (),
) -> Lengths:
    """What is known of the lengths before a run.

    Args:
        steps: of elicitation.
        prompts: the training prompts.
        store: the run folder's, whose answers stand for those that are still to come.
        given: the held-out prompts, where their own answers are the held-out text.
    """
    some = _some(prompts)
    stored = None if recipe.elicit or store is None else stored_answer(store)
    own = _own_answer(some, tokens)
    found = [_answer(writer, steps, own, stored) for writer in recipe.fixed_writers]
    held_out = recipe.held_out_writer
    by_teacher = [found[place][0] for place, writer in enumerate(recipe.fixed_writers) if writer == held_out]
    written = by_teacher[0] if by_teacher and stored else max(1.0, held_out.max_tokens * ANSWER_SHARE)
    return Lengths(
        prompt=sum(tokens.of_conversation(prompt.messages) for prompt in some) / len(some),
        answers=tuple(length for length, _ in found),
        held_out=_own_answer(_some(given), tokens) or written,
        source="; ".join(dict.fromkeys(source for _, source in found)) or ASSUMED,
        held_out_given=bool(given),
    )


def _some(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    return prompts[:: max(1, len(prompts) // COUNTED)]


def _own_answer(prompts: Sequence[Prompt], tokens: TokenCounter) -> float | None:
    """The mean length of the prompts' own answers, with the token that ends each; None if they have none."""
    answers = [tokens.of_text(prompt.answers[0]) + 1 for prompt in prompts if prompt.answers]
    return sum(answers) / len(answers) if answers else None


def _answer(
    writer: Writer, steps: Sequence[tuple[str, ElicitStep]], own: float | None, stored: float | None
) -> tuple[float, str]:
    """(the mean length of a writer's answers, where it is from)"""
    assumed = max(1.0, writer.max_tokens * ANSWER_SHARE)
    if writer.by == "corpus" and own is not None:
        return own, "counted in the prompts' own answers"
    if writer.by == "elicited":
        by_step = [(length, name) for name, step in steps if (length := step.answer_tokens()) is not None]
        if by_step:
            return by_step[-1][0], f"assumed of the step {by_step[-1][1]}"
        return (own, "counted in the prompts' own answers") if own is not None else (assumed, ASSUMED)
    if writer.by == "teacher" and stored is not None:
        return min(stored, writer.max_tokens), "counted in the run folder's answers"
    return assumed, ASSUMED


def stored_answer(store: Path) -> float | None:
    """The mean length of the answers in a store; None if there are few, or no store."""
    if not store.exists():
        return None
    try:
        count, mean = Store.answer_lengths(store)
    except sqlite3.Error:
        return None
    return mean if count >= LEAST_STORED else None


def counted_by(of_conversation: Callable[[Sequence[Message]], int], of_text: Callable[[str], int]) -> TokenCounter:
    """Counts by a tokenizer; a conversation that its template refuses, which is said elsewhere, by its letters."""
    letters = TokenCounter.by_letters()

    def conversation(messages: Sequence[Message]) -> int:
        try:
            return of_conversation(messages)
        except UserError:
            return letters.of_conversation(messages)

    return TokenCounter(conversation, of_text)
