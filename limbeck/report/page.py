"""Write a self-contained HTML page about a run or a comparison: no network access, every text escaped.

Reads files only; imports nothing that trains. Text that a model or a user wrote enters the page in three ways only:
escaped by the template engine, escaped by the SVG serialiser, or as JSON that the script shows as text. The page's
security policy allows only the script and the style sheet of this folder, by their hashes. Without scripts, the page
still has the tables, the plots and the first answers.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from limbeck.report.compare import comparison_content
from limbeck.report.excerpt import Excerpt, embedded
from limbeck.report.metrics import number, percent, signed
from limbeck.report.rounds import rounds_content, rounds_verdict
from limbeck.report.run import run_content
from limbeck.report.verdict import compare_verdict, leaks_left_out, verdict
from limbeck.storage.evaluation import check_records
from limbeck.storage.files import read_from, read_object, write_bytes
from limbeck.storage.rounds import has_rounds
from limbeck.types import UserError

__all__ = [
    "compare_verdict",
    "is_comparison",
    "read_comparison",
    "read_summary",
    "verdict",
    "verdict_of",
    "write_report",
]

HERE = Path(__file__).parent
MAX_LEAKS = 50


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a run, of a run in rounds, or of a comparison (a folder with a
    `comparison.json`).

    Raises:
        UserError: the folder has no evaluation.
    """
    with read_from(folder):
        try:
            page = _page(folder)
        except UndefinedError as error:
            raise LookupError(str(error)) from error
    write_bytes(folder / "report.html", page.encode(errors="replace"))
    return folder / "report.html"


def _page(folder: Path) -> str:
    if is_comparison(folder):
        comparison = read_comparison(folder)
        return _render("compare.html.jinja", comparison_content(folder, comparison), comparison)
    if has_rounds(folder):
        return _render("rounds.html.jinja", rounds_content(folder), read_summary(folder))
    summary = read_summary(folder)
    return _render("run.html.jinja", run_content(folder, summary), summary)


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison, rather than a run."""
    return (folder / "comparison.json").exists()


def verdict_of(folder: Path, results: dict[str, Any]) -> str:
    """The verdict on the results of a run or a comparison (see `data.read_results`)."""
    if has_rounds(folder):
        return rounds_verdict(folder)
    return compare_verdict(results) if is_comparison(folder) else verdict(results)


def read_summary(folder: Path) -> dict[str, Any]:
    """Read `evaluation/summary.json` of a run folder.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    file = folder / "evaluation" / "summary.json"
    if not file.exists():
        raise UserError(f"{folder} has no evaluation/summary.json: run `limbeck evaluate` first")
    check_records(file.parent)
    return read_object(file, "remove it, and `limbeck evaluate` writes it again")


def read_comparison(folder: Path) -> dict[str, Any]:
    """Read `comparison.json` of a comparison folder.

    Raises:
        UserError: there is none.
    """
    file = folder / "comparison.json"
    if not file.exists():
        raise UserError(f"{folder} has no comparison.json: run `limbeck compare` first")
    return read_object(file, "remove it, and `limbeck compare` writes it again")


def _render(template: str, content: dict[str, Any], summary: dict[str, Any]) -> str:
    style = (HERE / "page.css").read_text()
    script = (HERE / "page.js").read_text()
    leaks = summary.get("leaks") or []
    excerpt = content["excerpt"]
    return (
        _templates()
        .get_template(template)
        .render(
            **content,
            style=style,
            script=script,
            policy=_policy(style, script),
            leaks=leaks[:MAX_LEAKS],
            leaks_in_all=len(leaks),
            leaks_left_out=leaks_left_out(leaks),
            warnings=summary.get("warnings") or [],
            cautions=summary.get("cautions") or [],
            data=embedded(_data(excerpt, content)) if excerpt else "",
            first=excerpt.first(content["shown"]) if excerpt else [],
        )
    )


@cache
def _templates() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _minus(number), "signed": _minus(signed), "percent": percent, "span": _span}
    return environment


def _minus(write: Callable[[float], str]) -> Callable[[float], str]:
    """Write numbers with a true minus sign."""
    return lambda value: write(value).replace("-", "−")


def _span(interval: dict[str, float]) -> str:
    """An interval as "low–high", or as "low to high" if a minus sign could be mistaken for the dash."""
    low, high = (_minus(number)(interval[side]) for side in ("low", "high"))
    return f"{low} to {high}" if interval["low"] < 0 else f"{low}–{high}"


def _policy(style: str, script: str) -> str:
    """The content security policy: only this script and this style sheet, and no HTML from strings."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _data(excerpt: Excerpt, content: dict[str, Any]) -> dict[str, Any]:
    """The data for the script: the excerpt, and which systems to show first."""
    systems = [
        {"label": content["names"].get(name, name), "shown": name in content["shown"]} for name in excerpt.systems
    ]
    subject = excerpt.systems.index(content["subject"]) if content["subject"] in excerpt.systems else 0
    teacher = excerpt.systems.index("teacher") if "teacher" in excerpt.systems else -1
    return {"systems": systems, "subject": subject, "teacher": teacher, "items": excerpt.items}
