"""A run or a comparison as plain data for programs: one dictionary, rows, or CSV."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from limbeck.config.yaml_text import read_yaml
from limbeck.report.metrics import label, metrics_of
from limbeck.report.page import is_comparison, read_comparison, read_summary, verdict_of
from limbeck.report.worth import worth

COLUMNS = ("run", "system", "label", "metric", "title", "unit", "better", "group", "value", "low", "high", "items")
RUN_KEYS = ("metrics", "systems", "paired", "recovered", "kept", "by_label", "by_field", "cautions", "warnings")
COMPARISON_KEYS = ("base", "seeds", "metrics", "systems", "paired", "recovered", "by_seed", "cost", "warnings")


def read_results(folder: Path) -> dict[str, Any]:
    """`evaluation/summary.json` of a run, or `comparison.json` of a comparison.

    Raises:
        UserError: neither is there.
    """
    return read_comparison(folder) if is_comparison(folder) else read_summary(folder)


def as_data(folder: Path) -> dict[str, Any]:
    """Verdict, systems with their metrics and intervals, differences, worth, and where the files are.

    A number that is not finite is None.

    Raises:
        UserError: the folder has no evaluation, or a damaged `prices.json`.
    """
    results = read_results(folder)
    compared = is_comparison(folder)
    keys = COMPARISON_KEYS if compared else RUN_KEYS
    data = {
        "name": results.get("name", folder.name),
        "kind": "comparison" if compared else "run",
        "verdict": verdict_of(folder, results),
        **{key: results[key] for key in keys if key in results},
        "worth": None if compared else worth(folder, results, read_recipe(folder)),
        "paths": paths(folder),
    }
    return dict(_finite(data))


def read_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run folder."""
    return dict(read_yaml(folder / "recipe.yaml"))


def paths(folder: Path) -> dict[str, str]:
    """The files of a run or a comparison that are there, by what they are."""
    found = {
        "folder": folder,
        "report": folder / "report.html",
        "summary": folder / ("comparison.json" if is_comparison(folder) else "evaluation/summary.json"),
        "items": folder / "evaluation",
        "student": folder / "student",
        "prices": folder / "prices.json",
    }
    return {name: str(path) for name, path in found.items() if path.exists()}


def rows(folder: Path) -> list[dict[str, Any]]:
    """One row per system and metric, with COLUMNS as keys; a number that is not finite is None."""
    results = read_results(folder)
    metrics = metrics_of(results)
    return [
        {
            "run": results.get("name", folder.name),
            "system": system,
            "label": label(system),
            "metric": name,
            **{key: getattr(metrics[name], key) for key in ("title", "unit", "better", "group")},
            **{key: _finite(interval.get(key)) for key in ("value", "low", "high")},
            "items": interval.get("n"),
        }
        for system, values in results["systems"].items()
        for name, interval in values.items()
        if interval
    ]


def as_csv(folder: Path) -> str:
    """`rows` as CSV (RFC 4180), with a line of names. A text that a spreadsheet would compute gets a ' before it."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows(folder):
        writer.writerow([_cell(row[column]) for column in COLUMNS])
    return written.getvalue()


def _cell(value: Any) -> Any:
    risky = isinstance(value, str) and value.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value
