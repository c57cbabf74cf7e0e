"""Feedback steps: ratings, comparisons, critiques and corrections by any model that the recipe names, and what losses read of them."""

from __future__ import annotations

import json
import shutil

import pytest

import limbeck
from limbeck.config.recipe import parse
from limbeck.elicit.pairs import Lists, Pairs
from limbeck.elicit.rate import NOT_APPLICABLE, TOO_LONG, UNREADABLE, Rate, read_ratings
from limbeck.storage.files import read_jsonl
from limbeck.types import RecipeError
from tests.flow_driver import answers, drive


@pytest.fixture
def roomy(tiny_folder, tmp_path):
    """The tiny model with a context that a judge's question fits into."""
    folder = shutil.copytree(tiny_folder, tmp_path / "roomy")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return str(folder)


@pytest.fixture
def judged(recipe_data, roomy, prompt_file):
    """A recipe whose pairs a judge of its own rates."""
    prompt_file.write_text("".join(line + "\n" for line in prompt_file.read_text().splitlines()[:5]))
    recipe_data["student"] = {"start": {"pretrained": recipe_data["teacher"]}}
    recipe_data["models"] = {"judge": roomy}
    recipe_data["elicit"] = [
        {"answer": {"n": 2, "temperature": 1.0, "max_tokens": 8, "all": True}},
        {"rate": {"by": "judge", "expected": True, "aspects": ["helpfulness", "honesty"]}},
        "pairs",
    ]
    del recipe_data["writer"]
    recipe_data["loss"] = ["dpo"]
    recipe_data["train"]["steps"] = 2
    recipe_data["evaluate"] |= {"metrics": ["fidelity"], "controls": ["untouched"]}
    return recipe_data


def test_a_judge_by_name_rates_what_dpo_trains_on(judged, tmp_path):
    recipe = parse(judged)
    plan = limbeck.check(recipe)
    assert plan.requests >= 10
    limbeck.run(recipe, tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "elicited.jsonl")
    assert rows and len(rows) % 2 == 0
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        assert chosen["messages"][:-1] == rejected["messages"][:-1]
        assert (chosen["meta"]["place"], rejected["meta"]["place"]) == (0, 1)
        scores = [row["meta"]["scores"] for row in (chosen, rejected)]
        assert scores[0]["rating"] > scores[1]["rating"] and 1 <= scores[1]["rating"] <= 5
        assert scores[0]["rating"] == pytest.approx((scores[0]["helpfulness"] + scores[0]["honesty"]) / 2)
    inputs = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert inputs["model judge"].startswith("roomy@") and inputs["model judge"] != inputs["teacher"]
    account = json.loads((tmp_path / "out" / "elicitation.json").read_text())
    assert account["models"] == {"judge": inputs["model judge"]}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "the student is its own reference at first"
