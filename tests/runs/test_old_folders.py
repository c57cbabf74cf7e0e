"""Run folders that older versions wrote go on."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from limbeck.config.recipe import parse
from limbeck.models.fingerprint import NAMING
from limbeck.models.load import model_identity
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs.claim import WHOLE
from limbeck.runs.pipeline import run
from limbeck.types import UserError


@pytest.fixture
def asked(monkeypatch):
    """How many requests the teacher got in each batch."""
    counts = []
    whole = InProcessTeacher.answers
    monkeypatch.setattr(
        InProcessTeacher,
        "answers",
        lambda self, requests, stop: counts.append(len(requests)) or whole(self, requests, stop),
    )
    return counts


def test_a_folder_that_names_models_by_their_edges_goes_on(recipe_data, tiny_folder, tmp_path, monkeypatch, asked):
    teacher = shutil.copytree(tiny_folder, tmp_path / "model")
    recipe = parse({**recipe_data, "teacher": str(teacher)})
    out = tmp_path / "run"
    with monkeypatch.context() as older:
        older.setattr("limbeck.runs.pipeline.follow_names", lambda *_: None)
        older.setattr(NAMING, "by_edges", True)
        run(recipe, out, stages=("elicit",))
        inputs = json.loads((out / "inputs.json").read_text())
        (out / "inputs.json").write_text(json.dumps({key: inputs[key] for key in inputs if key != WHOLE}))
    count = sum(asked)
    run(recipe, out, stages=("elicit", "train"))
    assert sum(asked) == count, "nothing is asked twice"
    inputs = json.loads((out / "inputs.json").read_text())
    assert len(inputs["teacher"].rpartition("@")[2]) == 16 and len(inputs[WHOLE]) == 64
    monkeypatch.setattr("limbeck.models.fingerprint.EDGE", 16)
    file = teacher / "model.safetensors"
    with file.open("r+b") as weights:
        weights.seek(-64, os.SEEK_END)
        weights.write(b"\x3c" * 8)
    with pytest.raises(UserError, match=r"made from other contents \(weights changed since\)"):
        monkeypatch.setattr("limbeck.models.fingerprint._by_edges", lambda _: inputs["teacher"].rpartition("@")[2])
        run(recipe, out, stages=("elicit",))
    run(recipe, tmp_path / "new", stages=("elicit",))
    inputs = json.loads((tmp_path / "new" / "inputs.json").read_text())
    assert not NAMING.by_edges and inputs["teacher"] == model_identity(str(teacher)) and WHOLE not in inputs
