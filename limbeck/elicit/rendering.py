"""Templates of a recipe, filled in for samples: jinja in its immutable sandbox, in a process of its own with bounded
time, memory and output.

A template is the recipe's own text. What models wrote is only ever a value in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from limbeck.data.render_alone import MEMORY, render_alone
from limbeck.types import RecipeError

MAX_CHARS = 200_000  # of a text that a template gives
CPU_SECONDS = 10  # of one process
SECONDS = 120  # of the same, on a machine that does other things as well
TOGETHER = 4_000_000  # characters of values that one process is given, about


@dataclass(frozen=True)
class Rendered:
    """`names` are those that each template reads, columns of the prompt's row as `row.NAME`. `rows` are the texts for
    each row by the name of the template, or a plain text that says why the row has none. `printing` are the templates
    that do nothing with `prompt` but print it."""

    names: Mapping[str, frozenset[str]]
    rows: Sequence[Mapping[str, str] | str]
    printing: frozenset[str] = frozenset()


def names_read(templates: Mapping[str, str], place: str) -> Mapping[str, frozenset[str]]:
    """The names that each template reads (see `Rendered`).

    Raises:
        RecipeError: a template that is none.
    """
    return _names_read(tuple(templates.items()), place)


@cache
def _names_read(templates: tuple[tuple[str, str], ...], place: str) -> Mapping[str, frozenset[str]]:
    return render(dict(templates), (), place).names


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
    done = render_alone(job, CPU_SECONDS, SECONDS)
    if done is None or not done.ok:
        raise RecipeError(place, (done and done.fault) or _too_much(job))
    answer: dict[str, Any] = json.loads(done.result)
    return answer


def _too_much(job: Mapping[str, Any]) -> str:
    return (
        f"its templates take more than {CPU_SECONDS} seconds or {MEMORY // 2**20} MiB for"
        f" {len(job['rows']):,} samples; take loops and repetitions out of them"
    )
