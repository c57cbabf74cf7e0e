"""Evol-Instruct: prompts made harder, or varied, round by round, without those that fail."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    ending,
    inherited,
    new_prompt,
    prompt_of,
    said_by,
    user,
    with_answer,
)
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, Estimate, Temperature, TokenCount, TopP, register
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


@register("evol_instruct")
class EvolInstruct(AskingStep):
    """Rewrites every prompt in `rounds`, each time by an operator drawn from six: five make it harder, one replaces it
    by a related one. The new prompt is then answered. It fails if it adds nothing (the model is asked), if it speaks of
    "the given prompt", or if its answer says "sorry" in under 80 words or has only stop words and punctuation; then the
    old prompt is tried again in the next round. Gives the prompts of all rounds, and with `originals` the first ones,
    too. The paper allows 2,048 tokens an answer; the wording here is ours."""

    kind = "expand"
    paper = "Xu et al., arXiv:2304.12244"
    rounds: Annotated[int, Field(ge=1, le=20)] = 4
    originals: bool = False
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    prompt_tokens: TokenCount = 256
    max_tokens: TokenCount = 512

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        current = list(pool)
        samples: Pool = []
        if self.originals:
            replies = yield from ask(
                [context.request(sample.messages, self._sampling(self.max_tokens)) for sample in pool]
            )
            samples += [
                with_answer(sample, reply)
                for sample, reply in zip(pool, replies, strict=True)
                if not self._failed(reply, tally)
            ]
        for turn in range(1, self.rounds + 1):
            evolved = yield from self._evolve(current, context, tally, turn)
            evolved = yield from self._without_equal(current, evolved, context, tally)
            requests = [context.request(new.messages, self._sampling(self.max_tokens)) for new in evolved if new]
            replies_left = iter((yield from ask(requests)))
            for place, new in enumerate(evolved):
                if new is None or self._failed(reply := next(replies_left), tally):
                    continue
                samples.append(with_answer(new, reply))
                current[place] = new
        return samples

    def _sampling(self, max_tokens: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, max_tokens)

    def _evolve(self, current: Pool, context: StepContext, tally: Tally, turn: int) -> Questions[list[Sample | None]]:
        """The next version of every prompt; None where the rewriting failed."""
        operators = [context.rng("operator", turn, place).choice(OPERATORS) for place in range(len(current))]
        questions = [
            fill(WIDER, prompt=prompt_of(s)) if name == "widen" else fill(DEEPER, how=HOW[name], prompt=prompt_of(s))
            for s, name in zip(current, operators, strict=True)
        ]
        replies = yield from ask(
            [context.request((user(text),), self._sampling(self.prompt_tokens), turn) for text in questions]
        )
        evolved: list[Sample | None] = []
        for sample, name, reply in zip(current, operators, replies, strict=True):
            text = said_by(reply).strip().strip('"').strip()
            tally.add(f"{name}_tried")
            if reason := _unusable(text, ending(reply), prompt_of(sample)):
                tally.drop(reason, text)
                evolved.append(None)
            else:
                meta = inherited(sample, "kind", "task", "weight") | {"evolved": name, "generation": turn}
                evolved.append(new_prompt(text, [sample, reply], reply.writer, **meta))
        return evolved

    def _without_equal(
        self, current: Pool, evolved: list[Sample | None], context: StepContext, tally: Tally
    ) -> Questions[list[Sample | None]]:
        """`evolved` with None in place of prompts that ask for the same as before, according to the model."""
        questions = [_same(old, new) for old, new in zip(current, evolved, strict=True) if new]
        verdicts = iter((yield from ask([context.request((user(text),), Sampling(0.0, 1.0, 8)) for text in questions])))
        return [None if new is None or self._adds_nothing(new, next(verdicts), tally) else new for new in evolved]

    def _adds_nothing(self, new: Sample, verdict: Sample, tally: Tally) -> bool:
        first_words = words(said_by(verdict))[:3]
        equal = "equal" in first_words and "not" not in first_words
        if equal:
            tally.drop("adds nothing", prompt_of(new))
        return equal

    def _failed(self, reply: Sample, tally: Tally) -> bool:
        """Whether the answer shows that the prompt can't be answered."""
        text = said_by(reply)
        finish = ending(reply)
        reply_words = words(text)
        reason = None if finish == "ok" else f"answer: {finish}"
        if reason is None and "sorry" in reply_words and len(reply_words) < 80:
            reason = "the answer says sorry"
        if reason is None and all(word in STOP_WORDS for word in reply_words):
            reason = "the answer says nothing"
        if reason:
            tally.drop(reason, text)
        return reason is not None

    def estimate(self, samples: int) -> Estimate:
        rewrites = samples * self.rounds
        originals = samples if self.originals else 0
        tokens = rewrites * (self.prompt_tokens + self.max_tokens) + originals * self.max_tokens
        return Estimate(3 * rewrites + originals, int(tokens * ANSWER_SHARE), samples=rewrites + originals)

    def writes(self) -> frozenset[str]:
        return frozenset({"evolved", "generation"})


def _unusable(text: str, finish: str, old: str) -> str | None:
    """Why a rewritten prompt can't be used; None if it can."""
    if finish == "length":
        return "prompt cut off"
    if not text:
        return "no prompt"
    if finish != "ok":
        return f"prompt: {finish}"
    if LEAKED.search(text):
        return "speaks of the prompt"
    return "adds nothing" if text.casefold() == old.casefold() else None


def _same(old: Sample, new: Sample) -> str:
    return fill(SAME, one=prompt_of(old), other=prompt_of(new))
