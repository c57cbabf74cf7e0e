"""Run folders that older versions wrote go on: golden ones, and those that lack what came later."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import limbeck
from limbeck.config import older
from limbeck.config.recipe import load_recipe, parse
from limbeck.models.fingerprint import NAMING
from limbeck.models.load import model_identity
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs.claim import START, WHOLE, claim
from limbeck.runs.pipeline import run
from limbeck.storage.files import read_jsonl
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
        older.setattr("limbeck.runs.run.follow_names", lambda *_: None)
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


def test_a_folder_that_lacks_the_start_adopts_it_and_refuses_another(recipe_data, tiny_folder, tmp_path, asked):
    start = shutil.copytree(tiny_folder, tmp_path / "start")
    recipe = parse({**recipe_data, "student": {"start": {"pretrained": str(start)}}})
    out = tmp_path / "run"
    run(recipe, out, stages=("elicit",))
    count = sum(asked)
    inputs = json.loads((out / "inputs.json").read_text())
    assert inputs["start"] == model_identity(str(start))
    (out / "inputs.json").write_text(json.dumps({key: inputs[key] for key in inputs if key != START}))
    run(recipe, out, stages=("elicit",))
    assert sum(asked) == count and json.loads((out / "inputs.json").read_text()) == inputs
    weights = load_file(start / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"made from other contents \(start changed since\)"):
        run(recipe, out, stages=("elicit",))


def test_a_start_that_is_not_here_any_more_is_not_fetched_to_be_compared(
    recipe_data, tiny_folder, tmp_path, monkeypatch
):
    start = shutil.copytree(tiny_folder, tmp_path / "start")
    recipe = parse({**recipe_data, "student": {"start": {"pretrained": str(start)}}})
    out = tmp_path / "run"
    run(recipe, out, stages=("elicit",))
    inputs = (out / "inputs.json").read_text()
    monkeypatch.setattr("limbeck.runs.opening.is_ready", lambda _: False)
    run(recipe, out, stages=("elicit",))
    assert (out / "inputs.json").read_text() == inputs


FIXTURES = Path(__file__).parent.parent / "fixtures"
GOLDEN = sorted(FIXTURES.glob("run-*"), key=lambda path: int(path.name.removeprefix("run-")))
NAMES = [path.name for path in GOLDEN]


@pytest.fixture(params=NAMES)
def golden(request, tmp_path, monkeypatch):
    """A copy of a golden folder, whose paths are relative."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return Path("run")


def test_there_is_a_golden_folder_of_this_format():
    assert NAMES[-1] == f"run-{older.FORMAT}", "make it: python -m tests.fixtures.make_run tests/fixtures/run-N"
    assert [older.format_of(path / "run") for path in GOLDEN] == list(range(1, older.FORMAT + 1))


def test_no_default_has_changed_since_the_golden_folder():
    """A changed or new default: raise FORMAT in config/older.py, say in ABSENT what the field meant, make a folder."""
    folder = GOLDEN[-1]
    written = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    assert load_recipe(folder / "golden.yaml").resolved() == written


@pytest.mark.promise("R19", "R18")
def test_a_golden_run_is_finished_and_asks_and_trains_nothing_again(golden, asked, monkeypatch):
    before = {path.name: path.read_bytes() for path in golden.rglob("*.safetensors")}
    summary = (golden / "evaluation" / "summary.json").read_text()
    monkeypatch.setattr("limbeck.training.loop.train", lambda *_: pytest.fail("it is trained already"))
    run(load_recipe("golden.yaml"), golden)
    assert asked == [] and (golden / "evaluation" / "summary.json").read_text() == summary
    assert {path.name: path.read_bytes() for path in golden.rglob("*.safetensors")} == before
    assert (golden / "report.html").stat().st_size > 10_000
    assert limbeck.load_run(golden).student.name == "student"
    run(load_recipe(golden / "recipe.yaml"), golden)


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.promise("R19")
def test_a_golden_checkpoint_is_continued_to_the_same_student(golden, asked, last):
    """From its end, or from the first of its three steps."""
    before, steps = load_file(golden / "student" / "model.safetensors"), read_jsonl(golden / "metrics.jsonl")
    shutil.rmtree(golden / "student")
    if last == 1:
        shutil.rmtree(golden / "checkpoints")
        shutil.copytree(golden.parent / "unfinished", golden / "checkpoints")
        (golden / "metrics.jsonl").write_text((golden / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    run(load_recipe("golden.yaml"), golden, stages=("train",))
    after, again = load_file(golden / "student" / "model.safetensors"), read_jsonl(golden / "metrics.jsonl")
    assert asked == [] and before.keys() == after.keys() and len(again) == len(steps) == 3
    near = 0.0 if last == 3 else 1e-5  # another processor rounds otherwise
    assert [step["loss"] for step in again] == pytest.approx([step["loss"] for step in steps], rel=near, abs=0)
    assert all(torch.allclose(before[name], after[name], rtol=near, atol=near) for name in before)


def leaves(value, path=()):
    """The paths of all fields of a recipe's sections."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from leaves(inner, (*path, key))


def without(data, path):
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return data


@pytest.mark.promise("R19")
def test_a_folder_whose_recipe_lacks_any_one_default_goes_on(golden):
    recipe = load_recipe("golden.yaml")
    inputs = json.loads((golden / "inputs.json").read_text())
    whole = yaml.safe_load((golden / "recipe.yaml").read_text())
    lacking = [path for path in leaves(whole) if _is_default(whole, path, recipe)]
    assert ("train", "warmup") in lacking and len(lacking) >= 10
    for path in lacking:
        (golden / "recipe.yaml").write_text(yaml.safe_dump(without(whole, path)))
        assert load_recipe(golden / "recipe.yaml").resolved() == whole, path
        claim(golden, recipe, lambda: dict(inputs), lambda: None)
        assert yaml.safe_load((golden / "recipe.yaml").read_text()) == whole, path


def _is_default(whole, path, recipe):
    try:
        return parse(without(whole, path)) == recipe
    except UserError:
        return False


@pytest.mark.promise("R19")
def test_a_field_that_is_absent_means_what_it_meant_then(golden, monkeypatch):
    """A later version in which the gradient is clipped at 1 by default, where it was 9 before."""
    whole = yaml.safe_load((golden / "recipe.yaml").read_text())
    inputs = json.loads((golden / "inputs.json").read_text())
    (golden / "recipe.yaml").write_text(yaml.safe_dump(without(whole, ("train", "clip"))))
    then = older.format_of(golden)
    monkeypatch.setattr(older, "ABSENT", {then: {"train.clip": 9.0, "teacher.other.field": 1}})
    assert load_recipe(golden / "recipe.yaml").train.clip == 9.0
    with pytest.raises(UserError, match="differs in train"):
        claim(golden, load_recipe("golden.yaml"), lambda: dict(inputs), lambda: None)
    claim(golden, load_recipe("golden.yaml", ["train.clip=9.0"]), lambda: dict(inputs), lambda: None)
    assert yaml.safe_load((golden / "recipe.yaml").read_text())["train"]["clip"] == 9.0
    (golden / "recipe.yaml").write_text(yaml.safe_dump(without(whole, ("train", "clip"))))
    (golden / "inputs.json").write_text(json.dumps(inputs | {"format": str(then + 1)}))
    assert load_recipe(golden / "recipe.yaml").train.clip == 1.0
    (golden / "inputs.json").write_text("no JSON")
    assert load_recipe(golden / "recipe.yaml").train.clip == 9.0
