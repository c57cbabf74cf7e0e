"""The result in one sentence, which claims no more than the intervals support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.report.metrics import Metric, headline, is_clear, label, mark, metrics_of, number, p_text

Interval = dict[str, Any]
LEFT_OUT = ("exact", "contained", "overlap")


def verdict(summary: dict[str, Any]) -> str:
    """How close the student is to its teacher, and whether distilling beat fine-tuning on the teacher's text."""
    return _run_sentence(summary) + _leaks(summary)


def _run_sentence(summary: dict[str, Any]) -> str:
    systems = summary["systems"]
    paired = summary.get("paired", {})
    metric = headline(metrics_of(summary), [systems.get("student", {})])
    if metric is None:
        return "Nothing was measured of the student that could be better or worse."
    if metric.name != "forward_kl":
        return _other_metric(metric, systems, paired)
    kl = systems["student"]["forward_kl"]
    text = f"The student is {kl['value']:.2f} nats per token ({kl['low']:.2f} to {kl['high']:.2f}) from its teacher"
    change = paired.get("student - untouched", {}).get("forward_kl")
    if change and "forward_kl" in systems.get("untouched", {}):
        before = f"{systems['untouched']['forward_kl']['value']:.2f}"
        direction = (
            "with no clear change from" if not is_clear(change) else "down from" if change["high"] < 0 else "up from"
        )
        text += f", {direction} {before} before training"
    difference = paired.get("student - sft_control", {}).get("forward_kl")
    if difference is None:
        return text + "."
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if not is_clear(difference):
        change = f"{value:+.3f} nats ({low:+.3f} to {high:+.3f})"
        return f"{text}; the difference from fine-tuning on the teacher's text, {change}, may be chance."
    if high < 0:
        return (
            f"{text}; it is closer than fine-tuning on the teacher's text by {-value:.3f} nats ({-high:.3f} to"
            f" {-low:.3f})."
        )
    return f"{text}; fine-tuning on the teacher's text came closer, by {value:.3f} nats ({low:.3f} to {high:.3f})."


def _other_metric(metric: Metric, systems: dict[str, Any], paired: dict[str, Any]) -> str:
    """The sentence for a run whose teacher gave only text, so that no divergence could be measured."""
    where = f"{metric.title}, {metric.group}" if metric.group else metric.title
    text = f"{where}: the student reaches {_spread(systems['student'][metric.name])}"
    for control in ("untouched", "sft_control"):
        difference = paired.get(f"student - {control}", {}).get(metric.name)
        if difference:
            side = mark(metric, difference)
            comparison = "no clear difference from" if side == "unclear" else f"{side} than"
            text += f"; {comparison} the {label(control).lower()} ({_signed_spread(difference)})"
    return text + "."


def compare_verdict(comparison: dict[str, Any]) -> str:
    """Which methods are clearly better or worse than the base, by intervals and Holm-adjusted p values."""
    return _comparison_sentence(comparison) + _leaks(comparison)


def _comparison_sentence(comparison: dict[str, Any]) -> str:
    base = comparison["base"]
    rows = against_base(comparison)
    metric = headline(metrics_of(comparison), rows.values())
    if not rows or metric is None:
        return f"Nothing was compared with {base}."
    by_mark: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for method, differences in rows.items():
        difference = differences[metric.name]
        side = mark(metric, difference, len(rows))
        p = p_text(difference.get("p_holm")) if side != "unclear" else ""
        by_mark[side].append(f"{method} ({_signed_spread(difference)}{', ' + p if p else ''})")
    better, worse, unclear = by_mark["better"], by_mark["worse"], by_mark["unclear"]
    parts = [
        (
            f"{_list(better)} {_are(better)} clearly better than {base}"
            if better
            else f"no method is clearly better than {base}"
        )
    ]
    parts += [f"{_list(worse)} {_are(worse)} clearly worse"] if worse else []
    parts += [f"the difference of {_list(unclear)} may be chance"] if unclear else []
    seeds = len(comparison.get("seeds", []))
    over = f" over {seeds} seed{'s' if seeds > 1 else ''}" if seeds else ""
    unit = f" in {metric.unit}" if metric.unit else ""
    adjusted = ", Holm-adjusted p" if any("p_holm" in differences[metric.name] for differences in rows.values()) else ""
    return f"By {metric.title}{unit}{over} (difference, 95 % interval{adjusted}): {'; '.join(parts)}."


def against_base(comparison: dict[str, Any]) -> dict[str, dict[str, Interval]]:
    """The differences from the base: {method: {metric: interval}}."""
    suffix = f" - {comparison['base']}"
    paired = comparison.get("paired", {})
    return {pair.removesuffix(suffix): rows for pair, rows in paired.items() if pair.endswith(suffix)}


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _spread(interval: Interval) -> str:
    return f"{number(interval['value'])} ({number(interval['low'])} to {number(interval['high'])})"


def _signed_spread(interval: Interval) -> str:
    return f"{interval['value']:+.3f}, {interval['low']:+.3f} to {interval['high']:+.3f}"


def leaks_left_out(leaks: Sequence[dict[str, str]]) -> int:
    """How many leaked items the evaluation left out: those whose exact words are in the training text."""
    return sum(leak["kind"] in LEFT_OUT for leak in leaks)


def _leaks(summary: dict[str, Any]) -> str:
    """A sentence on evaluation items in the training text, which every verdict with such items includes."""
    leaks = summary.get("leaks") or []
    if not leaks:
        return ""
    count = len(leaks)
    left_out = leaks_left_out(leaks)
    found = f"{count:,} evaluation {'item was' if count == 1 else 'items were'} found in the training text"
    if left_out == count:
        return f" {found} and left out."
    return f" {found}, {left_out:,} of them left out and {count - left_out:,} counted."
