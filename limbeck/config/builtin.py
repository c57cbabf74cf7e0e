"""Where the data that ships with Limbeck lies: recipes, tasks and seeds, in the checkout or in the installed
package."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent.parent


def folder(kind: str) -> Path:
    """`recipes`, `tasks` or `seeds`: beside the code when installed, at the top of a checkout."""
    installed = HERE / kind
    return installed if installed.is_dir() else HERE.parent / kind


def recipe_files() -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder("recipes").glob("*.yaml"))}


def task_folders() -> dict[str, Path]:
    return {file.parent.name: file.parent for file in sorted(folder("tasks").glob("*/task.yaml"))}


def seed_files() -> dict[str, Path]:
    """What elicitation can begin from: instructions, documents, personas, topics, words, code."""
    return {file.stem: file for file in sorted(folder("seeds").glob("*.jsonl"))}
