"""The previous student under the names that steps and `models` give it, round by round."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing

import pytest

import limbeck
from limbeck.config.recipe import parse
from limbeck.runs.resolve import resolve
from limbeck.storage.rounds import round_folder, rounds_record
from tests.runs.test_rounds import TRAIN, data  # noqa: F401 (a fixture)


@pytest.fixture
def roomy_folder(tiny_folder, tmp_path):
    """The tiny model with a context that a judge's question fits into."""
    folder = shutil.copytree(tiny_folder, tmp_path / "roomy")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return str(folder)


def test_a_step_asks_the_previous_student_and_a_model_is_one(data):  # noqa: F811
    """In the first round, and where every round starts from it, the previous student is the untouched one."""
    steps = [{"answer": {"by": ["teacher", "previous"]}}, {"referee": {"by": "judge", "student": "previous"}}]
    changes = {"teacher": "x", "elicit": steps, "models": {"judge": {"model": "previous"}}}
    recipe = parse(data | changes)
    first, second = recipe.of_round(1, None), recipe.of_round(2, "/r/1/student")
    asked = [[step.params.get("by", ()), step.params.get("student")] for step in (*first.elicit, *second.elicit)]
    assert asked == [[["teacher", "untouched"], None], ["judge", "untouched"], [["teacher", "previous"], None], ["judge", "previous"]]  # fmt: skip
    start = data["student"]["start"]["pretrained"]
    assert (first.models["judge"].model, second.models["judge"].model) == (start, "/r/1/student")
    assert (first.previous, second.previous) == (None, "/r/1/student")
    on = parse(data | changes | {"rounds": {"n": 2, "restart": "previous"}}).of_round(2, "/r/1/student")
    assert on.elicit[0].params["by"] == ["teacher", "untouched"] and on.previous is None
    plain = {key: value for key, value in (data | changes).items() if key != "rounds"}
    with pytest.raises(limbeck.RecipeError, match=r"models.judge.model: previous is the student of the round before"):
        parse(plain)
    with pytest.raises(limbeck.RecipeError, match=r"elicit\[0\].answer.by: previous is the student of the round"):
        resolve(parse(plain | {"teacher": start, "models": None, "elicit": [{"answer": {"by": "previous"}}]}))
    with pytest.raises(limbeck.RecipeError, match=r"student.start: .*give start.pretrained"):
        parse(data | changes | {"student": {"start": {"scratch": {}}}})


def test_a_model_that_only_a_part_of_the_rounds_names_is_left_out_of_the_others(data):  # noqa: F811
    first = {"elicit": ["answer"], "writer": [{"by": "elicited"}]}
    steps = ["answer", {"rate": {"by": "judge"}}]
    models = {"judge": "j", "idle": "k"}
    recipe = parse(data | {"elicit": steps, "models": models, "rounds": {"n": 1, "first": first}})
    assert list(recipe.of_round(0, None).models) == ["idle"], "what nothing names is refused there"
    assert list(recipe.of_round(1, "/r/0/student", "/r/0/student").models) == ["judge", "idle"]
    only = parse(data | {"elicit": steps, "models": {"judge": "j"}, "rounds": {"n": 1, "first": first}})
    assert only.of_round(0, None).models is None


def test_the_previous_student_answers_and_judges_in_a_run(data, tmp_path, roomy_folder):  # noqa: F811
    data["student"] = {"start": {"pretrained": roomy_folder}}
    data["teacher"] = roomy_folder
    data["models"] = {"judge": {"model": "previous"}}
    sampled = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6, "all": True}
    data["elicit"] = [
        {"answer": {"by": ["teacher", "previous"], "n": 2, **sampled}},
        {"rate": {"by": "judge", "expected": True}},
        "pairs",
    ]
    data["loss"] = ["dpo"]
    out = limbeck.run(parse(data), tmp_path / "out", stages=TRAIN).folder
    facts = rounds_record(out)["rounds"]
    for number, judge in ((1, facts["1"]["start"]), (2, facts["1"]["student"])):
        inputs = json.loads((round_folder(out, number) / "inputs.json").read_text())
        assert inputs["model judge"] == judge
    with closing(sqlite3.connect(out / "store.sqlite")) as db:
        writers = {json.loads(body)["writer"] for (body,) in db.execute("select body from samples")}
    assert {facts["1"]["start"], facts["1"]["student"]} <= writers
