"""Generation tasks under budgets of thinking: what is measured, what is refused, and the figure of it."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from limbeck.config.recipe import parse
from limbeck.evaluate.records import CheckedAnswer, ItemResult
from limbeck.evaluate.task import GreedyAnswers
from limbeck.evaluate.tasks import load_task, run_task, run_task_by_text, summarise
from limbeck.models import forcing
from limbeck.models.forcing import BudgetedText
from limbeck.report.budgets import budget_figures
from limbeck.report.page import write_report
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError, UserError, canonical_json
from tests.report_folders import around, make_run

HEAD = "name: mine\nversion: 1.0\ndescription: d\ntest: test.jsonl\nsettings: "
LINES = [
    {"id": "a", "prompt": "why is the sky blue", "check": {"type": "number", "answer": 7}, "references": ["it is 7"]},
    {"id": "b", "prompt": "count one two", "check": {"type": "number", "answer": 8}},
]


@pytest.fixture
def task_of(tmp_path):
    def make(settings, name="t"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "task.yaml").write_text(f"{HEAD}{settings}\n")
        (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
        return load_task(str(folder))

    return make


def play(monkeypatch, texts):
    """In place of a model: the same text under every budget of that size, in tokens of one letter."""

    def write(model, jobs, bounds, progress):
        told = []
        for number, _ in enumerate(jobs):
            text, spent = texts[bounds.most][number % 2]
            ids = [token for letter in text for token in model.text_ids(letter)]
            told.append(BudgetedText(ids, spent, 3, 5, bounds.waits, is_cut=spent == bounds.most, finished=True))
            progress(number + 1)
        return told

    monkeypatch.setattr("limbeck.evaluate.thinking_budget.write_within", write)


def test_every_budget_has_its_own_metrics(task_of, tiny, monkeypatch):
    task = task_of("{max_tokens: 6, thinking: {budgets: [4, 9], waits: 2}}")
    names = ("pass_rate", "rouge_l", "finished", "answered", "tokens", "thinking_tokens", "cut_thinking")
    assert task.metrics == tuple(f"{name}@{most}" for most in (9, 4) for name in names) and not task.shares_answers
    assert (task.better("pass_rate@9"), task.title("tokens@4")) == ("high", "Length in tokens@4")
    assert task.settings["thinking"] == {"budgets": [4, 9], "waits": 2, "wait": "Wait"}
    play(monkeypatch, {4: [("<think>7</think>1", 4), ("<think>8", 4)], 9: [("<think>x</think>it is 7", 5), ("<think>x</think>8", 9)]})  # fmt: skip
    told = []
    first, second = run_task(task, tiny, lambda *counts: told.append(counts), {p.id: None for p in task.prompts})
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (first.scores["pass_rate@4"], first.scores["pass_rate@9"], first.scores["rouge_l@9"]) == (0, 1, 1)
    assert (second.scores["pass_rate@4"], second.scores["answered@4"], second.scores["cut_thinking@9"]) == (0, 0, 1)
    assert first.scores["tokens@9"] == 8 and first.scores["thinking_tokens@9"] == 5 and first.text.endswith("it is 7")
    assert first.facts["budgets"]["9"] | {"text": ""} == {
        "tokens": 8, "finished": True, "passed": True, "answered": True, "text": "", "thinking_tokens": 5, "cut_thinking": False,
        "forced_tokens": 5, "waits": 2,
    }  # fmt: skip
    assert ItemResult(**json.loads(canonical_json(vars(first)))) == first
    summary = summarise(task, [first, second])
    assert summary["mine/pass_rate@9"]["value"] == 1 and summary["mine/pass_rate@9"]["n"] == 2
    assert summary["mine/tokens@9"]["value"] == 10 and summary["mine/rouge_l@9"]["n"] == 1


def test_one_budget_keeps_the_plain_names_and_draws(task_of, tiny, monkeypatch):
    task = task_of("{temperature: 1.0, samples: 2, pass_at: [2], max_tokens: 6, thinking: {most: 4}}")
    assert task.metrics[:3] == ("pass_rate", "pass@2", "rouge_l") and task.metrics[-1] == "cut_thinking"
    play(monkeypatch, {4: [("<think>x</think>7", 4), ("<think>x</think>8", 2)]})
    first, second = run_task(task, tiny)
    assert (first.scores["pass_rate"], first.scores["pass@2"], first.scores["thinking_tokens"]) == (0.5, 1, 3)
    draws = first.facts["budgets"]["4"]["draws"]
    assert [draw["passed"] for draw in draws] == [True, False] and [draw["seed"] for draw in draws] == [0, 1]


def test_a_cue_judges_what_follows_it(task_of, tiny, monkeypatch):
    task = task_of("{max_tokens: 6, thinking: {most: 4, cue: 'Answer:'}}")
    play(monkeypatch, {4: [("so 7. answer: none", 4), ("it is 8", 4)]})
    first, second = run_task(task, tiny)
    assert first.scores["pass_rate"] == 0, "the number stands before the cue"
    assert second.scores["pass_rate"] == 1, "without the cue all of it is the answer"


@pytest.mark.parametrize("temperature", ["0.0", "1.0"])
def test_where_nothing_is_thought_the_answers_are_those_without_a_budget(task_of, tiny, temperature):
    """A tiny model writes no mark: under any budget it gives the plain task's text, and no tokens of thinking."""
    plain = run_task(task_of(f"{{temperature: {temperature}, max_tokens: 12}}", "p"), tiny)
    within = run_task(
        task_of(f"{{temperature: {temperature}, max_tokens: 12, thinking: {{most: 30, waits: 2}}}}", "w"), tiny
    )
    for one, other in zip(plain, within, strict=True):
        assert one.text == other.text and one.scores == {name: other.scores[name] for name in one.scores}
        assert other.scores["thinking_tokens"] == other.scores["cut_thinking"] == 0


def test_thinking_is_really_cut(task_of, tiny):
    task = task_of("{max_tokens: 6, thinking: {budgets: [3, 8], begin: <think>}}")
    for item in run_task(task, tiny):
        for most in (3, 8):
            facts = item.facts["budgets"][str(most)]
            assert facts["thinking_tokens"] == most and facts["cut_thinking"] and facts["answered"]
            assert facts["text"].startswith("<think>\n") and "\n</think>\n\n" in facts["text"]
            assert most < facts["tokens"] <= most + 6 and facts["forced_tokens"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{thinking: {}}", "say how many tokens"), ("{thinking: {most: 4, budgets: [4]}}", "not both"), ("{thinking: {budgets: [8, 4]}}", r"must rise.*\[8, 4\]"),
        ("{thinking: {budgets: [4, 4]}}", "each given once"), ("{thinking: {budgets: []}}", "budgets"), ("{thinking: {most: 0}}", "most"),
        ("{thinking: {most: 4, begin: think}}", "mark that opens thinking.*'think'"), ("{thinking: {most: 4, cue: ' '}}", "words that end"),
        ("{thinking: {most: 4, cue: 'A:', begin: <think>}}", "begin or cue"), ("{thinking: {most: 4, budget: 3}}", "unknown"),
        ("{temperature: 1.0, samples: 2, pass_at: [2], thinking: {budgets: [4, 8]}}", "pass_at can't"), ("{thinking: {most: 4, waits: -1}}", "waits"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(task_of, settings, message):
    with pytest.raises(UserError, match=message):
        task_of(settings)


def test_other_tasks_settings_stay_as_they_were(task_of):
    assert "thinking" not in task_of("{max_tokens: 6}").settings and "thinking" not in load_task("sums").settings


def test_a_harness_and_a_server_cant_hold_to_a_budget(task_of, tiny, recipe_data, tiny_folder):
    task = task_of("{thinking: {most: 4}}")
    with pytest.raises(UserError, match="harness can't do"):
        task.kind.harness_form(task, 10)
    assert run_task_by_text(task, lambda *_: pytest.fail("asked"), {}, 10) == []
    assert task.kind.score_by_text(task, lambda *_: pytest.fail("asked"), GreedyAnswers({}, 10)) == []
    recipe_data["evaluate"]["metrics"] = ["fidelity", "sums-budgets"]
    resolve(parse(recipe_data))
    served = recipe_data | {
        "teacher": {"server": {"url": "http://127.0.0.1:9/v1", "name": "toy"}},
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "loss": ["cross_entropy"],
    }
    with pytest.raises(RecipeError, match=r"evaluate.metrics: the task sums-budgets holds.*server.*teacher.model"):
        resolve(parse(served))


def test_a_budget_without_room_or_a_model_with_channels_is_refused_by_check(
    recipe_data, tmp_path, task_of, monkeypatch
):
    task_of("{max_tokens: 60, thinking: {most: 200}}")
    recipe_data["evaluate"]["metrics"] = ["fidelity", str(tmp_path / "t")]
    with pytest.raises(RecipeError, match=r"260 tokens, which leaves no room for a prompt in a context of 256"):
        check(parse(recipe_data))
    task_of("{max_tokens: 60, thinking: {most: 20}}")
    check(parse(recipe_data))
    monkeypatch.setattr("limbeck.runs.preflight.check_forcing", lambda vocabulary: forcing.check_forcing({*vocabulary, "<|channel|>"}))  # fmt: skip
    with pytest.raises(UserError, match="channels"):
        check(parse(recipe_data))


def summary_of(systems, budgets=(4, 9), **thinking):
    return {
        "tasks": {"mine": {"settings": {"thinking": {"budgets": list(budgets), **thinking}}}, "sums": {"settings": {}}},
        "systems": {
            name: {f"mine/tokens@{most}": around(most + 5.0) for most in budgets}
            | {f"mine/pass_rate@{most}": around(min(1.0, most / 10)) for most in budgets}
            for name in systems
        },
    }


def test_the_figure_has_a_line_for_every_system_with_its_intervals():
    (figure,) = budget_figures(summary_of(["teacher", "student"], waits=2))
    root = ElementTree.fromstring(figure.svg)
    assert figure.title == "mine: pass rate by tokens spent" and "taken away 2 times" in figure.caption
    assert len(root.findall("polyline")) == 2
    assert sorted(line.get("class") for line in root.findall("line") if "whisker" in line.get("class")) == ["whisker accent"] * 2 + ["whisker grey"] * 2  # fmt: skip
    assert "Student: 9.000 tokens, 0.400, 14.000 tokens, 0.900" in root.find("desc").text
    assert budget_figures({"systems": {}, "tasks": {}}) == budget_figures({"systems": {}}) == []
    assert budget_figures(summary_of(["student"], budgets=(4,))) == [], "one point is no line"
    partly = summary_of(["teacher", "student"])
    del partly["systems"]["teacher"]["mine/pass_rate@4"], partly["systems"]["student"]["mine/tokens@9"]
    assert budget_figures(partly) == []
    assert np.isfinite([float(part) for point in root.find("polyline").get("points").split() for part in point.split(",")]).all()  # fmt: skip


def test_the_page_shows_it(tmp_path):
    make_run(tmp_path)
    file = tmp_path / "evaluation" / "summary.json"
    summary = json.loads(file.read_text())
    more = summary_of(summary["systems"])
    summary["tasks"] = (summary.get("tasks") or {}) | more["tasks"]
    for name, values in more["systems"].items():
        summary["systems"][name] |= values
    file.write_text(json.dumps(summary))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'id="budgets"' in page and "mine: pass rate by tokens spent" in page


def test_answers_of_plain_tasks_have_the_fields_they_had():
    assert list(CheckedAnswer.__dataclass_fields__) == ["prompt_id", "kind", "text", "tokens", "finished", "passed", "answered"]  # fmt: skip
