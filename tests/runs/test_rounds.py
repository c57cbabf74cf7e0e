"""Rounds: each an ordinary run, one store, the next one's previous student; kills, ends and refusals."""

from __future__ import annotations

import json
import sqlite3

import pytest

import limbeck
from limbeck.config.recipe import parse


@pytest.fixture
def data(recipe_data, tiny_folder):
    """Rounds of a student that is taught by its own answers."""
    return recipe_data | {
        "teacher": "previous",
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "elicit": [{"answer": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6, "all": True}}],
        "writer": [{"by": "elicited"}],
        "loss": ["cross_entropy"],
        "train": {"steps": 2, "tokens_per_step": 32, "lr": 1e-3, "seed": 3},
        "rounds": {"n": 2},
        "evaluate": recipe_data["evaluate"] | {"metrics": ["fidelity"], "controls": ["untouched"], "max_tokens": 6},
    }


def test_two_rounds_from_recipe_to_page(data, tmp_path):
    out = tmp_path / "out"
    limbeck.run(parse(data), out)
    record = json.loads((out / "rounds.json").read_text())
    print(record)
    with sqlite3.connect(out / "store.sqlite") as db:
        print(db.execute("select count(*) from answers").fetchone())
    assert (out / "report.html").exists()
