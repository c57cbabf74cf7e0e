"""The blocks of docs/commands.md: every command with its options, from the command line itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import typer

from limbeck.cli import app

from .table import table

GROUPS = {
    "Make it": ("new", "models", "methods", "check", "doctor"),
    "Run it": ("run", "elicit", "train", "evaluate", "compare", "cache"),
    "Look": ("watch", "report", "chat", "why", "answers", "harness"),
    "Ship": ("export", "serve", "push"),
}
EXAMPLE = "Example: "
NAMES = {int: "N", float: "NUMBER", Path: "FILE"}  # a value whose option names none, by its type


def commands() -> str:
    """All commands by what they are for: a heading, a sentence, an example and the options of each."""
    known: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    listed = [name for names in GROUPS.values() for name in names]
    if sorted(listed) != sorted(known):
        raise ValueError(f"docs/blocks/commands.py groups {sorted(listed)}; the commands are {sorted(known)}")
    parts = []
    for title, names in GROUPS.items():
        parts += [f"## {title}", *(section(name, known[name]) for name in names)]
    return "\n\n".join(parts)


def section(name: str, command: Any) -> str:
    """One command."""
    example = (command.epilog or "").removeprefix(EXAMPLE)
    parts = [f"### {name}", " ".join((command.help or "").split()), f"```\n{example}\n```"]
    rows = [row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    return "\n\n".join([*parts, table(["argument or option", "what it is"], rows)] if rows else parts)


def row(parameter: Any) -> list[str]:
    """An argument or an option: as it is written, and what its help says, with the default where that has a value."""
    words = " ".join((parameter.help or "").split())
    default = parameter.default
    if isinstance(default, int | float | str) and not isinstance(default, bool) and "Default:" not in words:
        words += f" Default: {default:g}." if isinstance(default, float) else f" Default: {default}."
    if parameter.param_type_name == "option" and parameter.required:
        words += " Required."
    return [f"`{written(parameter)}`", re.sub(r"([*<])", r"\\\1", words)]


def written(parameter: Any) -> str:
    """`--out DIR`, `--yes`, `RECIPE`, `[NAME]`."""
    metavar = parameter.metavar
    if parameter.param_type_name == "argument":
        name = metavar or parameter.name.upper()
        return name if parameter.required or name.startswith("[") else f"[{name}]"
    kind = parameter.type_descriptor.annotation
    metavar = metavar or "|".join(map(str, get_args(kind))) or NAMES.get(kind, "TEXT")
    return parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {metavar}"
