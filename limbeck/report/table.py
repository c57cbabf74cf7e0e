"""The result table of a run as Markdown, for a README or an issue: every value with its interval."""

from __future__ import annotations

from typing import Any

from limbeck.report.page import LABELS, METRICS


def markdown(summary: dict[str, Any]) -> str:
    """Systems by metrics; each cell is the value and its 95 % interval."""
    systems = summary["systems"]
    names = list(dict.fromkeys(metric for metrics in systems.values() for metric in metrics))
    ordered = [name for name in METRICS if name in names] + [name for name in names if name.endswith("pass_rate")]
    titles = [METRICS[name][0] if name in METRICS else name.replace("/", " ").replace("_", " ") for name in ordered]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(ordered) + 1) + "|"]
    for name, metrics in systems.items():
        cells = [_cell(metrics.get(metric)) for metric in ordered]
        lines.append(f"| {LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return ""
    value, low, high = (round(interval[key], 2) + 0.0 for key in ("value", "low", "high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
