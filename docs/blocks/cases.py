"""The case studies' tables, from what `make case-intents`, `case-names` and `case-maths` wrote into docs/evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from limbeck.report.metrics import label

from .evidence import EVIDENCE
from .table import table

STUDENTS = {"full": "all weights", "adapters": "adapters"}


def case_intents() -> str:
    """Shares of right labels: the students see the text alone, the teacher its question."""
    return _case("case-intents", {"pass_rate": "right labels"})


def case_names() -> str:
    return _case("case-names", {"pass_rate": "all five fields right"})


def case_maths() -> str:
    """Shares of right results, and the tokens that they took."""
    return _case("case-maths", {"pass_rate": "right results", "tokens": "tokens of an answer"})


def _case(name: str, metrics: Mapping[str, str]) -> str:
    """A table of systems on the task."""
    file = EVIDENCE / f"{name}.json"
    if not file.is_file():
        return f"Not measured yet: `make {name} DATA=...`."
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for student, of in found["students"].items():
        for system, values in of["systems"].items():
            shared = system in ("teacher", "untouched")
            if shared and student != next(iter(found["students"])):
                continue
            title = label(system) if shared else f"{label(system)}, {STUDENTS[student]}"
            plain = [_cell(values.get(f"made-task/{metric}")) for metric in metrics]
            rows.append([title, *plain, *_speed(of, system)])
    titles = ["system", *metrics.values(), "first token", "tokens a second"]
    verdicts = [f"{STUDENTS[student].capitalize()}: {of['verdict']}" for student, of in found["students"].items()]
    minutes = ", ".join(f"{STUDENTS[name]} {seconds / 60:.0f}" for name, seconds in found["seconds"].items())
    notes = f"Teacher: {found['teacher']}. Minutes from data to page (if it was killed, since it went on)"
    notes += (
        f"; the second student took over the answers: {minutes}." if len(found["students"]) > 1 else f": {minutes}."
    )
    steps = next(iter(found["students"].values())).get("steps")
    if steps:
        notes += (
            " Steps: " + "; ".join(f"{step['step']} {step['taken']:,} to {step['given']:,}" for step in steps) + "."
        )
    return "\n\n".join([table(titles, rows), *verdicts, notes])


def _cell(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{interval['value']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def _speed(of: Mapping[str, Any], system: str) -> tuple[str, str]:
    facts = of["efficiency"].get(system, {})
    first, rate = facts.get("first_token_ms"), facts.get("decode_tokens_per_second")
    return "" if first is None else f"{first:.0f} ms", "" if rate is None else f"{rate:.0f}"
