"""The blocks of docs/python.md: the public functions and results, from their signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import limbeck

from .table import table

FUNCTIONS = ("load_recipe", "check", "run", "compare", "load_run", "load_model", "divergence", "methods")
RESULTS = ("RunResult", "ComparisonResult")
IN_PROSE = {"Recipe", "PrintingReporter", "StoppedError", "RecipeError", "UserError"}
WIDTH = 100  # of a signature in one line
SECTION = re.compile(r"\n+(Args|Raises):\n")
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)


def functions() -> str:
    """Every public function: its signature, what it does, its arguments and errors."""
    if missing := set(limbeck.__all__) ^ {*FUNCTIONS, *RESULTS, *IN_PROSE}:
        raise ValueError(f"docs/blocks/api.py and limbeck.__all__ differ in {sorted(missing)}")
    return "\n\n".join(described(name, getattr(limbeck, name)) for name in FUNCTIONS)


def results() -> str:
    """What a result has."""
    parts = []
    for name in RESULTS:
        kind = getattr(limbeck, name)
        rows = [[f"`{shown}`", f"`{gives}`", words] for shown, gives, words in members(kind)]
        parts += [f"### {name}", one_line(SECTION.split(inspect.getdoc(kind) or "")[0])]
        parts += [table(["member", "type", "what it is"], rows)]
    return "\n\n".join(parts)


def described(name: str, function: Callable[..., Any]) -> str:
    about, *rest = SECTION.split(inspect.getdoc(function) or "")
    parts = [f"### {name}", f"```python\n{signature(name, function)}\n```", one_line(about)]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        names = ENTRY.split("\n" + body)[1:]
        lines = [f"- `{key}`: {one_line(text)}" for key, text in zip(names[::2], names[1::2], strict=True)]
        parts += ["Raises:" if title == "Raises" else "Arguments:", "\n".join(lines)]
    return "\n\n".join(parts)


def signature(name: str, function: Callable[..., Any]) -> str:
    """The signature, an argument a line where it is long."""
    found = inspect.signature(function)
    given = [argument(parameter) for parameter in found.parameters.values()]
    alone = [place for place, each in enumerate(found.parameters.values()) if each.kind is each.KEYWORD_ONLY]
    if alone:
        given.insert(alone[0], "*")
    gives = f" -> {plain(found.return_annotation)}: ..."
    line = f"def {name}({', '.join(given)}){gives}"
    return line if len(line) <= WIDTH else f"def {name}(\n" + "".join(f"    {each},\n" for each in given) + f"){gives}"


def argument(parameter: inspect.Parameter) -> str:
    default = parameter.default
    shown = f"{'**' if parameter.kind is parameter.VAR_KEYWORD else ''}{parameter.name}"
    shown += f": {plain(parameter.annotation)}"
    if default is parameter.empty:
        return shown
    if callable(default):
        return f"{shown} = lambda: False"
    return f"{shown} = {default!r}".replace("'", '"')


def members(kind: Any) -> list[tuple[str, str, str]]:
    """(name, type, what it is) of the public members that a class defines itself."""
    found = [
        (name, plain(kind.__annotations__[name]), "Where the run is.") for name in vars(kind).get("__annotations__", {})
    ]
    for name, member in vars(kind).items():
        if name.startswith("_") or not (isinstance(member, property) or callable(member)):
            continue
        function = member.fget if isinstance(member, property) else member
        gives = plain(inspect.signature(function).return_annotation)
        words = one_line(SECTION.split(inspect.getdoc(function) or "")[0])
        given = [parameter.name for parameter in list(inspect.signature(function).parameters.values())[1:]]
        found.append((name if isinstance(member, property) else f"{name}({', '.join(given)})", gives, words))
    return found


def plain(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def one_line(text: str) -> str:
    return " ".join(text.split())
