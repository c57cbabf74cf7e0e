"""The results that `limbeck.run` and `limbeck.compare` give: they stand for their folder, and read it."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import limbeck
from limbeck.config.recipe import parse
from limbeck.evaluate.statistics import Interval
from limbeck.types import UserError
from tests.report_folders import make_comparison, make_run


@pytest.fixture
def made(tmp_path):
    return limbeck.load_run(make_run(tmp_path / "run", prompts=3))


def test_a_result_stands_for_its_folder(made, tmp_path):
    assert os.fspath(made) == str(made) == str(tmp_path / "run") and Path(made) == made.folder
    assert (Path(made) / "evaluation").is_dir() and limbeck.load_run(made) == made
    assert made.report == made.folder / "report.html" and made.student == made.folder / "student"
    assert json.loads((Path(made) / "evaluation" / "summary.json").read_text()) == made.summary


def test_a_result_reads_verdict_metrics_worth_and_items(made):
    assert made.verdict.startswith("Pass rate on everyday rose")
    assert made.systems["student"]["forward_kl"] == made.metric("student", "forward_kl")
    assert made.metric("student", "forward_kl") == Interval(0.69, pytest.approx(0.6348), pytest.approx(0.7452), 60)
    assert made.worth["systems"]["student"]["parameters"] == 108_000_000
    assert made.cautions[0].startswith("One seed") and "intervals are wide" in made.cautions[1]
    items = list(made.items("teacher"))
    assert {item["task"] for item in items} == {"", "intents"} and all(item["prompt"] for item in items)


def test_what_is_not_there_is_said_with_its_nearest_name(made):
    with pytest.raises(UserError, match=r"'studnet'.*student"):
        made.metric("studnet", "forward_kl")
    with pytest.raises(UserError, match="no metric 'forward'"):
        made.metric("student", "forward")
    with pytest.raises(UserError, match="no items of a system 'nobody'"):
        made.items("nobody")
    with pytest.raises(UserError, match="no run folder"):
        limbeck.load_run(made.folder / "evaluation")
    (made.folder / "evaluation" / "summary.json").unlink()
    with pytest.raises(UserError, match="limbeck evaluate"):
        made.verdict  # noqa: B018


def test_a_frame_needs_pandas_and_says_so(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        made.frame()
    pretend = types.SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", pretend)
    found, columns = made.frame()
    assert columns[:2] == ["run", "system"] and len(found) == sum(map(len, made.systems.values()))


def test_a_comparison_has_its_runs_and_the_items_of_every_seed(tmp_path):
    made = limbeck.load_run(make_comparison(tmp_path / "cmp", prompts=2, seeds=(7, 8)))
    assert isinstance(made, limbeck.ComparisonResult) and made.verdict.startswith("By Forward KL")
    assert {item["system"] for item in made.items("jsd")} == {"jsd-s7", "jsd-s8"}
    assert {item["system"] for item in made.items("jsd-s8")} == {"jsd-s8"}
    (made.folder / "runs" / "jsd-s7").mkdir(parents=True)
    assert made.runs == {"jsd-s7": limbeck.RunResult(made.folder / "runs" / "jsd-s7")}
    for read in (lambda: made.student, lambda: made.worth, lambda: limbeck.load_model(made)):
        with pytest.raises(UserError, match=r"comparison|several students"):
            read()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.jsonl").write_text('{"prompt": "why is the sky blue"}\n{"prompt": "count one two three"}\n')
    (folder / "held.jsonl").write_text('{"prompt": "a dog ran"}\n')
    (folder / "intents").mkdir()
    (folder / "intents" / "task.yaml").write_text(
        'name: intents\nversion: "1"\nkind: classification\ndescription: d\ntest: test.jsonl\nsettings: {labels: [cat, dog]}\n'
    )
    texts = [json.dumps({"text": f"the {name} {n}", "label": name}) for n in range(3) for name in ("cat", "dog")]
    (folder / "intents" / "test.jsonl").write_text("\n".join(texts) + "\n")
    (folder / "forms").mkdir()
    (folder / "forms" / "task.yaml").write_text('name: forms\nversion: "1"\ndescription: d\ntest: test.jsonl\n')
    check = {"type": "json", "equals": {"city": "Rome"}}
    (folder / "forms" / "test.jsonl").write_text(json.dumps({"prompt": "where?", "check": check}) + "\n")
    recipe = {
        "name": "tiny", "teacher": str(tiny_folder), "student": {"start": {"prune": {"layers": 3, "keep": "first"}}},
        "prompts": {"from": str(folder / "prompts.jsonl")}, "writer": [{"by": "teacher", "max_tokens": 8}], "loss": ["forward_kl"],
        "train": {"steps": 2, "tokens_per_step": 16},
        "evaluate": {"metrics": ["fidelity", str(folder / "intents"), str(folder / "forms")], "prompts": str(folder / "held.jsonl"), "max_tokens": 8, "controls": ["untouched"]},
    }  # fmt: skip
    return limbeck.run(parse(recipe), folder / "run")


def test_a_run_gives_its_result_with_labels_fields_and_what_was_kept(trained):
    summary = trained.summary
    assert trained.verdict.startswith("Accuracy on intents went from") and "over only 6 items" in trained.verdict
    labels = summary["by_label"]["intents"]
    assert labels["labels"] == ["cat", "dog", "(no label)"] and set(labels["systems"]) == {
        "teacher",
        "untouched",
        "student",
    }
    macro = labels["systems"]["student"]["macro_f1"]
    assert macro == summary["systems"]["student"]["intents/macro_f1"]
    assert set(summary["by_field"]["forms"]["city"]) == {"teacher", "untouched", "student"}
    assert "intents/acc" in summary["kept"] and summary["metrics"]["intents/acc"]["role"] == "headline"
    assert summary["requests"]["requests"] == 1 and summary["requests"]["prompt_tokens"] > 1
    asked = {item["item"]: item for item in trained.items("student") if item["task"] == "intents"}
    assert asked["intents/line-1"]["prompt"] == "the cat 0" and len(asked) == 6
    page = trained.report.read_text()
    assert "By label and by field" in page and "The first item of intents" in page


def test_load_model_takes_a_run_or_a_folder(trained, tiny_folder, tmp_path):
    for source in (trained, str(trained), trained.student):
        model, tokenizer = limbeck.load_model(source)
        assert model.config.num_hidden_layers == 3 and not model.training
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    assert model(ids).logits.shape[:2] == ids.shape
    assert limbeck.load_model(tiny_folder)[0].config.num_hidden_layers == 4
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(UserError, match="no trained student"):
        limbeck.load_model(tmp_path)


def test_a_run_takes_a_recipe_by_its_file_or_name(tmp_path):
    with pytest.raises(limbeck.RecipeError, match=r"no recipe file 'quickstrat'.*quickstart"):
        limbeck.run("quickstrat", tmp_path / "out")
