"""From every item that was measured to figures: values with intervals, paired differences, shares that were recovered.

A system is one training or several that differ in their seed only; then seeds are resampled as the outer level. Only
records are read, so a summary can be made again from a folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from limbeck.config.significance import LEAST_ITEMS
from limbeck.evaluate import calibration, fidelity, tasks, wording
from limbeck.evaluate.metrics import METRICS, Column, exponentials, reliability_by_item
from limbeck.evaluate.records import SystemRecords
from limbeck.evaluate.statistics import (
    RESAMPLES,
    Interval,
    PairedDifference,
    mcnemar,
    nested_difference,
    nested_interval,
    recovered,
)
from limbeck.evaluate.task import Task

Systems = Mapping[str, Sequence[SystemRecords]]
Columns = dict[str, Column]
RESAMPLES_A_PAIR = 200  # so that the smallest p value times the number of pairs (Holm) is 0.01 at most
FEW_ITEMS = 30
MUCH_REPETITION = 0.3


def columns(records: SystemRecords, task_list: Sequence[Task]) -> Columns:
    """Every metric that is a ratio over items: means over items, or over their tokens."""
    result: Columns = {}
    for name, metric in METRICS.items():
        if (column := metric.source.column(records)) is not None:
            result[name] = column
    for task in task_list:
        results = records.tasks[task.name]
        for name in dict.fromkeys(name for item in results for name in item.scores):
            scored = [item for item in results if name in item.scores]
            weights = [item.weights.get(name, 1.0) for item in scored]
            values = [item.scores[name] for item in scored]
            result[f"{task.name}/{name}"] = Column.of([item.item for item in scored], values, weights)
    return {name: column for name, column in result.items() if len(column.ids) and column.weights.sum() > 0}


def describe(names: Sequence[str], task_list: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Title, unit, direction and group of every named metric; `TASK/METRIC` are the tasks' own."""
    by_name = {task.name: task for task in task_list}
    result = {}
    for name in names:
        if metric := METRICS.get(name):
            title, unit, better, group = metric.title, metric.unit, metric.better, metric.group
        else:
            task_name, _, own_name = name.rpartition("/")
            task = by_name.get(task_name)
            title = task.title(own_name) if task else own_name.replace("_", " ").capitalize()
            unit, better, group = "", task.better(own_name) if task else "none", f"Task {task_name}"
        result[name] = {"title": title, "unit": unit, "better": better, "group": group}
        if not metric and task and own_name == task.metrics[0]:
            result[name]["role"] = "headline"
    return result


def summarise(systems: Systems, task_list: Sequence[Task], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values of every system, differences of every (first, second) pair, and what is shown with them."""
    by_system = {name: [columns(records, task_list) for records in seeds] for name, seeds in systems.items()}
    values = {name: _values(systems[name], by_system[name], task_list) for name in systems}
    metrics = list(dict.fromkeys([*(metric for each in values.values() for metric in each), *exponentials()]))
    resamples = max(RESAMPLES, RESAMPLES_A_PAIR * len(pairs))
    return {
        "systems": values,
        "metrics": describe(metrics, task_list),
        "paired": {
            f"{a} - {b}": {m: d.as_dict() for m, d in _differences(by_system[a], by_system[b], resamples).items()}
            for a, b in pairs
        },
        "calibration": {
            name: calibration.curve(calibration.merged(list(chain.from_iterable(reliability_by_item(seeds)))))
            for name, seeds in systems.items()
            if seeds[0].fidelity
        },
        "exposure": {
            name: fidelity.exposure(
                [item for records in seeds for item in records.own],
                [item for records in seeds for item in records.free],
            )
            for name, seeds in systems.items()
            if name != "teacher" and seeds[0].free
        },
        "wording": {name: _wording(seeds) for name, seeds in systems.items() if seeds[0].own_text},
        "efficiency": {name: seeds[0].efficiency for name, seeds in systems.items() if seeds[0].efficiency},
        "robustness": robustness(systems, task_list),
    }


def _values(
    seeds: Sequence[SystemRecords], by_seed: Sequence[Columns], task_list: Sequence[Task]
) -> dict[str, dict[str, Any]]:
    values = {}
    shown_as = exponentials()
    for name, aligned in _aligned(by_seed).items():
        rows = [column.values for column in aligned], [column.weights for column in aligned]
        interval = nested_interval(*rows, of_share=_is_share(name, task_list))
        if name in shown_as:
            interval = interval.exponential()
        values[shown_as.get(name, name)] = interval.as_dict()
    for name, metric in METRICS.items():
        if (whole := metric.source.interval(seeds)) is not None:
            values[name] = whole.as_dict()
    for task in task_list:  # its own figures that are no means over items, such as macro F1
        each = [tasks.summarise(task, records.tasks[task.name]) for records in seeds]
        for name in each[0]:
            if name not in values and all(name in own for own in each):
                values[name] = _over_seeds([own[name] for own in each])
    return values


def _is_share(name: str, task_list: Sequence[Task]) -> bool:
    """Whether a metric of the items lies between 0 and 1."""
    if metric := METRICS.get(name):
        return metric.unit.startswith("share")
    task_name, _, own_name = name.rpartition("/")
    return any(task.name == task_name and task.is_share(own_name) for task in task_list)


def _over_seeds(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the seeds' values. A limit's distance from it is the root of the sum of two squares: how far the
    limit of the items is from its value under the seed where that is farthest, and how far that of the seeds is."""
    if len(each) == 1:
        return dict(each[0])
    over = nested_interval([[own["value"]] for own in each], [[1.0]] * len(each))
    below = max(own["value"] - own["low"] for own in each)
    above = max(own["high"] - own["value"] for own in each)
    low = over.value - math.hypot(below, over.value - over.low)
    high = over.value + math.hypot(above, over.high - over.value)
    return Interval(over.value, low, high, min(own["n"] for own in each)).as_dict()


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a diverged model's perplexity is past what a float holds


def _aligned(by_seed: Sequence[Columns]) -> dict[str, list[Column]]:
    """Per metric that all seeds have their columns, over the items that some seed has; one that a seed has no figure of
    weighs nothing there."""
    result = {}
    for name in by_seed[0]:
        each = [columns[name] for columns in by_seed if name in columns]
        if len(each) == len(by_seed):
            result[name] = _filled(each)
    return result


def _filled(by_seed: Sequence[Column]) -> list[Column]:
    """The items of all columns in every column, in the same order, those that it lacked with weight 0."""
    ids = list(dict.fromkeys(chain.from_iterable(column.ids for column in by_seed)))
    result = []
    for column in by_seed:
        found = dict(zip(column.ids, zip(column.values, column.weights, strict=True), strict=True))
        values, weights = zip(*(found.get(id_, (0.0, 0.0)) for id_ in ids), strict=True)
        result.append(Column.of(ids, values, weights))
    return result


def _measurable(by_seed: Sequence[Column]) -> bool:
    return bool(by_seed[0].ids) and all(column.weights.sum() > 0 for column in by_seed)


def _common(by_seed: Sequence[Column]) -> list[Column]:
    """The same items in the same order in every column."""
    common = set.intersection(*(set(column.ids) for column in by_seed))
    ids = tuple(id_ for id_ in by_seed[0].ids if id_ in common)
    result = []
    for column in by_seed:
        places = {id_: index for index, id_ in enumerate(column.ids)}
        picks = [places[id_] for id_ in ids]
        result.append(Column(ids, column.values[picks], column.weights[picks]))
    return result


def _differences(first: Sequence[Columns], second: Sequence[Columns], resamples: int) -> dict[str, PairedDifference]:
    """first - second on the items that both have, seed by seed.

    Of two single trainings on a task's metric that is right or wrong item by item (accuracy, a pass rate of one draw) p
    is McNemar's, which is exact, in place of the bootstrap's; the interval stays the bootstrap's, and under LEAST_ITEMS
    items p stays 1.
    """
    differences = {}
    ours = _aligned(first)
    theirs = _aligned(second)
    for name in (name for name in ours if name in theirs):
        both = _common([*ours[name], *theirs[name]])
        if not _measurable(both):
            continue
        a = both[: len(ours[name])]
        b = both[len(ours[name]) :]
        differences[name] = nested_difference(
            [c.values for c in a],
            [c.weights for c in a],
            [c.values for c in b],
            [c.weights for c in b],
            resamples=resamples,
        )
        single = len(a) == len(b) == 1 and len(both[0].ids) >= LEAST_ITEMS
        if single and "/" in name and all(column.is_binary for column in both):
            exact = mcnemar(a[0].values == 1, b[0].values == 1)
            differences[name] = replace(differences[name], p=exact.p, test="mcnemar")
    return differences


def recovery(
    student: Sequence[SystemRecords],
    untouched: Sequence[SystemRecords],
    teacher: Sequence[SystemRecords],
    task_list: Sequence[Task],
) -> dict[str, dict[str, Any] | None]:
    """(student - untouched) / (teacher - untouched) per metric that has a better side; None where the teacher does
    not clearly lead."""
    sides = [_aligned([columns(one, task_list) for one in seeds]) for seeds in (student, untouched, teacher)]
    names = [name for name in sides[0] if all(name in side for side in sides)]
    shown_as = exponentials()
    result: dict[str, dict[str, Any] | None] = {}
    for name, facts in describe(names, task_list).items():
        if facts["better"] == "none":
            continue
        common = _common([column for side in sides for column in side[name]])
        interval = None
        if _measurable(common):
            left = iter(common)
            rows = [[next(left) for _ in side[name]] for side in sides]
            of = [([column.values for column in each], [column.weights for column in each]) for each in rows]
            interval = recovered(*of, better=facts["better"])
        result[shown_as.get(name, name)] = interval.as_dict() if interval else None
    return result


def values_by_seed(
    seeds: Sequence[int], records: Sequence[SystemRecords], task_list: Sequence[Task]
) -> dict[str, dict[str, float]]:
    """Each training's own values, without intervals: how much the seed alone changes."""
    shown_as = exponentials()
    result = {}
    for seed, one in zip(seeds, records, strict=True):
        means = {name: float(c.values.sum() / c.weights.sum()) for name, c in columns(one, task_list).items()}
        result[str(seed)] = {
            shown_as.get(name, name): _exp(value) if name in shown_as else value for name, value in means.items()
        }
    return result


def _wording(seeds: Sequence[SystemRecords]) -> dict[str, float | None]:
    """Properties of the system's own texts as a set, the mean over seeds; they are no means over items and have no
    interval."""
    sets = [[facts["text"] for facts in records.own_text] for records in seeds]
    by_property: dict[str, list[float | None]] = {
        "distinct_1": [wording.distinct_n(texts, 1) for texts in sets],
        "distinct_2": [wording.distinct_n(texts, 2) for texts in sets],
        "self_bleu": [wording.self_bleu(texts) for texts in sets],
    }
    result: dict[str, float | None] = {}
    for name, by_seed in by_property.items():
        values = [value for value in by_seed if value is not None]
        result[name] = sum(values) / len(values) if len(values) == len(seeds) else None
    return result


def robustness(systems: Systems, task_list: Sequence[Task]) -> dict[str, dict[str, dict[str, Any]]]:
    """{TASK@HOW/METRIC: {SYSTEM: relative drop}}: 1 - perturbed / plain, over the same items, for metrics that should
    be high.

    A system that scores nothing on the plain task has no drop and is left out.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for task in (task for task in task_list if "@" in task.name):
        plain = task.name.partition("@")[0]
        for name, seeds in systems.items():
            aligned = _aligned([columns(records, task_list) for records in seeds])
            for metric in (metric for metric in task.metrics if task.better(metric) == "high"):
                drop = _drop(aligned.get(f"{task.name}/{metric}"), aligned.get(f"{plain}/{metric}"))
                if drop is not None:
                    result.setdefault(f"{task.name}/{metric}", {})[name] = drop.as_dict()
    return result


def _drop(perturbed: Sequence[Column] | None, plain: Sequence[Column] | None) -> Interval | None:
    """1 - perturbed / plain; the items of the perturbed task are those of the plain one with @HOW after their ids."""
    if perturbed is None or plain is None:
        return None
    renamed = [replace(column, ids=tuple(id_.rpartition("@")[0] for id_ in column.ids)) for column in perturbed]
    both = _common([*renamed, *plain])
    after = both[: len(perturbed)]
    before = both[len(perturbed) :]
    if not both[0].ids or not all(column.values.sum() > 0 for column in before):
        return None
    left = nested_interval([c.values for c in after], [c.values for c in before])
    return Interval(1 - left.value, 1 - left.high, 1 - left.low, left.n)


def by_kind(
    systems: Systems, kinds: Mapping[str, str], task_list: Sequence[Task]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Forward KL (and the headline metric of tasks on the held-out prompts) of every system per kind of prompt."""
    metrics = ("forward_kl", *(f"{task.name}/{task.metrics[0]}" for task in task_list))
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for name, seeds in systems.items():
        for metric, by_seed in _aligned([columns(records, task_list) for records in seeds]).items():
            for kind in dict.fromkeys(kinds.values()) if metric in metrics else ():
                places = [index for index, id_ in enumerate(by_seed[0].ids) if kinds.get(id_) == kind]
                if places and sum(column.weights[places].sum() for column in by_seed) > 0:
                    rows = [c.values[places] for c in by_seed], [c.weights[places] for c in by_seed]
                    interval = nested_interval(*rows, of_share=_is_share(metric, task_list))
                    result.setdefault(kind, {}).setdefault(name, {})[metric] = interval.as_dict()
    return result if len(result) > 1 else {}


def warnings(
    systems: Systems, summary: Mapping[str, Any], trained: Sequence[str], shorten: Callable[[str], str] = str
) -> list[str]:
    """What a reader should know before believing a figure."""
    messages = []
    items = max(len(seeds[0].fidelity) for seeds in systems.values())
    if items < FEW_ITEMS:
        messages.append(f"Only {items} held-out answers: intervals are wide and may be too narrow for what they claim.")
    teachers = summary["systems"]["teacher"].get("own_finished")
    for name in trained:
        own = summary["systems"][name]
        finished = own.get("own_finished")
        if finished and teachers and finished["value"] < 0.5 * teachers["value"]:
            messages.append(
                f"{shorten(name)} ends {finished['value']:.0%} of its own answers, far fewer than the teacher."
            )
        repetition = own.get("own_repetition")
        if repetition and repetition["value"] > MUCH_REPETITION:
            messages.append(
                f"{shorten(name)} repeats itself: {repetition['value']:.0%} of the 4-grams of its own text had"
                " occurred in it before."
            )
    return messages
