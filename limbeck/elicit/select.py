"""Selection without a model: novelty, duplicates, length, script, words, repetition, scores, diversity. What goes is
counted by its reason."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.config.sections import Section
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answer_of, prompt_of
from limbeck.elicit.similar import Novelty, k_center, near_duplicates, vectors
from limbeck.elicit.wording import words
from limbeck.types import Sample

Part = Literal["prompt", "answer", "both"]
REFUSING = re.compile(
    r"(?:i\s*(?:'m| am)?\s*(?:very |so |truly )?(?:sorry|afraid|unable)\b|i (?:can(?:no|')t|cannot|won't|will not|am"
    r" not able to|do not "
    r"have the ability to)\b"
    r"|(?:unfortunately|regrettably),? i\b|as an? (?:ai|artificial|language)\b|(?:my )?apologies\b|i apologi[sz]e\b)",
    re.IGNORECASE,
)
OPENING = 120  # characters of an answer in which it declines, where it does


def part_of(sample: Sample, part: Part) -> str:
    texts = {
        "prompt": [prompt_of(sample)],
        "answer": [answer_of(sample) or ""],
        "both": [prompt_of(sample), answer_of(sample) or ""],
    }
    return "\n".join(texts[part])


class Novel(Section):
    """A sample goes where its ROUGE-L with an earlier one that was kept is above the threshold (Self-Instruct: 0.7)."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = "Wang et al., arXiv:2212.10560"
    needs: ClassVar[frozenset[str]] = frozenset()
    of: Part = "prompt"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        texts = [part_of(sample, self.of) for sample in pool]
        known = Novelty(self.threshold, texts)
        found = []
        for sample, text in zip(pool, texts, strict=True):
            if known.add(text):
                found.append(sample)
            else:
                tally.drop("like an earlier one", text)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Deduplicate(Section):
    """Of texts that are equal but for case and spaces, and of near-duplicates (Jaccard similarity of word shingles,
    found by MinHash), the first stays."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = "Broder 1997"
    needs: ClassVar[frozenset[str]] = frozenset()
    of: Part = "both"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        texts = [part_of(sample, self.of) for sample in pool]
        seen = set[str]()
        first = list[int]()
        for number, text in enumerate(texts):
            plain = " ".join(text.casefold().split())
            if plain in seen:
                tally.drop("the same text", text)
            else:
                seen.add(plain)
                first.append(number)
        twins = near_duplicates([texts[number] for number in first], self.threshold)
        for number, twin in zip(first, twins, strict=True):
            if twin is not None:
                tally.drop("a near-duplicate", texts[number])
        return [pool[number] for number, twin in zip(first, twins, strict=True) if twin is None]

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Length(Section):
    """Keeps texts of so many words."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    of: Part = "answer"
    least: Annotated[int, Field(ge=0)] = 1
    most: Annotated[int, Field(ge=1)] = 1000

    @model_validator(mode="after")
    def _order(self) -> Length:
        if self.least > self.most:
            raise ValueError(f"least is {self.least}, more than most, {self.most}")
        return self

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found = []
        for sample in pool:
            text = part_of(sample, self.of)
            count = len(text.split())
            if self.least <= count <= self.most:
                found.append(sample)
            else:
                tally.drop("too short" if count < self.least else "too long", text)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Script(Section):
    """Keeps texts most of whose letters are of one script (by the letters' Unicode names). Which language it is, it
    can't tell."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    of: Part = "both"
    script: Literal["latin", "cyrillic", "greek", "arabic", "hebrew", "cjk", "hangul", "devanagari"] = "latin"
    share: Annotated[float, Field(gt=0, le=1)] = 0.9

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found = []
        for sample in pool:
            text = part_of(sample, self.of)
            letters = [letter for letter in text if letter.isalpha()]
            own = sum(unicodedata.name(letter, "").startswith(self.script.upper()) for letter in letters)
            if letters and own >= self.share * len(letters):
                found.append(sample)
            else:
                tally.drop("no letters" if not letters else "another script", text)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Without(Section):
    """A sample goes where its text holds one of the words, as a whole word and whatever its case."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    words: Annotated[list[str], Field(min_length=1)]
    of: Part = "both"

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found = []
        for sample in pool:
            text = part_of(sample, self.of)
            held = next((word for word in self.words if holds(text, word)), None)
            if held is None:
                found.append(sample)
            else:
                tally.drop(f"holds {held!r}", text)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


def holds(text: str, word: str) -> bool:
    """Whether the word stands in the text as a whole word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


class Refusals(Section):
    """An answer goes that begins by declining ("I'm sorry, but", "As an AI"). Found by how answers open: one that
    declines in other words stays."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found = []
        for sample in pool:
            answer = (answer_of(sample) or "").replace("’", "'")
            if REFUSING.match(answer[:OPENING].lstrip(" *\"'")):
                tally.drop("declines", answer)
            else:
                found.append(sample)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Repetitive(Section):
    """An answer goes in which more than `most` of the `gram`-grams of words stand there before."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    gram: Annotated[int, Field(ge=1, le=50)] = 4
    most: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found = []
        for sample in pool:
            said = words(answer_of(sample) or "")
            grams = [tuple(said[at : at + self.gram]) for at in range(len(said) - self.gram + 1)]
            if grams and len(grams) - len(set(grams)) > self.most * len(grams):
                tally.drop("repeats itself", answer_of(sample) or "")
            else:
                found.append(sample)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Limit(Section):
    """`count` of the samples: the first, or a random draw that keeps their order."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    count: Annotated[int, Field(ge=1)]
    how: Literal["first", "random"] = "first"

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        count = min(self.count, len(pool))
        kept = set(range(count) if self.how == "first" else scene.draw("limit").sample(range(len(pool)), count))
        return list(_kept(pool, kept, tally, "beyond the limit"))

    def bill(self, taken: int) -> Bill:
        return Bill(given=min(taken, self.count))


class Diverse(Section):
    """`count` samples that are as unlike each other as can be: greedy k-center over TF-IDF vectors of the texts,
    beginning with the first."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = "Sener and Savarese, arXiv:1708.00489"
    needs: ClassVar[frozenset[str]] = frozenset()
    count: Annotated[int, Field(ge=1)]
    of: Part = "both"

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        kept = set(k_center(vectors([part_of(sample, self.of) for sample in pool]), self.count))
        return list(_kept(pool, kept, tally, "near one that is kept"))

    def bill(self, taken: int) -> Bill:
        return Bill(given=min(taken, self.count))


class Top(Section):
    """The samples with the highest score of that name (`lowest: true`: the lowest): `count` of them or a `share`, in
    the pool's order; or all from `least` to `most`."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    score: str
    count: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    least: float | None = None
    most: float | None = None
    lowest: bool = False

    @model_validator(mode="after")
    def _something(self) -> Top:
        if self.count is not None and self.share is not None:
            raise ValueError("give count or share, not both")
        if self.count is self.share is self.least is self.most is None:
            raise ValueError("say how many: count, share, or the bounds least and most")
        return self

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        values = [sample.meta.get("scores", {}).get(self.score) for sample in pool]
        within = []
        for number, (sample, value) in enumerate(zip(pool, values, strict=True)):
            if value is None:
                tally.drop(f"no score {self.score}", prompt_of(sample))
            elif (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
                tally.drop(f"{self.score} out of bounds", prompt_of(sample))
            else:
                within.append(number)
        count = (
            self.count
            if self.count is not None
            else len(within)
            if self.share is None
            else max(1, round(self.share * len(within)))
        )
        ranked = sorted(within, key=lambda number: (values[number] if self.lowest else -values[number], number))
        for number in sorted(ranked[count:]):
            tally.drop("not among the best", prompt_of(pool[number]))
        return [pool[number] for number in sorted(ranked[:count])]

    def bill(self, taken: int) -> Bill:
        return Bill(given=min(taken, self.count) if self.count else round(taken * (self.share or 1.0)))


class Bins(Section):
    """As many samples of each part of a score's range: the samples are cut into `bins` of equal number by their rank,
    and of each the `count` first are kept."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    score: str
    bins: Annotated[int, Field(ge=2)] = 4
    count: Annotated[int, Field(ge=1)]

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        having = [number for number, sample in enumerate(pool) if self.score in sample.meta.get("scores", {})]
        ranked = sorted(having, key=lambda number: (pool[number].meta["scores"][self.score], number))
        place = {number: rank * self.bins // max(1, len(ranked)) for rank, number in enumerate(ranked)}
        taken: Counter[int] = Counter()
        found = []
        for number, sample in enumerate(pool):
            if number not in place:
                tally.drop(f"no score {self.score}", prompt_of(sample))
            elif taken[place[number]] == self.count:
                tally.drop("its part of the range is full", prompt_of(sample))
            else:
                taken[place[number]] += 1
                found.append(sample)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=min(taken, self.bins * self.count))


def _kept(pool: Pool, kept: set[int], tally: Tally, reason: str) -> Iterator[Sample]:
    for number, sample in enumerate(pool):
        if number in kept:
            yield sample
        else:
            tally.drop(reason, prompt_of(sample))


STEPS: dict[str, type[Section]] = {
    "novel": Novel,
    "deduplicate": Deduplicate,
    "length": Length,
    "script": Script,
    "without": Without,
    "refusals": Refusals,
    "repetitive": Repetitive,
    "limit": Limit,
    "diverse": Diverse,
    "top": Top,
    "bins": Bins,
}
