"""The records of single items in a run's `evaluation/`: what was asked, and what each system answered."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from limbeck.storage.files import read_jsonl

Record = dict[str, Any]
HELD_OUT = ""  # stands for the held-out prompts, where a task's name is asked for
SUMS = {  # the quantity whose sum over tokens a metric is the mean of, where that has another name
    "top1_agreement": "top1",
    "top5_overlap": "top5",
    "perplexity": "nll",
    "teacher_perplexity": "teacher_nll",
}
K = TypeVar("K", bound=Hashable)


def item_files(folder: Path) -> dict[tuple[str, str], Path]:
    """{(TASK, SYSTEM): file} of a folder `evaluation`; TASK is HELD_OUT for the greedy answers to held-out prompts."""
    files = {(HELD_OUT, file.stem.removeprefix("answers-")): file for file in sorted(folder.glob("answers-*.jsonl"))}
    for file in sorted(folder.glob("task-*.jsonl")):
        task, _, system = file.stem.removeprefix("task-").rpartition("+")
        files[task, system] = file
    return files


def task_records(folder: Path, task: str, system: str) -> list[Record]:
    """A system's results on a task's items, in the order of the items; empty where there are none."""
    file = item_files(folder).get((task, system))
    return read_jsonl(file) if file else []


def over_common_items(systems: Mapping[K, tuple[Path, str]], metric: str) -> dict[K, float]:
    """A metric of systems that were measured apart, over the items that all of them have. Empty where they have the
    same, so that it is what their summaries say, or none in common, or the metric is no mean over items.

    Args:
        systems: a folder `evaluation`, and the system's name there.
    """
    tables = {key: _by_item(folder, system, metric) for key, (folder, system) in systems.items()}
    sets = [table.keys() for table in tables.values()]
    common = set[str]().union(*sets).intersection(*sets)
    if not common or all(len(items) == len(common) for items in sets):
        return {}
    sums = {key: [math.fsum(table[item][side] for item in common) for side in (0, 1)] for key, table in tables.items()}
    if any(weight <= 0 for _, weight in sums.values()):
        return {}
    means = {key: value / weight for key, (value, weight) in sums.items()}
    if metric.endswith("perplexity"):
        return {key: math.exp(min(nats, 700.0)) for key, nats in means.items()}
    return means


def _by_item(folder: Path, system: str, metric: str) -> dict[str, tuple[float, float]]:
    """The value and the weight of every item that has them."""
    task, _, own = metric.rpartition("/")
    if task:
        records = [record for record in task_records(folder, task, system) if own in record["scores"]]
        return {of["item"]: (of["scores"][own], of.get("weights", {}).get(own, 1.0)) for of in records}
    file = folder / f"{'own' if metric.startswith('own_') else 'fidelity'}-{system}.jsonl"
    plain = metric.removeprefix("own_")
    found = {}
    for record in read_jsonl(file):
        sums = record.get("sums", {})
        if (name := SUMS.get(plain, plain)) in sums:
            found[record["prompt_id"]] = (float(sums[name]), float(record["tokens"]))
        elif plain != metric and record.get(plain) is not None:
            found[record["prompt_id"]] = (float(record[plain]), 1.0)
    return found


def questions(folder: Path) -> dict[str, Record]:
    """The text, and the right answer where it is a text, of every task's item by its id."""
    return {record["item"]: record for record in read_jsonl(folder / "questions.jsonl")}


def all_items(folder: Path, systems: list[str]) -> Iterator[Record]:
    """Every record of these systems with `system`, `task` ("" for held-out prompts), `item` and what was asked in
    `prompt`."""
    asked = questions(folder)
    prompts = {record["prompt_id"]: record for record in read_jsonl(folder / "prompts.jsonl")}
    for (task, system), file in item_files(folder).items():
        for record in read_jsonl(file) if system in systems else ():
            ident = record.get("item", record.get("prompt_id", ""))
            text = asked.get(ident, {}).get("text", prompts.get(ident, {}).get("prompt", ""))
            yield {"system": system, "task": task, **record, "item": ident, "prompt": text}
