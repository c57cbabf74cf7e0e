"""Expansion: many tasks from a few (Self-Instruct), and its one-call form (Alpaca)."""

from __future__ import annotations

import re
from random import Random
from typing import Annotated

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    ending,
    new_prompt,
    prompt_of,
    said_by,
    user,
    with_answer,
)
from limbeck.elicit.select import has_word
from limbeck.elicit.similar import Novelty
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.wording import fill, items, numbered, parts
from limbeck.types import TAUGHT_FINISHES, Sample, Sampling

MORE = (
    "Here is a list of tasks that people give to an assistant. Continue it with new tasks of other"
    " kinds.\n\n{tasks}\n{next}."
)
IS_CLASSIFICATION = (
    "Is the task a classification, where the answer is one of a few given labels? Say Yes or No.\n\n{examples}\n\nTask:"
    " {task}\nClassification:"
)
OUTPUT_FIRST = (
    "For the classification task, write each possible label and an input that has this label.\n\nTask: Say whether the"
    " review is positive or negative.\nLabel: positive\nInput: The soup was warm and the waiter kind.\nLabel:"
    " negative\nInput: We waited an hour for cold fish.\n\nTask: {task}\n"
)
INPUT_FIRST = (
    "For the task, write an input where it needs one, and the right output.\n\n"
    "Task: Put the words into alphabetical order.\nInput: pear, apple, fig\nOutput: apple, fig, pear\n\n"
    "Task: Name three things that float on water.\nOutput: cork, wood and ice\n\nTask: {task}\n"
)
ALL_AT_ONCE = (
    "Write {count} more tasks like these, of different kinds, each with an instruction, an input (or <noinput>) and an"
    " output. Keep the form.\n\n{tasks}\n\n{next}. Instruction:"
)
UNFIT_WORDS = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
)
MORE_UNFIT_WORDS = (*UNFIT_WORDS, "video", "videos", "audio", "music", "flowchart", "flowcharts", "diagram", "diagrams")
CLASSIFIED = (
    ("Sort the e-mail into work or private.", "Yes"),
    ("Write a birthday wish for my aunt.", "No"),
    ("Is the sentence true or false?", "Yes"),
)
NO_INPUT = re.compile(r"<?\s*no\s*-?input\s*>?\.?", re.IGNORECASE)


def unfit(text: str, barred: tuple[str, ...]) -> str | None:
    """Why an instruction is dropped before it is compared with others; None if it may stay."""
    if not 3 < len(text.split()) <= 150:
        return "too short" if len(text.split()) <= 3 else "too long"
    if any(has_word(text, word) for word in barred):
        return "needs what a text can't hold"
    if text.lower().startswith("write a program"):
        return "asks for a program"
    if not text[0].isascii() or not text[0].isalnum():
        return "begins with a sign"
    return None


def _is_written(reply: Sample, tally: Tally) -> bool:
    """Whether the model wrote what it was asked for, if only its beginning. A reply that was refused or filtered, or
    that failed, counts as dropped."""
    finish = ending(reply)
    if finish not in TAUGHT_FINISHES:
        tally.drop(f"answer: {finish}", reply.messages[-1]["content"])
    return finish in TAUGHT_FINISHES


@register("self_instruct")
class SelfInstruct(AskingStep):
    """Asks for more tasks in rounds until there are `count` new ones or `requests` are used up; each request shows
    `shown` tasks, `made` of them new ones and the rest seeds. New tasks must pass some filters, and their ROUGE-L with
    all others must be at most `threshold`. The model then says whether a task is a classification and writes instances:
    the label first if it is, the input first if not. The sampler is the paper's without the frequency penalty and stop
    texts; the paper prompted GPT-3, the prompts here are ours. `instances` of each task are kept; with 0 none are
    written, and the tasks wait for an answer. `by` is the model that writes it all."""

    kind = "expand"
    paper = "Wang et al., arXiv:2212.10560"
    by: By = TEACHER
    count: Annotated[int, Field(ge=1)] = 100
    requests: Annotated[int, Field(ge=1)] = 100
    together: Annotated[int, Field(ge=1)] = 5
    shown: Annotated[int, Field(ge=1)] = 8
    made: Annotated[int, Field(ge=0)] = 2
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 0.7
    top_p: TopP = 0.5
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 2.0
    max_tokens: TokenCount = 512
    instance_tokens: TokenCount = 300
    instances: Annotated[int, Field(ge=0, le=5)] = 1

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        tasks = yield from self._tasks(pool, context, tally)
        if self.instances == 0:
            return tasks
        replies = yield from ask(
            [context.request((user(_is_classification(task)),), Sampling(0.0, 1.0, 3), by=self.by) for task in tasks]
        )
        classification = [said_by(reply).strip().lower().startswith("yes") for reply in replies]
        tally.facts["classification"] = sum(classification) / max(1, len(classification))
        sampling = Sampling(0.0, 1.0, self.instance_tokens, presence_penalty=1.5)
        templates = [OUTPUT_FIRST if label_first else INPUT_FIRST for label_first in classification]
        replies = yield from ask(
            [
                context.request((user(fill(template, task=prompt_of(task))),), sampling, by=self.by)
                for task, template in zip(tasks, templates, strict=True)
            ]
        )
        samples: Pool = []
        for task, reply, label_first in zip(tasks, replies, classification, strict=True):
            samples += self._instances(task, reply, label_first, tally)
        return samples

    def _tasks(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        """The new tasks, without instances."""
        novelty = Novelty(self.threshold, [prompt_of(sample) for sample in pool])
        tasks: Pool = []
        used = 0
        for sample in pool:
            novelty.remember(prompt_of(sample))
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens, presence_penalty=self.presence_penalty)
        while len(tasks) < self.count and used < self.requests:
            numbers = range(used, used + min(self.together, self.requests - used))
            groups = [self._demonstrations(pool, tasks, context.rng("shown", number)) for number in numbers]
            replies = yield from ask(
                [
                    context.request((user(_more(group)),), sampling, number, by=self.by)
                    for number, group in zip(numbers, groups, strict=True)
                ]
            )
            used += len(numbers)
            for group, reply in zip(groups, replies, strict=True):
                tasks += self._new_tasks(group, reply, novelty, tally)
        tally.facts |= {"requests": used, "new_instructions": len(tasks)}
        for task in tasks[self.count :]:
            tally.drop("more than wanted", prompt_of(task))
        return tasks[: self.count]

    def _demonstrations(self, pool: Pool, tasks: Pool, rng: Random) -> Pool:
        new = rng.sample(tasks, min(self.made, len(tasks)))
        shown = new + rng.sample(pool, min(self.shown - len(new), len(pool)))
        rng.shuffle(shown)
        return shown

    def _new_tasks(self, group: Pool, reply: Sample, novelty: Novelty, tally: Tally) -> Pool:
        """The fit and new instructions of one reply. A reply that was cut off loses its last one; the paper drops it
        whole."""
        if not _is_written(reply, tally):
            return []
        first = len(group) + 1
        listed = [text for _, text in items(f"{first}. {_without_number(said_by(reply), first)}")]
        if ending(reply) == "length" and listed:
            tally.drop("cut off", listed.pop())
        tasks: Pool = []
        for text in (" ".join(each.split()) for each in listed):
            if reason := ("empty" if not text else unfit(text, UNFIT_WORDS)):
                tally.drop(reason, text)
            elif not novelty.add(text):
                tally.drop("like another task", text)
            else:
                tasks.append(new_prompt(text, [*group, reply], reply.writer, kind="self-instruct"))
        return tasks

    def _instances(self, task: Sample, reply: Sample, label_first: bool, tally: Tally) -> Pool:
        if not _is_written(reply, tally):
            return []
        pairs = _input_output_pairs(said_by(reply), label_first)
        if ending(reply) == "length" and pairs:
            tally.drop("instance cut off", pairs.pop()[1])
            if not pairs:
                return []
        outputs: dict[str, str] = {}  # by input
        for task_input, output in pairs:
            if not output or output.endswith(":") or output == task_input:
                tally.drop("instance without a proper output", f"{task_input} -> {output}")
            elif outputs.setdefault(task_input, output) != output:
                tally.drop("same input with different outputs", prompt_of(task))
                return []
        if not outputs:
            tally.drop("no instance", said_by(reply))
        samples = []
        for task_input, output in list(outputs.items())[: self.instances]:
            text = f"{prompt_of(task)}\n\n{task_input}" if task_input else prompt_of(task)
            prompt = new_prompt(text, [task], reply.writer, kind=task.meta["kind"])
            samples.append(with_answer(prompt, reply, output, finish="ok"))
        return samples

    def estimate(self, _: int) -> Estimate:
        instances = self.count if self.instances else 0
        tokens = self.requests * self.max_tokens + instances * (self.instance_tokens + 3)
        samples = self.count * max(1, self.instances)
        return Estimate(self.requests + 2 * instances, int(tokens * ANSWER_SHARE), samples=samples)

    def answer_tokens(self) -> float | None:
        return super().answer_tokens() if self.instances else None


def _more(group: Pool) -> str:
    return fill(MORE, tasks=numbered([prompt_of(sample) for sample in group]), next=str(len(group) + 1))


def _without_number(text: str, number: int) -> str:
    """The reply without the number that it may repeat at its beginning."""
    return re.sub(rf"^\s*{number}\s*[.)]\s*", "", text)


def _is_classification(task: Sample) -> str:
    examples = "\n\n".join(f"Task: {text}\nClassification: {answer}" for text, answer in CLASSIFIED)
    return fill(IS_CLASSIFICATION, examples=examples, task=prompt_of(task))


def _input_output_pairs(text: str, label_first: bool) -> list[tuple[str, str]]:
    """(input, output) of every instance in a reply that has either of them first."""
    first, second = ("label", "input") if label_first else ("input", "output")
    blocks = re.split(rf"(?im)^(?=[ \t*#]*{first}[ \t*]*:)", text)
    if not label_first and not re.search(r"(?im)^[ \t*#]*(?:input|output)[ \t*]*:", text):
        return [("", text.strip())] if text.strip() else []
    pairs = []
    for block in blocks:
        read = parts(block, (first, second, "task"))
        if first in read or second in read:
            task_input = read.get(second if label_first else first, "")
            output = read.get(first if label_first else second, "")
            pairs.append(("" if NO_INPUT.fullmatch(task_input) else task_input, output))
    return pairs


@register("alpaca")
class Alpaca(AskingStep):
    """Self-Instruct in one call: each request shows `shown` seeds with their answers and asks for `tasks` more, each
    with an instruction, an input and an output, until there are `count` new ones or `requests` are used up. The
    original shows the seeds to text-davinci-003 with a page of requirements; the wording here is ours."""

    kind = "expand"
    paper = "Taori et al. 2023, Stanford Alpaca"
    count: Annotated[int, Field(ge=1)] = 100
    requests: Annotated[int, Field(ge=1)] = 100
    together: Annotated[int, Field(ge=1)] = 5
    shown: Annotated[int, Field(ge=1)] = 3
    tasks: Annotated[int, Field(ge=1)] = 20
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_tokens: TokenCount = 1024

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        seeds = [sample for sample in pool if sample.meta.get("answers")]
        for sample in pool:
            if not sample.meta.get("answers"):
                tally.drop("a seed without an answer", prompt_of(sample))
        novelty = Novelty(self.threshold, [prompt_of(seed) for seed in seeds])
        samples: Pool = []
        used = 0
        for seed in seeds:
            novelty.remember(prompt_of(seed))
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        while len(samples) < self.count and used < self.requests and seeds:
            numbers = range(used, used + min(self.together, self.requests - used))
            groups = [context.rng("shown", n).sample(seeds, min(self.shown, len(seeds))) for n in numbers]
            replies = yield from ask(
                [
                    context.request((user(self._question(group)),), sampling, n)
                    for n, group in zip(numbers, groups, strict=True)
                ]
            )
            used += len(numbers)
            for group, reply in zip(groups, replies, strict=True):
                samples += self._new_tasks(group, reply, novelty, tally)
        tally.facts |= {"requests": used, "new_instructions": len(samples)}
        for sample in samples[self.count :]:
            tally.drop("more than wanted", prompt_of(sample))
        return samples[: self.count]

    def _question(self, group: Pool) -> str:
        shown = [
            f"{n}. Instruction: {prompt_of(seed)}\nInput: <noinput>\nOutput: {seed.meta['answers'][0]}"
            for n, seed in enumerate(group, 1)
        ]
        return fill(ALL_AT_ONCE, count=str(self.tasks), tasks="\n\n".join(shown), next=str(len(group) + 1))

    def _new_tasks(self, group: Pool, reply: Sample, novelty: Novelty, tally: Tally) -> Pool:
        if not _is_written(reply, tally):
            return []
        blocks = _instruction_blocks(said_by(reply))
        if ending(reply) == "length" and blocks:
            tally.drop("cut off", blocks.pop().get("instruction", ""))
        samples: Pool = []
        for block in blocks:
            instruction, task_input, output = (
                block.get(name, "").strip() for name in ("instruction", "input", "output")
            )
            instruction = " ".join(instruction.split())
            if not instruction or not output:
                tally.drop("a part is missing", instruction or output)
            elif reason := unfit(instruction, MORE_UNFIT_WORDS):
                tally.drop(reason, instruction)
            elif not novelty.add(instruction):
                tally.drop("like another task", instruction)
            else:
                no_input = not task_input or NO_INPUT.fullmatch(task_input)
                text = instruction if no_input else f"{instruction}\n\n{task_input}"
                prompt = new_prompt(text, group, reply.writer, kind="alpaca")
                samples.append(with_answer(prompt, reply, output, finish="ok"))
        return samples

    def estimate(self, _: int) -> Estimate:
        return Estimate(self.requests, int(self.requests * self.max_tokens * ANSWER_SHARE), samples=self.count)


def _instruction_blocks(text: str) -> list[dict[str, str]]:
    """The named parts of every task in a reply, which goes on after the word Instruction."""
    text = re.sub(r"(?im)^[ \t*#]*\d{1,3}[ \t]*[.)][ \t]*(?=\**instruction)", "", f"Instruction: {text}")
    blocks = re.split(r"(?im)^(?=[ \t*#]*instruction[ \t*]*:)", text)
    return [parts(block, ("instruction", "input", "output")) for block in blocks if block.strip()]
