"""The text tables of a report: size and speed, cost, results by kind of prompt and of token, methods, seeds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.report.figures import trainings_of
from limbeck.report.metrics import Metric, headline, label, metrics_of, number, percent
from limbeck.storage.files import read_jsonl
from limbeck.storage.metrics_log import writing_share

MEASURES = {
    "layers": ("Layers", "", 1),
    "parameters": ("Parameters", "millions", 1e-6),
    "bytes": ("Weights", "MiB", 2**-20),
    "prefill_tokens_per_second": ("Reading", "tokens per second", 1.0),
    "decode_tokens_per_second": ("Writing", "tokens per second", 1.0),
    "first_token_ms": ("First token", "milliseconds", 1.0),
    "peak_memory_mib": ("Peak memory", "MiB", 1.0),
}
SPENT = {
    "teacher_tokens": ("Teacher tokens", "written for training", 1),
    "trained_tokens": ("Trained tokens", "", 1),
    "steps": ("Steps", "", 1),
    "seconds": ("Minutes", "of training", 1 / 60),
    "writing_share": ("Writing time", "% of training", 100.0),
    "peak_memory_mib": ("Peak memory", "MiB", 1.0),
}
WORDING = {
    "distinct_1": ("Distinct words", "% of all", 100.0),
    "distinct_2": ("Distinct pairs", "% of all", 100.0),
    "self_bleu": ("Self-BLEU", "0 to 1, lower is more varied", 1.0),
}
MAX_KINDS = 40


@dataclass(frozen=True)
class Grid:
    """A table of text: (title, unit) per column, (label, cells) per row.

    An empty cell was not measured. A cell can also be an interval: a dict with value, low and high.
    """

    corner: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[Any]]]
    note: str = ""


def efficiency_grid(summary: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """Size and speed of every system; columns without any value are left out."""
    facts = summary.get("efficiency") or summary.get("sizes") or {}
    grid = _measured("System", MEASURES, facts, names)
    return grid and replace(grid, note=(summary.get("speeds") or {}).get("note", ""))


def spent_grid(comparison: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """What each method cost, averaged over its seeds."""
    return _spent("Method", comparison.get("cost") or {}, names)


def training_grid(folder: Path) -> Grid | None:
    """Steps, tokens and minutes of every training of a run."""
    by_training = {}
    for name, place in trainings_of(folder).items():
        records = read_jsonl(folder / place / "metrics.jsonl")
        if records:
            trained = sum(record["response_tokens"] for record in records)
            seconds = sum(record["seconds"] for record in records)
            by_training[name] = {
                "steps": len(records),
                "trained_tokens": trained,
                "seconds": seconds,
                "writing_share": writing_share(records),
            }
    return _spent("Training", by_training, {})


def _spent(corner: str, facts: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """A table of costs, with the writing time only if a student wrote."""
    writes = any(values.get("writing_share") for values in facts.values())
    return _measured(
        corner, {key: measure for key, measure in SPENT.items() if writes or key != "writing_share"}, facts, names
    )


def _measured(
    corner: str, measures: dict[str, tuple[str, str, float]], facts: dict[str, Any], names: dict[str, str]
) -> Grid | None:
    """A table with a column for every measure (title, unit, factor) that some row has; None if there is none."""
    keys = [key for key in measures if any(values.get(key) is not None for values in facts.values())]
    rows = [
        (names.get(name, label(name)), [_cell(values.get(key), measures[key][2]) for key in keys])
        for name, values in facts.items()
    ]
    return Grid(corner, [measures[key][:2] for key in keys], rows) if keys else None


def _cell(value: Any, factor: float) -> Any:
    """A number as text; an interval (a dict with value, low and high) stays one."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return {key: value[key] * factor for key in ("value", "low", "high")}
    scaled = value * factor
    return f"{scaled:,.1f}" if isinstance(factor, float) and 0 < abs(scaled) < 1000 else f"{scaled:,.0f}"


def kinds_grid(summary: dict[str, Any], subject: str, names: dict[str, str]) -> Grid | None:
    """The headline metric by kind of prompt for every system, with the worst kinds of `subject` first."""
    kinds = {kind: values for kind, values in (summary.get("by_kind") or {}).items() if values.get(subject)}
    metrics = metrics_of(
        {"systems": {kind: values[subject] for kind, values in kinds.items()}, "metrics": summary.get("metrics", {})}
    )
    metric = headline(metrics, [values[subject] for values in kinds.values()])
    if not kinds or metric is None:
        return None
    sign = -1 if metric.better == "low" else 1
    ranked = sorted(kinds.items(), key=lambda item: sign * item[1][subject][metric.name]["value"])
    systems = [
        name
        for name in summary["systems"]
        if any((values.get(name) or {}).get(metric.name) for values in kinds.values())
    ]
    rows = [
        (
            kind or "(none)",
            [str(values[subject][metric.name]["n"]), *((values.get(name) or {}).get(metric.name) for name in systems)],
        )
        for kind, values in ranked[:MAX_KINDS]
    ]
    left_out = f" {len(ranked) - MAX_KINDS} more kinds are in summary.json." if len(ranked) > MAX_KINDS else ""
    columns = [("Answers", ""), *((names.get(name, label(name)), "") for name in systems)]
    whose = "the student" if subject == "student" else names.get(subject, subject)
    note = f"{_metric_note(metric)}. The worst results of {whose} come first.{left_out}"
    return Grid("Kind of prompt", columns, rows, note)


def wording_grid(summary: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """How varied each system's own texts are, taken together. There is no interval."""
    return _measured("System", WORDING, summary.get("wording") or {}, names)


def robustness_grid(summary: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """How much each system's results drop when a task is worded differently."""
    drops = summary.get("robustness") or {}
    systems = [name for name in summary["systems"] if any(name in values for values in drops.values())]
    rows = [(task, [values.get(name) for name in systems]) for task, values in drops.items()]
    note = "1 - reworded / original, over the same items. Below 0, results improve."
    return (
        Grid("Task and metric", [(names.get(name, label(name)), "") for name in systems], rows, note) if rows else None
    )


def classes_grid(summary: dict[str, Any]) -> Grid | None:
    """The divergence on each class of tokens, and its share of the total."""
    classes = summary.get("by_token_class") or {}
    ranked = sorted(classes.items(), key=lambda item: -item[1]["share_of_loss"])
    rows = [
        (name, [f"{x['tokens']:,}", number(float(x["forward_kl"])), percent(x["share_of_loss"])]) for name, x in ranked
    ]
    columns = [("Tokens", ""), ("Forward KL", "nats per token"), ("Share", "of the total divergence")]
    return Grid("Class of token", columns, rows) if rows else None


def methods_grid(comparison: dict[str, Any]) -> Grid:
    """The methods compared: title, paper, losses and recipe hash."""
    rows = [
        (
            name + (" (base)" if name == comparison["base"] else ""),
            [
                str(x.get("title") or ""),
                str(x.get("paper") or ""),
                ", ".join(map(str, x.get("loss", []))),
                str(x.get("recipe", ""))[:16],
            ],
        )
        for name, x in comparison.get("methods", {}).items()
    ]
    return Grid("Method", [("Title", ""), ("Paper", ""), ("Loss", ""), ("Recipe hash", "")], rows)


def seeds_grid(comparison: dict[str, Any], metric: Metric | None, names: dict[str, str]) -> Grid | None:
    """The headline metric of every training, by seed."""
    table = comparison.get("by_seed") or {}
    if metric is None or not table:
        return None
    seeds = list(dict.fromkeys(seed for by_seed in table.values() for seed in by_seed))
    rows = []
    for method, by_seed in table.items():
        values = [by_seed.get(seed, {}).get(metric.name) for seed in seeds]
        measured = [value for value in values if value is not None]
        cells = ["" if value is None else number(float(value)) for value in values]
        spread = number(max(measured) - min(measured)) if len(measured) > 1 else ""
        rows.append((names.get(method, method), [*cells, spread]))
    return Grid("Method", [*((f"Seed {seed}", "") for seed in seeds), ("Range", "")], rows, f"{_metric_note(metric)}.")


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record as (name, value as text) pairs. A nested record's entries are named "outer: inner"."""
    pairs = []
    for key, value in record.items():
        title = key.replace("_", " ")
        if isinstance(value, dict) and value:
            pairs += [(f"{title}: {name}", text) for name, text in facts(value)]
        else:
            pairs.append((title, _fact(value)))
    return pairs


def _fact(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def _metric_note(metric: Metric) -> str:
    side = f", {'lower' if metric.better == 'low' else 'higher'} is better" if metric.better != "none" else ""
    return f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}{side}"


def pairs_grid(summary: dict[str, Any]) -> Grid | None:
    """The held-out pairs that a reward model orders worst."""
    worst = (summary.get("preference") or {}).get("worst")
    if not worst:
        return None
    columns = [
        ("Prompt", ""),
        ("Better", "by the pair"),
        ("Scored higher", "by the student"),
        ("Lead", "of the better"),
    ]
    rows = [(pair["item"], [pair["prompt"], pair["better"], pair["worse"], number(pair["lead"])]) for pair in worst]
    return Grid("Item", columns, rows, "Texts are cut; every score is in evaluation/.")
