"""The machine section: outside the hash, from the recipe, a file of its own, or --set."""

from __future__ import annotations

import pytest
import yaml

from limbeck.config.recipe import load_recipe
from limbeck.types import RecipeError

RECIPE = {
    "name": "tiny",
    "teacher": "smollm2-135m-instruct",
    "student": {"start": {"prune": {"layers": 3, "keep": "first"}}},
    "prompts": {"from": "builtin/everyday"},
    "loss": ["forward_kl"],
    "train": {"steps": 1},
}


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"machine": {"device": "cpu", "micro_tokens": 512}}))
    return file


def test_a_machine_is_not_part_of_the_hash(recipe_file):
    plain = load_recipe(recipe_file, ["machine={}"])
    there = load_recipe(recipe_file, ["machine.device=cuda:1", "machine.teacher_device=cpu", "machine.head_mib=64"])
    assert plain.hash == there.hash == load_recipe(recipe_file).hash
    assert "machine" not in there.resolved()
    assert (there.machine.device, there.machine.teacher_device, there.machine.head_mib) == ("cuda:1", "cpu", 64)


def test_precision_and_quantisation_are_part_of_the_hash(recipe_file):
    plain = load_recipe(recipe_file)
    changed = ["train.precision=bfloat16", "teacher.dtype=bfloat16", "teacher.quantise=int8"]
    whole = ["teacher={model: smollm2-135m-instruct}"]
    hashes = {load_recipe(recipe_file, [*whole, one]).hash for one in changed}
    assert len(hashes | {plain.hash}) == 4
    assert load_recipe(recipe_file, ["train.precision=float32"]).hash == plain.hash
    assert load_recipe(recipe_file, [*whole, "teacher.dtype=float32"]).hash == plain.hash


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_machine_file_replaces_the_recipes_keys_and_set_replaces_both(recipe_file, tmp_path, wrapped):
    file = tmp_path / "machine.yaml"
    settings = {"device": "cuda", "cache_gib": 4}
    file.write_text(yaml.safe_dump({"machine": settings} if wrapped else settings))
    machine = load_recipe(recipe_file, ["machine.cache_gib=2"], file).machine
    assert (machine.device, machine.cache_gib, machine.micro_tokens) == ("cuda", 2, 512)


@pytest.mark.parametrize(
    ("settings", "path", "word"),
    [
        ({"devise": "cpu"}, "machine.devise", "device"),
        ({"device": "the big one"}, "machine.device", "pattern"),
        ({"device": 0}, "machine.device", "string"),
        ({"micro_tokens": 0}, "machine.micro_tokens", "16"),
        ({"cache_gib": -1}, "machine.cache_gib", "greater"),
        ([1], "", "mapping"),
    ],
)
def test_what_a_machine_file_gets_wrong_is_named(recipe_file, tmp_path, settings, path, word):
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(RecipeError, match=word) as refusal:
        load_recipe(recipe_file, [], file)
    assert refusal.value.path == path


def test_a_machine_file_that_is_not_there_is_named(recipe_file, tmp_path):
    with pytest.raises(RecipeError, match="no file"):
        load_recipe(recipe_file, [], tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("key", ["dtype", "quantise"])
@pytest.mark.parametrize(
    "teacher",
    [
        {"server": {"url": "http://127.0.0.1:1/v1", "name": "m"}},
        {"model": "smollm2-135m-instruct", "weights": "live"},
    ],
)
def test_a_teacher_without_weights_of_its_own_has_no_precision(recipe_file, teacher, key):
    value = "bfloat16" if key == "dtype" else "int8"
    with pytest.raises(RecipeError, match="leave") as refusal:
        load_recipe(recipe_file, [f"teacher={teacher | {key: value}}"])
    assert refusal.value.path == f"teacher.{key}"
