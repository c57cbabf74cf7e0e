"""Tasks as versioned data: held-out prompts with checks. Every system answers greedily; verifiers judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from limbeck.builtin import task_folders
from limbeck.elicit.prompts import Prompt, load_prompts
from limbeck.elicit.verify import verify
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.models.generate import Job, generate
from limbeck.models.load import Model
from limbeck.types import RecipeError, Sampling, nearest


@dataclass(frozen=True)
class Task:
    name: str
    version: str
    description: str
    metric: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Answer:
    """One system's answer to one prompt; `passed` is None where no verifier applies."""

    prompt_id: str
    kind: str
    text: str
    tokens: int
    finished: bool
    passed: bool | None


def load_task(name: str, limit: int | None = None, path: str = "evaluate.metrics") -> Task:
    """A task with the first `limit` of its own test prompts.

    Raises:
        RecipeError: no such task.
    """
    folders = task_folders()
    if name not in folders:
        raise RecipeError(path, f"no task is named {name!r}{nearest(name, [*folders, 'fidelity'])}")
    data = yaml.safe_load((folders[name] / "task.yaml").read_text())
    prompts = tuple(load_prompts(f"builtin/{name}", part="test")[:limit])
    return Task(data["name"], str(data["version"]), data["description"], data["metric"], prompts)


def answer_all(
    system: Model,
    prompts: Sequence[Prompt],
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """The system's greedy answers, in the order of the prompts, each judged by its check."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    jobs = [Job(system.prompt_ids(prompt.messages), sampling, 0) for prompt in prompts]
    answers: dict[int, Answer] = {}
    for index, ids in generate(system.net, jobs, system.eos_ids, tokens=system.tokens):
        prompt, text = prompts[index], system.decode(ids)
        passed = verify(prompt.check, text)
        answers[index] = Answer(prompt.id, prompt.kind, text, len(ids), ids[-1] in system.eos_ids, passed)
        progress(len(answers), len(jobs))
    return [answers[index] for index in range(len(jobs))]


def summarise(task: Task, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """The task's metrics with their intervals, over the answers to its own prompts. A share over no item is left out, never called 0."""
    own = {prompt.id for prompt in task.prompts}
    answers = [answer for answer in answers if answer.prompt_id in own]
    judged = [answer for answer in answers if answer.passed is not None]
    found: dict[str, Interval] = {}
    if judged:
        found[f"{task.name}/{task.metric}"] = ratio_interval([float(bool(a.passed)) for a in judged], [1.0] * len(judged))
    if answers:
        found[f"{task.name}/finished"] = ratio_interval([float(a.finished) for a in answers], [1.0] * len(answers))
        found[f"{task.name}/tokens"] = ratio_interval([float(a.tokens) for a in answers], [1.0] * len(answers))
    return {name: interval.as_dict() for name, interval in found.items()}
