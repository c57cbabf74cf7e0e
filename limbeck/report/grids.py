"""Plain tables of a report: size and speed, cost, where the student loses most, methods, seeds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.figures import TRAININGS
from limbeck.report.metrics import Metric, headline, label, metrics_of, number, percent
from limbeck.storage.files import read_jsonl
from limbeck.storage.metrics_log import writing_share

MEASURES = {
    "layers": ("Layers", "", 1),
    "parameters": ("Parameters", "millions", 1e-6),
    "bytes": ("Weights", "MiB", 2**-20),
    "prefill_tokens_per_second": ("Reading", "tokens a second", 1.0),
    "decode_tokens_per_second": ("Writing", "tokens a second", 1.0),
    "first_token_ms": ("First token", "milliseconds", 1.0),
    "peak_memory_mib": ("Peak memory", "MiB", 1.0),
}
SPENT = {
    "teacher_tokens": ("Teacher tokens", "written for training", 1),
    "trained_tokens": ("Trained tokens", "", 1),
    "steps": ("Steps", "", 1),
    "seconds": ("Minutes", "of training", 1 / 60),
    "writing_share": ("Time writing", "% of the training", 100.0),
    "peak_memory_mib": ("Peak memory", "MiB", 1.0),
}
WORDING = {
    "distinct_1": ("Distinct words", "% of all", 100.0),
    "distinct_2": ("Distinct pairs", "% of all", 100.0),
    "self_bleu": ("Self-BLEU", "0 to 1, lower is more varied", 1.0),
}
MOST_KINDS = 40


@dataclass(frozen=True)
class Grid:
    """A table of text: (title, unit) per column, (label, cells) per row. An empty cell was not measured.

    A cell may also be an interval, a record of value, low and high.
    """

    corner: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[Any]]]
    note: str = ""


def efficiency_grid(summary: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """Size and speed of every system; columns that nobody has are left out."""
    facts = summary.get("efficiency") or summary.get("sizes") or {}
    return _measured("System", MEASURES, facts, names)


def spent_grid(comparison: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """What each method cost, as means over its seeds."""
    return _spent("Method", comparison.get("cost") or {}, names)


def training_grid(folder: Path) -> Grid | None:
    """Steps, tokens and minutes of every training of a run."""
    facts = {}
    for name, place in TRAININGS.items():
        records = read_jsonl(folder / place / "metrics.jsonl")
        if records:
            trained = sum(record["response_tokens"] for record in records)
            seconds = sum(record["seconds"] for record in records)
            facts[name] = {
                "steps": len(records),
                "trained_tokens": trained,
                "seconds": seconds,
                "writing_share": writing_share(records),
            }
    return _spent("Training", facts, {})


def _spent(corner: str, facts: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """The time spent writing is a column only where a student wrote."""
    writes = any(values.get("writing_share") for values in facts.values())
    return _measured(
        corner, {key: measure for key, measure in SPENT.items() if writes or key != "writing_share"}, facts, names
    )


def _measured(
    corner: str, measures: dict[str, tuple[str, str, float]], facts: dict[str, Any], names: dict[str, str]
) -> Grid | None:
    kept = [key for key in measures if any(values.get(key) is not None for values in facts.values())]
    rows = [
        (names.get(name, label(name)), [_cell(values.get(key), measures[key][2]) for key in kept])
        for name, values in facts.items()
    ]
    return Grid(corner, [measures[key][:2] for key in kept], rows) if kept else None


def _cell(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    scaled = value * factor
    return f"{scaled:,.1f}" if isinstance(factor, float) and 0 < abs(scaled) < 1000 else f"{scaled:,.0f}"


def kinds_grid(summary: dict[str, Any], subject: str, names: dict[str, str]) -> Grid | None:
    """The main metric by kind of prompt, for every system; the kinds where `subject` does worst come first."""
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
        for kind, values in ranked[:MOST_KINDS]
    ]
    left_out = f" {len(ranked) - MOST_KINDS} more kinds are in summary.json." if len(ranked) > MOST_KINDS else ""
    columns = [("Answers", ""), *((names.get(name, label(name)), "") for name in systems)]
    worst = f"where the {label(subject).lower()}" if subject == "student" else f"where {names.get(subject, subject)}"
    return Grid("Kind of prompt", columns, rows, f"{_words(metric)}; {worst} does worst comes first.{left_out}")


def wording_grid(summary: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """How varied each system's own texts are, as one set; there is no interval."""
    return _measured("System", WORDING, summary.get("wording") or {}, names)


def robustness_grid(summary: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """By how much each system's results fall when a task is asked in another way."""
    drops = summary.get("robustness") or {}
    systems = [name for name in summary["systems"] if any(name in found for found in drops.values())]
    rows = [(task, [found.get(name) for name in systems]) for task, found in drops.items()]
    note = "1 - perturbed / plain, over the same items; below 0, it does better."
    return (
        Grid("Task and metric", [(names.get(name, label(name)), "") for name in systems], rows, note) if rows else None
    )


def classes_grid(summary: dict[str, Any]) -> Grid | None:
    """How far student and teacher are apart on each class of tokens, and the share of the whole that is."""
    classes = summary.get("by_token_class") or {}
    ranked = sorted(classes.items(), key=lambda item: -item[1]["share_of_loss"])
    rows = [
        (name, [f"{x['tokens']:,}", number(float(x["forward_kl"])), percent(x["share_of_loss"])]) for name, x in ranked
    ]
    columns = [("Tokens", ""), ("Forward KL", "nats a token"), ("Share", "of the whole divergence")]
    return Grid("Class of token", columns, rows) if rows else None


def methods_grid(comparison: dict[str, Any]) -> Grid:
    """What was compared: paper, losses and recipe of each method."""
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
    """The main metric of every single training."""
    table = comparison.get("by_seed") or {}
    if metric is None or not table:
        return None
    seeds = list(dict.fromkeys(seed for by_seed in table.values() for seed in by_seed))
    rows = []
    for method, by_seed in table.items():
        values = [by_seed.get(seed, {}).get(metric.name) for seed in seeds]
        known = [value for value in values if value is not None]
        cells = ["" if value is None else number(float(value)) for value in values]
        rows.append((names.get(method, method), [*cells, number(max(known) - min(known)) if len(known) > 1 else ""]))
    return Grid("Method", [*((f"Seed {seed}", "") for seed in seeds), ("Range", "")], rows, f"{_words(metric)}.")


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The entries of a record as (name in words, value as text); those of a record inside it follow one by one."""
    found = []
    for key, value in record.items():
        words = key.replace("_", " ")
        if isinstance(value, dict) and value:
            found += [(f"{words}: {name}", text) for name, text in facts(value)]
        else:
            found.append((words, _fact(value)))
    return found


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


def _words(metric: Metric) -> str:
    side = f", {'lower' if metric.better == 'low' else 'higher'} is better" if metric.better != "none" else ""
    return f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}{side}"
