"""Reads a run folder as it grows: the steps of its trainings, while another process may be writing them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from limbeck.storage.files import check_regular, content_of

Record = dict[str, Any]


class Metrics:
    """A `metrics.jsonl` that another process appends to, and rewrites when a training resumes from a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self._file = -1
        self._offset = 0

    def update(self) -> list[Record]:
        """All records in the file now. Only what is new is read, up to the last complete line."""
        check_regular(self.path)
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self.records = []
            self._offset = 0
            return self.records
        with file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._file or facts.st_size < self._offset:
                self.records = []
                self._file = facts.st_ino
                self._offset = 0
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.records += [record for line in whole.splitlines() if (record := _record(line)) is not None]
        return self.records


def _record(line: bytes) -> Record | None:
    """The record of a step, or None for a line that is none (damaged or truncated)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def steps_made(folder: Path) -> int | None:
    """The updates of the training in this folder; None without a record of any."""
    records = Metrics(folder / "metrics.jsonl").update()
    return int(records[-1]["step"]) if records else None


def trainings(folder: Path) -> dict[str, Path]:
    """The folder of every training that has started, by name: the student's first, then its controls'."""
    controls = folder / "controls"
    folders = {"student": folder} | {
        path.name: path for path in (sorted(controls.iterdir()) if controls.is_dir() else [])
    }
    return {name: path for name, path in folders.items() if (path / "metrics.jsonl").exists()}


def evaluation(folder: Path) -> dict[str, dict[str, float]]:
    """The measured values of every system by metric; empty before the evaluation."""
    summary = read_json(folder / "evaluation" / "summary.json")
    systems = summary.get("systems", {}) if summary else {}
    return {
        name: {metric: interval["value"] for metric, interval in metrics.items() if is_number(interval.get("value"))}
        for name, metrics in systems.items()
    }


def read_json(file: Path) -> Record | None:
    """The object in a JSON file; None if there is no file, or no object in it."""
    try:
        value = json.loads(content_of(file))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def rollout_of(record: Mapping[str, Any]) -> Record:
    """The part of a step's record about the text that the student wrote; empty if it wrote none."""
    part = record.get("rollout")
    return part if isinstance(part, dict) else {}


def mean_of(records: Sequence[Mapping[str, Any]], fact: str) -> float | None:
    """The mean of a fact about the student's text over the steps that have it; None if none has."""
    values = [value for record in records if is_number(value := rollout_of(record).get(fact))]
    return sum(values) / len(values) if values else None


def writing_share(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The share (0 to 1) of these steps' time that the student spent writing; None if no time was recorded."""
    timed = [record for record in records if is_number(record.get("seconds"))]
    total = sum(record["seconds"] for record in timed)
    writing = [seconds for record in timed if is_number(seconds := rollout_of(record).get("seconds"))]
    return sum(writing) / total if total > 0 else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value read from a file is a finite number, as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an int that no float can hold
        return False


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one step by name, without those that are not finite.

    loss and `terms/NAME` in nats per response token (or per the term's own unit), `scheduled/NAME`, lr, grad_norm,
    memory_mib, device_memory_mib, and tokens_per_second over all tokens of the step, prompts and padding included.
    """
    values = {name: record.get(name) for name in ("loss", "lr", "grad_norm", "memory_mib", "device_memory_mib")}
    for group in ("terms", "scheduled"):
        part = record.get(group)
        values |= {f"{group}/{name}": value for name, value in part.items()} if isinstance(part, dict) else {}
    tokens = record.get("tokens")
    seconds = record.get("seconds")
    if is_number(tokens) and is_number(seconds) and seconds:
        values["tokens_per_second"] = tokens / seconds
    return {name: float(value) for name, value in values.items() if value is not None and is_number(value)}
