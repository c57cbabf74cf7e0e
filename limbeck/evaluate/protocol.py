"""What every system is measured on, and which of the records in an evaluation's folder answer just these questions."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck.data.batches import Row
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.verify import VERSION
from limbeck.evaluate.items import Item
from limbeck.evaluate.task import Task
from limbeck.storage.files import read_object, write_json
from limbeck.types import content_hash

SHOWN = 24
FILES = {  # of the records of each part of the questions; those of a task are named by it
    "held-out text": ("fidelity-*.jsonl",),
    "own text": ("own-*.jsonl", "free-*.jsonl"),
    "answers": ("answers-*.jsonl",),
    "efficiency": ("efficiency-*.json", "speeds.json"),
}


@dataclass(frozen=True)
class EvaluationProtocol:
    """What every system is measured on.

    `rows` is held-out teacher text (one row per prompt that got an answer, named by its id); all systems answer
    `prompts` greedily, and write their own text at temperature 1 to the first `own_prompts` of them.
    """

    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    tasks: Sequence[Task]
    max_tokens: int
    own_prompts: int
    seed: int = 0

    @property
    def shown(self) -> frozenset[str]:
        """The ids of the prompts whose answers the page shows in full."""
        return frozenset(prompt.id for prompt in self.prompts[:SHOWN])

    @property
    def own(self) -> Sequence[Prompt]:
        """The prompts to which every system writes its own text."""
        return self.prompts[: self.own_prompts]

    @property
    def parts(self) -> dict[str, str]:
        """A hash of the questions behind each kind of record."""
        prompts = [prompt.facts for prompt in self.prompts]
        rows = [[row.sample_id, row.prompt_ids, row.response_ids, row.teacher_prompt_ids] for row in self.rows]
        answering = [self.max_tokens, VERSION]
        parts = {
            "held-out text": [rows, sorted(self.shown)],
            "own text": [[prompt.facts for prompt in self.own], self.max_tokens, self.seed],
            "answers": [prompts, answering],
            "efficiency": [prompts[:SHOWN]],
        }
        return {part: content_hash(facts) for part, facts in parts.items()} | {
            f"task-{task.name}": content_hash([_task_facts(task), answering]) for task in self.tasks
        }

    @property
    def fingerprint(self) -> str:
        """A hash of all questions."""
        facts = {
            "prompts": [prompt.facts for prompt in self.prompts],
            "max_tokens": self.max_tokens,
            "own_prompts": self.own_prompts,
            "verdicts": VERSION,
            "tasks": [_task_facts(task) for task in self.tasks],
            "rows": [row.response_ids for row in self.rows],
            "seed": self.seed,
        }
        return content_hash(facts)


def claim(folder: Path, protocol: EvaluationProtocol) -> list[str]:
    """Remove the folder's records that answer other questions, and return which parts of the evaluation they were of; a
    kill in between leaves the rest to the next call."""
    file = folder / "protocol.json"
    before = read_object(file, "remove it, and all is measured again") if file.exists() else {}
    parts = protocol.parts
    same = before.get("hash") == protocol.fingerprint
    kept = before.get("parts", parts if same else {})
    patterns = {
        part: FILES.get(part, (f"{glob.escape(part)}+*.jsonl",))
        for part in parts
        if before and kept.get(part) != parts[part]
    }
    if before and not kept:  # of a version that did not say which questions are whose
        patterns["tasks"] = ("task-*.jsonl",)
    outdated = []
    for part, of_part in patterns.items():
        records = [record for pattern in of_part for record in folder.glob(pattern)]
        for record in records:
            record.unlink()
        outdated += [part] if records else []
    write_json(file, {"hash": protocol.fingerprint, "parts": kept | parts})
    return outdated


def _task_facts(task: Task) -> dict[str, Any]:
    items = [_facts(item) for item in task.items]
    return {"name": task.name, "metrics": task.metrics, "settings": task.settings, "items": items}


def _facts(item: Item) -> dict[str, Any]:
    return item.facts if isinstance(item, Prompt) else asdict(item)
