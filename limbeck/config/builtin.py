"""The files that ship with Limbeck: recipes, tasks, seeds and machines, in a checkout or in the installed package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def folder(kind: str) -> Path:
    """The folder of such files, named as they are: in the package when installed, else at the top of a checkout."""
    installed = PACKAGE / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def recipe_files() -> dict[str, Path]:
    """The built-in recipes by name."""
    return {file.stem: file for file in sorted(folder("recipes").glob("*.yaml"))}


def evidence_file() -> Path:
    """What every built-in recipe did when it last ran on real weights; `make evidence-recipes` writes it."""
    return folder("recipes") / "evidence.json"


def task_folders() -> dict[str, Path]:
    """The built-in tasks by name."""
    return {file.parent.name: file.parent for file in sorted(folder("tasks").glob("*/task.yaml"))}


def seed_files() -> dict[str, Path]:
    """The seeds for elicitation by name: instructions, documents, personas, topics, words, code."""
    return {file.stem: file for file in sorted(folder("seeds").glob("*.jsonl"))}


def machine_files() -> dict[str, Path]:
    """Machine files by name: hardware that `limbeck check --machine` predicts for."""
    return {file.stem: file for file in sorted(folder("machines").glob("*.yaml"))}
