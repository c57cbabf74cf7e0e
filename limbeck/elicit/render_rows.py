"""A process of its own that renders a recipe's templates for many samples, in bounded time and memory (see
`rendering`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    TemplateRuntimeError,
    TemplateSyntaxError,
    Undefined,
    meta,
    nodes,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30
GLOBALS = ("range", "dict", "namespace")
RANDOM = ("random",)  # filters that would give another prompt, and other request keys, every time
FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)  # of a row

REWRITES = (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)  # what is printed in them


def main() -> None:
    """Read `{"templates": ..., "rows": ..., "most": ...}` from standard input and write what they give as JSON. The
    argument is the number of seconds that this may take."""
    _bound(int(sys.argv[1]))
    try:
        json.dump(_answer(json.load(sys.stdin)), sys.stdout)
    except (MemoryError, RecursionError):
        sys.exit(1)


def _bound(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on every system; the time is then bounded from outside alone
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    environment = _environment()
    templates, names, printing = {}, {}, []
    for place, source in job["templates"].items():
        try:
            tree = environment.parse(source)
            names[place] = sorted(meta.find_undeclared_variables(tree) - set(GLOBALS))
            if _only_prints(tree, "prompt"):
                printing.append(place)
            templates[place] = environment.from_string(source)
        except TemplateSyntaxError as error:
            return {"place": place, "fault": f"line {error.lineno}: {error.message}"}
    rows = [_row(templates, row, job["most"]) for row in job["rows"]]
    return {"names": names, "rows": rows, "printing": printing}


def _only_prints(tree: nodes.Template, name: str) -> bool:
    """Whether a template does nothing with this value but print it, so that any other would stand there, too."""
    if next(tree.find_all(REWRITES), None) is not None:
        return False
    read = sum(node.name == name for node in tree.find_all(nodes.Name))
    printed = sum(
        isinstance(child, nodes.Name) and child.name == name
        for output in tree.find_all(nodes.Output)
        for child in output.nodes
    )
    return bool(read == printed)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals = {name: environment.globals[name] for name in GLOBALS}
    environment.filters = {name: make for name, make in environment.filters.items() if name not in RANDOM}
    environment.filters["tojson"] = _as_json
    return environment


def _plain(value: Any) -> str:
    """What `{{ value }}` prints: text as it is, anything else as JSON."""
    return str(value) if isinstance(value, str | Undefined) else _as_json(value)


def _as_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except TypeError:
        raise TypeError(f"a {type(value).__name__} can't be printed; a list of texts can, with | join(', ')") from None


def _row(templates: Mapping[str, Template], row: Mapping[str, Any], most: int) -> dict[str, str] | str:
    """The text of every template; or, as a plain text, why there is none."""
    try:
        return {place: _text(template, row, most) for place, template in templates.items()}
    except FAULTS as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _text(template: Template, row: Mapping[str, Any], most: int) -> str:
    pieces = []
    size = 0
    for piece in template.generate(row):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise TemplateRuntimeError(f"it gives more than {most:,} characters")
    return "".join(pieces).strip()


if __name__ == "__main__":
    main()
