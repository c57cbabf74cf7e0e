"""Expansion: many tasks out of few (Self-Instruct), and its one-call form (Alpaca)."""

from __future__ import annotations

import re
from random import Random
from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.answer import ANSWER_SHARE, Temperature, Tokens, TopP
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answered, ask, new_prompt, prompt_of, user
from limbeck.elicit.select import holds
from limbeck.elicit.similar import Novelty
from limbeck.elicit.wording import fill, items, numbered, parts
from limbeck.types import Sample, Sampling

MORE = (
    "Here is a list of tasks that people give to an assistant. Continue it with new tasks of other"
    " kinds.\n\n{tasks}\n{next}."
)
IS_IT = (
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
UNFIT = (
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
UNFIT_TOO = (*UNFIT, "video", "videos", "audio", "music", "flowchart", "flowcharts", "diagram", "diagrams")
KNOWN_KINDS = (
    ("Sort the e-mail into work or private.", "Yes"),
    ("Write a birthday wish for my aunt.", "No"),
    ("Is the sentence true or false?", "Yes"),
)
NO_INPUT = re.compile(r"<?\s*no\s*-?input\s*>?\.?", re.IGNORECASE)


def unfit(text: str, barred: tuple[str, ...]) -> str | None:
    """Why an instruction is left out before it is compared with others; None where it may stay."""
    if not 3 < len(text.split()) <= 150:
        return "too short" if len(text.split()) <= 3 else "too long"
    if any(holds(text, word) for word in barred):
        return "needs what a text can't hold"
    if text.lower().startswith("write a program"):
        return "asks for a program"
    if not text[0].isascii() or not text[0].isalnum():
        return "begins with a sign"
    return None


class SelfInstruct(Section):
    """Rounds of questions for more tasks, each shown 8 (6 of the seeds and 2 made before; seeds fill up), until there
    are `count` new ones or `requests` are used up. What passes the filters and is new (ROUGE-L of 0.7 at most) is asked
    whether it is a classification, and then for instances: the label first for those, else the input first. The paper's
    sampler is kept but for its frequency penalty and its stop texts; its prompts were for GPT-3, these are ours, and a
    task's first instance is kept (`instances` for more)."""

    kind: ClassVar[Kind] = "expand"
    paper: ClassVar[str] = "Wang et al., arXiv:2212.10560"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    count: Annotated[int, Field(ge=1)] = 100
    requests: Annotated[int, Field(ge=1)] = 100
    together: Annotated[int, Field(ge=1)] = 5
    shown: Annotated[int, Field(ge=1)] = 8
    made: Annotated[int, Field(ge=0)] = 2
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 0.7
    top_p: TopP = 0.5
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 2.0
    max_tokens: Tokens = 512
    instance_tokens: Tokens = 300
    instances: Annotated[int, Field(ge=1, le=5)] = 1

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        made = yield from self._instructions(pool, scene, tally)
        kinds = yield from ask([scene.request((user(_is_it(sample)),), Sampling(0.0, 1.0, 3)) for sample in made])
        labelled = [reply.messages[-1]["content"].strip().lower().startswith("yes") for reply in kinds]
        tally.facts["classification"] = sum(labelled) / max(1, len(labelled))
        sampling = Sampling(0.0, 1.0, self.instance_tokens, presence_penalty=1.5)
        templates = [OUTPUT_FIRST if first else INPUT_FIRST for first in labelled]
        asked = [
            scene.request((user(fill(t, task=prompt_of(s))),), sampling) for s, t in zip(made, templates, strict=True)
        ]
        replies = yield from ask(asked)
        found: Pool = []
        for sample, reply, first in zip(made, replies, labelled, strict=True):
            found += self._instances(sample, reply, first, tally)
        return found

    def _instructions(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        known = Novelty(self.threshold, [prompt_of(sample) for sample in pool])
        made = list[Sample]()
        used = 0
        for sample in pool:
            known.remember(prompt_of(sample))
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens, presence_penalty=self.presence_penalty)
        while len(made) < self.count and used < self.requests:
            batch = min(self.together, self.requests - used)
            groups = [self._demonstrations(pool, made, scene.draw("shown", used + number)) for number in range(batch)]
            asked = [
                scene.request((user(_more(group)),), sampling, used + number) for number, group in enumerate(groups)
            ]
            used += batch
            replies = yield from ask(asked)
            for group, reply in zip(groups, replies, strict=True):
                made += self._new(group, reply, known, tally)
        tally.facts |= {"requests": used, "new_instructions": len(made)}
        for sample in made[self.count :]:
            tally.drop("more than wanted", prompt_of(sample))
        return made[: self.count]

    def _demonstrations(self, pool: Pool, made: Pool, noise: Random) -> Pool:
        ours = noise.sample(made, min(self.made, len(made)))
        chosen = ours + noise.sample(pool, min(self.shown - len(ours), len(pool)))
        noise.shuffle(chosen)
        return chosen

    def _new(self, group: Pool, reply: Sample, known: Novelty, tally: Tally) -> Pool:
        """The instructions of one answer that are fit and new. An answer that was cut off loses its last one; the paper
        drops it whole."""
        listed = [
            text
            for _, text in items(f"{len(group) + 1}. {_without_number(reply.messages[-1]['content'], len(group) + 1)}")
        ]
        if reply.meta.get("finish") == "length" and listed:
            tally.drop("cut off", listed.pop())
        found: Pool = []
        for text in (" ".join(each.split()) for each in listed):
            if reason := ("empty" if not text else unfit(text, UNFIT)):
                tally.drop(reason, text)
            elif not known.add(text):
                tally.drop("like another task", text)
            else:
                found.append(new_prompt(text, [*group, reply], reply.writer, kind="self-instruct"))
        return found

    def _instances(self, sample: Sample, reply: Sample, label_first: bool, tally: Tally) -> Pool:
        pairs = _pairs(reply.messages[-1]["content"], label_first)
        if reply.meta.get("finish") == "length" and len(pairs) > 1:
            tally.drop("instance cut off", pairs.pop()[1])
        kept: dict[str, str] = {}
        for given, output in pairs:
            if not output or output.endswith(":") or output == given:
                tally.drop("instance without a proper output", f"{given} -> {output}")
            elif kept.setdefault(given, output) != output:
                tally.drop("same input with different outputs", prompt_of(sample))
                return []
        if not kept:
            tally.drop("no instance", reply.messages[-1]["content"])
        found = []
        for given, output in list(kept.items())[: self.instances]:
            text = f"{prompt_of(sample)}\n\n{given}" if given else prompt_of(sample)
            found.append(
                answered(new_prompt(text, [sample], reply.writer, kind=sample.meta["kind"]), reply, output, finish="ok")
            )
        return found

    def bill(self, _: int) -> Bill:
        tokens = self.requests * self.max_tokens + self.count * (self.instance_tokens + 3)
        return Bill(self.requests + 2 * self.count, int(tokens * ANSWER_SHARE), given=self.count * self.instances)


def _more(group: Pool) -> str:
    return fill(MORE, tasks=numbered([prompt_of(sample) for sample in group]), next=str(len(group) + 1))


def _without_number(text: str, number: int) -> str:
    """The answer without the number that it may repeat at its beginning."""
    return re.sub(rf"^\s*{number}\s*[.)]\s*", "", text)


def _is_it(sample: Sample) -> str:
    examples = "\n\n".join(f"Task: {task}\nClassification: {answer}" for task, answer in KNOWN_KINDS)
    return fill(IS_IT, examples=examples, task=prompt_of(sample))


def _pairs(text: str, label_first: bool) -> list[tuple[str, str]]:
    """(input, output) of every instance that was written, in either order."""
    ahead, behind = ("label", "input") if label_first else ("input", "output")
    blocks = re.split(rf"(?im)^(?=[ \t*#]*{ahead}[ \t*]*:)", text)
    if not label_first and not re.search(r"(?im)^[ \t*#]*(?:input|output)[ \t*]*:", text):
        return [("", text.strip())] if text.strip() else []
    found = []
    for block in blocks:
        read = parts(block, (ahead, behind, "task"))
        given, output = (
            (read.get(behind, ""), read.get(ahead, "")) if label_first else (read.get(ahead, ""), read.get(behind, ""))
        )
        if ahead in read or behind in read:
            found.append(("" if NO_INPUT.fullmatch(given) else given, output))
    return found


class Alpaca(Section):
    """Self-Instruct in one call: three seeds with their answers are shown, and `tasks` more are asked for, each with
    instruction, input and output; until there are `count` or `requests` are used up. The original shows the seeds to
    text-davinci-003 with a page of requirements; the wording here is ours."""

    kind: ClassVar[Kind] = "expand"
    paper: ClassVar[str] = "Taori et al. 2023, Stanford Alpaca"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    count: Annotated[int, Field(ge=1)] = 100
    requests: Annotated[int, Field(ge=1)] = 100
    together: Annotated[int, Field(ge=1)] = 5
    shown: Annotated[int, Field(ge=1)] = 3
    tasks: Annotated[int, Field(ge=1)] = 20
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_tokens: Tokens = 1024

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        having = [sample for sample in pool if sample.meta.get("answers")]
        for sample in pool:
            if not sample.meta.get("answers"):
                tally.drop("a seed without an answer", prompt_of(sample))
        known = Novelty(self.threshold, [prompt_of(sample) for sample in having])
        found = list[Sample]()
        used = 0
        for sample in having:
            known.remember(prompt_of(sample))
        while len(found) < self.count and used < self.requests and having:
            batch = min(self.together, self.requests - used)
            groups = [scene.draw("shown", used + n).sample(having, min(self.shown, len(having))) for n in range(batch)]
            asked = [
                scene.request((user(self._question(group)),), self._sampling, used + n)
                for n, group in enumerate(groups)
            ]
            used += batch
            replies = yield from ask(asked)
            for group, reply in zip(groups, replies, strict=True):
                found += self._new(group, reply, known, tally)
        tally.facts |= {"requests": used, "new_instructions": len(found)}
        for sample in found[self.count :]:
            tally.drop("more than wanted", prompt_of(sample))
        return found[: self.count]

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)

    def _question(self, group: Pool) -> str:
        shown = [
            f"{n}. Instruction: {prompt_of(s)}\nInput: <noinput>\nOutput: {s.meta['answers'][0]}"
            for n, s in enumerate(group, 1)
        ]
        return fill(ALL_AT_ONCE, count=str(self.tasks), tasks="\n\n".join(shown), next=str(len(group) + 1))

    def _new(self, group: Pool, reply: Sample, known: Novelty, tally: Tally) -> Pool:
        text = re.sub(
            r"(?im)^[ \t*#]*\d{1,3}[ \t]*[.)][ \t]*(?=\**instruction)",
            "",
            f"Instruction: {reply.messages[-1]['content']}",
        )
        blocks = [
            parts(block, ("instruction", "input", "output"))
            for block in re.split(r"(?im)^(?=[ \t*#]*instruction[ \t*]*:)", text)
            if block.strip()
        ]
        if reply.meta.get("finish") == "length" and blocks:
            tally.drop("cut off", blocks.pop().get("instruction", ""))
        found: Pool = []
        for block in blocks:
            instruction, given, output = (block.get(name, "").strip() for name in ("instruction", "input", "output"))
            instruction = " ".join(instruction.split())
            if not instruction or not output:
                tally.drop("a part is missing", instruction or output)
            elif reason := unfit(instruction, UNFIT_TOO):
                tally.drop(reason, instruction)
            elif not known.add(instruction):
                tally.drop("like another task", instruction)
            else:
                asked = instruction if not given or NO_INPUT.fullmatch(given) else f"{instruction}\n\n{given}"
                found.append(
                    answered(new_prompt(asked, group, reply.writer, kind="alpaca"), reply, output, finish="ok")
                )
        return found

    def bill(self, _: int) -> Bill:
        return Bill(self.requests, int(self.requests * self.max_tokens * ANSWER_SHARE), given=self.count)


STEPS: dict[str, type[Section]] = {"self_instruct": SelfInstruct, "alpaca": Alpaca}
