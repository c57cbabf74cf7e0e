"""Templates of a recipe, filled in for samples: jinja in its immutable sandbox, in a process of its own with bounded
time, memory and output.

A template is the recipe's own text. What models wrote is only ever a value in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.elicit import render_rows
from limbeck.types import RecipeError

MAX_CHARS = 200_000  # of a text that a template gives
CPU_SECONDS = 10  # of one process
SECONDS = 120  # of the same, on a machine that does other things as well
TOGETHER = 4_000_000  # characters of values that one process is given, about


@dataclass(frozen=True)
class Rendered:
    """`names` are those that each template reads. `rows` are the texts for each row by the name of the template, or a
    plain text that says why the row has none. `printing` are the templates that do nothing with `prompt` but print
    it."""

    names: Mapping[str, frozenset[str]]
    rows: Sequence[Mapping[str, str] | str]
    printing: frozenset[str] = frozenset()


def render(templates: Mapping[str, str], rows: Sequence[Mapping[str, Any]], place: str) -> Rendered:
    """Every template with the values of every row.

    Raises:
        RecipeError: a template that is none, or that takes too much time or memory.
    """
    names: Mapping[str, frozenset[str]] = {}
    texts: list[Mapping[str, str] | str] = []
    printing: frozenset[str] = frozenset()
    for part in _parts(rows):
        answer = _run({"templates": templates, "rows": part, "most": MAX_CHARS}, place)
        if "fault" in answer:
            raise RecipeError(f"{place}.{answer['place']}", f"this is no template: {answer['fault']}")
        names = {name: frozenset(read) for name, read in answer["names"].items()}
        printing = frozenset(answer["printing"])
        texts += answer["rows"]
    return Rendered(names, texts, printing)


def _parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """The rows in parts of bounded size; one that is empty if there are none."""
    begin = size = 0
    for number, row in enumerate(rows):
        size += len(json.dumps(row))
        if size > TOGETHER and number > begin:
            yield rows[begin:number]
            begin, size = number, len(json.dumps(row))
    yield rows[begin:]


def _run(job: Mapping[str, Any], place: str) -> dict[str, Any]:
    command = [sys.executable, "-I", render_rows.__file__, str(CPU_SECONDS)]
    try:
        done = subprocess.run(  # noqa: S603 (fixed arguments)
            command, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RecipeError(place, _too_much(job)) from error
    if done.returncode:
        raise RecipeError(place, (done.stderr.strip().splitlines() or [_too_much(job)])[-1])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _too_much(job: Mapping[str, Any]) -> str:
    return (
        f"its templates take more than {CPU_SECONDS} seconds or {render_rows.MEMORY // 2**20} MiB for"
        f" {len(job['rows']):,} samples; take loops and repetitions out of them"
    )
