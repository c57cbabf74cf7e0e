"""Budget forcing (s1, arXiv:2501.19393): thinking of at most so many tokens, then the answer.

A model thinks where its template has opened the thinking, where it writes an opening mark first itself, where `begin`
puts one, or, as plain chains of thought, before a `cue` such as "Answer:". Thinking that reaches its budget is ended by
the mark that it would end with itself; with `waits`, an end that the model writes before that is taken away and "Wait"
put in its place. What is put there is read by the model and in the text, and not among the tokens it wrote.

A text that needs nothing of this is what plain generation writes, bit for bit. Otherwise it is continued from where it
was changed, with random numbers of its own. Not covered: gpt-oss's channels, and an end of the whole text (without a
mark) in the midst of thinking, which is left as it is unless a wait is due.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from limbeck.elicit.thinking import OPENS, closed_by
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model
from limbeck.types import Sampling, UserError, content_hash

OPENING_CHARS = 40  # within which a text has begun its thinking, or does not think
FIRST_CHARS = "<[◁Hh\ufffd"  # of every opening mark; the last stands for half a character


@dataclass(frozen=True)
class Forcing:
    """How thinking is bounded.

    Args:
        most: tokens of thinking, those of its marks that the model writes included.
        answer: tokens of the answer.
        waits: how often an end of thinking is taken away, and `wait` put there.
        begin: a mark that is put before the answer, such as <think>, where the prompt does not end with one.
        cue: what ends a chain of thought without marks.
    """

    most: int
    answer: int
    waits: int = 0
    wait: str = "Wait"
    begin: str = ""
    cue: str = ""


@dataclass
class BudgetedText:
    """A text under a budget: `ids` with what was put into it, which are `forced_tokens` of them. `thinking_tokens` and
    `answer_tokens` count what the model wrote, also ends that were taken away; `is_cut` tells whether the thinking was
    ended for it, `waits` how often an end was taken away."""

    ids: list[int] = field(default_factory=list)
    thinking_tokens: int = 0
    answer_tokens: int = 0
    forced_tokens: int = 0
    waits: int = 0
    is_cut: bool = False
    finished: bool = False

    def force(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.forced_tokens += len(ids)


class _Watch:
    """Looks at a text while it is written, and ends it where something must be put into it, or its budget is spent."""

    def __init__(self, model: Model, forcing: Forcing, row: _Text) -> None:
        self.model = model
        self.answer = forcing.answer
        self.known_close = row.close
        self.left = forcing.most - row.text.thinking_tokens
        self.may_wait = row.text.waits < forcing.waits
        self._begin()

    def _begin(self) -> None:
        self.close = self.known_close
        self.is_plain = False
        self.closed_at: int | None = None

    def __call__(self, ids: Sequence[int]) -> bool:
        count = len(ids)
        if count == 1:
            self._begin()
        if not self.close and not self.is_plain:
            self._look(ids)
        if not self.close:
            return self.is_plain and count >= self.answer
        if self.closed_at is not None:
            return count - self.closed_at >= self.answer
        if self._has_closed(ids):
            self.closed_at = count
            return self.may_wait and count < self.left
        return count >= self.left

    def _look(self, ids: Sequence[int]) -> None:
        """Find out whether the text begins with a mark that opens its thinking."""
        text = self.model.decode(ids).lstrip()
        if text.startswith("<|channel|>"):
            raise UserError(CHANNELS)
        if opened := OPENS.match(text):
            self.close = closed_by(opened[0].strip())
        elif len(text) >= OPENING_CHARS or (text and text[0] not in FIRST_CHARS):
            self.is_plain = True

    def _has_closed(self, ids: Sequence[int]) -> bool:
        """Whether the end of thinking has been written; every token has a byte or more, so only the last are read."""
        last = self.model.decode(ids[-len(self.close.encode()) - 2 :])
        return self.close.lower() in last.lower()


CHANNELS = (
    "a model that thinks in channels (gpt-oss) can't be held to a budget of thinking: leave `thinking` out of the task"
)


def check_forcing(vocabulary: Collection[str]) -> None:
    """Refuse models whose thinking has no single mark that ends it.

    Raises:
        UserError: the tokenizer has channels.
    """
    if "<|channel|>" in vocabulary:
        raise UserError(CHANNELS)


@dataclass
class _Text:
    """A text on its way; `seed` is that of its job, `close` ends its thinking, empty as long as that is not known."""

    prompt_ids: list[int]
    seed: int
    close: str
    text: BudgetedText = field(default_factory=BudgetedText)
    stage: int = 0
    is_answering: bool = False
    watch: _Watch | None = None


def write_within(
    model: Model,
    jobs: Sequence[GenerationJob],
    forcing: Forcing,
    progress: Callable[[int], None] = lambda done: None,
) -> list[BudgetedText]:
    """Continue every prompt under the budget, in the order of the jobs, whose `max_tokens` don't count.

    Raises:
        UserError: a prompt leaves no room for thinking and answer, or a model thinks in channels.
    """
    rows = [_begun(model, job, forcing) for job in jobs]
    unfinished = list(range(len(rows)))
    done = 0
    while unfinished:
        stretches = [_stretch(model, rows[number], jobs[number].sampling, forcing) for number in unfinished]
        going_on = []
        for index, ids in generate(model.net, stretches, model.eos_ids, vocab_size=model.vocab_size):
            if _take(model, rows[unfinished[index]], ids, forcing):
                done += 1
                progress(done)
            else:
                going_on.append(unfinished[index])
        unfinished = sorted(going_on)
    return [row.text for row in rows]


def _begun(model: Model, job: GenerationJob, forcing: Forcing) -> _Text:
    prompt_ids = list(job.prompt_ids)
    mark = "" if forcing.cue else model.opens_thinking(prompt_ids)
    row = _Text(prompt_ids, job.seed, forcing.cue or (closed_by(mark) if mark else ""))
    if forcing.begin and not mark:
        row.close = closed_by(forcing.begin)
        row.text.force(model.raw_ids(f"{forcing.begin}\n"))
    put = len(_closing(model, forcing, row.close or "</think>"))
    put += len(row.text.ids) + forcing.waits * len(model.text_ids(f" {forcing.wait}"))
    if len(prompt_ids) + forcing.most + forcing.answer + put > model.max_length:
        raise UserError(
            f"a prompt of {len(prompt_ids)} tokens, {forcing.most} of thinking, {forcing.answer} of the answer and"
            f" {put} that are put between them don't fit a context of {model.max_length}: lower the budget of"
            " thinking, or max_tokens"
        )
    return row


def _stretch(model: Model, row: _Text, sampling: Sampling, forcing: Forcing) -> GenerationJob:
    """The next stretch of a text: the rest of its thinking and the answer, or the answer alone."""
    left = 0 if row.is_answering else forcing.most - row.text.thinking_tokens
    row.watch = None if row.is_answering else _Watch(model, forcing, row)
    seed = row.seed if row.stage == 0 else int(content_hash([row.seed, row.stage])[:15], 16)
    bounded = replace(sampling, max_tokens=left + forcing.answer)
    return GenerationJob([*row.prompt_ids, *row.text.ids], bounded, seed, until=row.watch)


def _take(model: Model, row: _Text, ids: list[int], forcing: Forcing) -> bool:
    """Add a stretch to its text, and what has to be put behind it. Whether the text is done."""
    text, watch = row.text, row.watch
    row.stage += 1
    has_ended = ids[-1] in model.eos_ids
    if watch is None or not watch.close:  # the answer, or a text that does not think
        text.ids += ids[: forcing.answer]
        text.answer_tokens = len(ids[: forcing.answer])
        text.finished = has_ended and len(ids) <= forcing.answer
        return True
    row.close = watch.close
    has_closed = watch.closed_at is not None
    thought = len(ids) if watch.closed_at is None else watch.closed_at
    text.thinking_tokens += thought
    if watch.may_wait and thought == len(ids) < watch.left:  # an end that is too early
        text.ids += _before(model, ids, row.close) if has_closed else ids[:-1]
        text.force(model.text_ids(_spaced(model.decode(text.ids), forcing.wait)))
        text.waits += 1
        return False
    if not has_closed and not has_ended:
        text.ids += _without_part(model, ids, row.close)
        text.force(_closing(model, forcing, row.close))
        text.is_cut = row.is_answering = True
        return False
    text.ids += ids
    text.answer_tokens = len(ids) - thought
    text.finished = has_ended
    return True


def _closing(model: Model, forcing: Forcing, close: str) -> list[int]:
    """What ends the thinking, in the model's own tokens."""
    return model.text_ids(f"\n\n{close}") if forcing.cue else model.raw_ids(f"\n{close}\n\n")


def _spaced(before: str, word: str) -> str:
    return word if not before or before[-1].isspace() else f" {word}"


def _before(model: Model, ids: list[int], close: str) -> list[int]:
    """The ids before the mark that ends them."""
    text = model.decode(ids)
    return _within(model, ids, text.lower().rfind(close.lower()))


def _without_part(model: Model, ids: list[int], close: str) -> list[int]:
    """The ids without the beginning of a mark that the budget cut in two."""
    if close[0].isalnum():  # words may end like that, too
        return ids
    text = model.decode(ids).lower()
    parts = [length for length in range(len(close) - 1, 1, -1) if text.endswith(close[:length].lower())]
    return _within(model, ids, len(text) - parts[0]) if parts else ids


def _within(model: Model, ids: list[int], chars: int) -> list[int]:
    """As many ids as have at most so many characters."""
    count = len(ids)
    while count and len(model.decode(ids[:count])) > chars:
        count -= 1
    return ids[:count]
