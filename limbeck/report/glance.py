"""The page's first screen and its part on worth: the figures that decide, one example, and what a student saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config.significance import CLEAR_ITEMS
from limbeck.report.figures import SHORT, Figure
from limbeck.report.grids import Grid
from limbeck.report.item_files import HELD_OUT, questions, task_records
from limbeck.report.metrics import Metric, label, metrics_of, number, percent, task_headlines
from limbeck.report.plots import Label, Spot, scatter
from limbeck.report.prices import HINT
from limbeck.report.worth import point, unmetered_words
from limbeck.storage.files import read_jsonl

MOST_TASKS = 2
MAX_TEXT = 320
FIGURES = {  # title, unit, factor
    "parameters": ("Parameters", "millions", 1e-6),
    "bytes": ("Weights", "MB in memory", 1e-6),
    "bytes_on_disk": ("Folder", "MB on disk", 1e-6),
    "peak_memory_mib": ("Peak memory", "MiB", 1.0),
    "first_token_ms": ("First token", "milliseconds", 1.0),
    "decode_tokens_per_second": ("Speed", "tokens a second", 1.0),
}
AT_A_GLANCE = ("parameters", "first_token_ms", "decode_tokens_per_second")


@dataclass(frozen=True)
class ShownExample:
    """One item with every system's answer."""

    where: str
    prompt: str
    right: str
    answers: list[tuple[str, str]]


def glance_grid(summary: dict[str, Any], worth: dict[str, Any]) -> Grid | None:
    """Teacher, before and after: tasks, distance, size, speed and cost."""
    metrics = metrics_of(summary)
    student = summary["systems"].get("student", {})
    columns = task_headlines(metrics, [student])[:MOST_TASKS]
    columns += [metrics["forward_kl"]] if "forward_kl" in student else []
    rows, heads = _rows(summary, worth, AT_A_GLANCE)
    if not columns and not heads:
        return None
    body = [(label(name), [summary["systems"][name].get(metric.name) for metric in columns] + of) for name, of in rows]
    return Grid("System", [*((_title(metric), _unit(metric)) for metric in columns), *heads], body)


def worth_grid(summary: dict[str, Any], worth: dict[str, Any]) -> Grid | None:
    """Quality, size, memory, speed, seconds and cost of a request, per system."""
    quality = worth["quality"]
    rows, heads = _rows(summary, worth, tuple(FIGURES))
    if quality is None or not heads:
        return None
    title = f"{quality['title']}, {quality['task']}" if quality["task"] else quality["title"]
    body = [(label(name), [quality["values"].get(name), *cells]) for name, cells in rows]
    return Grid("System", [(title, ""), *heads], body)


def _rows(
    summary: dict[str, Any], worth: dict[str, Any], keys: tuple[str, ...]
) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, str]]]:
    """(system, cells) and the columns that some system has: `keys` of FIGURES, seconds and cost of a request."""
    columns: dict[str, tuple[str, str]] = {}
    table: dict[str, dict[str, Any]] = {}
    for name in summary["systems"]:
        facts = worth["systems"][name]
        cells = {key: _scaled(facts[key], FIGURES[key][2]) for key in keys if facts.get(key) is not None}
        if "seconds" in facts["request"] and "bytes" in keys:
            cells["seconds"] = number(facts["request"]["seconds"])
        if "cost_of_1000" in facts["request"]:
            cells["cost"] = _money(facts["request"]["cost_of_1000"])
        table[name] = cells
    heads = {key: FIGURES[key][:2] for key in keys}
    heads |= {"seconds": ("One request", "seconds"), "cost": ("1,000 requests", "at the stated prices")}
    columns = {key: head for key, head in heads.items() if any(key in cells for cells in table.values())}
    return [(name, [cells.get(key, "") for key in columns]) for name, cells in table.items()], list(columns.values())


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, dict):
        return {key: float(value[key]) * factor for key in ("value", "low", "high")}
    return number(float(value) * factor)


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.01 or amount == 0 else f"{amount:.2g}"


def _title(metric: Metric) -> str:
    return f"{metric.title.removeprefix(metric.task + ' ')}, {metric.task}" if metric.task else metric.title


def _unit(metric: Metric) -> str:
    side = "" if metric.better == "high" else "lower is better"
    return ", ".join(filter(None, (metric.unit, side)))


def example(folder: Path, summary: dict[str, Any]) -> ShownExample | None:
    """The first item of the page's first task, or the first held-out prompt: chosen by place, not by outcome."""
    metrics = task_headlines(metrics_of(summary), [summary["systems"].get("student", {})])
    names = [name for name in ("teacher", "untouched", "student") if name in summary["systems"]]
    evaluation = folder / "evaluation"
    for task in [*(metric.task for metric in metrics[:1]), HELD_OUT]:
        records = {name: _by_item(task_records(evaluation, task, name)) for name in names}
        item = next(iter(records.get("student", {})), None)
        if item is None:
            continue
        asked = questions(evaluation).get(item) or _held_out(evaluation).get(item)
        if asked is None:
            continue
        answers = [
            (label(name), _shortened(records[name][item].get("text", ""))) for name in names if item in records[name]
        ]
        where = f"The first item of {task}" if task else "The first held-out prompt"
        return ShownExample(where, _shortened(asked["text"]), _shortened(asked.get("answer", "")), answers)
    return None


def _by_item(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record.get("item", record.get("prompt_id", "")): record for record in records}


def _held_out(evaluation: Path) -> dict[str, dict[str, Any]]:
    return {record["prompt_id"]: {"text": record["prompt"]} for record in read_jsonl(evaluation / "prompts.jsonl")}


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def worth_facts(worth: dict[str, Any]) -> list[tuple[str, str]]:
    """What was kept, what it cost and when it has paid, as (name, text)."""
    facts = []
    quality, training = worth["quality"], worth["training"]
    for key, title in (("kept", "kept of the teacher's score"), ("recovered", "gained of the teacher's lead")):
        if quality and (share := quality[key]):
            items = f", over only {share['n']} items" if share.get("n", CLEAR_ITEMS) < CLEAR_ITEMS else ""
            spread = f"{percent(share['low'])} to {percent(share['high'])}"
            facts.append((title, f"{percent(share['value'])} ({spread}{items})"))
    if "answers" in training:
        bought = f"{training['answers']:,} answers: {training['tokens_read']:,} tokens read"
        facts.append(("bought of the teacher", f"{bought}, {training['tokens_written']:,} written"))
    if training.get("unmetered"):
        facts.append(("not counted by its server", unmetered_words(training)))
    if reused := training.get("reused"):
        worth_of = f", worth {_money(reused['worth'])}" if "worth" in reused else ""
        facts.append(("taken from earlier runs, not counted", f"{reused['answers']:,} answers{worth_of}"))
    if maybe := training.get("maybe_billed"):
        tokens = f"at most {sum(each['tokens_at_most'] for each in maybe):,} tokens"
        facts.append(
            ("may have been billed without an answer", f"{sum(each['tries'] for each in maybe):,} requests, {tokens}")
        )
    if "bill" in training:
        facts.append(("the teacher's bill", _money(training["bill"])))
    facts += [(f"the bill of {name}", _money(money)) for name, money in training.get("bills", {}).items()]
    facts.append(("training steps of the student", f"{number(training['hours'])} hours of the machine"))
    if "machine_cost" in training:
        facts.append(("at the price of an hour", _money(training["machine_cost"])))
    after = worth["pays_after"]
    text = f"{after['requests']:,} requests" if after["requests"] is not None else after["why"]
    return [*facts, ("has paid after", text)]


def price_note(worth: dict[str, Any]) -> str:
    """How costs were computed, or how to state the prices that are missing."""
    prices = worth["prices"]
    stated = [
        f"{title} {prices[key]:g}"
        for key, title in (
            ("teacher_in", "a million tokens read by the teacher:"),
            ("teacher_out", "a million tokens written by it:"),
            ("hour", "an hour of the machine:"),
        )
        if prices[key] is not None
    ]
    command = HINT.strip("`")
    if not stated:
        return f"No price is stated, so no money is shown. State prices with: {command}"
    left = "" if len(stated) == 3 else f" State the others with: {command}"
    return f"Stated prices: {'; '.join(stated)}. One request at a time, on the machine of this run.{left}"


def worth_figure(worth: dict[str, Any]) -> Figure | None:
    """Quality against cost, or without prices against size; None where fewer than two systems have both."""
    quality = worth["quality"]
    if quality is None:
        return None
    costs = {name: facts["request"].get("cost_of_1000") for name, facts in worth["systems"].items()}
    known = costs.get("student") is not None and costs.get("teacher") is not None
    sizes = {name: point(facts.get("bytes")) for name, facts in worth["systems"].items()}
    xs, unit, what = (costs, "cost of 1,000 requests", "cost") if known else (sizes, "weights, MB", "size")
    factor = 1.0 if known else 1e-6
    spots = [
        Spot(
            label=SHORT.get(name, name),
            x=x * factor,
            y=y["value"],
            low=y["low"],
            high=y["high"],
            strong=name == "student",
        )
        for name, y in quality["values"].items()
        if (x := xs.get(name)) is not None
    ]
    if len(spots) < 2:
        return None
    side = "lower" if quality["better"] == "low" else "higher"
    values = "; ".join(f"{spot.label}: {number(float(spot.x))}, {number(spot.y)}" for spot in spots)
    figure_label = Label(
        key="worth",
        title=f"{quality['title']} by {what}",
        about=f"{quality['title']} ({side} is better) by {unit}, with 95 % intervals. {values}.",
        x_title=unit,
        y_title=f"{quality['title']}, {side} is better",
    )
    return Figure(figure_label.title, scatter(figure_label, spots), "Bars are 95 % intervals.")
