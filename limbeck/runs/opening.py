"""What a run says and keeps before it begins: the devices that it takes, and what it read from the files of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from limbeck.config.machine import Machine
from limbeck.objectives.sizes import SIZES
from limbeck.progress import Reporter
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import read_json


def tell_prompts(folder: Path, notes: Sequence[str], reporter: Reporter) -> None:
    """Say what was read from each file of prompts, and keep it for the page."""
    record = {"notes": list(notes)}
    if notes and read_json(folder / "prompts.json") != record:
        write_json(folder / "prompts.json", record)
    for note in notes:
        reporter.note(note)


def settle(folder: Path, machine: Machine, facts: Mapping[str, str], reporter: Reporter) -> None:
    """Take the devices and sizes of the recipe's `machine`, say so, and record them."""
    SIZES.head_bytes = None if machine.head_mib is None else int(machine.head_mib * 2**20)
    SIZES.cache_bytes = None if machine.cache_gib is None else int(machine.cache_gib * 2**30)
    if machine.device == "auto" or len(set(facts.values())) > 1:
        teacher = "" if facts["teacher_device"] == facts["device"] else f", teachers on {facts['teacher_device']}"
        reporter.note(f"running on {facts['device']}{teacher}")
    record = {**facts, "settings": machine.model_dump(exclude_none=True)}
    if read_json(folder / "machine.json") != record:
        write_json(folder / "machine.json", record)
