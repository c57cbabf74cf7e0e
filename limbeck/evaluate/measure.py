"""Measure several systems on the same held-out text and questions; keep every item, then sum up.

Writes `fidelity.jsonl` and `answers-SYSTEM.jsonl` (one record per item), `lens.jsonl` and, last, `summary.json`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.data import Row
from limbeck.durable import read_jsonl, write_json, write_text
from limbeck.elicit.prompts import Prompt
from limbeck.evaluate import tasks
from limbeck.evaluate.fidelity import ItemFidelity, fidelity, summarise
from limbeck.evaluate.statistics import paired_difference
from limbeck.evaluate.tasks import Answer, Task
from limbeck.models.load import Model
from limbeck.models.teacher import InProcessTeacher
from limbeck.types import canonical_json

SHOWN = 24
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class System:
    name: str
    model: Model


def measure(
    folder: Path,
    systems: Sequence[System],
    teacher: InProcessTeacher,
    rows: Sequence[Row],
    prompt_of: dict[str, str],
    prompts: Sequence[Prompt],
    task_list: Sequence[Task],
    max_tokens: int,
    facts: dict[str, Any],
    progress: Progress = lambda done, total, detail: None,
) -> dict[str, Any]:
    """Every system's fidelity and task results, with intervals and paired differences.

    Args:
        folder: where records and summary are written.
        systems: the teacher first, the student last.
        rows: held-out teacher text, one row per prompt that got a non-empty answer.
        prompt_of: the prompt's id for every row's sample id.
        prompts: the held-out prompts; every system answers them and the tasks' own.
        facts: what else the summary should hold: recipe hash, names, how the text was drawn.
    """
    models = {system.name: system.model for system in systems}
    found = fidelity(models, teacher, rows, lambda done, total: progress(done, total, "fidelity on held-out text"))
    records = [
        {"system": name, "prompt_id": prompt_of[item.sample_id], "tokens": item.tokens, "sums": item.sums}
        for name, items in found.items()
        for item in items
    ]
    write_text(folder / "fidelity.jsonl", "".join(canonical_json(record) + "\n" for record in records))
    summaries: dict[str, dict[str, Any]] = {name: summarise(items) for name, items in found.items()}
    asked = list({prompt.id: prompt for prompt in [*prompts, *(p for task in task_list for p in task.prompts)]}.values())
    answers = {system.name: _answers(folder, system, asked, max_tokens, progress) for system in systems}
    texts = [{"prompt_id": prompt.id, "kind": prompt.kind, "prompt": prompt.text} for prompt in prompts]
    write_text(folder / "prompts.jsonl", "".join(canonical_json(record) + "\n" for record in texts))
    student = systems[-1]
    shown = {prompt.id for prompt in prompts[:SHOWN]}
    lens = [_lens("teacher", prompt_of[item.sample_id], item, student.model) for item in found[student.name]]
    lens += _lens_of_own_answers(student.model, teacher, prompts[:SHOWN], answers[student.name])
    write_text(folder / "lens.jsonl", "".join(canonical_json(r) + "\n" for r in lens if r["prompt_id"] in shown))
    for task in task_list:
        for name, given in answers.items():
            summaries[name] |= tasks.summarise(task, given)
    summary = {
        **facts,
        "systems": summaries,
        "paired": _paired(found, answers, task_list),
        "tasks": {task.name: {"version": task.version, "decoding": "greedy", "max_tokens": max_tokens} for task in task_list},
        "sizes": {system.name: _size(system.model) for system in systems},
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    write_json(folder / "summary.json", summary)
    return summary


def _answers(folder: Path, system: System, prompts: Sequence[Prompt], max_tokens: int, progress: Progress) -> list[Answer]:
    """The system's answers, generated unless its whole file is there from an earlier call."""
    file = folder / f"answers-{system.name}.jsonl"
    known = [Answer(**record) for record in read_jsonl(file)]
    if [answer.prompt_id for answer in known] != [prompt.id for prompt in prompts]:
        known = tasks.answer_all(system.model, prompts, max_tokens, lambda done, total: progress(done, total, f"answers of {system.name}"))
        write_text(file, "".join(canonical_json(vars(answer)) + "\n" for answer in known))
    return known


def _lens_of_own_answers(
    student: Model, teacher: InProcessTeacher, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[dict[str, Any]]:
    """Where the student leaves the teacher on text that the student itself wrote."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=False):
        ids = student.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        if ids:
            rows.append(Row(prompt.id, tuple(student.prompt_ids(prompt.messages)), tuple(ids)))
    items = fidelity({"student": student}, teacher, rows)["student"] if rows else []
    return [_lens("student", item.sample_id, item, student) for item in items]


def _lens(writer: str, prompt_id: str, item: ItemFidelity, student: Model) -> dict[str, Any]:
    """Tokens as text with the divergence at each: [text, nats, teacher's top choice, student's top choice]."""
    decode = student.tokenizer.decode
    tokens = [[decode([t]), nats, decode([a]), decode([b])] for t, nats, a, b in item.lens]
    return {"writer": writer, "prompt_id": prompt_id, "tokens": tokens}


def _paired(found: dict[str, list[ItemFidelity]], answers: dict[str, list[Answer]], task_list: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """student minus each control on the same items; for divergences below 0 favours the student."""
    pairs: dict[str, dict[str, Any]] = {}
    student = found["student"]
    tokens = [item.tokens for item in student]
    for name, items in found.items():
        if name in ("student", "teacher"):
            continue
        differences = {
            metric: paired_difference([a.sums[key] for a in student], [b.sums[key] for b in items], tokens).as_dict()
            for metric, key in (("forward_kl", "forward_kl"), ("reverse_kl", "reverse_kl"), ("jsd", "jsd"),
                                ("top1_agreement", "top1"), ("nll", "nll"))
        }  # fmt: skip
        for task in task_list:
            own = {prompt.id for prompt in task.prompts}
            pairs_of_answers = zip(answers["student"], answers[name], strict=True)
            both = [(a, b) for a, b in pairs_of_answers if a.passed is not None and a.prompt_id in own]
            if both:
                first, second = ([float(bool(answer.passed)) for answer in side] for side in zip(*both, strict=True))
                differences[f"{task.name}/{task.metric}"] = paired_difference(first, second, [1.0] * len(both)).as_dict()
        pairs[f"student - {name}"] = differences
    return pairs


def _size(model: Model) -> dict[str, int]:
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    return {"layers": model.net.config.num_hidden_layers, "parameters": parameters}
