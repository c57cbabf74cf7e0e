"""`--scale full`: the sizes of a recipe's paper stand in its file, change nothing of it, and are put in when asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from limbeck import RecipeError, UserError, load_recipe, methods, run
from limbeck.config.builtin import recipe_files
from limbeck.config.recipe_file import full_sizes
from limbeck.runs.resolve import resolve
from tests.command_line import called

SIZES = {name: sizes for name, path in recipe_files().items() if (sizes := full_sizes(path))}
FULL = {"train.lr": 2e-4, "train.steps": None, "train.epochs": 3, "loss.0.weight": 0.5, "writer.0.max_tokens": 10}

NO_SUCH_SCALE = "limbeck: there is no scale 'half': give `full`, the paper's sizes, or none, the recipe's own\n"
SAY_WHOSE = "limbeck: --scale changes the common settings, so say whose they are: --like RECIPE\n"


@pytest.fixture
def write(tmp_path, recipe_data):
    """Writes the tiny recipe with this `full`."""

    def write(full: Any):
        path = tmp_path / "sized.yaml"
        path.write_text(yaml.safe_dump(recipe_data | {"full": full}))
        return path

    return write


def value_at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else (data or {}).get(key)
    return data


@pytest.mark.parametrize("name", SIZES)
def test_a_built_in_recipe_is_valid_at_full_scale(name, tmp_path):
    recipe, full = load_recipe(name), load_recipe(name, scale="full")
    resolve(full)
    changed = {path for path, value in SIZES[name].items() if value_at(recipe.resolved(), path) != value}
    assert changed == set(SIZES[name]), "a size that the recipe has already is not stated again"
    assert all(value_at(full.resolved(), path) == value for path, value in SIZES[name].items())
    same = ("teacher", "models", "loss", "evaluate", "title", "paper", "name")
    for section in same if name != "dskd" else same[:2]:  # whose rate of projections is a size
        assert full.resolved().get(section) == recipe.resolved().get(section), "models, data and losses are the user's"


@pytest.mark.parametrize("name", SIZES)
def test_the_header_says_that_there_are_full_sizes(name):
    header = [line for line in recipe_files()[name].read_text().splitlines() if line.startswith("#")]
    assert sum("--scale full puts in" in line for line in header) == 1


@pytest.mark.parametrize("name", sorted(set(recipe_files()) - set(SIZES)))
def test_a_recipe_without_full_sizes_says_so(name):
    assert "--scale" not in recipe_files()[name].read_text()
    with pytest.raises(RecipeError, match="its paper's sizes are not known"):
        load_recipe(name, scale="full")


def test_full_is_no_part_of_the_recipe(write, tmp_path, recipe_data):
    sized = load_recipe(write(FULL))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(recipe_data))
    assert sized == load_recipe(tmp_path / "plain.yaml") and "full" not in sized.resolved()


def test_sizes_are_put_in_and_an_override_wins(write):
    full = load_recipe(write(FULL), scale="full")
    assert (full.train.lr, full.train.epochs, full.train.steps) == (2e-4, 3, None)
    assert (full.loss[0].weight, full.writer[0].max_tokens) == (0.5, 10)
    own = load_recipe(write(FULL), ["train.lr=0.5", "train.epochs=null", "train.steps=4"], scale="full")
    assert (own.train.lr, own.train.steps, own.loss[0].weight) == (0.5, 4, 0.5)
    assert full.hash != load_recipe(write(FULL)).hash


@pytest.mark.parametrize(
    ("full", "words"),
    [
        ({"train.stepz": 3}, "full.train.stepz: of .*sized.yaml: train.stepz: unknown key.*steps"),
        ({"train.epochs": 3}, "full.train.epochs: of .*sized.yaml: train: give exactly one of steps and epochs"),
        ({"trian.lr": 3}, "full.trian.lr: of .*sized.yaml: trian: unknown key.*train"),
        ({"loss.7.weight": 3}, "sized.yaml: full: loss.7.weight: loss has no entry '7'"),
        ({"train.lr.x": 3}, "sized.yaml: full: train.lr.x: train.lr is .*, which has no 'x'"),
        ({}, "the sizes of .*sized.yaml are its paper's already"),
        (3, "full: of .*sized.yaml must be a mapping"),
        (None, "full: of .*sized.yaml must be a mapping"),
    ],
)
def test_an_error_in_full_names_the_file_and_the_key(write, full, words):
    with pytest.raises(UserError, match=words):
        load_recipe(write(full), scale="full")


def test_an_error_of_the_user_is_not_blamed_on_full(write):
    with pytest.raises(RecipeError, match=r"^train\.lr: "):
        load_recipe(write(FULL), ["train.lr=-1"], scale="full")
    with pytest.raises(RecipeError, match=r"^prompts\.limit: "):
        load_recipe(write(FULL), ["prompts.limit=0"], scale="full")


def test_another_scale_is_refused(write):
    with pytest.raises(UserError, match="no scale 'half': give `full`"):
        load_recipe(write(FULL), scale="half")


def test_a_run_at_full_scale_goes_on_and_another_one_is_refused(write, tmp_path):
    file, out = write({"train.lr": 2e-4}), tmp_path / "run"
    result = run(load_recipe(file, scale="full"), out, stages=("elicit",))
    kept = (out / "recipe.yaml").read_text()
    assert yaml.safe_load(kept)["train"]["lr"] == 2e-4 and "full" not in yaml.safe_load(kept)
    assert run(load_recipe(file, scale="full"), out, stages=("elicit",)).folder == result.folder
    assert (out / "recipe.yaml").read_text() == kept
    with pytest.raises(UserError, match=r"holds a run of another recipe \(it differs in train\)"):
        run(load_recipe(file), out, stages=("elicit",))


def test_commands_take_the_scale(write, tmp_path):
    file, out = write({"train.lr": 2e-4}), tmp_path / "run"
    run(load_recipe(file), out, stages=("elicit",))
    status, told = called("why", out, "--recipe", file, "--scale", "full", "--json")
    assert status == 0, told
    assert [(field["field"], field["now"]) for field in json.loads(told)["recipe"]] == [("train.lr", 2e-4)]
    for command in ("run", "elicit", "train", "evaluate", "check", "doctor", "cache"):
        assert called(command, file, "--scale", "half") == (2, NO_SUCH_SCALE), command
    assert called("compare", file, file, "--scale", "full") == (2, SAY_WHOSE)
    assert called("compare", file, file, "--like", file, "--scale", "half") == (2, NO_SUCH_SCALE)


def test_methods_shows_the_sizes():
    listed = methods()["recipes"]
    assert listed["grpo"]["full"] == {"rollout.prompts": 16, "rollout.group": 64, "train.lr": 1e-6}
    assert "full" not in listed["quickstart"]
