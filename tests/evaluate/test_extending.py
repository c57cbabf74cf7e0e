"""A metric, a kind of task and a control each come from one declaration: here from outside of the package."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

import limbeck
from limbeck.config.recipe import parse
from limbeck.data.batches import Row
from limbeck.evaluate.fidelity import EvaluationText, fidelity
from limbeck.evaluate.items import TaskSettings
from limbeck.evaluate.metrics import HELD_OUT, METRICS, SystemMetric, TaskMetric, TokenRatio
from limbeck.evaluate.perturb import perturbed
from limbeck.evaluate.records import ItemResult, SystemRecords
from limbeck.evaluate.summary import summarise
from limbeck.evaluate.task import TaskKind
from limbeck.evaluate.tasks import KINDS, load_task, run_task
from limbeck.evaluate.tasks import summarise as summarise_task
from limbeck.evaluate.token_sums import TokenSum
from limbeck.models.teacher import InProcessTeacher
from limbeck.report.metrics import OLDEST, metrics_of
from limbeck.storage.files import read_jsonl
from limbeck.training.controls import CONTROLS, Control
from limbeck.types import RecipeError, UserError

ROWS = [Row(f"s{i}", (5, 6, 7), (20 + i, 21, 0)) for i in range(3)]


def test_a_metric_is_one_entry_from_the_distributions_to_the_report(tiny, monkeypatch):
    """The probability of the text's own token, averaged over tokens."""
    prob = TokenSum("prob", lambda block: block.q.prob.gather(-1, block.targets_R1)[:, 0], reads_teacher=False)
    metric = SystemMetric("Token probability", "share", "high", HELD_OUT, source=TokenRatio("held_out", prob))
    monkeypatch.setitem(METRICS, "token_probability", metric)
    items = fidelity(tiny, EvaluationText(ROWS, InProcessTeacher(tiny)))
    summary = summarise({"a": [SystemRecords("a", items, [], [], [], [], {}, {})]}, [], [])
    value = summary["systems"]["a"]["token_probability"]["value"]
    assert 0 < value < 1 and value == pytest.approx(sum(item.sums["prob"] for item in items) / 9)
    column = metrics_of(summary)["token_probability"]
    assert (column.title, column.unit, column.better) == ("Token probability", "share", "high")


def test_old_summaries_get_the_titles_that_new_ones_carry():
    for name, (title, _, better) in OLDEST.items():
        assert (METRICS[name].title, METRICS[name].better) == (title, better)


@dataclass(frozen=True)
class Word:
    id: str
    text: str
    tokens: int


class Counting(TaskKind):
    """How many tokens a word has."""

    name = "counting"
    settings = TaskSettings
    metrics = {"right": TaskMetric("Right", "high")}  # noqa: RUF012

    def parse(self, data, ident, place, settings) -> Any:
        if "word" not in data:
            raise UserError(f"{place}: needs a word")
        return Word(ident, data["word"], data["tokens"])

    def score(self, task, system, progress, answers):
        return [ItemResult(w.id, {"right": float(len(system.text_ids(w.text)) == w.tokens)}) for w in task.items]

    def change_question(self, item, change):
        return replace(item, text=change(item.text))


def test_a_kind_of_task_is_one_class(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(KINDS, "counting", Counting())
    (tmp_path / "task.yaml").write_text("{name: count, version: 1, kind: counting, description: d, test: test.jsonl}")
    words = [{"word": "cat", "tokens": len(tiny.text_ids("cat"))}, {"word": "dog", "tokens": 99}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    task = load_task(str(tmp_path))
    summary = summarise_task(task, run_task(task, tiny))
    assert summary["count/right"]["value"] == 0.5 and task.title("right") == "Right" and task.better("right") == "high"
    assert perturbed(task, "distraction").items[0].text.endswith(" cat")
    assert [text for _, text in task.texts] == ["cat", "dog"] and not task.shares_answers
    (tmp_path / "test.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"test\.jsonl, line 1: needs a word"):
        load_task(str(tmp_path))


def test_a_control_is_one_entry(recipe_data, tmp_path, monkeypatch):
    """Fine-tuning on the first answer alone."""
    control = Control(
        rows=lambda data: list(data.preferred_rows()[:1]),
        refusal=lambda recipe, prompts: "give more prompts" if len(prompts) < 2 else None,
    )
    monkeypatch.setitem(CONTROLS, "one_answer", control)
    recipe_data["evaluate"]["controls"] = ["untouched", "one_answer"]
    limbeck.run(parse(recipe_data), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "evaluation" / "summary.json").read_text())
    assert summary["controls"] == ["untouched", "one_answer"]
    assert summary["systems"]["one_answer"]["forward_kl"] != summary["systems"]["untouched"]["forward_kl"]
    assert len(read_jsonl(tmp_path / "out" / "controls" / "one_answer" / "metrics.jsonl")) == 6
    assert "one_answer" in (tmp_path / "out" / "report.html").read_text()
    recipe_data["prompts"]["limit"] = 1
    with pytest.raises(RecipeError, match="give more prompts"):
        limbeck.check(parse(recipe_data))
