"""Tasks asked in another way, to see how much a system's results fall: `TASK@typos`, `TASK@lower_case`,
`TASK@distraction`.

Only the question changes; choices, documents, checks and references stay. What a program must not touch stays as well:
words with digits or capitals inside, quoted text, short words. A perturbation depends on the item alone, so all systems
read the same text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from limbeck.evaluate.task import Task
from limbeck.types import RecipeError, content_hash, nearest

TYPO_SHARE = 0.3  # of the words that may have a typo
QUOTE_OR_WORD = re.compile(r"\"[^\"]*\"|[^\W\d_]+")
DISTRACTIONS = (
    "By the way, the weather has been mild this week.",
    "My neighbour bought a green bicycle last Tuesday.",
    "The library on our street closes early on Fridays.",
    "Somebody left a blue umbrella in the hallway.",
)


def typos(text: str, rng: random.Random) -> str:
    """Swaps two neighbouring inner letters in about a third of the plain words of five letters or more."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        if word.startswith('"') or len(word) < 5 or not word[1:].islower() or rng.random() >= TYPO_SHARE:
            return word
        at = rng.randrange(1, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return QUOTE_OR_WORD.sub(swap, text)


def lower_case(text: str, _: random.Random) -> str:
    """Writes plain words without capitals."""
    return QUOTE_OR_WORD.sub(
        lambda match: match[0] if match[0].startswith('"') or not match[0][1:].islower() else match[0].lower(), text
    )


def distraction(text: str, rng: random.Random) -> str:
    """Puts a sentence before the question that has nothing to do with it."""
    return f"{rng.choice(DISTRACTIONS)} {text}"


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": typos,
    "lower_case": lower_case,
    "distraction": distraction,
}


def perturbed(task: Task, how: str, path: str = "evaluate.metrics") -> Task:
    """The task `NAME@HOW`. Item i is `ID@HOW`.

    Raises:
        RecipeError: no such perturbation, or a task without questions.
    """
    if how not in PERTURBATIONS:
        raise RecipeError(path, f"{task.name}@{how}: there is no perturbation {how!r}{nearest(how, PERTURBATIONS)}")
    items = [_changed(task, item, how) for item in task.items]
    if any(item is None for item in items):
        raise RecipeError(
            path,
            f"{task.name}@{how}: a task of kind {task.kind.name} asks no question that could be put in another way",
        )
    return replace(task, name=f"{task.name}@{how}", items=tuple(items), plain=task)


def _changed(task: Task, item: Any, how: str) -> Any:
    def change(text: str) -> str:
        return PERTURBATIONS[how](text, random.Random(content_hash([item.id, text])))  # noqa: S311 (no secret)

    changed = task.kind.change_question(item, change)
    return None if changed is None else replace(changed, id=f"{item.id}@{how}")
