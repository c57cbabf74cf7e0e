"""Multiple choice and classification, by the log-probability of every choice after the item's prompt.

Shapes: I items, L labels, C choices, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.config.significance import CONFIDENCE
from limbeck.evaluate.calibration import brier
from limbeck.evaluate.items import (
    ChoiceItem,
    ChoiceSettings,
    LabelSettings,
    TemplateSettings,
    parse_choice,
    parse_label,
)
from limbeck.evaluate.likelihood import Continuation, log_probs, prompt_ids, text_ids
from limbeck.evaluate.metrics import TaskMetric
from limbeck.evaluate.records import ItemResult, Progress
from limbeck.evaluate.statistics import RESAMPLES, Interval, share_limits
from limbeck.evaluate.task import GreedyAnswers, HarnessForm, Task, TaskKind
from limbeck.models.model import Model
from limbeck.types import UserError

COUNTS_TOGETHER = 2**22


def score_choices(
    items: Sequence[ChoiceItem], settings: TemplateSettings, system: Model, progress: Progress
) -> list[ItemResult]:
    """The choices of every item by their log-probability after its prompt.

    `acc`: the most likely choice is the right one. `acc_norm`: the same with the log-probability divided by the
    choice's UTF-8 bytes; lm-evaluation-harness calls that acc_bytes, and its acc_norm divides by characters, which is
    the same for ASCII. `probability`: that of the right choice among the choices (softmax of their log-probabilities).
    `brier`: the sum over choices of (probability - truth)^2, 0 to 2. Of equal choices the first is taken.
    """
    continuations = []
    for item in items:
        prompt = prompt_ids(system, settings, item.fields)
        continuations += [
            Continuation(item.id, prompt, tuple(text_ids(system, settings.joint + choice))) for choice in item.choices
        ]
    values = iter(log_probs(system, continuations, progress))
    return [_choice_result(item, np.array([next(values) for _ in item.choices])) for item in items]


def _choice_result(item: ChoiceItem, log_prob_C: np.ndarray) -> ItemResult:
    bytes_C = np.array([len(choice.encode()) for choice in item.choices])
    odds_C = np.exp(log_prob_C - log_prob_C.max())
    prob_C = odds_C / odds_C.sum()
    chosen = int(log_prob_C.argmax())
    scores = {
        "acc": float(chosen == item.answer),
        "acc_norm": float(int((log_prob_C / bytes_C).argmax()) == item.answer),
        "probability": float(prob_C[item.answer]),
        "brier": float(brier(prob_C[None], np.array([item.answer]))),
    }
    facts = {
        "log_probs": log_prob_C.tolist(),
        "probabilities": prob_C.tolist(),
        "chosen": chosen,
        "answer": item.answer,
    }
    return ItemResult(item.id, scores, text=item.choices[chosen], facts=facts)


def macro_f1(truth_I: np.ndarray, chosen_I: np.ndarray, labels: int, seed: int = 0) -> Interval:
    """The mean over labels of F1 = 2 TP / (2 TP + FP + FN), with its bootstrap interval over items.

    A label that is neither true nor chosen anywhere (in the data, or in a resample) has no F1 and is left out of the
    mean.

    Args:
        truth_I, chosen_I: numbers of labels, 0 to `labels` - 1.
    """
    truth_IL = np.eye(labels)[truth_I]
    chosen_IL = np.eye(labels)[chosen_I]
    hits_IL = truth_IL * chosen_IL
    named_IL = truth_IL + chosen_IL

    def mean_f1(counts_RI: np.ndarray) -> np.ndarray:
        hits_RL = counts_RI @ hits_IL
        named_RL = counts_RI @ named_IL
        f1_RL = np.divide(2 * hits_RL, named_RL, out=np.zeros_like(hits_RL), where=named_RL > 0)
        return np.asarray(f1_RL.sum(1) / (named_RL > 0).sum(1))

    count = len(truth_I)
    rng = np.random.default_rng(seed)
    shares_I = np.full(count, 1 / count)
    size = max(1, COUNTS_TOGETHER // count)
    resampled = [
        mean_f1(rng.multinomial(count, shares_I, min(size, RESAMPLES - start))) for start in range(0, RESAMPLES, size)
    ]
    low, high = np.quantile(np.concatenate(resampled), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(mean_f1(np.ones((1, count)))[0])
    return Interval(value, *share_limits(value, (float(low), float(high)), count), count)


def _macro_f1_of(settings: LabelSettings, results: Sequence[ItemResult]) -> Interval:
    truth_I, chosen_I = (np.array([item.facts[key] for item in results]) for key in ("answer", "chosen"))
    return macro_f1(truth_I, chosen_I, len(settings.labels))


class ChoiceKind(TaskKind):
    """Tasks whose items have choices, one of which is right."""

    def __init__(
        self,
        name: str,
        settings: type[TemplateSettings],
        parse_item: Callable[..., ChoiceItem],
        metrics: Mapping[str, TaskMetric],
    ) -> None:
        self.name = name
        self.settings = settings
        self.parse_item = parse_item
        self.metrics = metrics

    def parse(self, data: dict[str, Any], ident: str, place: str, settings: Any) -> ChoiceItem:
        return self.parse_item(data, ident, place, settings)

    def score(self, task: Task, system: Model, progress: Progress, answers: GreedyAnswers) -> list[ItemResult]:
        return score_choices(task.items, task.protocol, system, progress)

    def change_question(self, item: ChoiceItem, change: Callable[[str], str]) -> ChoiceItem:
        return replace(item, fields={key: change(text) for key, text in item.fields.items()})

    def harness_form(self, task: Task, max_tokens: int) -> HarnessForm:
        """`acc` of both programs is the same number; `acc_norm` is called `acc_bytes` there, `brier` `brier_score`."""
        settings: TemplateSettings = task.protocol
        if settings.format == "chat" and settings.joint:
            raise UserError(
                f"{task.name}: in a chat, lm-evaluation-harness puts no delimiter before a choice; leave"
                " settings.delimiter out"
            )
        docs = [
            {"id": item.id, "prompt": settings.fill(item.fields), "choices": list(item.choices), "answer": item.answer}
            for item in task.items
        ]
        config = {
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": settings.joint,
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True},
                {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
            ],
        }
        return HarnessForm(docs, settings.format == "chat", config)


ACC = TaskMetric("Accuracy", "high")
PROBABILITY = TaskMetric("Probability of the right choice", "high")
BRIER = TaskMetric("Brier score", "low")
MULTIPLE_CHOICE = ChoiceKind(
    "multiple_choice",
    ChoiceSettings,
    parse_choice,
    {
        "acc": ACC,
        "acc_norm": TaskMetric("Accuracy, length-normalised", "high"),
        "probability": PROBABILITY,
        "brier": BRIER,
    },
)
CLASSIFICATION = ChoiceKind(
    "classification",
    LabelSettings,
    parse_label,
    {
        "acc": ACC,
        "macro_f1": TaskMetric("Macro F1", "high", interval=_macro_f1_of),
        "probability": PROBABILITY,
        "brier": BRIER,
    },
)
