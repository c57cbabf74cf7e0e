"""The result tables of a run or a comparison: as data for the page, and as Markdown for a README or an issue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.report.metrics import Metric, grouped, label, mark, metrics_of, p_text
from limbeck.report.verdict import against_base

Interval = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Systems by the metrics of one group; a cell is None where nothing was measured."""

    group: str
    metrics: list[Metric]
    rows: list[tuple[str, list[Interval | None]]]
    recovered: list[tuple[str, list[Interval | None]]]


@dataclass(frozen=True)
class Difference:
    """A paired difference with what may be said of it."""

    interval: Interval
    mark: str
    p: str


def systems_tables(summary: dict[str, Any]) -> list[Table]:
    """One table per group of metrics. `recovered` rows hold the share of the gap to the teacher that was closed."""
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
) -> tuple[list[str], list[tuple[str, list[tuple[Metric, list[Difference | None]]]]]]:
    """The columns (what each was paired with, or each method against the base) and, per group, a row per metric."""
    if "base" in summary:
        columns = against_base(summary)
        comparisons = len(against_base(summary))
    else:
        columns = {pair.removeprefix("student - "): rows for pair, rows in summary.get("paired", {}).items()}
        comparisons = 1
    metrics = [metric for name, metric in metrics_of(summary).items() if any(name in rows for rows in columns.values())]

    def cell(metric: Metric, rows: dict[str, Interval]) -> Difference | None:
        interval = rows.get(metric.name)
        if not interval:
            return None
        p = p_text(interval.get("p_holm", interval.get("p")))
        return Difference(interval, mark(metric, interval, comparisons), p)

    body = [
        (group, [(metric, [cell(metric, rows) for rows in columns.values()]) for metric in inner])
        for group, inner in grouped(metrics)
    ]
    return list(columns), body


def markdown(summary: dict[str, Any]) -> str:
    """Systems by metrics, then the paired differences; every value with its 95 % interval.

    Metrics without a better side are left out. A summary that describes its metrics gets a table per group.
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
    """Methods by metrics, then each difference to the base with its Holm-adjusted p value and whether it is clear."""
    lines = _markdown_tables(comparison)
    methods, body = paired_table(comparison)
    rows = [row for _, inner in body for row in inner if row[0].better != "none"]
    if rows:
        names = [_plain(name) for name in methods]
        lines += ["", f"Difference to {_plain(comparison['base'])} on the same answers:", ""]
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
    kept = [(table.group, [metric for metric in table.metrics if metric.better != "none"]) for table in tables]
    kept = [(group, metrics) for group, metrics in kept if metrics]
    if "metrics" not in summary:
        kept = [("", [metric for _, metrics in kept for metric in metrics])]
    lines: list[str] = []
    for group, metrics in kept:
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
    """A metric's title, with its group where another group has a metric of that title."""
    title = metrics[name].title
    group = metrics[name].group
    shared = any(other.title == title and other.name != name for other in metrics.values())
    return f"{title} ({group[:1].lower()}{group[1:]})" if shared else title


def _plain(text: str) -> str:
    """Text that stays in its cell and makes no markup: a model's or a user's name may hold any sign."""
    inert = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{sign}" if sign in "\\|`*_[]" else sign for sign in inert)


def _cell(interval: Interval | None) -> str:
    if not interval:
        return ""
    if abs(interval["value"]) >= 1000:
        return f"{interval['value']:,.0f} ({interval['low']:,.0f} to {interval['high']:,.0f})"
    value, low, high = (round(interval[key], 2) + 0.0 for key in ("value", "low", "high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _signed(x: Interval) -> str:
    return f"{x['value']:+.3f} ({x['low']:+.3f} to {x['high']:+.3f})"
