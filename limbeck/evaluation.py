"""A run's evaluation: what is asked of its systems, and the summary that its page is made from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck import build
from limbeck.data import Row
from limbeck.durable import write_json
from limbeck.evaluate.fidelity import by_class
from limbeck.evaluate.leak import Leak, find_leaks
from limbeck.evaluate.measure import Bench, Measured, Protocol
from limbeck.evaluate.summary import by_kind, recovery, summarise, warnings
from limbeck.models.teacher import InProcessTeacher
from limbeck.recipe import Recipe
from limbeck.text import Text
from limbeck.types import UserError

OWN_PROMPTS = 24
LEAK_KINDS = ("exact", "contained", "overlap", "same_but_for_numbers")  # the strongest first
Progress = Callable[[int, int, str], None]


def bench(recipe: Recipe, folder: Path, teacher: InProcessTeacher, text: Text, rows: Sequence[Row], progress: Progress) -> Bench:
    """Where systems are measured: on the held-out prompts and tasks, without those that the training text gives away.

    Args:
        rows: held-out teacher text, one row per answered prompt, named by its prompt's id.
    """
    leaked = {leak.item for leak in leaks(recipe, text) if leak.kind != "same_but_for_numbers"}
    first = {prompt.text: prompt.id for prompt in reversed(text.prompts[1])}  # a text that stands twice is one item
    prompts = [prompt for prompt in text.prompts[1] if prompt.id not in leaked and first[prompt.text] == prompt.id]
    kept = [row for row in rows if row.sample_id in {prompt.id for prompt in prompts}]
    if not kept:
        raise UserError(
            "no held-out answer is left to measure on: the training text holds all held-out prompts; give others in evaluate.prompts"
        )
    own = recipe.evaluate.own_prompts or OWN_PROMPTS
    tasks = [
        replace(task, items=tuple(item for item in task.items if item.id.partition("@")[0] not in leaked)) for task in build.tasks(recipe)
    ]
    return Bench(folder, teacher, Protocol(kept, prompts, tasks, recipe.evaluate.max_tokens, own, recipe.text_seed), progress)


def leaks(recipe: Recipe, text: Text) -> list[Leak]:
    """Held-out prompts and task items that stand in the training text: per item the strongest leak, with one text that shows it."""
    training = [(prompt.id, prompt.text) for prompt in text.prompts[0]]
    training += [(sample.id, sample.messages[-1]["content"]) for sample in text.training()]
    if "gold_control" in recipe.evaluate.controls:
        training += [(prompt.id, answer) for prompt in text.prompts[0] for answer in prompt.answers]
    items = {(prompt.id, prompt.text) for prompt in text.prompts[1]}
    items |= {pair for task in build.tasks(recipe) if "@" not in task.name for pair in task.texts}
    found: dict[str, Leak] = {}
    for leak in find_leaks(training, sorted(items)):
        if leak.item not in found or LEAK_KINDS.index(leak.kind) < LEAK_KINDS.index(found[leak.item].kind):
            found[leak.item] = leak
    return list(found.values())


def write_summary(recipe: Recipe, bench: Bench, text: Text, systems: dict[str, list[Measured]]) -> dict[str, Any]:
    """`summary.json` of a run: the teacher first, the student last."""
    tasks = bench.protocol.tasks
    against = [name for name in systems if name not in ("teacher", "student")]
    summary = {
        "name": recipe.name,
        "recipe": recipe.hash,
        "controls": against,
        **summarise(systems, tasks, [("student", name) for name in against]),
        **facts(recipe, bench, text),
    }
    if "untouched" in systems:
        summary["recovered"] = recovery(systems["student"], systems["untouched"], systems["teacher"], tasks)
    summary["by_kind"] = by_kind(systems, {prompt.id: prompt.kind for prompt in bench.protocol.prompts}, tasks)
    summary["by_token_class"] = by_class(systems["student"][0].fidelity)
    summary["warnings"] = warnings(systems, summary, ["student"])
    write_json(bench.folder / "summary.json", summary)
    return summary


def facts(recipe: Recipe, bench: Bench, text: Text) -> dict[str, Any]:
    """How the figures came about: held-out text, tasks with their settings, leaks, machine."""
    tasks, rows, ends = bench.protocol.tasks, bench.protocol.rows, bench.teacher.model.eos_ids
    return {
        "held_out": text.facts() | {"answers": len(rows), "cut_off": sum(row.response_ids[-1] not in ends for row in rows)},
        "own_text": {"prompts": bench.protocol.own_prompts, "temperature": 1.0, "top_p": 1.0, "max_tokens": recipe.evaluate.max_tokens},
        "tasks": {task.name: {"version": task.version, "kind": task.kind, "settings": task.settings} for task in tasks},
        "leaks": [vars(leak) for leak in leaks(recipe, text)],
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
