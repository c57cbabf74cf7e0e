"""Prompts: where a run's questions come from. A file of ours or the user's, one JSON object per line.

A line holds `prompt` and may hold `id`, `kind`, `answer` or `answers` (a corpus: one answer, or several, the best
first), `chosen` and `rejected` (the same for two), `task` and `weight` (for terms on one task, and for tokens that
count more), `check` (see `verify`), and `feedback` (on an earlier answer, for a teacher that is shown it).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck.config.builtin import seed_files, task_folders
from limbeck.elicit.verify import parse_check
from limbeck.types import Message, RecipeError, UserError, nearest

BUILTIN = "builtin/"
LISTS = (("answers",), ("references",))  # a task's items name what they are held against "references"


@dataclass(frozen=True)
class Prompt:
    """One question; `check` is None where no program can judge the answer. `before` is the conversation that it comes
    at the end of."""

    id: str
    text: str
    kind: str = ""
    answers: tuple[str, ...] = ()
    check: dict[str, Any] | None = None
    task: str = ""
    weight: float = 1.0
    feedback: str = ""
    before: tuple[Message, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.before, {"role": "user", "content": self.text})

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data, to be hashed and kept."""
        facts = asdict(self)
        return facts if self.before else {name: value for name, value in facts.items() if name != "before"}


def load_prompts(source: str, part: str = "train", path: str = "prompts.from") -> list[Prompt]:
    """The prompts of `builtin/NAME` (seeds, or a task's training or test part) or of a JSONL file. `path` is where the
    recipe names it.

    Raises:
        UserError: nothing there, nothing in it, or a malformed line, which is named by its number.
    """
    file = _locate(source, part, path)
    prefix = f"{source.removeprefix(BUILTIN)}/" if source.startswith(BUILTIN) else ""
    prompts: list[Prompt] = []
    seen: set[str] = set()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _prompt(line, f"{file}, line {number}", number, prefix)
        if prompt.id in seen:
            raise UserError(f"{file}, line {number}: the id {prompt.id!r} stands twice")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise UserError(
            f'{file} holds no prompt; write one JSON object per line, such as {{"prompt": "Why is the sky blue?"}}'
        )
    return prompts


def _locate(source: str, part: str, path: str) -> Path:
    if source.startswith(BUILTIN):
        tasks = task_folders()
        seeds = seed_files()
        name = source.removeprefix(BUILTIN)
        if name in seeds and part == "train":
            return seeds[name]
        if name in seeds:
            raise RecipeError(
                path,
                f"the seeds {name} have no held-out part; set evaluate.prompts: builtin/everyday, or another task's",
            )
        if name not in tasks:
            raise RecipeError(path, f"there are no built-in prompts {name!r}{nearest(name, (*tasks, *seeds))}")
        file = tasks[name] / f"{part}.jsonl"
        if part == "train" and not file.is_file():
            having = [known for known, folder in tasks.items() if (folder / "train.jsonl").is_file()]
            raise RecipeError(
                path, f"the task {name} has nothing to train on, only to be measured by; take {' or '.join(having)}"
            )
        return file
    file = Path(source).expanduser()
    if not file.is_file():
        raise RecipeError(path, f"there is no file {source!r}; give a JSONL file or builtin/everyday")
    return file


def _prompt(line: str, place: str, number: int, prefix: str) -> Prompt:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        raise UserError(f'{place}: needs a non-empty text under "prompt"')
    check = data.get("check")
    if check is not None:
        parse_check(check, place)
    weight = data.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise UserError(f'{place}: "weight" must be a number above 0')
    ident = prefix + str(data.get("id", f"line-{number}"))
    kind = str(data.get("kind", ""))
    task = str(data.get("task", ""))
    feedback = data.get("feedback", "")
    if not isinstance(feedback, str):
        raise UserError(f'{place}: "feedback" must be text')
    return Prompt(ident, data["prompt"], kind, _answers(data, place), check, task, float(weight), feedback)


def _answers(data: dict[str, Any], place: str) -> tuple[str, ...]:
    """The corpus's answers, the best first."""
    given = [
        keys for keys in (*LISTS, ("answer",), ("chosen", "rejected")) if any(data.get(key) is not None for key in keys)
    ]
    if len(given) > 1:
        raise UserError(f'{place}: give one of "answer", "answers" (or "references"), or "chosen" with "rejected"')
    if not given:
        return ()
    listed = given[0] in LISTS
    answers = data[given[0][0]] if listed else [data.get(key) for key in given[0]]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        keys = " and ".join(f'"{key}"' for key in given[0])
        raise UserError(f"{place}: {keys} must be text that is not empty" + (", in a list" if listed else ""))
    return tuple(answers)
