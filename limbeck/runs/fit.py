"""Fits the prompts to the context before anything is loaded or paid for: those that are too long are refused by their
line, left out, or cut; and a chat template that loses a part of a conversation is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.config.recipe import Recipe
from limbeck.elicit.prompt import Prompt
from limbeck.models.compatibility import have_other_tokens
from limbeck.models.conversation import check_conversation
from limbeck.models.given_answer import answer_ids
from limbeck.models.load import load_config, load_tokenizer
from limbeck.models.template import opened, prompt_ids
from limbeck.models.weights import context_length
from limbeck.runs.resolve import Method, context_of, resolve
from limbeck.types import Message, RecipeError, UserError

SLACK = 64  # tokens that a template may put around a conversation, beside those around every message


@dataclass(frozen=True)
class Window:
    """How many tokens a conversation and its answer may take, and how they are counted.

    Args:
        max_length: of the conversation as the student sees it, with an answer.
        shown: turns it into the one that the teacher sees, where that is another that is read here.
        shown_length: of that one, with an answer.
        limit: what `max_length` is, in words.
    """

    tokenizer: Tokenizer
    max_length: int
    shown: Callable[[tuple[Message, ...]], tuple[Message, ...]] | None
    shown_length: int
    limit: str = "the context"

    @cached_property
    def around(self) -> int:
        """At most so many tokens stand around a message."""
        return len(prompt_ids(self.tokenizer, [{"role": "user", "content": "x"}])) + SLACK

    @cached_property
    def opened(self) -> str:
        return opened(self.tokenizer)

    def surely_fits(self, prompt: Prompt, answers: Sequence[str], written: int) -> bool:
        """Whether it fits even if every byte were a token, which needs no tokenizer."""
        longest = max([written, *(len(answer.encode()) + SLACK for answer in answers)])
        for messages, room in self.views(prompt):
            texts = [value for message in messages for value in message.values()]
            size = sum(len(text.encode()) for text in texts) + self.around * len(messages)
            if size + longest > room:
                return False
        return True

    def views(self, prompt: Prompt) -> list[tuple[tuple[Message, ...], int]]:
        """The conversation as the student sees it, and as the teacher does where that is another, each with the tokens
        that it may take."""
        views = [(prompt.messages, self.max_length)]
        return views if self.shown is None else [*views, (self.shown(prompt.messages), self.shown_length)]

    def asked(self, prompt: Prompt) -> int:
        """Tokens of the conversation, and those that the teacher's has beyond what it may take more."""
        return max(
            len(prompt_ids(self.tokenizer, messages)) + self.max_length - room for messages, room in self.views(prompt)
        )

    def answer(self, text: str, is_cut: bool = False) -> list[int]:
        """An answer's tokens as they are trained on, with its end unless it is cut off."""
        return answer_ids(self.tokenizer, text, self.opened, is_cut)

    def tokens(self, prompt: Prompt, answers: Sequence[str], written: int) -> int:
        """The tokens of a conversation with its longest answer, which may be one that is still to be written."""
        return self.asked(prompt) + max([written, *(len(self.answer(answer)) for answer in answers)])


def fitted(method: Method) -> Method:
    """The method with prompts that all fit the context of teacher and student.

    Raises:
        UserError: a prompt is too long and `prompts.too_long` isn't set, or the template can't hold a conversation; the
            message names file and line.
    """
    recipe = method.recipe
    tokenizer = load_tokenizer(recipe.speaker, recipe.speaker_template)
    _check_templates(method, tokenizer)
    context = trained = _window(method, tokenizer)
    if recipe.prompts.longest is not None and recipe.prompts.longest < context.max_length:
        trained = replace(context, max_length=recipe.prompts.longest, limit="prompts.longest")
    reads_answers = any(writer.by == "corpus" for writer in recipe.writer) or "gold_control" in recipe.evaluate.controls
    asked = [writer.max_tokens for writer in recipe.writer if writer.by not in ("corpus", "elicited")]
    written = 0 if recipe.elicit else max(asked, default=0)
    training, lost = _fit(
        method.training_prompts, trained, recipe.prompts.too_long, written=written, reads_answers=reads_answers
    )
    most = max(recipe.held_out_writer.max_tokens, recipe.evaluate.max_tokens)
    held_out, held_out_lost = _fit(
        method.held_out_prompts, context, recipe.prompts.too_long, written=most, reads_answers=method.holds_out_answers
    )
    if not lost and not held_out_lost:
        return method
    for path, part, room in (("prompts.too_long", training, trained), ("evaluate.prompts", held_out, context)):
        if not part:
            raise RecipeError(path, f"no prompt fits {room.limit} of {room.max_length} tokens; give shorter ones")
    did = "left out" if recipe.prompts.too_long == "drop" else "cut"
    count = len(lost) + len(held_out_lost)
    first = (*lost, *held_out_lost)[0]
    room = trained if lost else context
    note = f"{count:,} prompts longer than {room.limit} of {room.max_length:,} tokens {did} (first: {first.place})"
    return replace(
        method,
        training_prompts=tuple(training),
        held_out_prompts=tuple(held_out),
        prompt_context=context_of(recipe, [*training, *held_out]),
        prompt_notes=(*method.prompt_notes, note),
    )


def prepared(recipe: Recipe) -> Method:
    """A recipe resolved, with prompts that fit."""
    return fitted(resolve(recipe))


def _window(method: Method, tokenizer: Tokenizer) -> Window:
    """The tokens that teacher and student both can read. What the teacher alone reads must fit the teacher alone, and a
    server is its own judge of it."""
    recipe = method.recipe
    start = recipe.student.start.pretrained
    teachers = min(2**31, context_length(load_config(recipe.speaker)))
    both = teachers if start is None else min(teachers, context_length(load_config(start)))
    is_read = method.teacher_reads_rows or method.is_prompted
    if recipe.teacher.model is None and not is_read:
        return Window(tokenizer, both, None, both)
    apart = start is not None and not is_read
    if start is not None and apart:
        apart = have_other_tokens(tokenizer, load_tokenizer(start, recipe.student.template))
    return Window(tokenizer, both, method.measured_context, teachers if apart else both)


def _check_templates(method: Method, tokenizer: Tokenizer) -> None:
    """Render the first prompt of every kind: with and without a system message, earlier turns, tools."""
    seen: set[frozenset[str]] = set()
    for prompt in (*method.training_prompts, *method.held_out_prompts):
        if not prompt.before and not prompt.after:
            continue
        has = frozenset(key if key in ("tool_calls",) else m["role"] for m in prompt.messages for key in m)
        if has not in seen:
            seen.add(has)
            try:
                check_conversation(tokenizer, prompt.messages)
            except UserError as error:
                raise UserError(
                    f"{prompt.place}: {error}; give models whose template has it, or leave it out"
                ) from error


def _fit(
    prompts: Sequence[Prompt], context: Window, too_long: str | None, *, written: int, reads_answers: bool
) -> tuple[list[Prompt], list[Prompt]]:
    """(the prompts that fit, those that did not)"""
    fit: list[Prompt] = []
    lost: list[Prompt] = []
    for prompt in prompts:
        answers = prompt.answers if reads_answers else ()
        if context.surely_fits(prompt, answers, written):
            fit.append(prompt)
            continue
        tokens = context.tokens(prompt, answers, written)
        if tokens <= context.max_length:
            fit.append(prompt)
            continue
        lost.append(prompt)
        if too_long is None:
            raise UserError(
                f"{prompt.place}: the prompt{' and its answer take' if answers else ', with an answer, may take'}"
                f" {tokens:,} tokens, more than {context.limit} of {context.max_length:,}: shorten it, lower"
                " max_tokens, or write prompts: {too_long: drop} (or cut)"
            )
        if too_long == "cut" and (shorter := _cut(prompt, context, answers, written)) is not None:
            fit.append(shorter)
    return fit, lost


def _cut(prompt: Prompt, context: Window, answers: Sequence[str], written: int) -> Prompt | None:
    """The prompt with the end of its last text cut off if no room is left for an answer, and with the ends of answers
    cut off that are still too long; None if the rest of the conversation is too long already."""
    room = max(written, context.max_length // 4 if answers else 1)
    if context.asked(prompt) + room > context.max_length:
        low, high = 0, len(prompt.text)
        while low < high:
            middle = (low + high + 1) // 2
            fits = context.asked(replace(prompt, text=prompt.text[:middle])) + room <= context.max_length
            low, high = (middle, high) if fits else (low, middle - 1)
        if not prompt.text[:low].strip():
            return None
        prompt = replace(prompt, text=prompt.text[:low])
    left = context.max_length - context.asked(prompt)
    shorter = [_cut_answer(answer, context, left) for answer in answers]
    if not answers:
        return prompt
    if not all(text.strip() for text in shorter):
        return None
    cut = tuple(number for number, text in enumerate(shorter) if text != answers[number])
    return replace(prompt, answers=tuple(shorter), cut=cut)


def _cut_answer(text: str, context: Window, left: int) -> str:
    if len(context.answer(text)) <= left:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(context.answer(text[:middle], is_cut=True)) <= left else (low, middle - 1)
    return text[:low]
