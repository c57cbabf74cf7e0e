"""Curation from existing texts: tasks about a document, and programming problems inspired by a piece of code."""

from __future__ import annotations

import re
from typing import Annotated

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
    user,
    with_answer,
)
from limbeck.elicit.similar import Novelty
from limbeck.elicit.step import AskingStep, Estimate, Temperature, TokenCount, TopP, register
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
GROUNDED = frozenset({"question", "gap"})  # their answers must be in the text, word for word
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
FENCE = re.compile(r"```[^\n`]*+\n(.*?)```", re.DOTALL)


@register("document_tasks")
class DocumentTasks(AskingStep):
    """Asks for tasks of given `types` about every text in the pool, each with its answer; the text becomes part of the
    prompt. Drops a task if it or its answer is missing, if the answer of a `question` or a `gap` is not in the text, or
    if it resembles another task on the same text. Bonito is a model trained to do this, with 16 types; here any model
    is asked, for 12 types of our own."""

    kind = "curate"
    paper = "after Nayak et al., arXiv:2402.18334"
    types: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    each: Annotated[int, Field(ge=1)] = 2
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    temperature: Temperature = 0.5
    top_p: TopP = 0.95
    max_tokens: TokenCount = 256

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        turns: list[tuple[Sample, str]] = []
        for sample in pool:
            drawn = context.rng("types", sample.id).sample(self.types, min(self.each, len(self.types)))
            turns += [(sample, task_type) for task_type in drawn]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        # a type that is not one of ours is described in the recipe's own words
        questions = [
            fill(ABOUT, document=prompt_of(sample), what=TASKS.get(task_type, task_type)) for sample, task_type in turns
        ]
        replies = yield from ask([context.request((user(text),), sampling) for text in questions])
        tasks: Pool = []
        novelty: dict[str, Novelty] = {sample.id: Novelty(self.threshold) for sample in pool}
        for (sample, task_type), reply in complete_replies(turns, replies, tally):
            text = said_by(reply)
            read = parts(text, ("task", "answer"))
            task = read.get("task", "")
            answer = read.get("answer", "")
            if not task or not answer:
                tally.drop("no task" if not task else "no answer", text)
            elif task_type in GROUNDED and not _contains(prompt_of(sample), answer):
                tally.drop("the answer is not in the text", answer)
            elif not novelty[sample.id].add(task):
                tally.drop("like another task on the text", task)
            else:
                prompt = new_prompt(f"{prompt_of(sample)}\n\n{task}", [sample], reply.writer, kind=task_type)
                tasks.append(with_answer(prompt, reply, answer, finish="ok"))
        return tasks

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples * min(self.each, len(self.types)), self.max_tokens)


def _contains(text: str, answer: str) -> bool:
    """Whether the words of the answer stand together in the text."""
    inner = words(answer)
    outer = words(text)
    return bool(inner) and any(outer[at : at + len(inner)] == inner for at in range(len(outer) - len(inner) + 1))


@register("oss_instruct")
class OssInstruct(AskingStep):
    """OSS-Instruct: 1 to `lines` consecutive lines of a program in the pool inspire a programming problem with its
    solution. Drops problems with a part missing, without a program, or that resemble another. The paper starts from
    80,000 pieces of starcoderdata and asks gpt-3.5-turbo; the wording here is ours."""

    kind = "curate"
    paper = "Wei et al., arXiv:2312.02120"
    each: Annotated[int, Field(ge=1)] = 1
    lines: Annotated[int, Field(ge=1)] = 15
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: TokenCount = 768

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        turns = [(sample, number) for sample in pool for number in range(self.each)]
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        questions = [fill(INSPIRED, code=self._excerpt(sample, number, context)) for sample, number in turns]
        replies = yield from ask(
            [
                context.request((user(text),), sampling, number)
                for text, (_, number) in zip(questions, turns, strict=True)
            ]
        )
        problems: Pool = []
        novelty = Novelty(self.threshold)
        for (sample, _), reply in complete_replies(turns, replies, tally):
            text = said_by(reply)
            read = parts(text, ("problem", "solution"))
            problem = read.get("problem", "")
            solution = read.get("solution", "")
            if not problem or not solution:
                tally.drop("no problem" if not problem else "no solution", text)
            elif not (program := FENCE.search(solution)) or not program[1].strip():
                tally.drop("no program", solution)
            elif not novelty.add(problem):
                tally.drop("like another problem", problem)
            else:
                prompt = new_prompt(problem, [sample], reply.writer, kind="code")
                problems.append(with_answer(prompt, reply, solution, finish="ok"))
        return problems

    def _excerpt(self, sample: Sample, number: int, context: StepContext) -> str:
        """Consecutive lines of a program; where they begin and how many they are is drawn."""
        rng = context.rng("lines", sample.id, number)
        program = prompt_of(sample).splitlines()
        count = rng.randint(1, min(self.lines, len(program)))
        first = rng.randint(0, len(program) - count)
        return "\n".join(program[first : first + count])

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples * self.each, self.max_tokens)
