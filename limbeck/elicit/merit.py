"""Selection by what a model thinks of a sample: how much the prompt helps with the answer, how hard it is, how complex
and how good."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.flow import (
    Asking,
    Bill,
    Kind,
    Pool,
    Scene,
    Score,
    Tally,
    answer_of,
    asked_of,
    prompt_of,
    score,
    scored,
    user,
)
from limbeck.elicit.similar import vectors
from limbeck.elicit.wording import fill
from limbeck.types import LogProb

COMPLEXITY = (
    "How complex is this task? A task is more complex the more steps, knowledge and constraints it takes to do it well."
    " Answer with one digit from 1 (trivial) to 6 (very complex).\n\nTask: {prompt}\n\nComplexity:"
)
QUALITY = (
    "How good is this answer? A good answer is right, complete, clear and does what was asked. Answer with one digit"
    " from 1 (useless) to 6 (excellent).\n\nTask: {prompt}\n\nAnswer: {answer}\n\nQuality:"
)
DIGITS = ("1", "2", "3", "4", "5", "6")


def answered_only(pool: Pool, tally: Tally) -> Pool:
    """The samples with an answer that is not empty; the others are counted."""
    for sample in pool:
        if not (answer_of(sample) or "").strip():
            tally.drop("no answer", prompt_of(sample))
    return [sample for sample in pool if (answer_of(sample) or "").strip()]


def per_token(found: LogProb) -> float:
    """Mean negative log-likelihood in nats per token."""
    return -found.nats / max(1, found.tokens)


def _highest(rated: Pool, name: str, share: float, tally: Tally, reason: str) -> Pool:
    """The `share` of the samples with the highest score of this name, in their own order; the others go, for this
    reason."""
    count = max(1, round(share * len(rated)))
    best = {id(sample) for sample in sorted(rated, key=lambda sample: -sample.meta["scores"][name])[:count]}
    for sample in rated:
        if id(sample) not in best:
            tally.drop(reason, prompt_of(sample))
    return [sample for sample in rated if id(sample) in best]


class Difficulty(Section):
    """Scores how hard an answer is to foresee: `difficulty`, its mean negative log-likelihood under the scoring model,
    in nats per token. Nothing is left out but samples without an answer: `bins` and `top` select by it."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"log_probs"})

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        kept = answered_only(pool, tally)
        found = yield from score([Score(asked_of(sample), answer_of(sample) or "") for sample in kept])
        return [scored(sample, difficulty=per_token(one)) for sample, one in zip(kept, found, strict=True)]

    def bill(self, taken: int) -> Bill:
        return Bill(scores=taken, given=taken)


class Ifd(Section):
    """Superfiltering: IFD = perplexity of the answer after its prompt / perplexity of the answer alone, under a small
    model. At 1 and more the prompt doesn't help with the answer, and the sample goes; of the others the `share` with
    the highest IFD stays, where the prompt helps least. The paper scores with GPT-2 and keeps 5 to 10 %; here the
    scoring model is the recipe's teacher."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = "Li et al., arXiv:2402.00530 and arXiv:2308.12032"
    needs: ClassVar[frozenset[str]] = frozenset({"log_probs"})
    share: Annotated[float, Field(gt=0, le=1)] = 0.1

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        kept = answered_only(pool, tally)
        texts = [answer_of(sample) or "" for sample in kept]
        after = yield from score([Score(asked_of(sample), text) for sample, text in zip(kept, texts, strict=True)])
        alone = yield from score([Score((), text) for text in texts])
        below = []
        for sample, one, other in zip(kept, after, alone, strict=True):
            ifd = math.exp(per_token(one) - per_token(other))
            if ifd >= 1:
                tally.drop("the prompt does not help with the answer", prompt_of(sample))
            else:
                below.append(scored(sample, ifd=ifd))
        return _highest(below, "ifd", self.share, tally, "the prompt helps too much")

    def bill(self, taken: int) -> Bill:
        return Bill(scores=2 * taken, given=max(1, round(self.share * taken)))


class Difference(Section):
    """Difference sampling (MiniPLM): the `share` of samples stays that the scoring model finds likelier than a small
    `reference` does by most, in nats per byte of the answer, so that length and tokenizer have no part in it. What both
    find easy goes, and what neither foresees. The reference is a model's name, or `untouched`, the student before
    training. The paper compares equally long pieces of a pre-training corpus by their sums, with a 104M reference
    trained on 5B tokens of it; here answers are compared after their prompts."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = "Gu et al., arXiv:2410.17215"
    needs: ClassVar[frozenset[str]] = frozenset({"log_probs"})
    reference: str = "untouched"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        kept = answered_only(pool, tally)
        texts = [(asked_of(sample), answer_of(sample) or "") for sample in kept]
        large = yield from score([Score(asked, text) for asked, text in texts])
        small = yield from score([Score(asked, text, self.reference) for asked, text in texts])
        rated = [
            scored(sample, difference=(one.nats - other.nats) / len(text.encode()))
            for sample, (_, text), one, other in zip(kept, texts, large, small, strict=True)
        ]
        return _highest(rated, "difference", self.share, tally, "the reference finds it as likely")

    def bill(self, taken: int) -> Bill:
        return Bill(scores=2 * taken, given=max(1, round(self.share * taken)))


class Deita(Section):
    """Complexity times quality, then variety: samples are taken in the order of the product of both scores, one at a
    time, unless the cosine with one that was taken is `similar` or more, until there are `count`. A score is the
    expected digit from 1 to 6 under the writer's probabilities. The paper's scorers are trained for it and score every
    turn, and its vectors are a language model's; here the writer is asked, about the last turn, and the vectors are
    TF-IDF."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = "Liu et al., arXiv:2312.15685"
    needs: ClassVar[frozenset[str]] = frozenset({"log_probs"})
    count: Annotated[int, Field(ge=1)]
    similar: Annotated[float, Field(gt=0, le=1)] = 0.9

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        kept = answered_only(pool, tally)
        complexity = yield from self._digits([fill(COMPLEXITY, prompt=prompt_of(sample)) for sample in kept])
        quality = yield from self._digits(
            [fill(QUALITY, prompt=prompt_of(sample), answer=answer_of(sample) or "") for sample in kept]
        )
        rated = [
            scored(sample, complexity=c, quality=q, deita=c * q)
            for sample, c, q in zip(kept, complexity, quality, strict=True)
        ]
        points_ND = vectors([f"{prompt_of(sample)}\n{answer_of(sample)}" for sample in rated])
        order = sorted(range(len(rated)), key=lambda number: (-rated[number].meta["scores"]["deita"], number))
        taken: list[int] = []
        for number in order:
            if len(taken) == self.count:
                tally.drop("enough samples", prompt_of(rated[number]))
            elif taken and float((points_ND[taken] @ points_ND[number]).max()) >= self.similar:
                tally.drop("like a better one", prompt_of(rated[number]))
            else:
                taken.append(number)
        return [rated[number] for number in taken]

    def _digits(self, questions: list[str]) -> Asking[list[float]]:
        """The expected digit for every question."""
        found = yield from score([Score((user(question),), digit) for question in questions for digit in DIGITS])
        return [
            expected([one.nats for one in found[at : at + len(DIGITS)]]) for at in range(0, len(found), len(DIGITS))
        ]

    def bill(self, taken: int) -> Bill:
        return Bill(scores=2 * len(DIGITS) * taken, given=min(taken, self.count))


def expected(log_probs: list[float]) -> float:
    """The mean of 1, 2, ... under these log-probabilities, normalised over them."""
    highest = max(log_probs)
    weights = [math.exp(nats - highest) for nats in log_probs]
    return sum(number * weight for number, weight in enumerate(weights, 1)) / sum(weights)


STEPS: dict[str, type[Section]] = {"difficulty": Difficulty, "ifd": Ifd, "difference": Difference, "deita": Deita}
