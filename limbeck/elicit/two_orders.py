"""Two answers compared in both orders: the question, the verdict, and how far whoever judges can be trusted.

A ruling is the first, the second, a tie, or unparsable. A judge that changes its mind with the order has called a tie.
Where either order can't be read, the pair is counted separately and never averaged in (MT-Bench's protocol, Zheng et
al. 2306.05685); neither is a pair that leaves the judge no room to reply, which is not asked. Judges favour long
answers and their own: both are reported.

Prompt and answers are data for the judge (see `fence`). Answers are shown without their thinking; one that never came
out of it is shown empty.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from limbeck.elicit.fence import DATA, fill_fenced
from limbeck.elicit.thinking import after_thinking
from limbeck.types import AnswerForm, Message

Ruling = Literal["first", "second", "tie", "unparsable", "too_long"]
VERDICT = re.compile(r"verdict:[ \t]*(a|b|tie)\.?", re.IGNORECASE)
PREFER = (
    "Prefer the answer that is correct, does what the request asks, and leaves out what it does not ask for. Length"
    " is no merit, and neither is the order in which the answers stand. If neither is better, it is a tie."
)
INSTRUCTION = """You compare two answers to one request. Below stand the request and the answers A and B. DATA

PREFER

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

ENDING which is one of:
VERDICT: A
VERDICT: B
VERDICT: TIE""".replace("DATA", DATA)
REASONED = "Explain your choice in one or two sentences. Then end with one line that holds nothing but your verdict,"
AT_ONCE = "Answer with one line that holds nothing but your verdict,"
VERDICT_ALONE = AnswerForm(pattern="VERDICT: (A|B|TIE)")


@dataclass(frozen=True)
class PairVerdict:
    """The judge's rulings on one pair. `forward` had the first answer as A, `backward` as B; both name the systems'
    answers.

    `first_length` and `second_length` are characters of the answers; `replies` are the judge's own words, empty for a
    pair that was too long to be asked.
    """

    prompt_id: str
    forward: Ruling
    backward: Ruling
    first_length: int
    second_length: int
    replies: tuple[str, str]

    @property
    def parsed(self) -> bool:
        """Whether both orders gave a verdict that can be read."""
        return not {"unparsable", "too_long"} & {self.forward, self.backward}

    @property
    def consistent(self) -> bool | None:
        """Whether it is the same in both orders; None where one can't be read."""
        return self.forward == self.backward if self.parsed else None

    @property
    def outcome(self) -> Ruling:
        if not self.parsed:
            return "too_long" if self.forward == "too_long" else "unparsable"
        return self.forward if self.forward == self.backward else "tie"


def question(
    prompt: str, a: str, b: str, control: Collection[str] = (), *, prefer: str = PREFER, ending: str = REASONED
) -> tuple[Message, ...]:
    """The judge's conversation about two answers.

    Args:
        control: its tokenizer's own control tokens, in addition to the usual ones.
        prefer: by what it compares them.
        ending: what it is to write: its reasons and its verdict, or that alone.
    """
    before, after = INSTRUCTION.replace("ENDING", ending).split("PREFER")
    filled = fill_fenced(after, control, prompt=prompt, a=a, b=b)
    return ({"role": "user", "content": before + prefer + filled},)


def read_verdict(reply: str, order: Literal["ab", "ba"]) -> Ruling:
    """The answer that a reply prefers, where `order` says whether the first one was called A.

    After its thinking, the last line that is not blank must hold a verdict and nothing else but emphasis, and no other
    line another verdict.
    """
    said = after_thinking(reply) or ""
    lines = [line.strip(" \t*_`") for line in said.splitlines() if line.strip(" \t*_`")]
    letters = [match[1].lower() for line in lines if (match := VERDICT.fullmatch(line))]
    if len(set(letters)) != 1 or not VERDICT.fullmatch(lines[-1]):
        return "unparsable"
    if letters[0] == "tie":
        return "tie"
    return "first" if letters[0] == order[0] else "second"


def trust(verdicts: Sequence[PairVerdict]) -> dict[str, Any]:
    """How the pairs ended, and what shows how far the judge can be trusted. What is undefined is None, never a number.

    Returns, as plain data:
        outcomes: how many pairs ended as first, second, tie and unparsable, and how many were too_long to be asked.
        unparsable_share: over all pairs that were asked.
        swap_consistency: share of readable pairs where both orders agree.
        first_position_share: of the single verdicts that are no tie, how many went to the answer shown as A; a fair
            judge that sees every pair in both orders gives half.
        longer_wins: share of decided pairs with answers of different lengths that the longer one won.
    """
    counts = {name: sum(verdict.outcome == name for verdict in verdicts) for name in get_args(Ruling)}
    asked = len(verdicts) - counts["too_long"]
    in_front = [
        ruling == place
        for v in verdicts
        for ruling, place in ((v.forward, "first"), (v.backward, "second"))
        if ruling in ("first", "second")
    ]
    longer = [
        (verdict.outcome == "first") == (verdict.first_length > verdict.second_length)
        for verdict in verdicts
        if verdict.outcome in ("first", "second") and verdict.first_length != verdict.second_length
    ]
    return {
        "outcomes": counts,
        "unparsable_share": counts["unparsable"] / asked if asked else None,
        "swap_consistency": _share([bool(verdict.consistent) for verdict in verdicts if verdict.parsed]),
        "first_position_share": _share(in_front),
        "longer_wins": _share(longer),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
