"""The previous student under the names that steps and `models` give it, round by round."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing

import pytest

import limbeck
from limbeck.config.recipe import load_recipe, parse
from limbeck.runs.resolve import resolve
from limbeck.storage.rounds import round_folder, rounds_record
from limbeck.types import UserError
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


REFERRING = [
    ("difference", {"reference": "previous"}, "reference"),
    ("referee", {"student": "previous"}, "student"),
    ("referee", {"teacher": "previous", "student": "teacher"}, "teacher"),
    ("rubric", {"author": "previous"}, "author"),
    ("rate", {"by": "previous"}, "by"),
]


@pytest.mark.parametrize(("step", "settings", "setting"), REFERRING)
def test_no_step_means_the_previous_student_where_there_are_no_rounds(data, tiny_folder, step, settings, setting):  # noqa: F811
    plain = {key: value for key, value in data.items() if key != "rounds"} | {"teacher": str(tiny_folder)}
    elicit = [{"answer": {"by": ["teacher", "untouched"]}}, {step: settings}]
    with pytest.raises(limbeck.RecipeError, match=rf"elicit\[1\].{step}.{setting}: .*add rounds: {{n: 3}}"):
        resolve(parse(plain | {"elicit": elicit}))
    resolve(parse(data | {"elicit": elicit, "teacher": str(tiny_folder)}))


def test_a_writer_is_the_previous_student_only_in_rounds(data, tiny_folder):  # noqa: F811
    writers = [{"by": "teacher"}, {"by": "previous"}]
    changes = {"teacher": str(tiny_folder), "elicit": None, "writer": writers, "loss": ["dpo"]}
    with pytest.raises(limbeck.RecipeError, match=r"writer\[1\].by: .*add rounds: {n: 3}"):
        parse(data | changes | {"rounds": None})
    for restart, previous in (("base", "/r/1/student"), ("previous", "untouched")):
        recipe = parse(data | changes | {"rounds": {"n": 2, "restart": restart}})
        assert (recipe.of_round(1, None).previous, recipe.of_round(2, "/r/1/student").previous) == (
            "untouched",
            previous,
        )
        assert parse(recipe.of_round(1, None).resolved()).hash == recipe.of_round(1, None).hash, "it is read back"


def test_a_round_after_fine_tuning_is_not_held_to_the_start_of_that(data, tiny_folder):  # noqa: F811
    """Layers are chosen by text before the rounds; what the rounds ask of the start has no part in it."""
    first = {"writer": [{"by": "teacher"}], "loss": ["cross_entropy"]}
    recipe = data | {
        "teacher": str(tiny_folder),
        "student": {"start": {"prune": {"layers": 3, "keep": "importance"}}},
        "elicit": [
            {"answer": {"by": ["teacher", "untouched"], "n": 2, "temperature": 1.0, "max_tokens": 6}},
            {"pairs": {"score": None}},
        ],
        "loss": ["dpo"],
        "rounds": {"n": 1, "first": first},
    }
    with pytest.raises(limbeck.RecipeError, match=r"elicit\[0\].answer.by: prune.keep: importance is judged"):
        resolve(parse(recipe | {"rounds": {"n": 1}}))
    method = resolve(parse(recipe))
    assert method.recipe.student.start.prune is not None, "its size is known before the rounds"
    assert limbeck.check(parse(recipe)).rounds == 2


def test_what_a_comparison_advises_for_rounds_works(data, tmp_path, prompt_file):  # noqa: F811
    lines = [json.loads(line) | {"answer": "the cat sat"} for line in prompt_file.read_text().splitlines()[:6]]
    prompt_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data["train"]["steps"] = 1
    writers = [{"by": "corpus"}, {"by": "previous", "temperature": 1.0, "top_p": 1.0, "max_tokens": 6}]
    first = {"writer": [{"by": "corpus"}], "loss": ["cross_entropy"]}
    common = data | {"teacher": data["student"]["start"]["pretrained"], "elicit": None, "writer": writers}
    made = [common | {"name": name, "loss": [name], "rounds": {"n": 1, "first": first}} for name in ("dpo", "simpo")]
    with pytest.raises(UserError, match=r"dpo has rounds.*then compare its RUN/rounds/1/recipe.yaml"):
        limbeck.compare([parse(recipe) for recipe in made], tmp_path / "compared")
    one = load_recipe(
        round_folder(limbeck.run(parse(made[0]), tmp_path / "dpo", stages=TRAIN).folder, 1) / "recipe.yaml"
    )
    other = parse(one.resolved() | {"name": "simpo", "loss": ["simpo"]})  # as the other's round is, from the same start
    result = limbeck.compare([one, other], tmp_path / "compared", seeds=1)
    methods = json.loads((result.folder / "comparison.json").read_text())["methods"]
    assert [methods[name]["loss"] for name in ("dpo", "simpo")] == [["dpo"], ["simpo"]]
