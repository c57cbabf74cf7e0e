"""Curation from texts that are there: tasks about a document, and programming problems inspired by a piece of code."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

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
    finished,
    new_prompt,
    prompt_of,
    user,
)
from limbeck.elicit.similar import Novelty
from limbeck.elicit.wording import fill, parts, words
from limbeck.types import Sample, Sampling

TASKS = {
    "question": "a question that the text answers, with the answer in a few words of the text",
    "yes_no": "a question that the text answers with yes or no, with that answer",
    "choice": "a question about the text with four choices A to D, with the letter of the right one and its text",
    "summary": "the instruction to say in one sentence what the text says, with that sentence",
    "title": "the instruction to find a title for the text, with the title",
    "points": "the instruction to list the main points of the text, with the list",
    "simple": "the instruction to tell a child what the text says, with what to tell",
    "claim": (
        "a claim and the question whether the text supports it, contradicts it or says nothing of it, with the answer"
        " and why"
    ),
    "term": "the question what a word of the text means there, with its meaning",
    "cause": "a question about why something in the text happens, with the reason",
    "gap": "a sentence of the text in which a word is replaced by ___ and the instruction to fill it in, with the word",
    "next": "the question what may follow from the text or happen next, with an answer",
}
GROUNDED = frozenset({"question", "gap"})  # whose answers stand in the text, word for word
ABOUT = (
    "Text:\n{document}\n\nMake {what}. Someone who does the task sees the text, too. Write exactly two parts, one after"
    " the other:\nTask: (the task)\nAnswer: (the answer)"
)
INSPIRED = (
    "Here is a piece of code:\n```\n{code}\n```\n\nLet it inspire you to a programming problem of your own that can be"
    " solved in one file. Write exactly two parts, one after the other:\nProblem: (everything that one needs to know to"
    " solve it; the piece of code is not shown)\nSolution: (a correct program in a fenced block, explained in a few"
    " words)"
)
FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


class DocumentTasks(Section):
    """Tasks of given types about every text of the pool, each with its answer; the text is part of the prompt. A task
    goes where it or its answer is missing, where the answer of a `question` or a `gap` does not stand in the text, or
    where it is like another one about the same text. Bonito is a model trained for this, with 16 types; here the writer
    is asked in words, for these 12 of our own."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "after Nayak et al., arXiv:2402.18334"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    types: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    each: Annotated[int, Field(ge=1)] = 2
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    temperature: Temperature = 0.5
    top_p: TopP = 0.95
    max_tokens: Tokens = 256

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        turns: list[tuple[Sample, str, int]] = []
        for sample in pool:
            drawn = scene.draw("types", sample.id).sample(self.types, min(self.each, len(self.types)))
            turns += [(sample, kind, number) for number, kind in enumerate(drawn)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        asked = [(user(fill(ABOUT, document=prompt_of(sample), what=self._what(kind))),) for sample, kind, _ in turns]
        replies = yield from ask([scene.request(messages, sampling) for messages in asked])
        found: Pool = []
        known: dict[str, Novelty] = {sample.id: Novelty(self.threshold) for sample in pool}
        for (sample, kind, _), reply, whole in zip(turns, replies, finished(replies, tally), strict=True):
            if not whole:
                continue
            said = reply.messages[-1]["content"]
            read = parts(said, ("task", "answer"))
            task = read.get("task", "")
            answer = read.get("answer", "")
            if not task or not answer:
                tally.drop("no task" if not task else "no answer", said)
            elif kind in GROUNDED and not _stands_in(answer, prompt_of(sample)):
                tally.drop("the answer is not in the text", answer)
            elif not known[sample.id].add(task):
                tally.drop("like another task on the text", task)
            else:
                prompt = new_prompt(f"{prompt_of(sample)}\n\n{task}", [sample], reply.writer, kind=kind)
                found.append(answered(prompt, reply, answer, finish="ok"))
        return found

    @staticmethod
    def _what(kind: str) -> str:
        return TASKS.get(kind, kind)  # another type is described in the recipe's own words

    def bill(self, taken: int) -> Bill:
        asked = taken * min(self.each, len(self.types))
        return Bill(asked, int(asked * self.max_tokens * ANSWER_SHARE), given=asked)


def _stands_in(answer: str, text: str) -> bool:
    said = words(answer)
    there = words(text)
    return bool(said) and any(there[at : at + len(said)] == said for at in range(len(there) - len(said) + 1))


class OssInstruct(Section):
    """OSS-Instruct: 1 to 15 consecutive lines of a program of the pool inspire a programming problem and its solution.
    A problem goes where a part is missing, where it has no program, or where it is like another. The paper has 80,000
    pieces of starcoderdata and gpt-3.5-turbo; in our own words."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "Wei et al., arXiv:2312.02120"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    each: Annotated[int, Field(ge=1)] = 1
    lines: Annotated[int, Field(ge=1)] = 15
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: Tokens = 768

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        turns = [(sample, number) for sample in pool for number in range(self.each)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        asked = [(user(fill(INSPIRED, code=self._piece(sample, number, scene))),) for sample, number in turns]
        replies = yield from ask(
            [scene.request(messages, sampling, number) for messages, (_, number) in zip(asked, turns, strict=True)]
        )
        found = list[Sample]()
        known = Novelty(self.threshold)
        for (sample, _), reply, whole in zip(turns, replies, finished(replies, tally), strict=True):
            if not whole:
                continue
            said = reply.messages[-1]["content"]
            read = parts(said, ("problem", "solution"))
            problem = read.get("problem", "")
            solution = read.get("solution", "")
            if not problem or not solution:
                tally.drop("no problem" if not problem else "no solution", said)
            elif not (program := FENCE.search(solution)) or not program[1].strip():
                tally.drop("no program", solution)
            elif not known.add(problem):
                tally.drop("like another problem", problem)
            else:
                found.append(
                    answered(new_prompt(problem, [sample], reply.writer, kind="code"), reply, solution, finish="ok")
                )
        return found

    def _piece(self, sample: Sample, number: int, scene: Scene) -> str:
        """Consecutive lines of a program, how many and from where drawn."""
        noise = scene.draw("lines", sample.id, number)
        having = prompt_of(sample).splitlines()
        count = noise.randint(1, min(self.lines, len(having)))
        first = noise.randint(0, len(having) - count)
        return "\n".join(having[first : first + count])

    def bill(self, taken: int) -> Bill:
        asked = taken * self.each
        return Bill(asked, int(asked * self.max_tokens * ANSWER_SHARE), given=asked)


STEPS: dict[str, type[Section]] = {"document_tasks": DocumentTasks, "oss_instruct": OssInstruct}
