"""More places to kill a run in, and more ways of writing, than `make test` has time for."""

from __future__ import annotations

import pytest

from tests.runs import test_pipeline
from tests.training import test_rewards, test_rollout
from tests.training.test_rollout import STUDENT


@pytest.mark.parametrize(
    "crash_at", ["elicit.before_record:7", "elicit.after_record:7", "train.after_step:10", "directory.before_rename:2"]
)
def test_killed_anywhere_it_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, crash_at):
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


def test_rewards_killed_and_run_again_with_new_text_at_every_step(recipe_data, tmp_path):
    test_rewards.test_killed_and_run_again_the_losses_are_the_same_to_the_bit(recipe_data, tmp_path, 1)
