"""From every item that was measured to figures: values with intervals, paired differences, what was recovered.

A system is one training or several that differ in their seed only; then seeds are resampled as the outer level. All
that is here reads records, so a summary can be made again from a folder.

Shapes: S seeds, I items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from limbeck.evaluate import calibration, fidelity, tasks, wording
from limbeck.evaluate.measure import Measured
from limbeck.evaluate.metrics import described
from limbeck.evaluate.statistics import (
    LEAST_ITEMS,
    Difference,
    Interval,
    mcnemar,
    nested_difference,
    nested_interval,
    recovered,
)
from limbeck.evaluate.tasks import Task

Systems = Mapping[str, Sequence[Measured]]
PER_TOKEN = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": "jsd",
    "tvd": "tvd",
    "top1_agreement": "top1",
    "top5_overlap": "top5",
    "entropy": "entropy",
    "nll": "nll",
}
OWN_PER_TOKEN = {
    "own_forward_kl": "forward_kl",
    "own_reverse_kl": "reverse_kl",
    "own_top1_agreement": "top1",
    "own_entropy": "entropy",
    "own_teacher_nll": "teacher_nll",
}
SHOWN_AS = {"nll": "perplexity", "own_teacher_nll": "own_teacher_perplexity"}  # exponentials of these means
FEW_ITEMS = 30


@dataclass(frozen=True)
class Column:
    """One metric of one training: a value and a weight per item; the metric is sum of values / sum of weights."""

    ids: tuple[str, ...]
    values: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[str], values: Sequence[float], weights: Sequence[float] | None = None) -> Column:
        return cls(
            tuple(ids), np.asarray(values, float), np.ones(len(ids)) if weights is None else np.asarray(weights, float)
        )

    @property
    def right_or_wrong(self) -> bool:
        """Whether every item is 0 or 1 and counts once."""
        return bool(np.isin(self.values, (0, 1)).all() and (self.weights == 1).all())


def columns(found: Measured, task_list: Sequence[Task]) -> dict[str, Column]:
    """Every metric that is a mean over items or over their tokens."""
    result: dict[str, Column] = {}
    for items, names in ((found.fidelity, PER_TOKEN), (found.own, OWN_PER_TOKEN)):
        ids = [item.sample_id for item in items]
        tokens = [item.tokens for item in items]
        known = {name: key for name, key in names.items() if all(key in item.sums for item in items)}
        result |= {name: Column.of(ids, [item.sums[key] for item in items], tokens) for name, key in known.items()}
    wrong = [item for item in found.fidelity if item.sums["wrong"] > 0 and "same_wrong" in item.sums]
    result["agree_when_wrong"] = Column.of(
        [item.sample_id for item in wrong],
        [item.sums["same_wrong"] for item in wrong],
        [item.sums["wrong"] for item in wrong],
    )
    own_ids = [item.sample_id for item in found.own]
    for name, key in (("own_tokens", "tokens"), ("own_finished", "finished"), ("own_repetition", "repetition")):
        known_ids = [
            (id_, facts[key]) for id_, facts in zip(own_ids, found.own_text, strict=True) if facts[key] is not None
        ]
        result[name] = Column.of([id_ for id_, _ in known_ids], [float(value) for _, value in known_ids])
    for task in task_list:
        scored = found.tasks[task.name]
        for metric in dict.fromkeys(metric for item in scored for metric in item.scores):
            having = [item for item in scored if metric in item.scores]
            weights = [item.weights.get(metric, 1.0) for item in having]
            result[f"{task.name}/{metric}"] = Column.of(
                [item.item for item in having], [item.scores[metric] for item in having], weights
            )
    return {name: column for name, column in result.items() if len(column.ids) and column.weights.sum() > 0}


def summarise(systems: Systems, task_list: Sequence[Task], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values of every system, differences of every (first, second) pair, and what stands beside them."""
    known = {name: [columns(one, task_list) for one in seeds] for name, seeds in systems.items()}
    values = {name: _values(systems[name], known[name], task_list) for name in systems}
    metrics = list(dict.fromkeys([*(metric for found in values.values() for metric in found), *SHOWN_AS]))
    return {
        "systems": values,
        "metrics": described(metrics, task_list),
        "paired": {
            f"{a} - {b}": {m: d.as_dict() for m, d in _differences(known[a], known[b]).items()} for a, b in pairs
        },
        "calibration": {
            name: calibration.curve(_reliability(seeds)) for name, seeds in systems.items() if seeds[0].fidelity
        },
        "exposure": {
            name: fidelity.exposure(*_both(seeds))
            for name, seeds in systems.items()
            if name != "teacher" and seeds[0].free
        },
        "wording": {name: _wording(seeds) for name, seeds in systems.items() if seeds[0].own_text},
        "efficiency": {name: seeds[0].efficiency for name, seeds in systems.items() if seeds[0].efficiency},
        "robustness": robustness(systems, task_list),
    }


def _values(
    seeds: Sequence[Measured], known: Sequence[dict[str, Column]], task_list: Sequence[Task]
) -> dict[str, dict[str, Any]]:
    found = {}
    for name, by_seed in _aligned(known).items():
        interval = nested_interval([column.values for column in by_seed], [column.weights for column in by_seed])
        shown = SHOWN_AS.get(name)
        if shown:
            interval = interval.exponential()
        found[shown or name] = interval.as_dict()
    if seeds[0].fidelity:
        found["ece"] = calibration.ece_interval(_tables(seeds)).as_dict()
    for task in task_list:  # a task's own figures that are no means over items, such as macro F1
        if len(seeds) == 1:
            found |= {
                name: v for name, v in tasks.summarise(task, seeds[0].tasks[task.name]).items() if name not in found
            }
    return found


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a diverged model's perplexity is past what a float holds


def _aligned(known: Sequence[dict[str, Column]]) -> dict[str, list[Column]]:
    """Per metric the columns of all seeds, over the items that every seed has."""
    found = {}
    for name in known[0]:
        by_seed = [columns[name] for columns in known if name in columns]
        common = _common(by_seed) if len(by_seed) == len(known) else []
        if common and _measurable(common):
            found[name] = common
    return found


def _measurable(by_seed: Sequence[Column]) -> bool:
    return bool(by_seed[0].ids) and all(column.weights.sum() > 0 for column in by_seed)


def _common(by_seed: Sequence[Column]) -> list[Column]:
    """The same items in the same order in every column."""
    common = set.intersection(*(set(column.ids) for column in by_seed))
    ids = tuple(id_ for id_ in by_seed[0].ids if id_ in common)
    result = []
    for column in by_seed:
        place = {id_: index for index, id_ in enumerate(column.ids)}
        picks = [place[id_] for id_ in ids]
        result.append(Column(ids, column.values[picks], column.weights[picks]))
    return result


def _differences(first: Sequence[dict[str, Column]], second: Sequence[dict[str, Column]]) -> dict[str, Difference]:
    """first - second on the items that both have, seed by seed.

    Of two single trainings on a task's metric that is right or wrong item by item (accuracy, a pass rate of one draw) p
    is McNemar's, which is exact, in place of the bootstrap's; the interval stays the bootstrap's, and under LEAST_ITEMS
    items p stays 1.
    """
    found = {}
    ours = _aligned(first)
    theirs = _aligned(second)
    for name in (name for name in ours if name in theirs):
        both = _common([*ours[name], *theirs[name]])
        if not _measurable(both):
            continue
        a = both[: len(ours[name])]
        b = both[len(ours[name]) :]
        found[name] = nested_difference(
            [c.values for c in a], [c.weights for c in a], [c.values for c in b], [c.weights for c in b]
        )
        single = len(a) == len(b) == 1 and len(both[0].ids) >= LEAST_ITEMS
        if single and "/" in name and all(column.right_or_wrong for column in both):
            found[name] = replace(found[name], p=mcnemar(a[0].values == 1, b[0].values == 1).p, test="mcnemar")
    return found


def recovery(
    student: Sequence[Measured], untouched: Sequence[Measured], teacher: Sequence[Measured], task_list: Sequence[Task]
) -> dict[str, dict[str, Any] | None]:
    """(student - untouched) / (teacher - untouched) per metric that has a better side; None where teacher and untouched
    may be equal."""
    sides = [_aligned([columns(one, task_list) for one in seeds]) for seeds in (student, untouched, teacher)]
    found: dict[str, dict[str, Any] | None] = {}
    for name, facts in described([name for name in sides[0] if all(name in side for side in sides)], task_list).items():
        if facts["better"] != "none":
            parts = [_pooled(side[name]) for side in sides]
            s, u, t = both = _common(parts)
            interval = None
            if _measurable(both):
                interval = recovered((s.values, s.weights), (u.values, u.weights), (t.values, t.weights))
            found[SHOWN_AS.get(name, name)] = interval.as_dict() if interval else None
    return found


def _pooled(by_seed: Sequence[Column]) -> Column:
    """Seeds added up, item by item."""
    return Column(by_seed[0].ids, sum(column.values for column in by_seed), sum(column.weights for column in by_seed))  # type: ignore[arg-type]


def values_by_seed(
    seeds: Sequence[int], measured: Sequence[Measured], task_list: Sequence[Task]
) -> dict[str, dict[str, float]]:
    """Each training's own values, without intervals: how much the seed alone changes."""
    found = {}
    for seed, one in zip(seeds, measured, strict=True):
        known = {name: float(c.values.sum() / c.weights.sum()) for name, c in columns(one, task_list).items()}
        found[str(seed)] = {
            SHOWN_AS.get(name, name): _exp(value) if name in SHOWN_AS else value for name, value in known.items()
        }
    return found


def _reliability(seeds: Sequence[Measured]) -> calibration.Reliability:
    return calibration.merged(_tables(seeds))


def _tables(seeds: Sequence[Measured]) -> list[calibration.Reliability]:
    """One reliability table per item, the seeds' added up."""
    by_item: dict[str, list[calibration.Reliability]] = {}
    for one in seeds:
        for item in one.fidelity:
            if item.reliability:
                by_item.setdefault(item.sample_id, []).append(item.reliability)
    return [calibration.merged(tables) for tables in by_item.values()]


def _both(seeds: Sequence[Measured]) -> tuple[list[Any], list[Any]]:
    return [item for one in seeds for item in one.own], [item for one in seeds for item in one.free]


def _wording(seeds: Sequence[Measured]) -> dict[str, float | None]:
    """Properties of the system's own texts as a set, the mean over seeds; they are no means over items and have no
    interval."""
    sets = [[facts["text"] for facts in one.own_text] for one in seeds]
    found: dict[str, list[float | None]] = {
        "distinct_1": [wording.distinct_n(texts, 1) for texts in sets],
        "distinct_2": [wording.distinct_n(texts, 2) for texts in sets],
        "self_bleu": [wording.self_bleu(texts) for texts in sets],
    }
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: sum(values) / len(values) if len(values) == len(seeds) else None for name, values in known.items()}


def robustness(systems: Systems, task_list: Sequence[Task]) -> dict[str, dict[str, dict[str, Any]]]:
    """{TASK@HOW/METRIC: {SYSTEM: relative drop}}: 1 - perturbed / plain, over the same items, for metrics that should
    be high.

    A system that scores nothing on the plain task has no drop and is left out.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task in (task for task in task_list if "@" in task.name):
        plain = task.name.partition("@")[0]
        for name, seeds in systems.items():
            known = _aligned([columns(one, task_list) for one in seeds])
            for metric in (metric for metric in task.metrics if task.better(metric) == "high"):
                asked = known.get(f"{task.name}/{metric}")
                before = known.get(f"{plain}/{metric}")
                if asked is None or before is None:
                    continue
                renamed = [replace(column, ids=tuple(id_.rpartition("@")[0] for id_ in column.ids)) for column in asked]
                both = _common([*renamed, *before])
                after = both[: len(asked)]
                base = both[len(asked) :]
                if both[0].ids and all(column.values.sum() > 0 for column in base):
                    left = nested_interval([c.values for c in after], [c.values for c in base])
                    drop = Interval(1 - left.value, 1 - left.high, 1 - left.low, left.n)
                    found.setdefault(f"{task.name}/{metric}", {})[name] = drop.as_dict()
    return found


def by_kind(
    systems: Systems, kinds: Mapping[str, str], task_list: Sequence[Task]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Forward KL (and the pass rate of tasks on the held-out prompts) of every system per kind of prompt."""
    picked = ("forward_kl", *(f"{task.name}/{task.metrics[0]}" for task in task_list))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, seeds in systems.items():
        for metric, by_seed in _aligned([columns(one, task_list) for one in seeds]).items():
            for kind in dict.fromkeys(kinds.values()) if metric in picked else ():
                places = [index for index, id_ in enumerate(by_seed[0].ids) if kinds.get(id_) == kind]
                if places and sum(column.weights[places].sum() for column in by_seed) > 0:
                    interval = nested_interval(
                        [c.values[places] for c in by_seed], [c.weights[places] for c in by_seed]
                    )
                    found.setdefault(kind, {}).setdefault(name, {})[metric] = interval.as_dict()
    return found if len(found) > 1 else {}


def warnings(
    systems: Systems, summary: Mapping[str, Any], trained: Sequence[str], shorten: Callable[[str], str] = str
) -> list[str]:
    """What a reader should know before believing a figure."""
    found = []
    items = max(len(seeds[0].fidelity) for seeds in systems.values())
    if items < FEW_ITEMS:
        found.append(f"Only {items} held-out answers: intervals are wide and may be too narrow for what they claim.")
    for name in trained:
        own = summary["systems"][name]
        ended = own.get("own_finished")
        teachers = summary["systems"]["teacher"].get("own_finished")
        if ended and teachers and ended["value"] < 0.5 * teachers["value"]:
            found.append(f"{shorten(name)} ends {ended['value']:.0%} of its own answers, far fewer than the teacher.")
        if (repeats := own.get("own_repetition")) and repeats["value"] > 0.3:
            found.append(
                f"{shorten(name)} repeats itself: {repeats['value']:.0%} of the 4-grams of its own text stood there"
                " before."
            )
    return found
