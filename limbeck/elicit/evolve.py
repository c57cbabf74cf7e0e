"""Evol-Instruct: prompts made harder, or others in their vein, round by round, and what failed thrown out."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.answer import ANSWER_SHARE, Temperature, Tokens, TopP
from limbeck.elicit.flow import (
    Asking,
    Bill,
    Kind,
    Pool,
    Scene,
    Tally,
    answer_of,
    answered,
    ask,
    new_prompt,
    prompt_of,
    user,
)
from limbeck.elicit.wording import fill, words
from limbeck.types import Sample, Sampling

DEEPER = (
    "Rewrite the prompt below so that it is somewhat harder for an assistant, yet still reasonable and clear to a"
    " person. {how} The new prompt may be 10 to 20 words longer, no more. Write the new prompt and nothing"
    " else.\n\nPrompt: {prompt}\n\nNew prompt:"
)
WIDER = (
    "Write one quite different prompt of the same field as the one below, about something rarer. It should be about as"
    " long and as hard, and make sense to a person. Write the new prompt and nothing else.\n\nPrompt: {prompt}\n\nNew"
    " prompt:"
)
HOW = {
    "constrain": "Add one more constraint or requirement.",
    "deepen": "Where it asks about something, ask about it in more depth and breadth.",
    "concretise": "Replace a general notion in it by a more specific one.",
    "reason": "If it can be answered in a step or two, make it ask for several steps of reasoning.",
    "complicate": (
        "Add an input in some format, such as a table, code, JSON or a formula, that the answer has to work with."
    ),
}
OPERATORS = (*HOW, "widen")
SAME = (
    "Do these two prompts ask for the same, with the same constraints and in the same depth? Say Equal or Not"
    " equal.\n\nFirst: {one}\n\nSecond: {other}\n\nAnswer:"
)
LEAKED = re.compile(r"\b(?:given|new|rewritten|created|original|#?the)[ _-]prompt\b|\bnew prompt\b", re.IGNORECASE)
STOP_WORDS = frozenset(
    "a an and are as at be but by for from had has have he her his i if in is it its me my no not of on or our she so"
    " that the their them they this to us was we were what which who will with you your yes".split()
)


class EvolInstruct(Section):
    """`rounds` in which every prompt is rewritten by one of five operators that make it harder or one that makes
    another (drawn evenly), and the new one is answered. Out goes what adds nothing (asked of the writer), whose answer
    says "sorry" in under 80 words or is nothing but stop words and signs, or that speaks of "the given prompt"; then
    the old prompt tries again in the next round. All generations are given, and the first prompts too with `originals`.
    The paper takes 2,048 tokens an answer; the wording here is ours."""

    kind: ClassVar[Kind] = "expand"
    paper: ClassVar[str] = "Xu et al., arXiv:2304.12244"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    rounds: Annotated[int, Field(ge=1, le=20)] = 4
    originals: bool = False
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    prompt_tokens: Tokens = 256
    max_tokens: Tokens = 512

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        alive = list(pool)
        found = list[Sample]()
        if self.originals:
            replies = yield from ask(
                [scene.request(sample.messages, self._sampling(self.max_tokens)) for sample in pool]
            )
            found += [
                answered(sample, reply)
                for sample, reply in zip(pool, replies, strict=True)
                if not self._failed(reply, tally)
            ]
        for turn in range(1, self.rounds + 1):
            evolved = yield from self._evolve(alive, scene, tally, turn)
            equal = yield from ask(
                [
                    scene.request((user(_same(old, new)),), Sampling(0.0, 1.0, 8))
                    for old, new in zip(alive, evolved, strict=True)
                    if new
                ]
            )
            verdicts = iter(equal)
            survivors = [
                None if new is None or self._adds_nothing(new, next(verdicts), tally) else new for new in evolved
            ]
            asked = [scene.request(new.messages, self._sampling(self.max_tokens)) for new in survivors if new]
            said = iter((yield from ask(asked)))
            for place, new in enumerate(survivors):
                if new is None or self._failed(reply := next(said), tally):
                    continue
                found.append(answered(new, reply))
                alive[place] = new
        return found

    def _sampling(self, tokens: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, tokens)

    def _evolve(self, alive: Pool, scene: Scene, tally: Tally, turn: int) -> Asking[list[Sample | None]]:
        """The next generation of every prompt; None where there is none."""
        operators = [scene.draw("operator", turn, place).choice(OPERATORS) for place in range(len(alive))]
        questions = [
            fill(WIDER, prompt=prompt_of(s)) if name == "widen" else fill(DEEPER, how=HOW[name], prompt=prompt_of(s))
            for s, name in zip(alive, operators, strict=True)
        ]
        replies = yield from ask(
            [scene.request((user(text),), self._sampling(self.prompt_tokens), turn) for text in questions]
        )
        found: list[Sample | None] = []
        for sample, name, reply in zip(alive, operators, replies, strict=True):
            text = (answer_of(reply) or "").strip().strip('"').strip()
            reason = "prompt cut off" if reply.meta.get("finish") == "length" else "no prompt" if not text else None
            if reason is None and LEAKED.search(text):
                reason = "speaks of the prompt"
            if reason is None and text.casefold() == prompt_of(sample).casefold():
                reason = "adds nothing"
            tally.add(f"{name}_tried")
            if reason:
                tally.drop(reason, text)
            kept = {key: sample.meta[key] for key in ("kind", "task", "weight") if key in sample.meta}
            found.append(
                None
                if reason
                else new_prompt(text, [sample, reply], reply.writer, **kept, evolved=name, generation=turn)
            )
        return found

    def _adds_nothing(self, new: Sample, verdict: Sample, tally: Tally) -> bool:
        said = words(answer_of(verdict) or "")
        equal = "equal" in said[:3] and "not" not in said[:3]
        if equal:
            tally.drop("adds nothing", prompt_of(new))
        return equal

    def _failed(self, reply: Sample, tally: Tally) -> bool:
        """Whether the answer shows that the prompt can't be answered."""
        text = answer_of(reply) or ""
        finish = str(reply.meta.get("finish"))
        said = words(text)
        reason = None if finish == "ok" else f"answer: {finish}"
        if reason is None and "sorry" in said and len(said) < 80:
            reason = "the answer says sorry"
        if reason is None and all(word in STOP_WORDS for word in said):
            reason = "the answer says nothing"
        if reason:
            tally.drop(reason, text)
        return reason is not None

    def bill(self, taken: int) -> Bill:
        times = taken * self.rounds
        tokens = times * (self.prompt_tokens + self.max_tokens) + (taken * self.max_tokens if self.originals else 0)
        return Bill(
            3 * times + (taken if self.originals else 0),
            int(tokens * ANSWER_SHARE),
            given=times + (taken if self.originals else 0),
        )


def _same(old: Sample, new: Sample) -> str:
    return fill(SAME, one=prompt_of(old), other=prompt_of(new))


STEPS: dict[str, type[Section]] = {"evol_instruct": EvolInstruct}
