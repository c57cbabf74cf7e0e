"""The result in one sentence: the user's task first, then nats; it claims no more than the intervals support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.config.significance import CLEAR_ITEMS
from limbeck.report.metrics import (
    Metric,
    fixed,
    headline,
    is_clear,
    label,
    mark,
    metrics_of,
    number,
    p_text,
    task_headlines,
)

Interval = dict[str, Any]
LEFT_OUT = ("exact", "contained", "overlap")


def verdict(summary: dict[str, Any]) -> str:
    """What the student gained at its task and kept of its teacher, and whether distilling beat plain fine-tuning."""
    metrics = metrics_of(summary)
    student = summary["systems"].get("student", {})
    tasks = task_headlines(metrics, [student])
    sentences = [_task_sentence(tasks[0], summary)] if tasks else []
    if "forward_kl" in student and not (tasks and _has_no_teacher(summary)):
        sentences.append(_fidelity_sentence(summary))
    elif not tasks:
        metric = headline(metrics, [student])
        sentences.append(
            "Nothing was measured of the student that could be better or worse."
            if metric is None
            else _other_sentence(metric, summary)
        )
    return " ".join(sentences) + leaks_note(summary.get("leaks") or [])


def _task_sentence(metric: Metric, summary: dict[str, Any]) -> str:
    """Before, after and the teacher; a change or a difference is only called one if it is clear over enough items."""
    systems, paired = summary["systems"], summary.get("paired", {})
    after, before = (systems.get(name, {}).get(metric.name) for name in ("student", "untouched"))
    assert after is not None
    items = _fewest(after, paired.get("student - untouched", {}).get(metric.name))
    side = ", lower is better," if metric.better == "low" else ""
    title = metric.title.removeprefix(f"{metric.task} ")
    text = f"{title[:1].upper()}{title[1:]} on {metric.task}{side}"
    reached = f"{_two(after['value'])} ({_two(after['low'])} to {_two(after['high'])})"
    chance = ""
    if before:
        change = paired.get("student - untouched", {}).get(metric.name)
        clear = bool(change) and items >= CLEAR_ITEMS and is_clear(change)
        verb = "went" if not clear or change is None else "rose" if change["value"] > 0 else "fell"
        text += f" {verb} from {_two(before['value'])} to {reached}"
        chance = ", a change that may be chance" if change and items >= CLEAR_ITEMS and not clear else ""
    else:
        text += f" is {reached}"
    text += f" {_over(items)}{chance}"
    if (teacher := systems.get("teacher", {}).get(metric.name)) and not _has_no_teacher(summary):
        text += f"; the teacher reaches {_two(teacher['value'])}"
    if control := systems.get("sft_control", {}).get(metric.name):
        text += f"; fine-tuning on the teacher's text reaches {_two(control['value'])}"
        difference = paired.get("student - sft_control", {}).get(metric.name)
        if difference and items >= CLEAR_ITEMS:
            more = "more" if difference["high"] < 0 else "less"
            text += f", clearly {more}" if is_clear(difference) else ", a difference that may be chance"
    return text + "."


def _has_no_teacher(summary: dict[str, Any]) -> bool:
    """Whether nobody teaches: the text is the data's own, and what stands as the teacher is the student before training
    (`limbeck new --teacher none`)."""
    before = summary["systems"].get("untouched", {}).get("forward_kl") or {}
    of_data = (summary.get("held_out") or {}).get("writer") == "corpus"
    return of_data and abs(before.get("value", 1.0)) < 1e-6


def _fewest(*intervals: Interval | None) -> int:
    """The smallest number of items that some of these are over."""
    return min(int(x.get("n", CLEAR_ITEMS)) for x in intervals if x)


def _over(items: int, what: str = "items") -> str:
    return f"over only {items:,} {what}" if items < CLEAR_ITEMS else f"over {items:,} {what}"


def _two(value: float) -> str:
    return fixed(value, 2) if abs(value) < 1000 else number(value)


def _nats(*values: float, sign: str = "") -> str:
    """A difference in nats with its limits."""
    value, low, high = (fixed(each, 3, sign) for each in values)
    return f"{value} nats ({low} to {high})"


def _fidelity_sentence(summary: dict[str, Any]) -> str:
    systems, paired = summary["systems"], summary.get("paired", {})
    kl = systems["student"]["forward_kl"]
    reached, low, high = (_two(kl[key]) for key in ("value", "low", "high"))
    text = f"The student is {reached} nats per token ({low} to {high}) from its teacher"
    change = paired.get("student - untouched", {}).get("forward_kl")
    items = _fewest(kl, change)
    few = items < CLEAR_ITEMS
    if change and "forward_kl" in systems.get("untouched", {}):
        before = _two(systems["untouched"]["forward_kl"]["value"])
        if few:
            text += f", {before} before training"
        elif is_clear(change):
            text += f", {'down' if change['high'] < 0 else 'up'} from {before} before training"
        else:
            text += f", {before} before training, a change that may be chance"
    text += f", {_over(items, 'answers')}" if few else ""
    difference = paired.get("student - sft_control", {}).get("forward_kl")
    if difference is None:
        return text + "."
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if few or not is_clear(difference):
        signed = _nats(value, low, high, sign="+")
        against = f"{text}; the difference from fine-tuning on the teacher's text"
        return f"{against} is {signed}." if few else f"{against}, {signed}, may be chance."
    if high < 0:
        return f"{text}; it is closer than fine-tuning on the teacher's text by {_nats(-value, -high, -low)}."
    return f"{text}; fine-tuning on the teacher's text came closer, by {_nats(value, low, high)}."


def _other_sentence(metric: Metric, summary: dict[str, Any]) -> str:
    """The sentence for a run with neither a task nor a divergence."""
    systems, paired = summary["systems"], summary.get("paired", {})
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
    return _comparison_sentence(comparison) + leaks_note(comparison.get("leaks") or [])


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
    items = min((x.get("n", CLEAR_ITEMS) for row in rows.values() if (x := row.get(metric.name))), default=CLEAR_ITEMS)
    clearly = "clearly " if len(comparison.get("seeds", [])) != 1 and items >= CLEAR_ITEMS else ""
    parts = [
        f"{_list(better)} {_are(better)} {clearly}better than {base}"
        if better
        else f"no method is clearly better than {base}"
    ]
    parts += [f"{_list(worse)} {_are(worse)} {clearly}worse"] if worse else []
    parts += [f"the difference of {_list(unclear)} may be chance"] if unclear else []
    seeds = len(comparison.get("seeds", []))
    over = f" over {seeds} seed{'s' if seeds > 1 else ''}" if seeds else ""
    unit = f" in {metric.unit}" if metric.unit else ""
    adjusted = ", Holm-adjusted p" if any("p_holm" in differences[metric.name] for differences in rows.values()) else ""
    few = f", {_over(items)}" if items < CLEAR_ITEMS else ""
    where = f" on {metric.task}" if metric.task else ""
    text = f"By {metric.title}{where}{unit}{over}{few} (difference, 95 % interval{adjusted}): {'; '.join(parts)}."
    return text + (" One seed says nothing of another training." if seeds == 1 else "")


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
    value, low, high = (fixed(interval[key], 3, "+") for key in ("value", "low", "high"))
    return f"{value}, {low} to {high}"


def leaks_left_out(leaks: Sequence[dict[str, str]]) -> int:
    """How many leaked items the evaluation left out: those whose exact words are in the training text."""
    return sum(leak["kind"] in LEFT_OUT for leak in leaks)


def leaks_note(leaks: Sequence[dict[str, str]]) -> str:
    """A sentence on evaluation items in the training text, which every verdict with such items includes."""
    if not leaks:
        return ""
    count = len(leaks)
    left_out = leaks_left_out(leaks)
    found = f"{count:,} evaluation {'item was' if count == 1 else 'items were'} found in the training text"
    if left_out == count:
        return f" {found} and left out."
    return f" {found}, {left_out:,} of them left out and {count - left_out:,} counted."
