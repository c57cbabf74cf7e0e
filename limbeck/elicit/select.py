"""Selection without a model: novelty, duplicates, length, script, words, repetition, scores, diversity. What is dropped
is counted by its reason."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from limbeck.elicit.flow import Pool, StepContext, Tally, answer_of, drop_if, prompt_of, said_by
from limbeck.elicit.similar import Novelty, k_center, near_duplicates, vectors
from limbeck.elicit.step import Estimate, LocalStep, register
from limbeck.elicit.wording import words
from limbeck.types import Sample

SamplePart = Literal["prompt", "answer", "both"]
ScriptName = Literal["latin", "cyrillic", "greek", "arabic", "hebrew", "cjk", "hangul", "devanagari"]
REFUSING = re.compile(
    r"(?:i\s*(?:'m| am)?\s*(?:very |so |truly )?(?:sorry|afraid|unable)\b|i (?:can(?:no|')t|cannot|won't|will not|am"
    r" not able to|do not "
    r"have the ability to)\b"
    r"|(?:unfortunately|regrettably),? i\b|as an? (?:ai|artificial|language)\b|(?:my )?apologies\b|i apologi[sz]e\b)",
    re.IGNORECASE,
)
OPENING = 120  # characters of an answer within which a refusal begins


def text_of(sample: Sample, part: SamplePart) -> str:
    """The prompt, the answer, or both."""
    texts = {
        "prompt": [prompt_of(sample)],
        "answer": [answer_of(sample) or ""],
        "both": [prompt_of(sample), answer_of(sample) or ""],
    }
    return "\n".join(texts[part])


def has_word(text: str, word: str) -> bool:
    """Whether the text has the word, as a whole word in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def has_script(text: str, script: ScriptName, share: float) -> bool:
    """Whether at least a share of the letters belong to the script, by Unicode name; also without any letter."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(unicodedata.name(letter, "").startswith(script.upper()) for letter in letters) >= share * len(letters)


def score_of(sample: Sample, name: str) -> float | None:
    """The sample's score of this name, None if it has none."""
    score: float | None = sample.meta.get("scores", {}).get(name)
    return score


def _keep_places(pool: Pool, places: set[int], tally: Tally, reason: str) -> Pool:
    """The samples at these places; drops the others."""
    for place, sample in enumerate(pool):
        if place not in places:
            tally.drop(reason, prompt_of(sample))
    return [sample for place, sample in enumerate(pool) if place in places]


@register("novel")
class Novel(LocalStep):
    """Drops samples whose ROUGE-L with an earlier kept sample is above the threshold (0.7 in Self-Instruct)."""

    paper = "Wang et al., arXiv:2212.10560"
    of: SamplePart = "prompt"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        novelty = Novelty(self.threshold, [text_of(sample, self.of) for sample in pool])

        def reject(sample: Sample) -> tuple[str, str] | None:
            text = text_of(sample, self.of)
            return None if novelty.add(text) else ("like an earlier one", text)

        return drop_if(reject, pool, tally)


@register("deduplicate")
class Deduplicate(LocalStep):
    """Keeps the first of texts that are equal apart from case and whitespace, and the first of near-duplicates (by the
    Jaccard similarity of their word shingles, found with MinHash)."""

    paper = "Broder 1997"
    of: SamplePart = "both"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        texts = [text_of(sample, self.of) for sample in pool]
        unique: dict[str, int] = {}  # text without case and whitespace -> place of the first sample that has it
        for place, text in enumerate(texts):
            if unique.setdefault(" ".join(text.casefold().split()), place) != place:
                tally.drop("the same text", text)
        twins = near_duplicates([texts[place] for place in unique.values()], self.threshold)
        for place, twin in zip(unique.values(), twins, strict=True):
            if twin is not None:
                tally.drop("a near-duplicate", texts[place])
        return [pool[place] for place, twin in zip(unique.values(), twins, strict=True) if twin is None]


@register("length")
class Length(LocalStep):
    """Keeps texts of `least` to `most` words."""

    of: SamplePart = "answer"
    least: Annotated[int, Field(ge=0)] = 1
    most: Annotated[int, Field(ge=1)] = 1000

    @model_validator(mode="after")
    def _order(self) -> Length:
        if self.least > self.most:
            raise ValueError(f"least is {self.least}, more than most, {self.most}")
        return self

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        return drop_if(self._reject, pool, tally)

    def _reject(self, sample: Sample) -> tuple[str, str] | None:
        text = text_of(sample, self.of)
        count = len(text.split())
        if self.least <= count <= self.most:
            return None
        return "too short" if count < self.least else "too long", text


@register("script")
class Script(LocalStep):
    """Keeps texts in one script: at least a `share` of their letters belong to it, by Unicode name. It can't tell
    languages apart."""

    of: SamplePart = "both"
    script: ScriptName = "latin"
    share: Annotated[float, Field(gt=0, le=1)] = 0.9

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        return drop_if(self._reject, pool, tally)

    def _reject(self, sample: Sample) -> tuple[str, str] | None:
        text = text_of(sample, self.of)
        if not any(letter.isalpha() for letter in text):
            return "no letters", text
        return None if has_script(text, self.script, self.share) else ("another script", text)


@register("without")
class Without(LocalStep):
    """Drops samples whose text has one of the words, as a whole word in upper or lower case."""

    words: Annotated[list[str], Field(min_length=1)]
    of: SamplePart = "both"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        return drop_if(self._reject, pool, tally)

    def _reject(self, sample: Sample) -> tuple[str, str] | None:
        text = text_of(sample, self.of)
        barred = next((word for word in self.words if has_word(text, word)), None)
        return None if barred is None else (f"holds {barred!r}", text)


@register("refusals")
class Refusals(LocalStep):
    """Drops answers that begin by declining ("I'm sorry, but", "As an AI"). Only such openings are recognised: an
    answer that declines in other words is kept."""

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        return drop_if(self._reject, pool, tally)

    @staticmethod
    def _reject(sample: Sample) -> tuple[str, str] | None:
        answer = said_by(sample).replace("’", "'")
        return ("declines", answer) if REFUSING.match(answer[:OPENING].lstrip(" *\"'")) else None


@register("repetitive")
class Repetitive(LocalStep):
    """Drops answers in which more than a share `most` of the `gram`-grams of words have occurred before."""

    gram: Annotated[int, Field(ge=1, le=50)] = 4
    most: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        return drop_if(self._reject, pool, tally)

    def _reject(self, sample: Sample) -> tuple[str, str] | None:
        answer = answer_of(sample) or ""
        tokens = words(answer)
        grams = [tuple(tokens[at : at + self.gram]) for at in range(len(tokens) - self.gram + 1)]
        repeated = len(grams) - len(set(grams))
        return ("repeats itself", answer) if grams and repeated > self.most * len(grams) else None


@register("limit")
class Limit(LocalStep):
    """Keeps `count` samples: the first ones, or a random draw, in the pool's order."""

    count: Annotated[int, Field(ge=1)]
    how: Literal["first", "random"] = "first"

    def apply(self, pool: Pool, context: StepContext, tally: Tally) -> Pool:
        count = min(self.count, len(pool))
        places = range(count) if self.how == "first" else context.rng("limit").sample(range(len(pool)), count)
        return _keep_places(pool, set(places), tally, "beyond the limit")

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=min(samples, self.count))


@register("diverse")
class Diverse(LocalStep):
    """Keeps `count` samples that are as unlike each other as possible: greedy k-center over TF-IDF vectors of the
    texts, starting from the first."""

    paper = "Sener and Savarese, arXiv:1708.00489"
    count: Annotated[int, Field(ge=1)]
    of: SamplePart = "both"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        places = k_center(vectors([text_of(sample, self.of) for sample in pool]), self.count)
        return _keep_places(pool, set(places), tally, "near one that is kept")

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=min(samples, self.count))


@register("top")
class Top(LocalStep):
    """Keeps the samples with the highest `score` of that name (the lowest, with `lowest: true`), in the pool's order:
    `count` of them, a `share`, or all from `least` to `most`."""

    score: str
    count: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    least: float | None = None
    most: float | None = None
    lowest: bool = False

    @model_validator(mode="after")
    def _limits(self) -> Top:
        if self.count is not None and self.share is not None:
            raise ValueError("give count or share, not both")
        if self.count is self.share is self.least is self.most is None:
            raise ValueError("say how many: count, share, or the bounds least and most")
        return self

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        scores: dict[int, float] = {}  # by place in the pool
        for place, sample in enumerate(pool):
            score = score_of(sample, self.score)
            if score is None:
                tally.drop(f"no score {self.score}", prompt_of(sample))
            elif (self.least is not None and score < self.least) or (self.most is not None and score > self.most):
                tally.drop(f"{self.score} out of bounds", prompt_of(sample))
            else:
                scores[place] = score
        count = len(scores) if self.share is None else max(1, round(self.share * len(scores)))
        if self.count is not None:
            count = self.count
        ranked = sorted(scores, key=lambda place: (scores[place] if self.lowest else -scores[place], place))
        for place in sorted(ranked[count:]):
            tally.drop("not among the best", prompt_of(pool[place]))
        return [pool[place] for place in sorted(ranked[:count])]

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=min(samples, self.count) if self.count else round(samples * (self.share or 1.0)))


@register("bins")
class Bins(LocalStep):
    """Keeps equally many samples from each part of a score's range: ranks the samples by `score`, cuts them into `bins`
    of equal size, and keeps the first `count` of each."""

    score: str
    bins: Annotated[int, Field(ge=2)] = 4
    count: Annotated[int, Field(ge=1)]

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        scores = {
            place: score for place, sample in enumerate(pool) if (score := score_of(sample, self.score)) is not None
        }
        ranked = sorted(scores, key=lambda place: (scores[place], place))
        bin_of = {place: rank * self.bins // len(ranked) for rank, place in enumerate(ranked)}
        sizes: Counter[int] = Counter()
        samples: Pool = []
        for place, sample in enumerate(pool):
            if place not in bin_of:
                tally.drop(f"no score {self.score}", prompt_of(sample))
            elif sizes[bin_of[place]] == self.count:
                tally.drop("its part of the range is full", prompt_of(sample))
            else:
                sizes[bin_of[place]] += 1
                samples.append(sample)
        return samples

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=min(samples, self.bins * self.count))
