"""What a judge is asked when it rates answers by an aspect, and how its ratings are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from limbeck.elicit.aspects import MAY_NOT_APPLY
from limbeck.elicit.fence import DATA, conversation_text, fenced
from limbeck.elicit.flow import prompt_messages, said_by
from limbeck.types import AnswerForm, Sample

UNREADABLE = "unreadable"
NOT_APPLICABLE = "not applicable"
TOO_LONG = "too long"
Rating = int | str  # a number of the scale, or one of the three
LINE = re.compile(r"rating[ \t]*(\d{1,3})?[ \t]*:[ \t]*(-?\d{1,3}|n/a)\.?", re.IGNORECASE)


@dataclass(frozen=True)
class AspectQuestion:
    """A question about some answers to one prompt.

    Args:
        aspect, question: the aspect's name, and what it asks of an answer.
        scale: the lowest and the highest rating.
        reply: the judge gives its reasons and then its ratings, the ratings alone, or writes nothing (its probabilities
            of the next token are read).
    """

    aspect: str
    question: str
    scale: tuple[int, int]
    reply: Literal["reasons", "ratings", "none"] = "reasons"

    @property
    def may_be_none(self) -> bool:
        return self.aspect in MAY_NOT_APPLY and self.reply != "none"

    def text(self, answers: Sequence[Sample], control: Collection[str]) -> str:
        """The question; `control` are the judge's own control tokens."""
        several = len(answers) > 1
        low, high = self.scale
        or_none = ', or "n/a" if it does not apply to this request' if self.may_be_none else ""
        head = (
            f"You rate {'answers' if several else 'an answer'} to one request. Below stand the request and the"
            f" {'answers' if several else 'answer'}. {DATA}\n\nRate {'each answer' if several else 'it'} by one aspect"
            f" alone, {self.aspect.replace('_', ' ')}: {self.question} The scale is from {low} (not at all) to {high}"
            f" (fully){or_none}. Length is no merit.\n\nRequest:\n"
        )
        parts = [head + fenced(conversation_text(prompt_messages(answers[0])), control)]
        for number, answer in enumerate(answers, 1):
            parts.append(f"Answer{f' {number}' if several else ''}:\n{fenced(said_by(answer), control)}")
        return "\n\n".join([*parts, self._ending(len(answers))])

    def _ending(self, count: int) -> str:
        low, high = self.scale
        if self.reply == "none" or (count == 1 and self.reply == "ratings"):
            return f"Answer with the number alone, from {low} to {high}.\nRating:"
        of_each = ", of each" if count > 1 else ""
        say = f"Say what speaks for it and against it in one or two sentences{of_each}. Then end"
        say = say if self.reply == "reasons" else "Answer"
        numbers = [f" {number}" for number in range(1, count + 1)] if count > 1 else [""]
        lines = "\n".join(f"RATING{number}: <number>" for number in numbers)
        line = "line for every answer" if count > 1 else "line"
        return f"{say} with one {line}, that holds nothing but its rating:\n{lines}"

    def form(self, count: int) -> AnswerForm | None:
        """What a reply about so many answers is held to; None where reasons come first."""
        if self.reply != "ratings":
            return None
        numbers = [str(number) for number in range(self.scale[0], self.scale[1] + 1)]
        numbers += ["n/a"] if self.may_be_none else []
        if count == 1:
            return AnswerForm(labels=tuple(numbers))
        return AnswerForm(
            pattern="\n".join(f"RATING {number}: ({'|'.join(numbers)})" for number in range(1, count + 1))
        )

    def read(self, said: str, count: int) -> list[Rating]:
        """The ratings of a reply, in the order in which the answers were shown."""
        return read_ratings(said, count, self.scale, bare=self.reply == "ratings", may_be_none=self.may_be_none)


def read_ratings(
    said: str, count: int, scale: tuple[int, int], *, bare: bool = False, may_be_none: bool = False
) -> list[Rating]:
    """The ratings of `count` answers in a reply, each read strictly: one line that holds nothing but it, after
    everything else, and no other line that says otherwise. With `bare`, the number may be all that is said."""
    lines = [line.strip(" \t*_`") for line in said.splitlines() if line.strip(" \t*_`")]
    if bare and count == 1 and len(lines) == 1:
        alone = re.sub(r"^rating[ \t]*:[ \t]*", "", lines[0], flags=re.IGNORECASE).rstrip(". ")
        return [_rating(alone, scale, may_be_none)]
    matches = [LINE.fullmatch(line) for line in lines]
    last = next((place for place in range(len(lines) - 1, -1, -1) if matches[place] is None), -1)
    found: dict[int, set[Rating]] = {}
    late: set[int] = set()
    for place, match in enumerate(matches):
        if match is not None:
            number = int(match[1] or 1) if match[1] or count == 1 else 0
            found.setdefault(number, set()).add(_rating(match[2], scale, may_be_none))
            late |= {number} if place > last else set()
    return [
        next(iter(found[number])) if number in late and len(found[number]) == 1 else UNREADABLE
        for number in range(1, count + 1)
    ]


def _rating(text: str, scale: tuple[int, int], may_be_none: bool) -> Rating:
    if text.lower() == "n/a":
        return NOT_APPLICABLE if may_be_none else UNREADABLE
    value = int(text) if re.fullmatch(r"-?\d{1,3}", text) else scale[0] - 1
    return value if scale[0] <= value <= scale[1] else UNREADABLE
