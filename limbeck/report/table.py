"""The result table of a run as Markdown, for a README or an issue: every value with its interval."""

from __future__ import annotations

from typing import Any

from limbeck.report.page import LABELS, METRICS


def markdown(summary: dict[str, Any]) -> str:
    """Systems by metrics, then the paired differences; every value stands with its 95 % interval."""
    systems = summary["systems"]
    names = list(dict.fromkeys(metric for metrics in systems.values() for metric in metrics))
    ordered = [name for name in METRICS if name in names] + [name for name in names if name.endswith("pass_rate")]
    lines = ["| | " + " | ".join(map(_title, ordered)) + " |", "|---" * (len(ordered) + 1) + "|"]
    for name, metrics in systems.items():
        cells = [_cell(metrics.get(metric)) for metric in ordered]
        lines.append(f"| {LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    for pair, differences in summary["paired"].items():
        against = pair.removeprefix("student - ")
        parts = [f"{_title(name)} {x['value']:+.3f} ({x['low']:+.3f} to {x['high']:+.3f})" for name, x in differences.items()]
        lines += ["", f"Student minus {LABELS.get(against, against).lower()}, answer by answer: {'; '.join(parts)}."]
    return "\n".join(lines) + "\n"


def _title(metric: str) -> str:
    named = METRICS.get(metric)
    return named[0] if named else {"nll": "Negative log-likelihood"}.get(metric, metric.replace("/", " ").replace("_", " "))


def _cell(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return ""
    value, low, high = (round(interval[key], 2) + 0.0 for key in ("value", "low", "high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
