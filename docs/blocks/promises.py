"""What Limbeck promises, what proves it, and what it does not promise: from promises.yaml and the tests' marks."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .evidence import EVIDENCE

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
MARK = "promise"
KILLS = EVIDENCE / "kills.json"
SOAK = EVIDENCE / "soak.json"


def read_promises() -> list[dict[str, Any]]:
    """The groups of promises, in the order of the page."""
    groups: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return groups


def proofs(tests: Path = TESTS) -> dict[str, list[tuple[Path, str]]]:
    """(file, function) of the tests that carry each promise's name."""
    found: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for file in sorted(tests.rglob("test_*.py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                for name in _marks(function):
                    found[name].append((file, function.name))
    return dict(found)


def _marks(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{MARK}":
            yield from (ast.literal_eval(argument) for argument in decorator.args)


def promises() -> str:
    """Every promise in words, with its limits, what was measured, and the tests that prove it."""
    proved = proofs()
    parts = []
    for group in read_promises():
        parts.append(f"## {group['title']}")
        for name, entry in group["promises"].items():
            parts.append(f"### {entry['promise']}")
            parts.append(" ".join(entry["text"].split()))
            if "measured" in entry:
                parts.append(MEASURED[entry["measured"]]())
            if "not" in entry:
                parts.append(f"Not covered: {' '.join(entry['not'].split())}")
            parts.append(_proved_by(name, proved.get(name, []), entry.get("reason")))
    return "\n\n".join(parts)


def _proved_by(name: str, tests: list[tuple[Path, str]], reason: str | None) -> str:
    links = [f"[{_words(test)}](../{file.relative_to(ROOT).as_posix()})" for file, test in tests]
    said = f"Proved by: {'; '.join(links)}." if links else f"No test: {' '.join((reason or '').split())}"
    return f"{said} (`{name}`)"


def _words(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def how_many() -> str:
    """The number of promises and of the tests that prove them."""
    count = sum(len(group["promises"]) for group in read_promises())
    tests = {test for found in proofs().values() for test in found}
    return f"{count} promises, proved by {len(tests)} tests."


def kills() -> str:
    """What became of a teacher's answers under kills, from what benchmarks/kills.py wrote."""
    if not KILLS.is_file():
        return "Not measured yet: run python benchmarks/kills.py"
    found = json.loads(KILLS.read_text(encoding="utf-8"))
    return (
        f"Measured (`benchmarks/kills.py`, [kills.json](evidence/kills.json)): {found['kills']} kills at random"
        f" moments of an elicitation of {found['requests']:,} answers, {found['at_once']} at once. Stored answers lost:"
        f" {found['acknowledged_and_lost']}. Answers billed again, all under way at a kill: {found['billed_twice']}"
        f" ({found['most_allowed'] - found['requests']} could have been)."
    )


def soak() -> str:
    """What random faults did to whole runs, from what benchmarks/soak.py wrote."""
    if not SOAK.is_file():
        return "Not measured yet: run make soak"
    found = json.loads(SOAK.read_text(encoding="utf-8"))
    faults = ", ".join(f"{count} x {name}" for name, count in found["faults"].items())
    return (
        f"Measured (`make soak`, [soak.json](evidence/soak.json)): {found['minutes']:g} minutes of random faults over"
        f" {found['episodes']} runs of {len(found['recipes'])} kinds of recipe ({faults}). Runs that did not end as"
        f" their undisturbed twins, in losses and weights to the bit, in answers and in what was measured:"
        f" {len(found['broken'])}."
    )


MEASURED = {"kills": kills, "soak": soak}
