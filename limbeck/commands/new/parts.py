"""The two parts of a job's texts, what there is to say of them, and how long their answers are."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.commands.new.data import Example, Seen, lengths, shown, unique
from limbeck.commands.new.draft import corpus, mean_tokens, token_count
from limbeck.commands.new.split import MOST_HELD_OUT, Split, split
from limbeck.commands.new.student import context_of
from limbeck.commands.new.wishes import Wishes
from limbeck.types import UserError

USUAL_TOKENS = {
    "extract": 128,
    "answer": 128,
    "rewrite": 192,
    "chat": 384,
    "reason": 384,
    "tools": 192,
    "compress": 256,
}
LONG_CHAT = 1024  # of a teacher that is no small model on a laptop
MOST_TOKENS = 4096


def split_notes(parts: Split) -> list[str]:
    """Lines that say what is held out."""
    notes = [f"{len(parts.training):,} texts to train on, {len(parts.held_out):,} held out to measure on"]
    if parts.near:
        notes.append(f"{parts.near:,} held-out texts resemble a trained one: what is measured on them may be too good")
    if parts.untested:
        named = ", ".join(parts.untested[:5])
        notes.append(
            f"{len(parts.untested)} labels have no held-out text, so they are trained and not measured: {named}"
        )
    if len(parts.held_out) < 50:
        notes.append("few texts are held out, so the intervals will be wide")
    return notes


def both_parts(wishes: Wishes, seen: Seen, most: int = MOST_HELD_OUT) -> tuple[Split, list[str]]:
    """The two parts, of which `most` texts are held out, and what was seen."""
    seen = unique(seen, by_label=False)
    if corpus(wishes) and seen.answered < len(seen.examples):
        bare = next(example for example in seen.examples if not example.answer)
        raise UserError(f"{bare.place}: no answer to learn from; give one to every row, or leave --learn-from out")
    parts = split(seen.examples, most=most)
    if not parts.held_out:
        raise UserError(
            f"{seen.file}: too many conversations say the same after another system message (such as"
            f" {shown(seen.examples[0].text)!r}), so none can be held out; give others to measure on with --test FILE"
        )
    texts = [f"texts: {lengths([example.text for example in seen.examples])}"]
    if seen.answered:
        answers = [example.answer for example in seen.examples if example.answer]
        texts.append(f"{seen.answered:,} of {len(seen.examples):,} have an answer: {lengths(answers)}")
    return parts, [*seen.notes, *texts, *split_notes(parts)]


def refuse_conversations(wishes: Wishes, seen: Seen) -> None:
    for example in seen.examples:
        if example.is_conversation:
            raise UserError(
                f"{example.place} is a conversation, and --task {wishes.task} takes single texts; take --task chat or"
                " tools"
            )


def room_for(wishes: Wishes, examples: Sequence[Example]) -> tuple[int, list[str]]:
    """Tokens of an answer at most, without thinking: half as many again as the longest of the data's, or what is usual,
    and no more than half of what the student can read; and what there is to say of it."""
    given = sorted(token_count(example.answer) for example in examples if example.answer)
    is_long = wishes.task == "chat" and (wishes.is_served or wishes.on_gpu)
    usual = LONG_CHAT if is_long else USUAL_TOKENS[wishes.task]
    longest = int(1.5 * given[len(given) * 95 // 100]) if given else 0
    most = min(MOST_TOKENS, max(1, context_of(wishes) // 2))
    room = min(most, max(usual, longest))
    return room, [f"the longest 5 % of the answers may not fit in {most:,} tokens"] if longest > most else []


def mean_answer(wishes: Wishes, examples: Sequence[Example], most: int) -> float:
    """Tokens of an answer, about: as long as the data's, or half of what there is room for; with the thinking before it
    where that is learnt."""
    given = [example.answer for example in examples if example.answer]
    thinking = 0.0 if wishes.drops_thinking else wishes.thought / 2
    return (min(float(most), mean_tokens(given)) if given else most / 2) + thinking
