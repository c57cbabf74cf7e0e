"""Prompts: where a run's questions come from. A file of ours or the user's, one JSON object per line.

A line holds `prompt` and may hold `id`, `kind`, `answer` (a corpus) and `check` (see `verify`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.builtin import task_folders
from limbeck.elicit.verify import parse_check
from limbeck.types import Message, RecipeError, UserError, nearest

BUILTIN = "builtin/"


@dataclass(frozen=True)
class Prompt:
    """One question; `check` is None where no program can judge the answer."""

    id: str
    text: str
    kind: str = ""
    answer: str | None = None
    check: dict[str, Any] | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": self.text},)


def load_prompts(source: str, part: str = "train", path: str = "prompts.from") -> list[Prompt]:
    """The prompts of `builtin/NAME` (its training or test part) or of a JSONL file. `path` is where the recipe names it.

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
        raise UserError(f'{file} holds no prompt; write one JSON object per line, such as {{"prompt": "Why is the sky blue?"}}')
    return prompts


def _locate(source: str, part: str, path: str) -> Path:
    if source.startswith(BUILTIN):
        tasks = task_folders()
        name = source.removeprefix(BUILTIN)
        if name not in tasks:
            raise RecipeError(path, f"there are no built-in prompts {name!r}{nearest(name, tasks)}")
        return tasks[name] / f"{part}.jsonl"
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
    answer = data.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise UserError(f'{place}: "answer" must be text')
    check = data.get("check")
    if check is not None:
        parse_check(check, place)
    return Prompt(prefix + str(data.get("id", f"line-{number}")), data["prompt"], str(data.get("kind", "")), answer, check)
