"""What systems say per label of a classification, and per field of an extraction: confusions, precision, recall, F1.

A classification is a task of kind `classification`, or of kind `generation` whose checks name one right label each:
all `choice` with the same labels, or all `exact` with few different answers. An extraction has `json` checks.

Shapes: I items, L labels, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config.significance import CONFIDENCE
from limbeck.elicit import checks
from limbeck.elicit.json_in import objects_in, same
from limbeck.elicit.labels import decided
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.thinking import after_thinking
from limbeck.evaluate.items import GenerationSettings, LabelSettings
from limbeck.evaluate.records import ItemResult, SystemRecords
from limbeck.evaluate.statistics import RESAMPLES, Interval, ratio_interval, share_limits
from limbeck.evaluate.task import Task
from limbeck.evaluate.thinking_settings import thinking_of
from limbeck.storage.files import write_text
from limbeck.types import canonical_json

OTHER = "(no label)"
MOST_LABELS = 500
COUNTS_TOGETHER = 2**22

Systems = Mapping[str, Sequence[SystemRecords]]


def by_label(systems: Systems, tasks: Sequence[Task]) -> dict[str, Any]:
    """{TASK: {"labels": [...], "systems": {SYSTEM: figures}}} of every classification, of each system's first training.

    `figures` are those of `label_figures`. What names none of the labels, or several, counts as `OTHER`, which stands
    after the labels.
    """
    result = {}
    for task in tasks:
        labels = labels_of(task)
        of_systems = {}
        for name, seeds in systems.items() if labels else ():
            truth_I, chosen_I = _numbered(task, labels, seeds[0].tasks[task.name])
            if len(truth_I):
                of_systems[name] = label_figures(truth_I, chosen_I, labels)
        if of_systems:
            result[task.name] = {"labels": [*labels, OTHER], "systems": of_systems}
    return result


def labels_of(task: Task) -> list[str]:
    """The labels of a classification in the order of the task; empty for any other task."""
    if isinstance(task.protocol, LabelSettings):
        return list(task.protocol.labels)
    if not isinstance(task.protocol, GenerationSettings) or len(task.protocol.draws) > 1 or not task.prompts:
        return []
    found = [prompt.check or {} for prompt in task.prompts]
    kinds = {check.get("type") for check in found}
    if kinds == {"choice"} and all(check["labels"] == found[0]["labels"] for check in found):
        return list(found[0]["labels"])
    if kinds == {"exact"} and all(isinstance(check["answer"], str) for check in found):
        answers = list(dict.fromkeys(check["answer"] for check in found))
        return answers if 2 <= len(answers) <= min(MOST_LABELS, len(found) // 2) else []
    return []


def label_figures(truth_I: np.ndarray, chosen_I: np.ndarray, labels: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Confusions and figures per label, with bootstrap intervals over items.

    precision = TP / chosen, recall = TP / true, F1 = 2 TP / (true + chosen); None where the denominator is 0.
    `macro_f1` is the mean of F1 over the labels that are true or chosen somewhere.

    Args:
        truth_I, chosen_I: numbers of labels; `chosen_I` may hold len(labels), which is none of them.
    """
    count, size = len(truth_I), len(labels)
    truth_IL = np.eye(size)[truth_I]
    chosen_IL = np.eye(size + 1)[chosen_I][:, :size]
    tables = (truth_IL * chosen_IL, truth_IL, chosen_IL)
    whole = _ratios(*(table.sum(0, keepdims=True) for table in tables))
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, RESAMPLES, step := max(1, COUNTS_TOGETHER // count)):
        counts_RI = rng.multinomial(count, np.full(count, 1 / count), min(step, RESAMPLES - start))
        parts.append(_ratios(*(counts_RI @ table for table in tables)))
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    support_L, named_L = truth_IL.sum(0), chosen_IL.sum(0)
    items = {"precision": named_L, "recall": support_L, "f1": support_L}
    either_L = support_L + named_L - tables[0].sum(0)  # the items that F1 is over
    over = items | {"f1": either_L}
    of_labels = [
        {
            name: _interval(whole[name][0, n], drawn[name][:, n], int(items[name][n]), over=int(over[name][n]))
            for name in items
        }
        | {"items": int(support_L[n]), "chosen": int(named_L[n])}
        for n in range(size)
    ]
    pairs = Counter(zip(truth_I.tolist(), chosen_I.tolist(), strict=True))
    return {
        "by_label": of_labels,
        "macro_f1": _interval(whole["macro_f1"][0, 0], drawn["macro_f1"][:, 0], count),
        "confusions": [[truth, chosen, times] for (truth, chosen), times in sorted(pairs.items())],
    }


def _ratios(hits_RL: np.ndarray, true_RL: np.ndarray, named_RL: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 [R, L] and macro F1 [R, 1]; NaN where undefined."""

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.asarray(np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0))

    both_RL = true_RL + named_RL
    f1_RL = ratio(2.0 * hits_RL, both_RL)
    total_R1 = np.where(both_RL > 0, f1_RL, 0.0).sum(1, keepdims=True)
    return {
        "precision": ratio(1.0 * hits_RL, named_RL),
        "recall": ratio(1.0 * hits_RL, true_RL),
        "f1": f1_RL,
        "macro_f1": ratio(total_R1, (both_RL > 0).sum(1, keepdims=True)),
    }


def _interval(value: float, drawn_R: np.ndarray, items: int, *, over: int | None = None) -> dict[str, Any] | None:
    """A share with its limits; `over` so many items, where that is not the number that is shown."""
    if not np.isfinite(value):
        return None
    low, high = np.quantile(drawn_R[np.isfinite(drawn_R)], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    limits = share_limits(value, (float(low), float(high)), items if over is None else over)
    return Interval(float(value), *limits, items).as_dict()


def _numbered(task: Task, labels: Sequence[str], results: Sequence[ItemResult]) -> tuple[np.ndarray, np.ndarray]:
    """The true and the chosen label of every item, as numbers; len(labels) is none of them."""
    if isinstance(task.protocol, LabelSettings):
        pairs = [(item.facts["answer"], item.facts["chosen"]) for item in results]
    else:
        found = {prompt.id: prompt.check for prompt in task.prompts if prompt.check is not None}
        places = {label: number for number, label in enumerate(labels)}
        pairs = [
            (places[check["answer"]], places.get(said_label(check, _said(task, item), labels), len(labels)))
            for item in results
            if (check := found.get(item.item)) is not None
        ]
    truth_I, chosen_I = (np.array([pair[side] for pair in pairs], int) for side in (0, 1))
    return truth_I, chosen_I


def _said(task: Task, item: ItemResult) -> str:
    """What is judged of an item's text: under a budget of thinking the part that follows it."""
    thinking = thinking_of(task)
    return item.text if thinking is None else thinking.said(item.text)


def said_label(check: checks.Check, text: str, labels: Sequence[str]) -> str:
    """The one label that a text gives, as its check reads it; OTHER where it gives none or several."""
    answer = text if check.get("thinking") else after_thinking(text)
    if answer is None:
        return OTHER
    if check["type"] == "choice":
        found = set(decided(answer, labels))
    elif checks.exact(check, answer):
        return str(check["answer"])
    else:
        found = {label for label in labels if checks.exact({**check, "answer": label}, answer)}
    return found.pop() if len(found) == 1 else OTHER


def by_field(systems: Systems, tasks: Sequence[Task]) -> dict[str, Any]:
    """{TASK: {FIELD: {SYSTEM: share of the items whose first JSON object has the right value there}}}."""
    result: dict[str, Any] = {}
    for task in tasks:
        wanted = _wanted_fields(task)
        names = dict.fromkeys(field for fields in wanted.values() for field in fields)
        for name, seeds in systems.items() if names else ():
            said = {item.item: _first_object(_said(task, item)) for item in seeds[0].tasks[task.name]}
            for field in names:
                right = [
                    float(field in said[item] and same(said[item][field], fields[field]))
                    for item, fields in wanted.items()
                    if field in fields and item in said
                ]
                if right:
                    interval = ratio_interval(right, np.ones(len(right)), of_share=True).as_dict()
                    result.setdefault(task.name, {}).setdefault(field, {})[name] = interval
    return result


def _wanted_fields(task: Task) -> dict[str, dict[str, Any]]:
    """The right value of every field by item, of prompts with a `json` check; none where answers are drawn anew."""
    if not isinstance(task.protocol, GenerationSettings) or len(task.protocol.draws) > 1:
        return {}
    found = [(prompt.id, prompt.check or {}) for prompt in task.prompts]
    return {ident: dict(check["equals"]) for ident, check in found if check.get("type") == "json"}


def _first_object(text: str) -> dict[str, Any]:
    found = objects_in(after_thinking(text) or "")
    return found[0] if found else {}


def write_questions(folder: Path, tasks: Sequence[Task]) -> None:
    """Write `questions.jsonl`: the text of every task's item, and its right answer where that is a text."""
    records = []
    for task in tasks:
        for item in task.items:
            text = item.shown if isinstance(item, Prompt) else item.text
            record = {"task": task.name, "item": item.id, "text": text}
            records.append(record | ({"answer": answer} if (answer := _right_answer(item)) is not None else {}))
    write_text(folder / "questions.jsonl", "".join(canonical_json(record) + "\n" for record in records))


def _right_answer(item: Any) -> str | None:
    if isinstance(item, Prompt):
        check = item.check or {}
        right = check.get("answer", check.get("equals"))
        if right is None:
            return item.answers[0] if item.answers else None
        return right if isinstance(right, str) else canonical_json(right)
    return item.choices[item.answer] if hasattr(item, "choices") else None
