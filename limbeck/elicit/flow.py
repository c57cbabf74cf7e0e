"""What flows through elicitation: pools of samples, questions to models, and the count of everything that was left out.

A step is a pure generator: it yields questions (`ask`, `score`) and is sent the answers, in the order of the questions
whoever answered first. So the same seed and stored answers give the same pool, byte for byte. Only `engine` does I/O.

A pool's sample is a conversation. One that ends with a user's message is a prompt that waits for an answer; one that
ends with an assistant's message is answered. Its `meta` may hold: `prompt_id` (samples that answer one prompt share
it), `kind`, `task` (the tag that a loss's `only` names), `weight`, `check` (see `verify`), `answers` (given ones, the
best first), `finish`, `scores` (by name) and whatever later steps are to read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from limbeck.types import LogProb, Message, Request, Sample, Sampling, content_hash

Pool = list[Sample]
T = TypeVar("T")
KEPT_EXAMPLES = 3
EXAMPLE_CHARS = 160
Kind = Literal["expand", "curate", "label", "verify", "select", "transform"]


@dataclass(frozen=True)
class Score:
    """How likely does the scoring model find this answer? Answered by a `LogProb`. Without messages, it is a plain text
    without a template. `by` names another model, or `untouched`, the student before training; questions that are asked
    together are all to one."""

    messages: tuple[Message, ...]
    answer: str
    by: str = ""

    @property
    def name(self) -> str:
        return content_hash([list(self.messages), self.answer])


Asking = Generator[Sequence[Request] | Sequence[Score], Sequence[Any], T]


def ask(requests: Sequence[Request]) -> Asking[list[Sample]]:
    """`answers = yield from ask(requests)`: one sample per request, in their order; the last message is the answer,
    `meta["finish"]` what became of it. One that failed for good has the text "" and the finish "error"."""
    return list((yield list(requests))) if requests else []


def score(scores: Sequence[Score]) -> Asking[list[LogProb]]:
    """`found = yield from score(questions)`: one LogProb per question, in their order."""
    return list((yield list(scores))) if scores else []


@dataclass
class Tally:
    """What a step did: samples it was given and gave, why others went (with an example or three), and facts such as an
    accept rate."""

    step: str
    taken: int = 0
    given: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def drop(self, reason: str, text: str = "") -> None:
        """Count one that goes no further; `reason` in a few plain words."""
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if text and len(shown) < KEPT_EXAMPLES:
            shown.append(text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]}…")

    def add(self, fact: str, by: float = 1) -> None:
        self.facts[fact] = self.facts.get(fact, 0) + by


@dataclass(frozen=True)
class Scene:
    """What a step is given beside the pool: whom it asks, and where its random numbers come from.

    `header` is the text before a user's first message in the writer's own chat format, where that is known (see
    `magpie`).
    """

    model: str
    seed: int
    step: str
    header: str | None = None

    def request(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        number: int = 0,
        *,
        raw: str | None = None,
        against: Sequence[Message] | None = None,
        contrast: float = 0.0,
    ) -> Request:
        """A question to the writer; `number` tells several answers to the same messages apart."""
        seed = self.seed if number == 0 else int(content_hash([self.seed, number])[:7], 16)
        other = None if against is None else tuple(against)
        return Request(self.model, tuple(messages), sampling, seed, raw=raw, against=other, contrast=contrast)

    def draw(self, *what: Any) -> random.Random:
        """Random numbers of this step's own, the same for the same `what` (such as the round, or a sample's id)."""
        return random.Random(content_hash([self.seed, self.step, [str(part) for part in what]]))  # noqa: S311 (a draw, not a secret)


@dataclass(frozen=True)
class Bill:
    """What a step will ask for, about: requests, tokens to be written, texts to be scored; and how many samples come
    out of it."""

    requests: int = 0
    tokens: int = 0
    scores: int = 0
    given: int = 0


class Step(Protocol):
    """A step of `elicit:` in a recipe: its settings (a pydantic model) and what it does with them.

    `needs` are what the writer must be able to do: "text", "raw" (continue a text without a template), "contrast",
    "log_probs".
    """

    kind: ClassVar[Kind]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]: ...

    def bill(self, taken: int) -> Bill: ...


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def prompt_of(sample: Sample) -> str:
    """The last thing that the user said."""
    return next((message["content"] for message in reversed(sample.messages) if message["role"] == "user"), "")


def answer_of(sample: Sample) -> str | None:
    """The answer; None for a prompt that waits for one."""
    last = sample.messages[-1]
    return last["content"] if last["role"] == "assistant" else None


def asked_of(sample: Sample) -> tuple[Message, ...]:
    """The conversation before the answer."""
    return sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages


def new_prompt(text: str, parents: Sequence[Sample], writer: str, **meta: Any) -> Sample:
    """A prompt that came from these samples. Facts of the parents aren't taken over: name those that still hold."""
    sample = Sample((user(text),), writer, parents=tuple(parent.id for parent in parents), meta=meta)
    return replace(sample, meta={"prompt_id": sample.id[:16], **meta})


def answered(prompt: Sample, reply: Sample, text: str | None = None, **meta: Any) -> Sample:
    """The prompt with an answer out of `reply`: its very text and ids, or `text` that was read out of it. Keeps the
    prompt's facts.

    The answer stands after the prompt's own messages, whatever else the writer was shown (a system message,
    demonstrations).
    """
    content, ids = (reply.messages[-1]["content"], reply.response_ids) if text is None else (text, None)
    facts = {**prompt.meta, "finish": reply.meta.get("finish", "ok"), **meta}
    message = {"role": "assistant", "content": content}
    return Sample((*asked_of(prompt), message), reply.writer, ids, (prompt.id, reply.id), facts)


def rewritten(sample: Sample, answer: str, writer: str, **meta: Any) -> Sample:
    """The sample with another answer, made from its own."""
    return Sample(
        (*asked_of(sample), {"role": "assistant", "content": answer}),
        writer,
        None,
        (sample.id,),
        {**sample.meta, **meta},
    )


def scored(sample: Sample, **scores: float) -> Sample:
    """The sample with these scores beside it."""
    return replace(sample, meta=sample.meta | {"scores": {**sample.meta.get("scores", {}), **scores}})


def finished(replies: Sequence[Sample], tally: Tally) -> list[bool]:
    """Which answers are whole; the others are counted as dropped by what became of them (length, empty, refused,
    ...)."""
    whole = []
    for reply in replies:
        finish = str(reply.meta.get("finish", "ok"))
        whole.append(finish == "ok")
        if finish != "ok":
            tally.drop(f"answer: {finish}", reply.messages[-1]["content"])
    return whole
