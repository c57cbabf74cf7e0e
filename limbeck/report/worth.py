"""What a distillation is worth: quality kept against size, speed and cost, and after how many requests it has paid.

docs/worth.md has every formula with its units. A figure that would need a price nobody stated is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.report.item_files import HELD_OUT, item_files
from limbeck.report.metrics import headline, metrics_of, task_headlines
from limbeck.report.prices import Prices, prices_of
from limbeck.storage.files import read_jsonl
from limbeck.storage.rounds import rounds_in, stages_in

Facts = dict[str, Any]
THOUSAND = 1000
SIZES = ("layers", "parameters", "bytes")
READ_MORE = ("teacher", "prompted")  # are shown the teacher's prompt
SPEEDS = ("first_token_ms", "decode_tokens_per_second", "prefill_tokens_per_second", "peak_memory_mib")


def worth(folder: Path, summary: Facts, recipe: Facts) -> Facts:
    """Quality, size, speed, cost and the point where it has paid, as plain data.

    Returns:
        prices, quality (metric, values, `kept` and `recovered` shares), systems (sizes, speeds, `request`), training
        (tokens bought, bill, hours), and pays_after (requests, or why there is no such number).
    """
    prices = prices_of(folder, recipe)
    systems = {
        name: _system(folder, summary, name=name, trained=_trained(folder, name), answers=name, prices=prices)
        for name in summary["systems"]
    }
    training = _training(folder, summary, prices)
    return {
        "prices": vars(prices),
        "quality": _quality(summary, "student"),
        "systems": systems,
        "training": training,
        "pays_after": _pays_after(systems, training),
    }


def compared_worth(folder: Path, comparison: Facts) -> Facts:
    """`quality` and `systems` as `worth` has them, of a comparison's systems: a method's answers and its student's
    folder are those of its first seed. What trainings cost is the comparison's own `cost`."""
    methods = comparison.get("methods") or comparison.get("by_seed") or {}
    first = {method: f"{method}-s{seed}" for seed in comparison.get("seeds", [])[:1] for method in methods}
    prices = prices_of(folder, comparison.get("settings") or {})
    systems = {
        name: _system(
            folder,
            comparison,
            name=name,
            trained=folder / "runs" / first.get(name, name) / "student",
            answers=first.get(name, name),
            prices=prices,
        )
        for name in comparison["systems"]
    }
    return {"quality": _quality(comparison, comparison["base"]), "systems": systems}


def _trained(folder: Path, name: str) -> Path:
    return (folder if name == "student" else folder / "controls" / name) / "student"


def _system(folder: Path, summary: Facts, *, name: str, trained: Path, answers: str, prices: Prices) -> Facts:
    """A system's sizes, speeds and `request`.

    Args:
        trained: its weights' folder, if it was trained here.
        answers: the name of its answers' file.
    """
    facts = (summary.get("efficiency") or summary.get("sizes") or {}).get(name) or {}
    own = {key: value for key in (*SIZES, *SPEEDS) if (value := _interval(facts, key)) is not None}
    if on_disk := _bytes_on_disk(trained):
        own["bytes_on_disk"] = on_disk
    file = item_files(folder / "evaluation").get((HELD_OUT, answers))  # a name in a summary is never a path
    return own | {"request": _request(file, summary, name=name, facts=own, prices=prices)}


def point(value: Any) -> float | None:
    """The value of a figure that is a number or an interval."""
    found = value.get("value") if isinstance(value, Mapping) else value
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _interval(facts: Facts, key: str) -> Any:
    """A figure of a system; with its spread where the summary has one."""
    value = facts.get(key)
    spread = facts.get(f"{key}_spread") or (facts.get("spread") or {}).get(key)
    if isinstance(spread, list | tuple) and len(spread) == 2 and isinstance(value, int | float):
        return {"value": value, "low": spread[0], "high": spread[1]}
    return value


def _bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _quality(summary: Facts, subject: str) -> Facts | None:
    """The headline metric of the page's first task, else of fidelity; one that the `subject` has."""
    metrics = metrics_of(summary)
    student = summary["systems"].get(subject, {})
    metric = next(iter(task_headlines(metrics, [student])), None) or headline(metrics, [student])
    if metric is None:
        return None
    values = {name: of[metric.name] for name, of in summary["systems"].items() if of.get(metric.name)}
    return {
        "metric": metric.name,
        "title": metric.title,
        "task": metric.task,
        "better": metric.better,
        "values": values,
        "kept": (summary.get("kept") or {}).get(metric.name),
        "recovered": (summary.get("recovered") or {}).get(metric.name),
    }


def _request(file: Path | None, summary: Facts, *, name: str, facts: Facts, prices: Prices) -> Facts:
    """Tokens, seconds and cost of one request: a held-out prompt and the system's greedy answer to it, in `file`."""
    lengths = summary.get("requests") or {}
    prompt = lengths.get("teacher_prompt_tokens" if name in READ_MORE else "prompt_tokens")
    answers = [record["tokens"] for record in read_jsonl(file)] if file else []
    answer = sum(answers) / len(answers) if answers else None
    if name == "teacher" and (counted := lengths.get("counted")):  # by its server
        prompt, answer = (counted[key] / counted["answers"] for key in ("tokens_read", "tokens_written"))
    first, rate = (point(facts.get(key)) for key in ("first_token_ms", "decode_tokens_per_second"))
    request: Facts = {"prompt_tokens": prompt, "answer_tokens": answer}
    if first is not None and rate and answer is not None:
        request["seconds"] = first / 1000 + max(0.0, answer - 1) / rate
    of_tokens = prices.of_tokens if name == "teacher" and not _unmetered(summary.get("bill")) else None
    if of_tokens is not None and prompt is not None and answer is not None:
        request |= {"cost_of_1000": THOUSAND * (prompt * of_tokens[0] + answer * of_tokens[1]) / 1e6, "by": "tokens"}
    elif prices.hour is not None and "seconds" in request:
        request |= {"cost_of_1000": THOUSAND * request["seconds"] * prices.hour / 3600, "by": "machine"}
    return {key: value for key, value in request.items() if value is not None}


def _unmetered(bill: Facts | None) -> int:
    """How many answers of a bill have unknown tokens. Older summaries do not say it: there, all where none has any."""
    if not bill:
        return 0
    if "unmetered" in bill:
        return int(bill["unmetered"])
    return 0 if bill.get("tokens_read") or bill.get("tokens_written") else int(bill.get("answers", 0))


def _training(folder: Path, summary: Facts, prices: Prices) -> Facts:
    """What the student cost: the tokens of the teacher's server and of others', and the seconds of its training, in all
    rounds and their stages. With answers whose tokens no server counted (`unmetered`) there is no total."""
    bill = summary.get("bill") or {}
    others = summary.get("bills") or {}
    files = [home / "metrics.jsonl" for home in (folder, *rounds_in(folder).values(), *stages_in(folder))]
    seconds = sum(record.get("seconds", 0.0) for file in files for record in read_jsonl(file))
    facts: Facts = {key: bill[key] for key in ("answers", "tokens_read", "tokens_written") if key in bill}
    bills = [bill, *others.values()]
    if unmetered := sum(map(_unmetered, bills)):
        facts["unmetered"] = unmetered
    if reused := _reused(bills, prices):
        facts["reused"] = reused
    if maybe := [each["maybe_billed"] for each in bills if "maybe_billed" in each]:
        facts["maybe_billed"] = maybe
    facts["hours"] = seconds / 3600
    if bill:
        of_tokens = prices.of_tokens
        money = bill.get("money") if of_tokens is None else _price(bill, of_tokens)
        if money is not None and not _unmetered(bill):
            facts["bill"] = money
    if prices.hour is not None:
        facts["machine_cost"] = facts["hours"] * prices.hour
    if priced := {name: of["money"] for name, of in others.items() if "money" in of and not _unmetered(of)}:
        facts["bills"] = priced
    if "machine_cost" in facts and ("bill" in facts or not bill) and len(priced) == len(others):
        facts["total"] = facts["machine_cost"] + facts.get("bill", 0.0) + sum(priced.values())
    return facts


def _reused(bills: list[Facts], prices: Prices) -> Facts:
    """Answers that were taken from earlier runs: how many, and what they are worth where all have a price; empty where
    there are none. The first bill is the teacher's."""
    answers = 0
    worths = []
    for place, bill in enumerate(bills):
        if reused := bill.get("reused"):
            of_tokens = prices.of_tokens if place == 0 and reused["tokens_read"] else None
            answers += reused["answers"]
            worths.append(reused.get("money") if of_tokens is None else _price(reused, of_tokens))
    known = [worth for worth in worths if worth is not None]
    return {"answers": answers} | ({"worth": sum(known)} if len(known) == len(worths) else {}) if answers else {}


def _price(bill: Facts, of_tokens: tuple[float, float]) -> float:
    return float(bill["tokens_read"] * of_tokens[0] + bill["tokens_written"] * of_tokens[1]) / 1e6


def _pays_after(systems: Mapping[str, Facts], training: Facts) -> Facts:
    """total / (teacher's cost of a request - student's), as a whole number of requests."""
    teacher, student = (systems.get(name, {}).get("request", {}) for name in ("teacher", "student"))
    unknown = [
        *(["the cost of a request to the teacher"] if "cost_of_1000" not in teacher else []),
        *(["the cost of a request to the student"] if "cost_of_1000" not in student else []),
        *(["what the training cost"] if "total" not in training else []),
    ]
    if unknown and training.get("unmetered"):
        return {"requests": None, "why": f"unknown: {unmetered_words(training)}"}
    if unknown:
        return {"requests": None, "why": f"unknown: {' and '.join(unknown)} need stated prices"}
    saved = teacher["cost_of_1000"] - student["cost_of_1000"]
    if saved <= 0:
        return {"requests": None, "why": "never: at these prices a request to the student costs no less"}
    return {"requests": math.ceil(THOUSAND * training["total"] / saved), "why": ""}


def unmetered_words(training: Facts) -> str:
    """That the cost of some answers is unknown, and why."""
    return f"servers did not say how many tokens {training['unmetered']:,} answers took, so their cost is unknown"
