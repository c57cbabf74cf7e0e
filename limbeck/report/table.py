"""The result tables of a run or a comparison: as data for the page, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.report.metrics import Metric, fixed, grouped, label, mark, metrics_of, p_text
from limbeck.report.verdict import against_base

Interval = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Systems by the metrics of one group. A cell is None if nothing was measured."""

    group: str
    metrics: list[Metric]
    rows: list[tuple[str, list[Interval | None]]]
    recovered: list[tuple[str, list[Interval | None]]]


@dataclass(frozen=True)
class DifferenceCell:
    """A paired difference with its mark (see `metrics.mark`) and p value as text."""

    interval: Interval
    mark: str
    p: str


def systems_tables(summary: dict[str, Any]) -> list[Table]:
    """One table per group of metrics. Rows in `recovered` are the share of the gap to the teacher that was closed."""
    metrics = metrics_of(summary)
    measured = {name for values in summary["systems"].values() for name in values}
    recovered = summary.get("recovered") or {}
    by_method = recovered if "base" in summary else {"student": recovered}
    tables = []
    for group, columns in grouped(metric for name, metric in metrics.items() if name in measured):
        rows = [(name, [values.get(metric.name) for metric in columns]) for name, values in summary["systems"].items()]
        shares = [(name, [values.get(metric.name) for metric in columns]) for name, values in by_method.items()]
        tables.append(Table(group, columns, rows, [row for row in shares if any(row[1])]))
    return tables


def paired_table(
    summary: dict[str, Any],
) -> tuple[list[str], list[tuple[str, list[tuple[Metric, list[DifferenceCell | None]]]]]]:
    """The columns (each control, or each method against the base) and, per group, a row per metric."""
    if "base" in summary:
        columns = against_base(summary)
        comparisons = len(against_base(summary))
    else:
        columns = {pair.removeprefix("student - "): rows for pair, rows in summary.get("paired", {}).items()}
        comparisons = 1
    metrics = [metric for name, metric in metrics_of(summary).items() if any(name in rows for rows in columns.values())]

    def cell(metric: Metric, rows: dict[str, Interval]) -> DifferenceCell | None:
        interval = rows.get(metric.name)
        if not interval:
            return None
        p = p_text(interval.get("p_holm", interval.get("p")))
        return DifferenceCell(interval, mark(metric, interval, comparisons), p)

    body = [
        (group, [(metric, [cell(metric, rows) for rows in columns.values()]) for metric in inner])
        for group, inner in grouped(metrics)
    ]
    return list(columns), body


def markdown(summary: dict[str, Any]) -> str:
    """A run as Markdown: systems by metrics, then the paired differences, all with 95 % intervals.

    Metrics without a better direction are left out. A summary that describes its metrics gets a table per group.
    """
    lines = _markdown_tables(summary)
    metrics = metrics_of(summary)
    for pair, differences in summary.get("paired", {}).items():
        against = _plain(label(pair.removeprefix("student - ")).lower())
        parts = [
            f"{_plain(_unique(metrics, name))} {_signed(x)}"
            for name, x in differences.items()
            if metrics[name].better != "none"
        ]
        lines += ["", f"Student minus {against}, answer by answer: {'; '.join(parts)}."]
    return "\n".join(lines) + "\n"


def compare_markdown(comparison: dict[str, Any]) -> str:
    """A comparison as Markdown: methods by metrics, then each difference from the base with its adjusted p value."""
    lines = _markdown_tables(comparison)
    methods, body = paired_table(comparison)
    rows = [row for _, inner in body for row in inner if row[0].better != "none"]
    if rows:
        names = [_plain(name) for name in methods]
        lines += ["", f"Difference from {_plain(comparison['base'])} on the same answers:", ""]
        lines += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for metric, cells in rows:
            shown = [
                "" if cell is None else f"{_signed(cell.interval)}, {', '.join(filter(None, (cell.p, cell.mark)))}"
                for cell in cells
            ]
            lines.append(f"| {_plain(_unique(metrics_of(comparison), metric.name))} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _markdown_tables(summary: dict[str, Any]) -> list[str]:
    tables = systems_tables(summary)
    groups = [(table.group, [metric for metric in table.metrics if metric.better != "none"]) for table in tables]
    groups = [(group, metrics) for group, metrics in groups if metrics]
    if "metrics" not in summary:
        groups = [("", [metric for _, metrics in groups for metric in metrics])]
    lines: list[str] = []
    for group, metrics in groups:
        lines += ([""] if lines else []) + ([f"**{_plain(group)}**", ""] if group else [])
        lines += [
            "| | " + " | ".join(_plain(metric.title) for metric in metrics) + " |",
            "|---" * (len(metrics) + 1) + "|",
        ]
        for name, values in summary["systems"].items():
            cells = [_cell(values.get(metric.name)) for metric in metrics]
            lines.append(f"| {_plain(label(name))} | {' | '.join(cells)} |")
    return lines


def _unique(metrics: dict[str, Metric], name: str) -> str:
    """A metric's title, with its group if another metric has the same title."""
    title = metrics[name].title
    group = metrics[name].group
    shared = any(other.title == title and other.name != name for other in metrics.values())
    return f"{title} ({group[:1].lower()}{group[1:]})" if shared else title


def _plain(text: str) -> str:
    """Escape text for a Markdown table: a model's or a user's name may contain any character."""
    inert = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\|`*_[]" else character for character in inert)


def _cell(interval: Interval | None) -> str:
    if not interval:
        return ""
    if abs(interval["value"]) >= 1000:
        return f"{interval['value']:,.0f} ({interval['low']:,.0f} to {interval['high']:,.0f})"
    return _spread(interval, 2)


def _signed(x: Interval) -> str:
    return _spread(x, 3, "+")


def _spread(x: Interval, decimals: int, sign: str = "") -> str:
    value, low, high = (fixed(x[key], decimals, sign) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
