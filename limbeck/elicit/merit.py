"""Selection by what a model makes of a sample: how much the prompt helps with the answer, how hard the answer is, how
complex the task and how good the answer."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    ScoreRequest,
    StepContext,
    Tally,
    answer_of,
    prompt_messages,
    prompt_of,
    score,
    user,
    with_scores,
)
from limbeck.elicit.similar import vectors
from limbeck.elicit.step import AskingStep, Estimate, register
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
    """The samples that have an answer; the others count as dropped."""
    for sample in pool:
        if not (answer_of(sample) or "").strip():
            tally.drop("no answer", prompt_of(sample))
    return [sample for sample in pool if (answer_of(sample) or "").strip()]


def tell_own_answers(samples: Pool, identity: str, tally: Tally) -> None:
    """Note which share of the answers a judge of this identity wrote itself: it may favour its own manner."""
    own = sum(sample.writer == identity for sample in samples)
    tally.facts["of_its_own_answers"] = own / max(1, len(samples))


def nats_per_token(log_prob: LogProb) -> float:
    """Mean negative log-likelihood in nats per token."""
    return -log_prob.nats / max(1, log_prob.tokens)


def normalised(log_probs: list[float]) -> list[float]:
    """The probabilities, scaled so that they sum to 1."""
    highest = max(log_probs)
    weights = [math.exp(nats - highest) for nats in log_probs]
    return [weight / sum(weights) for weight in weights]


def expected(log_probs: list[float]) -> float:
    """The mean of 1, 2, ... under these log-probabilities, normalised over them."""
    highest = max(log_probs)
    weights = [math.exp(nats - highest) for nats in log_probs]
    return sum(number * weight for number, weight in enumerate(weights, 1)) / sum(weights)


def _highest(samples: Pool, name: str, share: float, *, tally: Tally, reason: str) -> Pool:
    """The `share` of the samples with the highest scores of this name, in their own order; drops the others."""
    count = max(1, round(share * len(samples)))
    best = {id(sample) for sample in sorted(samples, key=lambda sample: -sample.meta["scores"][name])[:count]}
    for sample in samples:
        if id(sample) not in best:
            tally.drop(reason, prompt_of(sample))
    return [sample for sample in samples if id(sample) in best]


@register("difficulty")
class Difficulty(AskingStep):
    """Scores how hard an answer is to predict: `difficulty`, its mean negative log-likelihood under the scoring model,
    in nats per token. Drops only samples without an answer; `bins` and `top` can then select by the score."""

    kind = "select"
    needs = frozenset({"log_probs"})
    scores = frozenset({"difficulty"})

    def run(self, pool: Pool, _: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        log_probs = yield from score(
            [ScoreRequest(prompt_messages(sample), answer_of(sample) or "") for sample in samples]
        )
        return [
            with_scores(sample, difficulty=nats_per_token(log_prob))
            for sample, log_prob in zip(samples, log_probs, strict=True)
        ]

    def estimate(self, samples: int) -> Estimate:
        return Estimate(scores=samples, samples=samples)


@register("ifd")
class InstructionFollowingDifficulty(AskingStep):
    """Superfiltering by IFD, the perplexity of the answer after its prompt divided by the perplexity of the answer
    alone. Drops samples with an IFD of 1 or more, where the prompt doesn't help with the answer; keeps the `share` of
    the others with the highest IFD, where it helps least. The paper scores with GPT-2 and keeps 5 to 10 %; here the
    recipe's teacher scores."""

    kind = "select"
    paper = "Li et al., arXiv:2402.00530 and arXiv:2308.12032"
    needs = frozenset({"log_probs"})
    scores = frozenset({"ifd"})
    share: Annotated[float, Field(gt=0, le=1)] = 0.1

    def run(self, pool: Pool, _: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        texts = [answer_of(sample) or "" for sample in samples]
        after_prompt = yield from score(
            [ScoreRequest(prompt_messages(sample), text) for sample, text in zip(samples, texts, strict=True)]
        )
        alone = yield from score([ScoreRequest((), text) for text in texts])
        below: Pool = []
        for sample, with_prompt, without in zip(samples, after_prompt, alone, strict=True):
            ifd = math.exp(nats_per_token(with_prompt) - nats_per_token(without))
            if ifd >= 1:
                tally.drop("the prompt does not help with the answer", prompt_of(sample))
            else:
                below.append(with_scores(sample, ifd=ifd))
        return _highest(below, "ifd", self.share, tally=tally, reason="the prompt helps too much")

    def estimate(self, samples: int) -> Estimate:
        return Estimate(scores=2 * samples, samples=max(1, round(self.share * samples)))


@register("difference")
class DifferenceSampling(AskingStep):
    """Difference sampling (MiniPLM): keeps the `share` of samples whose answers the scoring model finds likelier than a
    small `reference` does by the widest margin. So what both find easy is dropped, and what neither predicts. The
    margin is in nats per byte of the answer, independent of length and tokenizer. The reference is a model's name, or
    `untouched`, the student before training. The paper compares pieces of equal length of a pre-training corpus, with a
    104M reference trained on 5B tokens of it; here answers are compared, after their prompts."""

    kind = "select"
    paper = "Gu et al., arXiv:2410.17215"
    needs = frozenset({"log_probs"})
    scores = frozenset({"difference"})
    reference: str = "untouched"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def run(self, pool: Pool, _: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        texts = [answer_of(sample) or "" for sample in samples]
        prompts = [prompt_messages(sample) for sample in samples]
        pairs = list(zip(prompts, texts, strict=True))
        large = yield from score([ScoreRequest(prompt, text) for prompt, text in pairs])
        small = yield from score([ScoreRequest(prompt, text, self.reference) for prompt, text in pairs])
        rated = [
            with_scores(sample, difference=(one.nats - other.nats) / len(text.encode()))
            for sample, text, one, other in zip(samples, texts, large, small, strict=True)
        ]
        return _highest(rated, "difference", self.share, tally=tally, reason="the reference finds it as likely")

    def estimate(self, samples: int) -> Estimate:
        return Estimate(scores=2 * samples, samples=max(1, round(self.share * samples)))


@register("deita")
class Deita(AskingStep):
    """Scores complexity and quality, then takes samples in the order of the product, skipping those whose cosine with
    one already taken is `similar` or more, until there are `count`. A score is the expected digit from 1 to 6 under the
    writer's probabilities. The paper trains its scorers, scores every turn, and takes vectors from a language model;
    here the writer is asked, about the last turn, and the vectors are TF-IDF."""

    kind = "select"
    paper = "Liu et al., arXiv:2312.15685"
    needs = frozenset({"log_probs"})
    scores = frozenset({"complexity", "deita", "quality"})
    count: Annotated[int, Field(ge=1)]
    similar: Annotated[float, Field(gt=0, le=1)] = 0.9

    def run(self, pool: Pool, _: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        complexity = yield from self._digits([fill(COMPLEXITY, prompt=prompt_of(sample)) for sample in samples])
        quality = yield from self._digits(
            [fill(QUALITY, prompt=prompt_of(sample), answer=answer_of(sample) or "") for sample in samples]
        )
        rated = [
            with_scores(sample, complexity=c, quality=q, deita=c * q)
            for sample, c, q in zip(samples, complexity, quality, strict=True)
        ]
        points_ND = vectors([f"{prompt_of(sample)}\n{answer_of(sample)}" for sample in rated])
        order = sorted(range(len(rated)), key=lambda number: (-rated[number].meta["scores"]["deita"], number))
        chosen: list[int] = []
        for number in order:
            if len(chosen) == self.count:
                tally.drop("enough samples", prompt_of(rated[number]))
            elif chosen and float((points_ND[chosen] @ points_ND[number]).max()) >= self.similar:
                tally.drop("like a better one", prompt_of(rated[number]))
            else:
                chosen.append(number)
        return [rated[number] for number in chosen]

    def _digits(self, questions: list[str]) -> Questions[list[float]]:
        """The expected digit for every question."""
        log_probs = yield from score(
            [ScoreRequest((user(question),), digit) for question in questions for digit in DIGITS]
        )
        nats = [log_prob.nats for log_prob in log_probs]
        return [expected(nats[at : at + len(DIGITS)]) for at in range(0, len(nats), len(DIGITS))]

    def estimate(self, samples: int) -> Estimate:
        return Estimate(scores=2 * len(DIGITS) * samples, samples=min(samples, self.count))
