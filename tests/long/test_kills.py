"""More places to kill a run in, and more ways of writing, than `make test` has time for."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
import yaml

from limbeck.models.load import model_contents
from limbeck.storage.rounds import round_folder, rounds_record
from tests.runs import test_pipeline, test_stages
from tests.runs.test_pipeline import recipe_file  # noqa: F401 (a fixture)
from tests.runs.test_rounds import adversarial, answers_in, data, losses  # noqa: F401 (fixtures)
from tests.runs.test_stages import aligned  # noqa: F401 (a fixture)
from tests.scripted_server import Scripted
from tests.training import test_judges, test_rewards, test_rollout
from tests.training.test_rollout import STUDENT

JOINT = {"joint": {"teacher_share": 0.2}}


@pytest.mark.parametrize(
    "crash_at", ["elicit.before_record:7", "elicit.after_record:7", "train.after_step:10", "directory.before_rename:2"]
)
@pytest.mark.promise("R3")
def test_killed_anywhere_it_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, crash_at):  # noqa: F811
    test_pipeline.test_killed_anywhere_it_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, crash_at)


@pytest.mark.parametrize(
    ("rollout", "loss", "crash_at"),
    [
        ({"ahead": 3}, ["on_policy_distillation"], "train.after_step:4"),
        ({"ahead": 3}, ["on_policy_distillation"], "rollout.after_text:9"),  # between two texts of the student
        ({}, ["on_policy_distillation"], "rollout.after_text:6"),
        ({"ahead": 2, "dtype": "bfloat16"}, ["on_policy_distillation"], "train.after_step:4"),
        (JOINT, ["minillm_long", {"reverse_kl": {"by": "importance_weight"}}], "train.after_step:4"),
        (JOINT, ["minillm_long", {"reverse_kl": {"by": "importance_weight"}}], "rollout.after_text:6"),
    ],
)
@pytest.mark.promise("R3")
def test_killed_and_run_again_the_losses_are_the_same_to_the_bit(recipe_data, tmp_path, rollout, loss, crash_at):
    test_rollout.test_killed_and_run_again_the_losses_are_the_same_to_the_bit(
        recipe_data, tmp_path, [STUDENT], rollout, loss, crash_at
    )


@pytest.mark.parametrize(
    "crash_at",
    ["elicit.after_record:23", "train.after_step:1", "train.after_step:3", "directory.before_rename:3"],
)
@pytest.mark.promise("R3")
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


def twins(crash_at, file, tmp_path, homes):
    """The folders of a training that was killed there and run again, and of its undisturbed twin; alike in `homes`."""
    killed, clean = tmp_path / "killed", tmp_path / "clean"
    assert test_pipeline.command("train", file, "--out", killed, crash_at=crash_at).returncode == 137
    before = set(answers_in(killed))
    for folder in (killed, clean):
        done = test_pipeline.command("train", file, "--out", folder)
        assert done.returncode == 0, done.stderr
    assert before <= set(answers_in(killed)) == set(answers_in(clean))
    for home in homes:
        assert losses(killed / home) == losses(clean / home), home
        assert model_contents(str(killed / home / "student")) == model_contents(str(clean / home / "student")), home
    return killed, clean


@pytest.mark.parametrize(
    "crash_at",
    [
        "elicit.after_record:5",  # a draft of the first stage
        "train.after_step:1",  # its training
        "checkpoint.before_manifest:2",
        "directory.before_rename:1",  # as its model is saved
        "elicit.after_record:25",  # what that model writes for the round
        "train.after_step:3",  # the round
        "train.after_step:5",  # the second round's stage
        "train.after_step:8",
    ],
)
@pytest.mark.promise("R3")
def test_a_stage_that_trains_a_named_model_is_killed_anywhere(aligned, tmp_path, crash_at):  # noqa: F811
    aligned["rounds"]["stages"]["tutor"]["train"]["save_seconds"] = 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(aligned))
    killed, clean = twins(crash_at, tmp_path / "recipe.yaml", tmp_path, test_stages.HOMES)
    assert rounds_record(killed)["rounds"] == rounds_record(clean)["rounds"]


@pytest.mark.parametrize(
    "crash_at",
    [
        "train.after_step:1",  # the training before the rounds
        "train.after_step:3",  # the first reward model
        "rollout.after_write:1",  # the first round, its groups written and not judged
        "rollout.after_write:2",
        "directory.before_rename:3",
        "train.after_step:7",  # the second reward model
        "rollout.after_write:4",  # the second round
        "checkpoint.before_prune:4",
    ],
)
@pytest.mark.promise("R3")
def test_rewards_by_a_stage_are_killed_in_every_round(adversarial, tmp_path, crash_at):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(adversarial))
    homes = ["rounds/0", "stages/discriminator/1", "rounds/1", "stages/discriminator/2", "rounds/2"]
    killed, clean = twins(crash_at, tmp_path / "recipe.yaml", tmp_path, homes)
    assert rounds_record(killed)["rounds"] == rounds_record(clean)["rounds"]


def billed(folder):
    """How many answers of servers a run's store has."""
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        return db.execute("select count(*) from bills").fetchone()[0]


@pytest.mark.parametrize("crash_at", ["elicit.after_record:5", "elicit.before_record:6", "rollout.after_write:3"])
@pytest.mark.promise("R3", "R7")
def test_a_judged_group_is_killed_between_its_verdicts(recipe_data, tmp_path, crash_at):
    """Four steps of two prompts, each judged by one question: what was answered and kept is not asked again."""
    rollout = test_rewards.ROLLOUT | {"rewards": [{"judge": "judge"}]}
    recipe = test_rewards.recipe(recipe_data, tmp_path, rollout=rollout, writer=[test_rewards.STUDENT])
    recipe["train"] |= {"steps": 4, "save_seconds": 0}
    recipe["machine"] = {"answers": "none"}
    with Scripted(test_judges.script) as server:
        recipe["models"] = {"judge": {"server": {"url": server.url, "name": "toy", "concurrency": 1}}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        killed, clean = twins(crash_at, tmp_path / "recipe.yaml", tmp_path, ["."])
        lost = len(server.seen) - billed(killed) - billed(clean)
        assert 0 <= lost <= 1, "but for the answer that was under way"
    assert any(int(value != "0x0.0p+0") for value in losses(clean))
