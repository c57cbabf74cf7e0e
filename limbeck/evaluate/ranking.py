"""Ranking: documents ordered by the likelihood of the query after each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from limbeck.evaluate.items import RankingItem, RankingSettings, parse_ranking
from limbeck.evaluate.likelihood import Continuation, log_probs, prompt_ids, text_ids
from limbeck.evaluate.metrics import TaskMetric
from limbeck.evaluate.records import ItemResult, Progress
from limbeck.evaluate.statistics import ndcg
from limbeck.evaluate.task import GreedyAnswers, Task, TaskKind
from limbeck.models.model import Model


def score_rankings(
    items: Sequence[RankingItem], settings: RankingSettings, system: Model, progress: Progress
) -> list[ItemResult]:
    """Documents ordered by the query's log-probability per token after each of them (query likelihood, Ponte and Croft
    1998).

    Of documents with equal scores the earlier one comes first.
    """
    continuations = []
    for item in items:
        query = tuple(text_ids(system, settings.joint + item.query))
        continuations += [
            Continuation(item.id, prompt_ids(system, settings, {"document": text}), query) for text in item.documents
        ]
    values = log_probs(system, continuations, progress)
    results = []
    start = 0
    for item in items:
        places = range(len(item.documents))
        per_token = [values[start + place] / len(continuations[start + place].ids) for place in places]
        start += len(per_token)
        order = sorted(places, key=lambda place: -per_token[place])
        ranked = [item.relevances[place] for place in order]
        scores = {f"ndcg@{k}": float(ndcg(ranked, k)) for k in settings.k}
        facts = {"log_probs": per_token, "order": order}
        results.append(ItemResult(item.id, scores, text=item.documents[order[0]], facts=facts))
    return results


class RankingKind(TaskKind):
    name = "ranking"
    settings = RankingSettings
    metrics = {"ndcg": TaskMetric("nDCG", "high")}  # noqa: RUF012

    def parse(self, data: dict[str, Any], ident: str, place: str, settings: Any) -> RankingItem:
        return parse_ranking(data, ident, place)

    def score(self, task: Task, system: Model, progress: Progress, answers: GreedyAnswers) -> list[ItemResult]:
        return score_rankings(task.items, task.protocol, system, progress)

    def possible_metrics(self, settings: RankingSettings, items: Sequence[RankingItem]) -> list[str]:
        return [f"ndcg@{k}" for k in settings.k]

    def texts(self, item: RankingItem) -> Sequence[str]:
        return (item.query, *item.documents)

    def change_question(self, item: RankingItem, change: Callable[[str], str]) -> RankingItem:
        return replace(item, query=change(item.query))
