"""What a figure rests on (items, seeds, steps), and in plain sentences what that can't bear.

The sentences and counts go into the summary; the words of a verdict follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.config.significance import CLEAR_ITEMS, LEAST_SEEDS, LEAST_STEPS
from limbeck.evaluate.task import Task

FEW = "an interval from so few is too narrow, so no difference on them is clear"


def basis(tasks: Sequence[Task], *, held_out: int, seeds: Sequence[int], steps: int | None) -> dict[str, Any]:
    """The counts that a summary's figures rest on, and `cautions`, the sentences that follow from them.

    Args:
        held_out: how many held-out answers were measured on.
        seeds: of the trainings.
        steps: updates of the student's training, None if that is not known.
    """
    items = {"held_out": held_out} | {task.name: len(task.items) for task in tasks}
    facts: dict[str, Any] = {"items": items, "seeds": list(seeds)}
    if steps is not None:
        facts["steps"] = steps
    return facts | {"cautions": [*_of_limits(tasks), *_of_items(items), *_of_training(len(seeds), steps)]}


def _of_limits(tasks: Sequence[Task]) -> list[str]:
    return [
        f"{task.name} was measured on {len(task.items):,} of its {task.available:,} items."
        for task in tasks
        if len(task.items) < task.available
    ]


def _of_items(items: Mapping[str, int]) -> list[str]:
    few = {name: count for name, count in items.items() if 0 < count < CLEAR_ITEMS}
    if not few:
        return []
    counted = ", ".join(f"{name.replace('_', '-')}: {count}" for name, count in few.items())
    return [f"Fewer than {CLEAR_ITEMS} items ({counted}): {FEW}."]


def _of_training(seeds: int, steps: int | None) -> list[str]:
    sentences = []
    if seeds < LEAST_SEEDS:
        sentences.append(
            "One training run (one seed): the intervals hold for this one training run, not for the method; `limbeck"
            " compare --seeds 3` trains more."
        )
    if steps is not None and steps < LEAST_STEPS:
        sentences.append(
            f"The student was trained for {steps} step{'s' if steps > 1 else ''}: in fewer than {LEAST_STEPS} it has"
            " hardly left its start, and a comparison says little about a longer training."
        )
    return sentences


def task_facts(task: Task) -> dict[str, Any]:
    """How a task was asked, and on how many of its items."""
    return {
        "version": task.version,
        "kind": task.kind.name,
        "items": len(task.items),
        "of": max(len(task.items), task.available),
        "settings": task.settings,
    }
