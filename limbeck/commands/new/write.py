"""The folder that `limbeck new` writes: a recipe with comments, its prompts and tasks; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.commands.new.draft import Draft, TaskDraft, block, inline, sizes, token_count
from limbeck.commands.new.server import server_lines
from limbeck.commands.new.split import SEED
from limbeck.commands.new.student import context_of, learning_rate
from limbeck.commands.new.wishes import INSTRUCTED_APART, Wishes
from limbeck.config.recipe import load_recipe
from limbeck.storage.files import new_directory, write_text
from limbeck.types import UserError

QUICK = 60  # training texts, and QUICK_ITEMS of the evaluation
QUICK_ITEMS = 30
VERSION = "1.0"
QUICK_WORDS = "a few texts, to see that all works (--scale full takes all)"


def write(draft: Draft, wishes: Wishes, data: Path) -> None:
    """Write the folder, after its recipe was resolved as `limbeck check` does.

    Raises:
        UserError: the folder is there, the recipe can't be run, or thinking has no room.
    """
    from limbeck.runs.resolve import resolve

    _check_thinking(draft, wishes)
    if wishes.folder.exists():
        raise UserError(f"{wishes.folder} exists already, and nothing is overwritten; give another name")
    with new_directory(wishes.folder) as folder:
        write_text(folder / "train.jsonl", _lines(draft.training))
        write_text(folder / "held-out.jsonl", _lines(draft.held_out))
        for name, task in draft.tasks.items():
            (folder / name).mkdir()
            write_text(folder / name / "items.jsonl", _lines(_numbered(task.items)))
            write_text(folder / name / "task.yaml", _task_yaml(f"{wishes.name}-{name}", task))
        write_text(folder / "recipe.yaml", recipe_yaml(draft, wishes, data, folder))
        resolve(load_recipe(folder / "recipe.yaml"))
        write_text(folder / "recipe.yaml", recipe_yaml(draft, wishes, data, wishes.folder))


def _check_thinking(draft: Draft, wishes: Wishes) -> None:
    """Refuse thinking that has no room beside a prompt: the student's context bounds what both are asked."""
    if not wishes.thought:
        return
    longest = max((token_count(_lines([row])) for row in (*draft.training, *draft.held_out)), default=0)
    if draft.max_tokens + longest > (context := context_of(wishes)):
        raise UserError(
            f"--thinking keep: {draft.max_tokens:,} tokens of an answer and its thinking and {longest:,.0f} of a prompt"
            f" are more than the {context:,} that {wishes.student} can read; take --thinking off, or another --student"
        )


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _numbered(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{"id": f"item-{number}", **item} for number, item in enumerate(items, 1)]


def _task_yaml(name: str, task: TaskDraft) -> str:
    lines = [
        f"name: {name}",
        f'version: "{VERSION}"   # give a changed task another one',
        f"kind: {task.kind}",
        f"description: {inline(task.description)}",
        "test: items.jsonl",
        f"metrics: [{', '.join(task.metrics)}]   # the first is the headline",
        *(["settings:"] if task.settings else []),
        *(
            f"  {key}: {block(value, 4) if key == 'template' else inline(value)}"
            for key, value in task.settings.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def recipe_yaml(draft: Draft, wishes: Wishes, data: Path, folder: Path) -> str:
    """The recipe, its paths in `folder`."""
    quick = wishes.scale == "quick"
    used = min(len(draft.training), QUICK) if quick else len(draft.training)
    length = sizes(draft, wishes, used)
    rate = draft.lr or learning_rate(wishes)
    limit = f", limit: {QUICK}" if quick and used < len(draft.training) else ""
    head = [
        *(line for about in draft.about for line in about.split("\n")),
        f"Made by `limbeck new` from {data.name if data.name.isprintable() else ascii(data.name)}."
        " Paths start in the folder in which limbeck is called.",
        f"Sizes: {QUICK_WORDS if quick else 'all texts'}.",
    ]
    parts = [
        *(f"# {line}" for line in head),
        f"name: {inline(wishes.name)}",
        f"title: {inline(draft.title)}",
        *_teacher(wishes),
        *_student(draft, wishes),
        f"prompts: {{from: {inline(str(folder / 'train.jsonl'))}{limit}}}   # {len(draft.training):,} texts"
        + (f", of which {used} are used" if limit else ""),
        draft.text.rstrip("\n"),
        "train:",
        f"  epochs: {length.epochs}   # passes over the text: about {length.steps:,} updates",
        f"  tokens_per_step: {length.tokens_per_step}   # answers' tokens of one update: about"
        f" {max(1, round(length.tokens_per_step / draft.answer_tokens)):,} answers",
        f"  lr: {rate}   # halve it if the loss jumps; double it if the student learns too little",
        *(["  turns: all   # every answer, not the last alone"] if draft.answers_each > 1 else []),
        f"  seed: {SEED}",
        *_precision(wishes),
        *_evaluate(draft, wishes, folder),
        *_machine(wishes),
    ]
    return "\n".join(parts) + "\n"


def _student(draft: Draft, wishes: Wishes) -> list[str]:
    if not wishes.lora:
        return [f"student: {{start: {draft.start}}}"]
    base = ", base: bfloat16" if wishes.on_gpu else ""
    return [
        "student:",
        f"  start: {draft.start}",
        f"  lora: {{rank: 16, alpha: 32{base}}}   # adapters are trained, and merged on export",
    ]


def _precision(wishes: Wishes) -> list[str]:
    if wishes.on_gpu:
        return ["  precision: bfloat16   # of the student's passes; its weights stay in float32"]
    from limbeck.models import placement  # imports torch

    if placement.multiplies_in_bfloat16():
        return [
            "  precision: bfloat16   # of the student's passes; leave it out where the processor has no such products"
        ]
    return []


def _teacher(wishes: Wishes) -> list[str]:
    if not wishes.has_teacher:
        return [f"teacher: {inline(wishes.student)}   # asked nothing: only what the student is measured against"]
    apart = wishes.instruction if wishes.task in INSTRUCTED_APART else ""
    context = [f"  context: {{system: {inline(apart)}}}   # the teacher alone sees it"] if apart else []
    why = "a larger one answers better: a folder, a hub id, a server"
    if wishes.is_served:
        return ["teacher:", *context, *server_lines(wishes)]
    dtype = "bfloat16" if wishes.on_gpu else ""
    if not context:
        name = inline(wishes.teacher)
        return [f"teacher: {f'{{model: {name}, dtype: {dtype}}}' if dtype else name}   # {why}"]
    return [
        "teacher:",
        f"  model: {inline(wishes.teacher)}   # {why}",
        *([f"  dtype: {dtype}"] if dtype else []),
        *context,
    ]


def _evaluate(draft: Draft, wishes: Wishes, folder: Path) -> list[str]:
    quick = wishes.scale == "quick"
    tasks = [inline(str(folder / name)) for name in draft.tasks]
    metrics = ["fidelity", *(f"{{{name}: {{limit: {QUICK_ITEMS}}}}}" if quick else name for name in tasks)]
    gold = wishes.has_teacher and not quick and all("answer" in row for row in draft.training)
    plain = "cross_entropy" in draft.text
    controls = ["untouched", *([] if plain else ["sft_control"]), *(["gold_control"] if gold else [])]
    why = "the student before training"
    why += "" if plain else "; fine-tuned on the same text"
    why += "; trained on the data's own answers" if gold else ""
    limit = QUICK_ITEMS if quick else draft.measured
    whole = "; a task is measured whole" if tasks and not quick else ""
    judged = wishes.is_served and wishes.task in ("chat", "tools")
    return [
        "evaluate:",
        f"  metrics: [{', '.join(metrics)}]   # look at {_headline(draft, wishes)}",
        f"  prompts: {inline(str(folder / 'held-out.jsonl'))}   # {_held_out(wishes)}",
        f"  limit: {limit}   # of these prompts at most{whole}",
        f"  max_tokens: {draft.max_tokens}",
        f"  controls: [{', '.join(controls)}]   # {why}",
        *(["  # judge: NAME   # a strong model compares their answers (docs/evaluation.md)"] if judged else []),
    ]


def _held_out(wishes: Wishes) -> str:
    return "fidelity: how near it is to the teacher on these" if wishes.has_teacher else "fidelity: on these answers"


def _headline(draft: Draft, wishes: Wishes) -> str:
    return f"{wishes.name}-{draft.headline}" if draft.headline.startswith("task/") else draft.headline


def _machine(wishes: Wishes) -> list[str]:
    if not wishes.on_gpu:
        return ["machine: {device: auto}   # a CUDA device if there is one, else the CPU"]
    like = "" if wishes.run_on == "gpu" else f"; estimate with --device-like {wishes.run_on}"
    return [f"machine: {{device: cuda}}   # sizes follow from its memory{like}"]
