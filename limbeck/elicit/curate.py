"""Curation: texts written to a specification, from given words or for a topic, a reader and a purpose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    complete_replies,
    new_prompt,
    prompt_of,
    said_by,
    with_answer,
)
from limbeck.elicit.step import AskingStep, Estimate, Temperature, TokenCount, TopP, register
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


@register("stories")
class Stories(AskingStep):
    """TinyStories: asks for short stories that use a verb, a noun and an adjective from the pool (each prompt is a
    word, its `kind` says which) and have features such as a dialogue or a twist; words and features are drawn. Drops
    stories without one of the words, or that don't end in a whole sentence. The paper draws from some 1,500 words that
    a small child knows and has GPT-3.5 and GPT-4 write."""

    kind = "curate"
    paper = "Eldan and Li, arXiv:2305.07759"
    count: Annotated[int, Field(ge=1)] = 100
    features: Annotated[int, Field(ge=0, le=6)] = 1
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: TokenCount = 320

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        by_kind: dict[str, list[Sample]] = {
            kind: [sample for sample in pool if sample.meta.get("kind") == kind]
            for kind in ("verb", "noun", "adjective")
        }
        if missing := [kind for kind, samples in by_kind.items() if not samples]:
            tally.drop(f"no {missing[0]} among the words")
            return []
        drawn = [self._prompt(by_kind, context, number) for number in range(self.count)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([context.request(prompt.messages, sampling) for prompt, _ in drawn])
        stories: Pool = []
        for (prompt, required), reply in complete_replies(drawn, replies, tally):
            text = said_by(reply)
            if any(not _uses(text, word) for word in required):
                tally.drop("a word is missing", text)
            elif not ends_well(text):
                tally.drop("no end", text)
            else:
                stories.append(with_answer(prompt, reply))
        return stories

    def _prompt(self, by_kind: dict[str, list[Sample]], context: StepContext, number: int) -> tuple[Sample, list[str]]:
        """(prompt for a story, the words that it must use)"""
        rng = context.rng("words", number)
        chosen = {kind: rng.choice(samples) for kind, samples in by_kind.items()}
        features = "".join(f" {FEATURES[name]}" for name in sorted(rng.sample(sorted(FEATURES), self.features)))
        text = fill(STORY, features=features, **{kind: prompt_of(sample) for kind, sample in chosen.items()})
        prompt = new_prompt(text, list(chosen.values()), "corpus", kind="story")
        return prompt, [prompt_of(sample) for sample in chosen.values()]

    def estimate(self, _: int) -> Estimate:
        return Estimate.of_answers(self.count, self.max_tokens)


def _uses(text: str, word: str) -> bool:
    """Whether the text has the word, in this form or another common one (jumped, boxes)."""
    stem = word.lower()[:-1] if word.lower().endswith(("e", "y")) and len(word) > 3 else word.lower()
    return any(other.startswith(stem) and len(other) <= len(word) + 4 for other in words(text))


@register("textbook")
class Textbook(AskingStep):
    """Textbook-like texts: asks for a lesson on every topic in the pool, or for an exercise with its solution. Reader
    and purpose are drawn, so that texts on one topic differ. The paper does this for programming, with GPT-3.5."""

    kind = "curate"
    paper = "Gunasekar et al., arXiv:2306.11644"
    form: Literal["lesson", "exercise"] = "lesson"
    each: Annotated[int, Field(ge=1)] = 1
    readers: Annotated[tuple[str, ...], Field(min_length=1)] = READERS
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    max_tokens: TokenCount = 384

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        prompts = [self._prompt(sample, context, number) for sample in pool for number in range(self.each)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([context.request(prompt.messages, sampling, n) for n, prompt in enumerate(prompts)])
        texts: Pool = []
        for prompt, reply in complete_replies(prompts, replies, tally):
            if self.form == "exercise" and "solution" not in said_by(reply).lower():
                tally.drop("no solution", said_by(reply))
            else:
                texts.append(with_answer(prompt, reply))
        return texts

    def _prompt(self, sample: Sample, context: StepContext, number: int) -> Sample:
        rng = context.rng("specification", sample.id, number)
        text = fill(
            LESSON if self.form == "lesson" else EXERCISE,
            topic=prompt_of(sample),
            reader=rng.choice(self.readers),
            purpose=rng.choice(PURPOSES),
        )
        return new_prompt(text, [sample], "corpus", kind=self.form)

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples * self.each, self.max_tokens)
