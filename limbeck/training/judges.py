"""What steps of feedback say of the student's answers, as rewards: a model that the recipe names judges in the loop.

A verdict that can't be read is no number: it stays the word that says why, such as "unreadable".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from limbeck.elicit.compare import Compare
from limbeck.elicit.flow import Pool
from limbeck.elicit.prompt import Prompt
from limbeck.elicit.rate import Rate
from limbeck.elicit.ratings import NOT_APPLICABLE, TOO_LONG, UNREADABLE
from limbeck.elicit.rubric import Rubric
from limbeck.elicit.select import score_of
from limbeck.elicit.soft_preference import SoftPreference
from limbeck.elicit.thinking import after_thinking
from limbeck.objectives.loss import STUDENT
from limbeck.types import Message, Sample

Feedback = Rate | Rubric | Compare | SoftPreference
JudgeBy = Callable[[Feedback, Pool], Pool]  # runs a step of feedback on a pool, whatever it asks
SCORE: dict[type, str] = {Rate: "rating", Rubric: "rubric", Compare: "wins", SoftPreference: "preference"}
ALONE = "nothing to compare it with"
SILENT = "no answer"  # it says nothing: the worst there is, which the weight of the reward decides
TURN = "turn"  # in a sample's meta: the number of the answer


class Spoken(Protocol):
    """An answer of the student to a prompt, with its thinking; `finished` if it ended by itself."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def text(self) -> str: ...

    @property
    def finished(self) -> bool: ...


def judged_by(step: Feedback, answers: Sequence[Spoken], judge: JudgeBy) -> list[float | str]:
    """For each answer its score by the step, from 0 to 1, or the word that says why there is none.

    What follows the thinking is judged; an answer that says nothing is not asked about, and is `SILENT`. One that alone
    speaks, where answers are compared, wins. With several ranks the caller has one of
    them ask, so that nothing here may wait for the others.
    """
    pool = [
        Sample(_conversation(answer, said), STUDENT, meta=_meta(number, answer))
        for number, answer in enumerate(answers)
        if (said := (after_thinking(answer.text) or "").strip())
    ]
    judged = judge(step, pool) if pool else []
    found = {int(sample.meta[TURN]): _value(step, sample) for sample in judged}
    outspoken = {answers[number].prompt.id for number in range(len(answers)) if number not in found}
    found |= {n: 1.0 for n, value in found.items() if value == ALONE and answers[n].prompt.id in outspoken}
    return [found.get(number, SILENT) for number in range(len(answers))]


def _conversation(answer: Spoken, said: str) -> tuple[Message, ...]:
    return (*answer.prompt.messages, {"role": "assistant", "content": said})


def _meta(number: int, answer: Spoken) -> dict[str, Any]:
    return {"prompt_id": answer.prompt.id, TURN: number, "finish": "ok" if answer.finished else "length"}


def _value(step: Feedback, sample: Sample) -> float | str:
    score = score_of(sample, SCORE[type(step)])
    if score is None:
        return _why(sample.meta)
    low, high = step.scale if isinstance(step, Rate) else (0, 1)
    return (score - low) / (high - low)


def _why(meta: Mapping[str, Any]) -> str:
    """Why an answer has no score."""
    compared = [entry["outcome"] for entry in meta.get("compared", ())]
    said = [*meta.get("ratings", {}).values(), *meta.get("rubric", {}).values(), *compared]
    for why in (TOO_LONG, UNREADABLE, "unparsable", NOT_APPLICABLE):
        if why in said:
            return UNREADABLE if why == "unparsable" else why
    return ALONE if "compared" in meta and not compared else UNREADABLE
