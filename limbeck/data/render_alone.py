"""A process of its own that renders what a user wrote, in jinja's immutable sandbox and in bounded time and memory: a
recipe's templates for many samples (`elicit/rendering.py`), or a chat template once (`models/template_names.py`).

The file runs by itself: it imports nothing of Limbeck.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

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
MESSAGES = ({"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."})


class Done(NamedTuple):
    """What became of a job: whether it was done, its result, and why it was not, where that is known."""

    ok: bool
    result: str
    fault: str


def render_alone(job: Mapping[str, Any], cpu_seconds: int, seconds: float) -> Done | None:
    """Do a job in a process of its own: `{"templates": ..., "rows": ..., "most": ...}`, whose result is JSON, or
    `{"chat": TEMPLATE}`, which gives nothing. None if it takes more than `seconds`."""
    command = [sys.executable, "-I", __file__, str(cpu_seconds)]
    try:
        done = subprocess.run(  # noqa: S603 (fixed arguments)
            command, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None
    return Done(done.returncode == 0, done.stdout, (done.stderr.strip().splitlines() or [""])[-1])


def main() -> None:
    """Do the job on standard input. The argument is the number of seconds that this may take."""
    _bound(int(sys.argv[1]))
    job = json.load(sys.stdin)
    if "chat" in job:
        _render_chat(job["chat"])
        return
    try:
        json.dump(_answer(job), sys.stdout)
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
            if _only_prints(environment.parse(source), "prompt"):
                printing.append(place)
            names[place] = sorted(_names(environment.parse(source)))
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


def _names(tree: nodes.Template) -> set[str]:
    """The names that a template reads. `row` is the prompt's row in its file: its columns are `row.NAME` each, and
    `row` itself is among the names only where it is read otherwise."""
    names = meta.find_undeclared_variables(tree) - set(GLOBALS)
    if "row" not in names:
        return names
    columns = set()
    gets: list[nodes.Getattr | nodes.Getitem] = [*tree.find_all(nodes.Getattr), *tree.find_all(nodes.Getitem)]
    for node in gets:
        if not (isinstance(node.node, nodes.Name) and node.node.name == "row"):
            continue
        name = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if isinstance(name, str):
            columns.add(name)
            node.node.name = ""  # read so; what is left is read otherwise
    whole = any(node.name == "row" for node in tree.find_all(nodes.Name))
    return (names if whole else names - {"row"}) | {f"row.{column}" for column in columns}


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


def _render_chat(text: str) -> None:
    """Render a chat template for two short conversations; a fault is one line on standard error. What it gives is not
    read."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda _: "26 Jul 2024"}
    text = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)  # transformers' own tag
    try:
        template = environment.from_string(text)
    except TemplateError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for messages, answer in ((MESSAGES[:1], True), (MESSAGES, False)):
        shown = [dict(message) for message in messages]
        try:
            template.render(messages=shown, add_generation_prompt=answer, bos_token="", eos_token="")
        except (MemoryError, RecursionError, OverflowError) as error:
            sys.exit(f"{type(error).__name__} {error}")
        except Exception:  # noqa: BLE001, S112 (it may refuse this conversation; only its bounds are looked at here)
            continue


def _refuse(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
