"""Stages that train a model of `models`: whose text they learn, who asks them afterwards, kills and refusals."""

from __future__ import annotations

import json

import pytest
import yaml

import limbeck
from limbeck.config.recipe import parse
from limbeck.models.load import model_identity
from limbeck.runs.resolve import resolve
from limbeck.storage.rounds import round_folder, rounds_record, stage_folder
from tests.runs.test_rounds import TRAIN, Killed, answers_in, asked, data, losses  # noqa: F401 (fixtures)

SAMPLED = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6}


@pytest.fixture
def aligned(data, tiny_folder, prompt_file):  # noqa: F811
    return aligned_recipe(data, tiny_folder, prompt_file)


def aligned_recipe(data, tiny_folder, prompt_file):  # noqa: F811
    """ARTE, small: a tutor's drafts are scored by how they help the student, and the tutor that learnt it teaches."""
    lines = [json.loads(line) | {"answer": "the cat sat"} for line in prompt_file.read_text().splitlines()[:6]]
    prompt_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = {
        "elicit": [
            {"answer": {"by": "tutor", "n": 3, "all": True, **SAMPLED}},
            {"in_context": {"by": "previous", "probes": 2}},
            {"pairs": {"score": "helps"}},
        ],
        "loss": ["dpo"],
        "train": {"steps": 2, "tokens_per_step": 32, "lr": 1e-2, "seed": 3},
        "evaluate": {"metrics": ["fidelity"], "controls": []},
    }
    return data | {
        "teacher": str(tiny_folder),
        "models": {"tutor": str(tiny_folder)},
        "elicit": [{"answer": {"by": "tutor", "all": True, **SAMPLED}}],
        "rounds": {"n": 2, "stages": {"tutor": stage}},
    }


HOMES = ["stages/tutor/1", "rounds/1", "stages/tutor/2", "rounds/2"]


def test_a_stage_trains_a_model_of_the_recipe_which_then_teaches(aligned, tmp_path, asked):  # noqa: F811
    out = limbeck.run(parse(aligned), tmp_path / "out").folder
    assert len(asked) == len(set(asked)) == len(answers_in(out))
    recipes = {home: yaml.safe_load((out / home / "recipe.yaml").read_text()) for home in HOMES}
    start, students = aligned["teacher"], {home: str(out / home / "student") for home in HOMES}
    tutors = [recipes[home]["models"]["tutor"]["model"] for home in HOMES]
    assert tutors == [start, students[HOMES[0]], students[HOMES[0]], students[HOMES[2]]], "each round has its own tutor"
    assert [recipes[home]["student"]["start"]["pretrained"] for home in HOMES] == [start] * 4, "restart: base"
    assert [recipes[home]["previous"] for home in HOMES[::2]] == [start, students[HOMES[1]]], "whom drafts help"
    identities = [model_identity(folder) for folder in students.values()]
    assert len(set(identities)) == 4 and model_identity(start) not in identities
    inputs = [json.loads((out / home / "inputs.json").read_text())["model tutor"] for home in HOMES]
    assert inputs == [model_identity(start), identities[0], identities[0], identities[2]]
    account = json.loads((out / HOMES[2] / "elicitation.json").read_text())
    assert account["steps"][1]["facts"]["probes"] == 2 and account["steps"][2]["given"] > 0
    assert "dpo" in (out / HOMES[0] / "metrics.jsonl").read_text()
    page = (out / "report.html").read_text()
    assert 'href="stages/tutor/2/report.html"' in page and "Round 2: tutor" in page
    assert not list(out.rglob("checkpoints/step-*"))
    moved, before = tmp_path / "moved", len(asked)
    out.rename(moved)
    limbeck.run(parse(aligned), moved)
    assert len(asked) == before, "moved, it is done"


@pytest.mark.promise("R3")
def test_killed_in_a_stage_or_a_round_it_ends_as_its_twin(aligned, tmp_path, monkeypatch, asked):  # noqa: F811
    """In the training of a stage, and in the text that the trained model then writes. The real kill: tests/long/test_kills.py."""
    aligned["rounds"]["n"] = 1
    limbeck.run(parse(aligned), tmp_path / "clean", stages=TRAIN)
    total = len(answers_in(tmp_path / "clean"))
    drafts = json.loads((tmp_path / "clean" / HOMES[0] / "elicitation.json").read_text())["steps"][0]["answers"]
    first = sum(drafts.values())
    kills = [
        ("limbeck.training.loop", "train.after_step", 1),
        ("limbeck.elicit.engine", "elicit.after_record", first + 4),
    ]
    for number, (place, point, count) in enumerate(kills):
        folder, seen = tmp_path / f"killed-{number}", []

        def kill(name, point=point, count=count, seen=seen):
            seen.append(name)
            if seen.count(point) == count:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(f"{place}.crash_point", kill)
            with pytest.raises(Killed):
                limbeck.run(parse(aligned), folder, stages=TRAIN)
        there = set(answers_in(folder))
        asked.clear()
        limbeck.run(parse(aligned), folder, stages=TRAIN)
        assert there.isdisjoint(asked) and len(asked) == len(set(asked)) == total - len(there), "nothing is asked twice"
        for home in HOMES[:2]:
            assert losses(folder / home) == losses(tmp_path / "clean" / home), (number, home)
        assert rounds_record(folder)["rounds"] == rounds_record(tmp_path / "clean")["rounds"]


def test_what_a_stage_of_a_named_model_is_as_an_ordinary_recipe(aligned):
    start = aligned["teacher"]
    recipe = parse(aligned | {"models": {"tutor": {"model": start, "template": "chatml", "dtype": "bfloat16"}}})
    first = recipe.of_stage("tutor", None)
    assert first.rounds is None and first.student.template == "chatml" and first.previous == start
    assert first.models["tutor"].template == "chatml" and first.loss[0].name == "dpo"
    later = recipe.of_stage("tutor", "/r/1/student", {"tutor": "/s/1"})
    assert later.models["tutor"].model == "/s/1/student" and later.models["tutor"].template is None
    assert later.models["tutor"].dtype == "bfloat16", "it is asked as the recipe says"
    assert later.student.start.pretrained == start and later.student.template == "chatml"
    on = parse(aligned | {"rounds": aligned["rounds"] | {"restart": "previous"}})
    assert on.of_stage("tutor", "/r/1/student", {"tutor": "/s/1"}).student.start.pretrained == "/s/1/student"
    assert on.of_round(2, "/r/1/student", None, {"tutor": "/s/2"}).models["tutor"].model == "/s/2/student"
    adapted = aligned["rounds"]["stages"]["tutor"] | {"student": {"lora": {"rank": 2}}}
    adapted = parse(aligned | {"rounds": {"n": 1, "stages": {"tutor": adapted}}}).of_stage("tutor", None)
    assert adapted.student.lora.rank == 2 and adapted.student.start.pretrained == start
    del aligned["rounds"]["stages"]["tutor"]["evaluate"]
    measured = parse(aligned).of_stage("tutor", None).evaluate
    assert measured.metrics == ["fidelity"] and measured.controls == ["untouched"]
    assert measured.prompts == aligned["evaluate"]["prompts"]


def test_elicit_alone_writes_the_drafts_and_says_what_the_round_waits_for(aligned, tmp_path):
    notes = []
    aligned["rounds"]["n"] = 1

    class Noting(limbeck.progress.Silent):
        def note(self, text):
            notes.append(text)

    out = limbeck.run(parse(aligned), tmp_path / "out", reporter=Noting(), stages=("elicit",)).folder
    assert (out / HOMES[0] / "elicited.jsonl").exists() and not round_folder(out, 1).joinpath("recipe.yaml").exists()
    assert any("round 1 waits for the training of tutor" in note for note in notes)
    assert not stage_folder(out, "tutor", 1).joinpath("student").exists()
    limbeck.run(parse(aligned), out, stages=TRAIN)
    assert set(rounds_record(out)["rounds"]) == {"1"}


@pytest.mark.parametrize(
    ("models", "student", "words"),
    [
        ({"tutor": "previous"}, {}, r"rounds.stages.tutor: tutor is the student"),
        (
            {"tutor": {"server": {"url": "http://x/v1", "name": "y"}}},
            {},
            r"rounds.stages.tutor: tutor is behind a server",
        ),
        (None, {"start": {"pretrained": "x"}}, r"rounds.stages.tutor.student: .*leave start out"),
        (None, {"head": "scalar"}, r"rounds.stages.tutor.student: .*leave head out"),
        ({"other": "x"}, None, r"rounds.stages.tutor: student is missing: give it, or name tutor under `models`"),
    ],
)
def test_a_stage_that_trains_no_model_of_the_recipe_is_refused(aligned, models, student, words):
    stage = aligned["rounds"]["stages"]["tutor"] | ({} if student is None else {"student": student})
    changes = {"rounds": {"n": 1, "stages": {"tutor": stage}}} | ({} if models is None else {"models": models})
    with pytest.raises(limbeck.RecipeError, match=words):
        parse(aligned | changes)


def test_a_model_that_nothing_asks_after_its_stage_is_refused(aligned):
    limbeck.check(parse(aligned))
    with pytest.raises(limbeck.RecipeError, match=r"rounds.stages.tutor: no step of the rounds asks it"):
        resolve(parse(aligned | {"elicit": [{"answer": SAMPLED}]}))
