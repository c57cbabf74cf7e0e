"""A run's evaluation: what is asked of its systems, and the summary that its page is made from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from limbeck.config.recipe import Recipe
from limbeck.data.batches import Row
from limbeck.elicit.training_text import TrainingText
from limbeck.evaluate.fidelity import by_class
from limbeck.evaluate.judge import MAX_TOKENS, kept_verdicts, summarise_verdicts
from limbeck.evaluate.leak import Leak, find_leaks
from limbeck.evaluate.measure import Bench, Measured, Protocol
from limbeck.evaluate.summary import by_kind, recovery, summarise, warnings
from limbeck.models.model import Model
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs import build
from limbeck.storage.files import write_json
from limbeck.types import UserError

OWN_PROMPTS = 24
LEAK_KINDS = ("exact", "contained", "overlap", "same_but_for_numbers")  # the strongest first
Progress = Callable[[int, int, str], None]


def bench(
    recipe: Recipe,
    folder: Path,
    teacher: InProcessTeacher | None,
    reader: Model,
    text: TrainingText,
    rows: Sequence[Row],
    progress: Progress,
) -> Bench:
    """Where systems are measured: on the held-out prompts and tasks, without those that the training text gives away.

    Args:
        teacher: None where its weights are not here.
        reader: in whose tokens the rows are.
        rows: held-out teacher text, one row per answered prompt, named by its prompt's id.
    """
    leaked = {leak.item for leak in leaks(recipe, text) if leak.kind != "same_but_for_numbers"}
    first = {prompt.text: prompt.id for prompt in reversed(text.prompts[1])}  # a text that stands twice is one item
    prompts = [prompt for prompt in text.prompts[1] if prompt.id not in leaked and first[prompt.text] == prompt.id]
    kept = [row for row in rows if row.sample_id in {prompt.id for prompt in prompts}]
    if not kept:
        raise UserError(
            "no held-out answer is left to measure on: the training text holds all held-out prompts; give others in"
            " evaluate.prompts"
        )
    own = recipe.evaluate.own_prompts or OWN_PROMPTS
    tasks = [
        replace(task, items=tuple(item for item in task.items if item.id.partition("@")[0] not in leaked))
        for task in build.tasks(recipe)
    ]
    return Bench(
        folder,
        teacher,
        reader,
        Protocol(kept, prompts, tasks, recipe.evaluate.max_tokens, own, recipe.text_seed),
        progress,
    )


def leaks(recipe: Recipe, text: TrainingText) -> list[Leak]:
    """Held-out prompts and task items that stand in the training text: per item the strongest leak, with one text that
    shows it."""
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


def write_summary(
    recipe: Recipe, bench: Bench, text: TrainingText, systems: dict[str, list[Measured]]
) -> dict[str, Any]:
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
    summary["warnings"] += teacher_warnings(recipe, text)
    if recipe.evaluate.judge is not None:
        summary["judge"] = judged(recipe.evaluate.judge, bench, {name: seeds[0] for name, seeds in systems.items()})
        summary["warnings"] += judge_warnings(summary["judge"])
    write_json(bench.folder / "summary.json", summary)
    return summary


def judged(source: str, bench: Bench, systems: Mapping[str, Measured]) -> dict[str, Any]:
    """What a judge says of the student's greedy answers against those of each control and of the teacher.

    `judge-SYSTEM.jsonl` holds every verdict, written once. The judge is loaded where one is missing; where it is the
    teacher, there is no second copy of it.
    """
    teacher = (
        None if bench.teacher is None else bench.teacher.model.with_context(None)
    )  # a judge is shown the pair alone
    identity = build.judge_identity(source)
    is_teacher = teacher is not None and _weights(identity) == _weights(teacher.identity)
    load = cache(lambda: teacher if is_teacher and teacher is not None else build.judge(source))
    answers = {name: {answer.prompt_id: answer.text for answer in one.answers} for name, one in systems.items()}
    pairs = {}
    for name in sorted((name for name in systems if name != "student"), key=lambda name: name == "teacher"):
        file = bench.folder / f"judge-{name}.jsonl"
        told = partial(_told, bench.progress, f"the judge: student and {name}")
        verdicts = kept_verdicts(file, load, identity, bench.protocol.prompts, answers["student"], answers[name], told)
        pairs[f"student - {name}"] = summarise_verdicts(verdicts, is_teacher)
    return {"model": identity, "max_tokens": MAX_TOKENS, "pairs": pairs}


def _weights(identity: str) -> str:
    """The part of an identity that names the weights: a copy in another folder is the same model."""
    return identity.rpartition("@")[2]


def _told(progress: Progress, detail: str, done: int, total: int) -> None:
    progress(done, total, detail)


def judge_warnings(found: dict[str, Any]) -> list[str]:
    """What a reader should know before believing the judge."""
    pairs = found["pairs"]
    told = []
    if any(pair["judge_is_teacher"] for pair in pairs.values()):
        told.append(
            "The judge is the teacher itself: it may favour its own manner of writing, and whoever writes like it."
        )
    mute = [name.removeprefix("student - ") for name, pair in pairs.items() if (pair["unparsable_share"] or 0) > 0.5]
    if mute:
        told.append(
            f"More than half of what the judge says of the student against {', '.join(mute)} can't be read: this model"
            " can't judge; name another in evaluate.judge."
        )
    if left_out := sum(pair["outcomes"]["too_long"] for pair in pairs.values()):
        every = sum(sum(pair["outcomes"].values()) for pair in pairs.values())
        told.append(f"The judge's context has no room for {left_out} of {every} pairs of answers, which were left out.")
    return told


def teacher_warnings(recipe: Recipe, text: TrainingText) -> list[str]:
    """What to know of a teacher that is shown more than the students, or is the student itself, before believing its
    figures."""
    found = []
    context = recipe.teacher.context
    server = recipe.teacher.server
    if server is not None and recipe.teacher.model is None:
        found.append(
            f"The teacher, {server.name}, is behind a server and gives text alone: how near a student's distribution is"
            " to its own is not known; perplexity is how likely the student finds the teacher's held-out text."
        )
    elif build.other_tokens(recipe):
        found.append(
            "Teacher and student have other tokens, so they are compared by their text: perplexity is how likely the"
            " student finds the teacher's held-out text, in its own tokens."
        )
    elif server is not None:
        found.append(
            f"The teacher's text was written by {server.name} behind a server; what is measured as the teacher here,"
            f" its distribution and its answers, is {recipe.teacher.model} in process."
        )
    for name in context.reads if context else []:
        known = [prompt.answers if name == "answer" else prompt.feedback for prompt in text.prompts[1]]
        having = sum(map(bool, known))
        found.append(
            f"The teacher was shown the {name} of {having} of {len(text.prompts[1])} held-out prompts: there its"
            " figures are no ceiling that a student could reach, and shares of its lead mean little."
        )
    if recipe.teacher.weights != "own":
        found.append(
            "The teacher measured here has the start's weights; while training it had the student's own"
            f" ({recipe.teacher.weights})."
        )
    return found


def bill(recipe: Recipe, text: TrainingText) -> dict[str, Any]:
    """What the teacher's server was paid for, where there is one: answers, tokens, and by the recipe's price money."""
    if recipe.teacher.server is None:
        return {}
    answers, read, written = text.bill()
    found: dict[str, Any] = {"answers": answers, "tokens_read": read, "tokens_written": written}
    if (money := text.money()) is not None:
        found["money"] = money
    return {"bill": found}


def facts(recipe: Recipe, bench: Bench, text: TrainingText) -> dict[str, Any]:
    """How the figures came about: held-out text, tasks with their settings, leaks, machine."""
    tasks = bench.protocol.tasks
    rows = bench.protocol.rows
    ends = bench.reader.eos_ids
    return bill(recipe, text) | {
        "held_out": (
            text.facts() | {"answers": len(rows), "cut_off": sum(row.response_ids[-1] not in ends for row in rows)}
        ),
        "own_text": {
            "prompts": bench.protocol.own_prompts,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": recipe.evaluate.max_tokens,
        },
        "tasks": {task.name: {"version": task.version, "kind": task.kind, "settings": task.settings} for task in tasks},
        "leaks": [vars(leak) for leak in leaks(recipe, text)],
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }
