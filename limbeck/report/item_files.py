"""The records of single items in a run's `evaluation/`: what was asked, and what each system answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.storage.files import read_jsonl

Record = dict[str, Any]
HELD_OUT = ""  # stands for the held-out prompts, where a task's name is asked for


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
