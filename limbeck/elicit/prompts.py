"""Prompts: the questions of a run, from a built-in file or the user's, one JSON object per line.

A line has `prompt` and may have `id`, `kind`, `answer` or `answers` (a corpus: one answer, or several, the best first),
`chosen` and `rejected` (the same for two), `task` and `weight` (for losses on one task, and for tokens that count
more), `check` (see `verify`), and `feedback` (on an earlier answer, for a teacher that is shown it).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck.config.builtin import seed_files, task_folders
from limbeck.elicit.verify import parse_check
from limbeck.types import Message, RecipeError, UserError, content_hash, nearest

BUILTIN = "builtin/"
HELD_OUT_SHARE = 0.1  # of a user's own file
LISTS = (("answers",), ("references",))  # the items of a task call their right answers "references"


@dataclass(frozen=True)
class Prompt:
    """One question. `check` is None if no program can judge the answer; `before` is the conversation that comes before
    it."""

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
        """As plain data, to be hashed and stored."""
        facts = asdict(self)
        return facts if self.before else {name: value for name, value in facts.items() if name != "before"}


def load_prompts(source: str, part: str = "train", path: str = "prompts.from") -> list[Prompt]:
    """The prompts of `builtin/NAME` (seeds, or a task's training or test part) or of a JSONL file.

    Args:
        path: where the recipe names the source, for error messages.

    Raises:
        UserError: the source does not exist or is empty, or a line, named by its number, is malformed.
    """
    file = _locate(source, part, path)
    prefix = f"{source.removeprefix(BUILTIN)}/" if source.startswith(BUILTIN) else ""
    prompts: list[Prompt] = []
    ids: set[str] = set()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _prompt(line, f"{file}, line {number}", number, prefix)
        if prompt.id in ids:
            raise UserError(f"{file}, line {number}: the id {prompt.id!r} is used twice")
        ids.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise UserError(
            f'{file} has no prompt; write one JSON object per line, such as {{"prompt": "Why is the sky blue?"}}'
        )
    return prompts


def split_prompts(
    source: str, limit: int | None, evaluate_source: str | None, evaluate_limit: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), without a common text.

    Built-in prompts come with a held-out part. Of a user's own file about a tenth is held out (by a hash of the text,
    so that a prompt stays held out when lines are added), unless `evaluate_source` names another file.

    Raises:
        RecipeError: one of the two is empty, or a held-out prompt is among the training prompts.
    """
    training = load_prompts(source)
    if evaluate_source is not None:
        held_out = load_prompts(evaluate_source, part="test", path="evaluate.prompts")
    elif source.startswith(BUILTIN):
        held_out = load_prompts(source, part="test")
    else:
        held_out = [prompt for prompt in training if _is_held_out(prompt)]
        training = [prompt for prompt in training if not _is_held_out(prompt)]
    training = training[:limit]
    held_out = held_out[:evaluate_limit]
    for part, path in ((training, "prompts"), (held_out, "evaluate.prompts")):
        if not part:
            raise RecipeError(
                path, "no prompt is left for this part; give more prompts, or a file under evaluate.prompts"
            )
    if both := {prompt.text for prompt in training} & {prompt.text for prompt in held_out}:
        raise RecipeError(
            "evaluate.prompts", f"{len(both)} held-out prompts are training prompts too, such as {min(both)!r}"
        )
    return training, held_out


def _is_held_out(prompt: Prompt) -> bool:
    return int(content_hash(prompt.text)[:8], 16) < HELD_OUT_SHARE * 16**8


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
            trainable = [task for task, folder in tasks.items() if (folder / "train.jsonl").is_file()]
            raise RecipeError(
                path, f"the task {name} has no training prompts, only test ones; take {' or '.join(trainable)}"
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
    feedback = data.get("feedback", "")
    if not isinstance(feedback, str):
        raise UserError(f'{place}: "feedback" must be text')
    return Prompt(
        id=prefix + str(data.get("id", f"line-{number}")),
        text=data["prompt"],
        kind=str(data.get("kind", "")),
        answers=_answers(data, place),
        check=check,
        task=str(data.get("task", "")),
        weight=float(weight),
        feedback=feedback,
    )


def _answers(data: dict[str, Any], place: str) -> tuple[str, ...]:
    """The corpus's answers, the best first."""
    forms = (*LISTS, ("answer",), ("chosen", "rejected"))
    used = [keys for keys in forms if any(data.get(key) is not None for key in keys)]
    if len(used) > 1:
        raise UserError(f'{place}: give one of "answer", "answers" (or "references"), or "chosen" with "rejected"')
    if not used:
        return ()
    is_list = used[0] in LISTS
    answers = data[used[0][0]] if is_list else [data.get(key) for key in used[0]]
    is_text = isinstance(answers, list) and all(isinstance(answer, str) and answer.strip() for answer in answers)
    if not is_text or not answers:
        keys = " and ".join(f'"{key}"' for key in used[0])
        raise UserError(f"{place}: {keys} must be text that is not empty" + (", in a list" if is_list else ""))
    return tuple(answers)
