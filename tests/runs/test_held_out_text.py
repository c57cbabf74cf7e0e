"""Held-out text is the teacher's; without a teacher, the data's own answers."""

from __future__ import annotations

import json

import pytest

from limbeck.config.recipe import parse
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve

QUESTIONS = [{"id": f"q{n}", "prompt": f"why is cat number {n} red", "answer": ("one", "two")[n % 2]} for n in range(9)]


@pytest.fixture
def corpus(recipe_data, tiny_folder, tmp_path):
    """A recipe that trains a model on given answers, with given answers to the held-out prompts."""
    for name, rows in (("train", QUESTIONS[:6]), ("held-out", QUESTIONS[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_data | {
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "prompts": {"from": str(tmp_path / "train.jsonl")},
        "writer": [{"by": "corpus"}],
        "loss": ["cross_entropy"],
        "train": {"steps": 2, "tokens_per_step": 32, "lr": 1e-3, "seed": 3},
        "evaluate": {"metrics": ["fidelity"], "prompts": str(tmp_path / "held-out.jsonl"), "controls": ["untouched"]},
    }


def test_without_a_teacher_the_held_out_text_is_the_datas_own(corpus, tmp_path, monkeypatch):
    recipe = parse(corpus)
    assert check(recipe).requests == check(recipe).teacher_tokens == 0
    assert "elicit" not in check(recipe).seconds
    monkeypatch.setattr(InProcessTeacher, "answers", lambda *_: pytest.fail("a teacher was asked"))
    folder = run(recipe, tmp_path / "run")
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert summary["held_out"] == {"answers": 3, "cut_off": 0, "writer": "corpus"}
    assert summary["systems"]["student"]["perplexity"]["n"] == 3


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, True),
        ({"loss": ["forward_kl"]}, False),
        ({"writer": [{"by": "corpus", "share": 0.5}, {"by": "teacher", "share": 0.5}]}, False),
        ({"student": {"start": {"prune": {"layers": 3, "keep": "uniform"}}}}, False),
    ],
    ids=["data alone", "its distributions", "its text", "its weights"],
)
def test_who_gives_the_student_anything_writes_the_held_out_text(corpus, changes, own):
    assert resolve(parse(corpus | changes)).holds_out_answers is own
    assert (check(parse(corpus | changes)).requests == 0) is own


def test_held_out_prompts_without_answers_are_answered(corpus, tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"id": row["id"], "prompt": row["prompt"]}) + "\n" for row in QUESTIONS[6:]))
    recipe = parse(corpus | {"evaluate": corpus["evaluate"] | {"prompts": str(bare)}})
    assert not resolve(recipe).holds_out_answers and check(recipe).requests == 3
