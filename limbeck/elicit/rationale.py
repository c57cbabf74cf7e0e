"""Labeling with reasons: worked solutions, several different ones, and reasons that follow from one answer and not from
another.

An answered sample has the whole text as its answer, `rationale` (the reasons) and `final` (the answer they end in) in
its meta.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

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
    answered,
    ask,
    asked_of,
    finished,
    prompt_of,
    user,
)
from limbeck.elicit.verify import verify
from limbeck.elicit.wording import fill, words
from limbeck.types import Message, Sample, Sampling

THINK = "{prompt}\n\nLet's think step by step."
CONCLUDE = "Therefore, the answer is"
IN_ONE = "{prompt}\n\nThink step by step, and end with a line of the form: The answer is ..."
SAYS = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*[:*]*[ \t]*", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
LONGEST_FINAL = 200


def final_of(text: str) -> str | None:
    """What stands after the last "the answer is" (or "answer:"), without the closing period, or in the last box of a
    text that says neither; None where nothing does."""
    found = list(SAYS.finditer(text))
    boxes = BOXED.findall(text)
    last = text[found[-1].end() :].partition("\n")[0] if found else boxes[-1] if boxes else ""
    if boxed := BOXED.search(last):
        last = boxed[1]
    last = re.sub(r"[\s.*$]+$", "", last.strip("*$ "))
    return last if last and len(last) <= LONGEST_FINAL else None


def with_reasons(prompt: Sample, reply: Sample, text: str, rationale: str, final: str) -> Sample:
    """The prompt answered by reasons and what they end in."""
    kept = text if text != reply.messages[-1]["content"] else None
    return answered(prompt, reply, kept, rationale=rationale, final=final)


class Rationale(Section):
    """Zero-shot chains of thought: the writer thinks step by step, and in a second call says what the answer therefore
    is (Fine-tune-CoT). With `calls: 1` it does both at once and ends with "The answer is ...". `n` solutions a question
    are the paper's diverse reasoning."""

    kind: ClassVar[Kind] = "label"
    paper: ClassVar[str] = "Ho et al., arXiv:2212.10071; Kojima et al., arXiv:2205.11916"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    n: Annotated[int, Field(ge=1, le=1000)] = 1
    calls: Annotated[int, Field(ge=1, le=2)] = 2
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: Tokens = 256
    final_tokens: Tokens = 32

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        turns = [(sample, number) for sample in pool for number in range(self.n)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        template = THINK if self.calls == 2 else IN_ONE
        asked = [scene.request(_last_replaced(sample, template), sampling, number) for sample, number in turns]
        replies = yield from ask(asked)
        whole = finished(replies, tally)
        thought = [
            (sample, request.messages, reply)
            for (sample, _), request, reply, good in zip(turns, asked, replies, whole, strict=True)
            if good
        ]
        if self.calls == 1:
            return [found for sample, _, reply in thought if (found := _in_one(sample, reply, tally)) is not None]
        closing = Sampling(0.0, 1.0, self.final_tokens)
        ends = yield from ask(
            [scene.request((*messages, reply.messages[-1], user(CONCLUDE)), closing) for _, messages, reply in thought]
        )
        pairs = zip(thought, ends, finished(ends, tally), strict=True)
        return [
            found
            for (sample, _, reply), end, good in pairs
            if good and (found := _in_two(sample, reply, end, tally)) is not None
        ]

    def bill(self, taken: int) -> Bill:
        asked = taken * self.n
        tokens = int(asked * self.max_tokens * ANSWER_SHARE) + (asked * self.final_tokens if self.calls == 2 else 0)
        return Bill(asked * self.calls, tokens, given=asked)


def _last_replaced(sample: Sample, template: str) -> tuple[Message, ...]:
    """The conversation with its last question in the words of the template."""
    *before, _ = asked_of(sample)
    return (*before, user(fill(template, prompt=prompt_of(sample))))


def _in_one(sample: Sample, reply: Sample, tally: Tally) -> Sample | None:
    text = reply.messages[-1]["content"]
    final = final_of(text)
    if final is None:
        tally.drop("no answer at the end of the reasons", text)
        return None
    said = list(SAYS.finditer(text))
    reasons = text[: said[-1].start()].strip() if said else text
    return with_reasons(sample, reply, text, reasons or text, final)


def _in_two(sample: Sample, reply: Sample, end: Sample, tally: Tally) -> Sample | None:
    reasons = reply.messages[-1]["content"].strip()
    said = end.messages[-1]["content"].strip()
    final = final_of(said) or re.sub(r"[\s.*$]+$", "", said.splitlines()[0]).lstrip("*$: ")
    if not final or len(final) > LONGEST_FINAL:
        tally.drop("no short answer after the reasons", said)
        return None
    text = f"{reasons}\n\n{CONCLUDE} {final}."
    found = with_reasons(sample, reply, text, reasons, final)
    return replace(found, parents=(*found.parents, end.id))


class DiverseRationales(Section):
    """Several different rationales a question (MCC-KD): of `n` samples those that are right, by the prompt's check
    where it has one, and no two of which share more than `similar` of their `gram`-grams (Jaccard); the first `keep`
    are kept. The loss `consistency` lets the student predict the answer alike after each of them."""

    kind: ClassVar[Kind] = "label"
    paper: ClassVar[str] = "Chen et al., arXiv:2310.14747"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    n: Annotated[int, Field(ge=2, le=1000)] = 8
    keep: Annotated[int, Field(ge=1)] = 5
    similar: Annotated[float, Field(gt=0, le=1)] = 0.5
    gram: Annotated[int, Field(ge=1, le=8)] = 3
    calls: Annotated[int, Field(ge=1, le=2)] = 1
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: Tokens = 256

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        asking = Rationale(
            n=self.n, calls=self.calls, temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens
        )
        written = yield from asking.run(pool, scene, tally)
        kept: dict[str, list[tuple[Sample, set[tuple[str, ...]]]]] = {}
        for sample in written:
            text = sample.messages[-1]["content"]
            group = kept.setdefault(str(sample.meta.get("prompt_id", prompt_of(sample))), [])
            if sample.meta.get("check") is not None and not verify(sample.meta["check"], text):
                tally.drop("wrong answer", text)
                continue
            grams = _grams(sample.meta["rationale"], self.gram)
            if any(_jaccard(grams, other) > self.similar for _, other in group):
                tally.drop("too like another rationale", text)
            elif len(group) == self.keep:
                tally.drop("enough rationales", text)
            else:
                group.append((sample, grams))
        return [sample for group in kept.values() for sample, _ in group]

    def bill(self, taken: int) -> Bill:
        asked = taken * self.n
        return Bill(
            asked * self.calls, int(asked * self.max_tokens * ANSWER_SHARE), given=min(taken * self.keep, asked)
        )


def _grams(text: str, size: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + size]) for at in range(max(1, len(found) - size + 1))}


def _jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


class Contrastive(Section):
    """Reasons for a given answer, drawn by log p(token | right answer) - `strength` log p(token | another answer): what
    follows from this answer alone (SCOTT). The prompt's first given answer is explained; with `counterfactual`, a wrong
    one is explained as well (another prompt's answer, drawn), and that sample has `counterfactual: true`. The paper
    decodes greedily from GPT-NeoX-20B with few-shot demonstrations; here the writer is asked without any."""

    kind: ClassVar[Kind] = "label"
    paper: ClassVar[str] = "Wang et al., arXiv:2305.01879"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "contrast"})
    strength: Annotated[float, Field(ge=0, le=2)] = 0.5
    against: Literal["wrong", "empty"] = "wrong"
    counterfactual: bool = True
    max_tokens: Tokens = 128

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        known = [(sample, str(sample.meta["answers"][0])) for sample in pool if sample.meta.get("answers")]
        for sample in pool:
            if not sample.meta.get("answers"):
                tally.drop("no answer is given", prompt_of(sample))
        turns = []
        for sample, answer in known:
            others = sorted({other for _, other in known} - {answer})
            wrong = scene.draw("wrong", sample.id).choice(others) if others else "unknown"
            turns.append((sample, answer, wrong if self.against == "wrong" else "", False))
            if self.counterfactual and others:
                turns.append((sample, wrong, answer if self.against == "wrong" else "", True))
        sampling = Sampling(0.0, 1.0, self.max_tokens)
        asked = [
            scene.request(_why(sample, given), sampling, against=_why(sample, other), contrast=self.strength)
            for sample, given, other, _ in turns
        ]
        replies = yield from ask(asked)
        found: Pool = []
        for (sample, given, _, counter), reply, whole in zip(turns, replies, finished(replies, tally), strict=True):
            if whole:
                reasons = reply.messages[-1]["content"].strip()
                new = with_reasons(sample, reply, f"{reasons}\n\n{CONCLUDE} {given}.", reasons, given)
                found.append(replace(new, meta=new.meta | ({"counterfactual": True} if counter else {})))
        return found

    def bill(self, taken: int) -> Bill:
        asked = taken * (2 if self.counterfactual else 1)
        return Bill(asked, int(asked * self.max_tokens * ANSWER_SHARE), given=asked)


def _why(sample: Sample, answer: str) -> tuple[Message, ...]:
    text = fill(
        "Question: {prompt}\nAnswer: {answer}\n\nExplain in a few sentences why this is the answer.",
        prompt=prompt_of(sample),
        answer=answer,
    )
    return (user(text),)


STEPS: dict[str, type[Section]] = {
    "rationale": Rationale,
    "diverse_rationales": DiverseRationales,
    "contrastive": Contrastive,
}
