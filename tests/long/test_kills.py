"""More places to kill a run in, and more ways of writing, than `make test` has time for."""

from __future__ import annotations

import json

import pytest
import yaml

from limbeck.storage.rounds import round_folder, rounds_record
from tests.runs import test_pipeline
from tests.runs.test_pipeline import recipe_file  # noqa: F401 (a fixture)
from tests.runs.test_rounds import answers_in, data, losses  # noqa: F401 (a fixture)
from tests.training import test_rewards, test_rollout
from tests.training.test_rollout import STUDENT


@pytest.mark.parametrize(
    "crash_at", ["elicit.before_record:7", "elicit.after_record:7", "train.after_step:10", "directory.before_rename:2"]
)
def test_killed_anywhere_it_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, crash_at):  # noqa: F811
    test_pipeline.test_killed_anywhere_it_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, crash_at)


@pytest.mark.parametrize(
    ("rollout", "loss"),
    [
        ({"ahead": 3}, ["on_policy_distillation"]),
        ({"ahead": 2, "dtype": "bfloat16"}, ["on_policy_distillation"]),
        ({"joint": {"teacher_share": 0.2}}, ["minillm_long", {"reverse_kl": {"by": "importance_weight"}}]),
    ],
)
def test_killed_and_run_again_the_losses_are_the_same_to_the_bit(recipe_data, tmp_path, rollout, loss):
    test_rollout.test_killed_and_run_again_the_losses_are_the_same_to_the_bit(
        recipe_data, tmp_path, [STUDENT], rollout, loss
    )


@pytest.mark.parametrize(
    "crash_at",
    ["elicit.after_record:23", "train.after_step:1", "train.after_step:3", "directory.before_rename:3"],
)
def test_rounds_killed_anywhere_go_on_to_the_same_end(data, recipe_file, tmp_path, crash_at):  # noqa: F811
    recipe_file.write_text(yaml.safe_dump(data))
    out, clean = tmp_path / "killed", tmp_path / "clean"
    assert test_pipeline.command("run", recipe_file, "--out", out, crash_at=crash_at).returncode == 137
    before = set(answers_in(out))
    done = test_pipeline.command("run", recipe_file, "--out", out)
    assert done.returncode == 0, done.stderr
    assert before <= set(answers_in(out)) and len(answers_in(out)) == 40
    assert test_pipeline.command("run", recipe_file, "--out", clean).returncode == 0
    ours, theirs = rounds_record(out), rounds_record(clean)
    assert ours["rounds"] == theirs["rounds"], "the same weights to the bit"
    for number in (1, 2):
        assert losses(round_folder(out, number)) == losses(round_folder(clean, number))
        values = [
            json.loads((round_folder(folder, number) / "evaluation" / "summary.json").read_text())["systems"]
            for folder in (out, clean)
        ]
        assert values[0] == values[1]


def test_rewards_killed_and_run_again_with_new_text_at_every_step(recipe_data, tmp_path):
    test_rewards.test_killed_and_run_again_the_losses_are_the_same_to_the_bit(recipe_data, tmp_path, 1)
