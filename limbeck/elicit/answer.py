"""Labeling: a writer answers prompts, once or several times, plainly or shown what the student is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answered, ask, asked_of, finished
from limbeck.types import Message, Sample, Sampling

Temperature = Annotated[float, Field(ge=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]
Tokens = Annotated[int, Field(ge=1)]
ANSWER_SHARE = 0.65  # of max_tokens: how long answers are expected to be
EXPLAINING = (
    "You are a patient teacher. Say what the question is about, then explain each part of your answer.",
    "Answer as you would for a ten-year-old: simple words, one idea after the other, an example where it helps.",
    "Work it out step by step, say why each step follows, and end with the result on a line of its own.",
    "First name what is known and what is asked. Then answer, and say how you know.",
    "Give a complete answer, so that nobody has to look anything up to understand it.",
    "Answer, then justify the answer: which facts does it rest on, and could they be wrong?",
    "Think it through before you answer, and write down the thoughts that matter.",
    "Answer precisely. Use a list where there are several points, and explain each in a sentence.",
    "You help people who want to learn. Do the task, then point out how they could have done it themselves.",
    "Describe the task in your own words, follow its instructions one by one, and show the outcome.",
    "If there are several ways to see this, compare them before you decide, and give your reasons.",
    "Take the role of an expert who explains to a colleague from another field.",
    "Break the problem into smaller ones, solve each, and put the solutions together.",
    "Give the answer first. After it, explain why it is right and what a likely mistake would be.",
    "Write clearly and fully; define every uncommon word that you use.",
    "Check your answer before you give it, and mention how you checked it.",
)


def shown(sample_messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The conversation with a system message before it (in place of its own, where it has one)."""
    if system is None:
        return sample_messages
    rest = sample_messages[1:] if sample_messages and sample_messages[0]["role"] == "system" else sample_messages
    return ({"role": "system", "content": system}, *rest)


class Answer(Section):
    """The writer answers every prompt, `n` times: several answers are equals, and equal ones are kept once. What
    `system` tells it the student does not see (prompt erasure), unless `keep_system`."""

    kind: ClassVar[Kind] = "label"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    n: Annotated[int, Field(ge=1, le=1000)] = 1
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: Tokens = 256
    system: str | None = None
    keep_system: bool = False

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        turns = [(sample, number) for sample in pool for number in range(self.n)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        asked = [scene.request(shown(asked_of(sample), self.system), sampling, number) for sample, number in turns]
        replies = yield from ask(asked)
        found: Pool = []
        seen: set[tuple[int, str]] = set()
        for (sample, number), request, reply, whole in zip(
            turns, asked, replies, finished(replies, tally), strict=True
        ):
            if not whole:
                continue
            new = (
                answered(sample, reply)
                if not self.keep_system
                else answered(_as_asked(sample, request.messages), reply)
            )
            if number and (id(sample), new.messages[-1]["content"]) in seen:
                tally.drop("the same answer again", new.messages[-1]["content"])
                continue
            seen.add((id(sample), new.messages[-1]["content"]))
            found.append(new)
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(taken * self.n, int(taken * self.n * self.max_tokens * ANSWER_SHARE), given=taken * self.n)


class Explain(Section):
    """Explanation traces: a system message, drawn for each prompt out of 16, asks for an explained answer. The student
    is trained without it (Orca 2's prompt erasure), or, with `keep_system`, sees it (Orca). The paper's 16 messages
    were not at hand: these are our own."""

    kind: ClassVar[Kind] = "label"
    paper: ClassVar[str] = "Mukherjee et al., arXiv:2306.02707; erasure: Mitra et al., arXiv:2311.11045"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: Tokens = 384
    keep_system: bool = False

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        systems = [EXPLAINING[scene.draw("system", sample.id).randrange(len(EXPLAINING))] for sample in pool]
        asked = [
            scene.request(shown(asked_of(sample), system), sampling)
            for sample, system in zip(pool, systems, strict=True)
        ]
        replies = yield from ask(asked)
        found: Pool = []
        for sample, request, reply, whole in zip(pool, asked, replies, finished(replies, tally), strict=True):
            if whole:
                found.append(answered(_as_asked(sample, request.messages) if self.keep_system else sample, reply))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(taken, int(taken * self.max_tokens * ANSWER_SHARE), given=taken)


def _as_asked(sample: Sample, messages: tuple[Message, ...]) -> Sample:
    """The prompt as the writer saw it."""
    return replace(sample, messages=messages)


STEPS: dict[str, type[Section]] = {"answer": Answer, "explain": Explain}
