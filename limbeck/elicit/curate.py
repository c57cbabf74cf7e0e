"""Curation: texts made to a specification, of given words or for a topic, a reader and a purpose."""

from __future__ import annotations

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
    answer_of,
    answered,
    ask,
    finished,
    new_prompt,
    prompt_of,
)
from limbeck.elicit.wording import ends_well, fill, words
from limbeck.types import Sample, Sampling

STORY = (
    "Write a short story of a few paragraphs that a three-year-old understands, in very simple words. Use the verb"
    ' "{verb}", the noun "{noun}" and the adjective "{adjective}".{features}'
)
FEATURES = {
    "dialogue": "The story has a dialogue.",
    "twist": "Something unexpected happens.",
    "bad_ending": "It does not end well.",
    "moral": "It teaches something.",
    "conflict": "There is a quarrel in it.",
    "foreshadowing": "What happens later is hinted at early.",
}
LESSON = "Write a short lesson on {topic} for {reader}. {purpose}"
EXERCISE = "Write an exercise on {topic} for {reader}, and then its solution under the word Solution. {purpose}"
READERS = (
    "a curious ten-year-old",
    "a beginner without any background",
    "a student in the first year",
    "a practitioner who needs it at work",
)
PURPOSES = (
    "Explain one idea with an example.",
    "Clear up a common mistake.",
    "Compare two things that are often confused.",
    "Go from the known to the new step by step.",
)


class Stories(Section):
    """TinyStories: a verb, a noun and an adjective out of the pool (its prompts are words, their `kind` says which),
    and features such as a dialogue or a twist, all drawn; the story must hold the three words and end in a sentence.
    The paper's words are some 1,500 of a small child, its writers GPT-3.5 and GPT-4."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "Eldan and Li, arXiv:2305.07759"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    count: Annotated[int, Field(ge=1)] = 100
    features: Annotated[int, Field(ge=0, le=6)] = 1
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: Tokens = 320

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        known: dict[str, list[Sample]] = {
            name: [s for s in pool if s.meta.get("kind") == name] for name in ("verb", "noun", "adjective")
        }
        if missing := [name for name, having in known.items() if not having]:
            tally.drop(f"no {missing[0]} among the words")
            return []
        drawn = []
        for number in range(self.count):
            noise = scene.draw("words", number)
            chosen = {name: noise.choice(having) for name, having in known.items()}
            told = "".join(f" {FEATURES[name]}" for name in sorted(noise.sample(sorted(FEATURES), self.features)))
            text = fill(STORY, features=told, **{name: prompt_of(sample) for name, sample in chosen.items()})
            drawn.append(
                (
                    new_prompt(text, list(chosen.values()), "corpus", kind="story"),
                    [prompt_of(s) for s in chosen.values()],
                )
            )
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([scene.request(prompt.messages, sampling) for prompt, _ in drawn])
        found: Pool = []
        for (prompt, wanted), reply, whole in zip(drawn, replies, finished(replies, tally), strict=True):
            text = answer_of(reply) or ""
            if not whole:
                continue
            if any(not _has(text, word) for word in wanted):
                tally.drop("a word is missing", text)
            elif not ends_well(text):
                tally.drop("no end", text)
            else:
                found.append(answered(prompt, reply))
        return found

    def bill(self, _: int) -> Bill:
        return Bill(self.count, int(self.count * self.max_tokens * ANSWER_SHARE), given=self.count)


def _has(text: str, word: str) -> bool:
    """Whether the word stands there, in this form or a common other one (jumped, boxes)."""
    stem = word.lower()[:-1] if word.lower().endswith(("e", "y")) and len(word) > 3 else word.lower()
    return any(said.startswith(stem) and len(said) <= len(word) + 4 for said in words(text))


class Textbook(Section):
    """Textbook-like texts: for every topic of the pool a lesson, or an exercise with its solution, for a reader and
    with a purpose that are drawn, so that texts on one topic differ. The paper does it for programming, with
    GPT-3.5."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "Gunasekar et al., arXiv:2306.11644"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    form: Literal["lesson", "exercise"] = "lesson"
    each: Annotated[int, Field(ge=1)] = 1
    readers: Annotated[tuple[str, ...], Field(min_length=1)] = READERS
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    max_tokens: Tokens = 384

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        prompts = []
        for sample in pool:
            for number in range(self.each):
                noise = scene.draw("specification", sample.id, number)
                fields = {
                    "topic": prompt_of(sample),
                    "reader": noise.choice(self.readers),
                    "purpose": noise.choice(PURPOSES),
                }
                text = fill(LESSON if self.form == "lesson" else EXERCISE, **fields)
                prompts.append(new_prompt(text, [sample], "corpus", kind=self.form))
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([scene.request(prompt.messages, sampling, n) for n, prompt in enumerate(prompts)])
        found: Pool = []
        for prompt, reply, whole in zip(prompts, replies, finished(replies, tally), strict=True):
            if whole and self.form == "exercise" and "solution" not in (answer_of(reply) or "").lower():
                tally.drop("no solution", answer_of(reply) or "")
            elif whole:
                found.append(answered(prompt, reply))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(taken * self.each, int(taken * self.each * self.max_tokens * ANSWER_SHARE), given=taken * self.each)


STEPS: dict[str, type[Section]] = {"stories": Stories, "textbook": Textbook}
