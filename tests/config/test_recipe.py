"""Recipes: equal means equal hash, and every error names the place, the value and what would do."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml

from limbeck import RecipeError, UserError, load_recipe
from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import as_yaml, parse
from limbeck.evaluate.tasks import load_task
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve, terms_of


@pytest.fixture
def file(tmp_path, recipe_data):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_data))
    return path


def test_hash_ignores_order_and_short_forms(recipe_data):
    turned = dict(reversed(list(copy.deepcopy(recipe_data).items())))
    turned["loss"] = [{"forward_kl": {"weight": 1.0}}]
    assert parse(turned).hash == parse(copy.deepcopy(recipe_data)).hash
    recipe_data["train"]["seed"] = 4
    assert parse(recipe_data).hash != parse(turned).hash


def test_resolved_form_reads_back(recipe_data):
    recipe = parse(recipe_data)
    again = parse(yaml.safe_load(yaml.safe_dump(recipe.resolved())))
    assert again == recipe and again.hash == recipe.hash


def test_set_replaces_nested_values(file):
    recipe = load_recipe(file, ["train.lr=0.5", "student.lora.rank=4", "train.betas=[0.8, 0.9]"])
    assert load_recipe(file, ["loss.0.weight=0.5"]).loss[0].weight == 0.5, "short forms can be set into too"
    assert (recipe.train.lr, recipe.student.lora.rank, recipe.train.betas) == (0.5, 4, (0.8, 0.9))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.²=1", "--set loss.²: loss has no entry '²': its 1 are counted from 0"),
        ("loss.7.weight=2", "loss has no entry '7'"),
        ("teacher.server.url=http://x", "replace it whole, as in --set 'teacher={server: ...}'"),
        ("train.lr.x=3", "train.lr is 0.001, which has no 'x'"),
        ("loss.0.teacher_share=0.5", "parameters stand under loss.0.params.teacher_share"),
        ("loss=forward_kl", "loss: must be a list, such as [forward_kl]; got 'forward_kl'"),
        ("writer=teacher", "writer: must be a list, such as [{by: teacher}]"),
        ("writer={by: teacher}", "must be a list, with its entries in [ ]"),
        ("elicit=[]", "elicit: is an empty list; write null for none"),
        ("loss=[]", "loss: is an empty list; give an entry"),
    ],
)
def test_what_set_refuses_comes_with_what_to_write(file, override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load_recipe(file, [override])


def test_a_file_that_is_not_there_is_named_with_the_folder_looked_in(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"no recipe file 'none.yaml' in {tmp_path}") + "$"):
        load_recipe("none.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(file.read_text())
    with pytest.raises(UserError, match=re.escape("'run' is a folder; did you mean 'run/recipe.yaml'?")):
        load_recipe("run")


def test_a_number_with_an_exponent_needs_no_point(file, recipe_data, tmp_path):
    """YAML 1.1 reads 2e-4 and 1.5e3 as text; quoted, it is text, and stays so when a resolved recipe is read again."""
    text = file.read_text().replace("lr: 0.001", "lr: 2e-4").replace("- forward_kl", "- jsd: {teacher_share: +5E-1}")
    file.write_text(text.replace("name: tiny", "name: '1e5'"))
    recipe = load_recipe(file, ["train.warmup=1e-1", "train.steps=1.0e1"])
    assert (recipe.train.lr, recipe.train.warmup, recipe.train.steps) == (2e-4, 0.1, 10)
    assert recipe.loss[0].params == {"teacher_share": 0.5} and recipe.name == "1e5"
    (tmp_path / "again.yaml").write_text(as_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr.x=3", "loss.7=jsd"])
def test_bad_set_is_refused(file, override):
    with pytest.raises(UserError):
        load_recipe(file, [override])


@pytest.mark.parametrize(
    ("path", "value", "place", "words"),
    [
        ("train.stepz", 3, "train.stepz", "steps"),
        ("train.lr", "fast", "train.lr", "fast"),
        ("train.lr", -1, "train.lr", "-1"),
        ("train.lr", float("nan"), "train.lr", "nan"),
        ("teecher", "x", "teecher", "teacher"),
        ("name", "../up", "", "name"),
        ("train.epochs", 2, "train", "exactly one of steps and epochs"),
        ("student.start.prune.keep", "importanc", "student.start.prune.keep", "importance"),
        ("student.start.prune.keep", "last", "student.start.prune.keep", "keep: first"),
        ("student.start.pretrained", "x", "student.start", "exactly one"),
        ("student.start.prune.keep", [3, 1], "student.start.prune", "rising"),
        ("writer", [{"by": "teacher", "share": 0.5}], "", "add up to 0.5"),
        ("writer", [{"by": "techer"}], "writer[0].by", "teacher"),
        ("evaluate.stop", ["x", "a \ud83d"], "evaluate.stop[1]", "half a character"),
        ("loss", [], "loss", "give an entry"),
        ("loss", [{"jsd": 3}], "loss[0].jsd", "mapping"),
        ("loss", [{"jsd": {}, "forward_kl": {}}], "loss[0]", "one loss per list entry"),
    ],
)
@pytest.mark.promise("S12")
def test_errors_name_place_value_and_cure(recipe_data, path, value, place, words):
    at = recipe_data
    *parents, last = path.split(".")
    for key in parents:
        at = at[key]
    at[last] = value
    with pytest.raises(RecipeError) as caught:
        parse(recipe_data)
    assert caught.value.path == place and words in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "place", "words"),
    [
        ("loss", ["forward_lk"], "loss[0].forward_lk", "forward_kl"),
        ("loss", [{"jsd": {"beta": 0.5}}], "loss[0].jsd.beta", "teacher_share"),
        ("loss", [{"jsd": {"teacher_share": 1}}], "loss[0].jsd.teacher_share", "outside (0, 1)"),
        ("loss", ["jsd", "jsd"], "loss[1]", "twice"),
        ("evaluate.metrics", ["everyday"], "evaluate.metrics", "fidelity is always measured"),
        ("evaluate.metrics", ["fidelity", "everyda"], "evaluate.metrics", "everyday"),
        ("evaluate.controls", ["untuched"], "evaluate.controls[0]", "untouched"),
        ("prompts.from", "nowhere.jsonl", "prompts.from", "nowhere.jsonl"),
        ("writer", [{"by": "corpus"}], "writer", "prompts.jsonl, line 1"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_is_loaded(recipe_data, path, value, place, words):
    at = recipe_data
    *parents, last = path.split(".")
    for key in parents:
        at = at[key]
    at[last] = value
    recipe_data["teacher"] = "no/such-model"  # never reached
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
        resolve(parse(recipe_data))
    assert getattr(caught.value, "path", "") == place


def test_layers_beyond_the_teacher_are_refused(recipe_data):
    recipe_data["student"]["start"]["prune"]["layers"] = 5
    with pytest.raises(RecipeError, match="only 4 layers"):
        check(parse(recipe_data))


@pytest.mark.parametrize(
    ("path", "value"), [("writer", [{"by": "teacher", "max_tokens": 256}]), ("evaluate.max_tokens", 256)]
)
def test_answers_that_leave_no_room_for_a_prompt_are_refused_early(recipe_data, path, value):
    if path == "writer":
        recipe_data["writer"] = value
    else:
        recipe_data["evaluate"]["max_tokens"] = value
    with pytest.raises(RecipeError, match="context of 256"):
        check(parse(recipe_data))


def test_one_token_answers_have_a_plan_too(recipe_data):
    recipe_data["writer"][0]["max_tokens"] = 1
    assert check(parse(recipe_data)).requests == 20


def test_training_on_a_tasks_own_prompts_is_refused(recipe_data, tmp_path):
    from limbeck.config.builtin import task_folders

    recipe_data["prompts"]["from"] = str(task_folders()["everyday"] / "test.jsonl")
    with pytest.raises(RecipeError, match="everyday/explain-t01"):
        resolve(parse(recipe_data))


def test_held_out_prompts_that_are_trained_on_are_refused(recipe_data):
    recipe_data["evaluate"]["prompts"] = recipe_data["prompts"]["from"]
    with pytest.raises(RecipeError, match="training prompts too"):
        resolve(parse(recipe_data))


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2", "a: 1\na: 2", "1: 2", "!!python/object/apply:os.system ['true']", "\x00", "a: " + "[" * 5000,
             'title: "\\ud83d"', "loss: &a [*a]"],
    ids=range(9),
)  # fmt: skip
def test_malformed_files_are_one_clear_error(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "bad.yaml")


def test_a_missing_recipe_names_the_nearest_built_in_one():
    with pytest.raises(RecipeError, match="quickstart"):
        load_recipe("quickstar")


@pytest.mark.parametrize("name", recipe_files())
def test_built_in_recipes_are_short_valid_and_named_like_their_file(name):
    path = recipe_files()[name]
    assert len(path.read_text().splitlines()) <= 25
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.title
    resolve(recipe)
    assert terms_of(recipe)


def test_the_plan_counts_requests_and_needs_no_weights(recipe_data):
    plan = check(parse(recipe_data))
    assert plan.requests == 18 + 2 and plan.steps == 6 and plan.trainings == 2
    assert plan.disk_bytes > 0 and plan.memory_bytes > 0 and all(seconds > 0 for seconds in plan.seconds.values())


def test_the_older_words_of_a_preference_are_still_read(recipe_data):
    old = parse(recipe_data | {"loss": [{"cross_entropy": {"only": "best"}}]})
    new = parse(recipe_data | {"loss": [{"cross_entropy": {"only": "chosen"}}]})
    assert old.hash == new.hash and old.loss[0].params == {"only": "chosen"}


@pytest.mark.parametrize(
    "setting", ["train.steps", "train.lr", "train.seed", "evaluate.limit", "student.start.prune.layers"]
)
def test_a_boolean_is_no_number(setting):
    with pytest.raises(RecipeError, match="must be a number, not true"):
        load_recipe("quickstart", [f"{setting}=true"])


def test_a_boolean_is_a_boolean():
    assert load_recipe("quickstart", ["evaluate.speeds=true"]).evaluate.speeds is None


@pytest.mark.promise("S9")
@pytest.mark.parametrize(
    "name", ["../up", "/etc", "a/b", "..", ".hidden", "C:\\x", "a\\b", "a\0b", "a\n", "\uff0e\uff0e", "x" * 65, ""]
)
def test_no_name_is_a_path(recipe_data, tmp_path, name):
    """Of a recipe, of a model in it, and of a task; each stands for a folder or a file somewhere."""
    with pytest.raises(UserError):
        parse(recipe_data | {"name": name})
    with pytest.raises(UserError, match="models"):
        parse(recipe_data | {"models": {name: "elsewhere"}})
    assert parse(recipe_data | {"name": "fine.1", "models": {"fine_1": "elsewhere"}}).name == "fine.1"
    (tmp_path / "task.yaml").write_text(
        json.dumps({"name": name, "version": "1", "description": "d", "test": "test.jsonl"})
    )
    with pytest.raises(UserError, match=r"name|special characters"):
        load_task(str(tmp_path))


def test_a_task_has_one_limit(recipe_data):
    recipe_data["evaluate"] = [{"everyday": {"limit": 3}}, {"everyday": {"limit": 4}}]
    with pytest.raises(RecipeError, match=r"evaluate\.metrics\[1\]: everyday has two limits"):
        parse(recipe_data)
