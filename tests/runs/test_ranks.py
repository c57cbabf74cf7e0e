"""What is refused on several ranks, before anything is spent; tests/long/test_ranks.py starts them."""

from __future__ import annotations

import pytest
import torch

import limbeck
from limbeck.commands.ranks import one_process, start, without_ranks
from limbeck.config import ranks as environment
from limbeck.config.recipe import parse
from limbeck.models.placement import find_device
from limbeck.runs import sharing
from limbeck.types import RecipeError, UserError

STUDENT = [{"by": "student", "max_tokens": 8}]


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment of torch's launcher."""
    facts = {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"writer": STUDENT, "loss": ["on_policy_distillation"]}, "writer"),
        ({"loss": ["hidden_match"]}, "loss.hidden_match"),
        ({"teacher": {"quantise": "int8"}}, "teacher.quantise"),
        ({"train": {"epochs": 1, "mixup": 1.0}}, "train.mixup"),
        ({"student": {"start": "teacher", "lora": {"rank": 2, "alpha": 4, "base": "int8"}}}, "student.lora.base"),
        ({"student": {"start": "teacher"}, "teacher": {"weights": "average"}}, "teacher"),
    ],
)
def test_what_divided_weights_can_not_do_is_refused(recipe_data, changes, place):
    source = recipe_data["teacher"]
    if "teacher" in changes:
        changes["teacher"] = {"model": source} | changes["teacher"]
    if changes.get("student", {}).get("start") == "teacher":
        changes["student"]["start"] = {"pretrained": source}
    recipe_data |= changes
    sharing.check(parse(recipe_data))
    with pytest.raises(RecipeError, match=r"machine\.shard: full") as refused:
        sharing.check(parse(recipe_data | {"machine": {"shard": "full"}}))
    assert refused.value.path == place


def test_a_served_teachers_ceilings_are_refused_where_each_rank_asks(recipe_data):
    server = {"url": "http://127.0.0.1:1/v1", "name": "toy", "names": 20}
    student = {"start": {"pretrained": recipe_data["teacher"]}}
    for more in ({"limits": {"requests": 10}}, {"requests_per_minute": 60}, {"tokens_per_minute": 600}):
        data = recipe_data | {"student": student, "teacher": {"server": server | more}}
        with pytest.raises(RecipeError, match="have its limits and rates for itself"):
            sharing.check(parse(data))
        sharing.check(parse(data | {"loss": ["cross_entropy"]}))  # rank 0 alone asks for text
    sharing.check(parse(recipe_data | {"student": student, "teacher": {"server": server}}))
    own = {"url": server["url"], "name": "toy", "logprobs": 20, "limits": {"requests": 10}}
    sharing.check(parse(recipe_data | {"student": student, "teacher": {"server": own}}))  # asked by rank 0 alone


def test_what_divided_weights_can_do_is_not(recipe_data):
    machine = {"shard": "full", "checkpointing": True, "timeout": 60}
    sharing.check(parse(recipe_data | {"machine": machine}))
    text = recipe_data | {"loss": ["cross_entropy"], "machine": machine}
    sharing.check(parse(text | {"teacher": {"model": recipe_data["teacher"], "quantise": "int8"}}))
    cached = {"model": recipe_data["teacher"], "quantise": "int8", "cache": {"top_k": {"k": 8}}}
    sharing.check(parse(recipe_data | {"teacher": cached, "machine": machine}))
    elsewhere = {"server": {"url": "http://127.0.0.1:1/v1", "name": "toy", "kind": "states"}}
    student = {"start": {"pretrained": recipe_data["teacher"]}}
    sharing.check(parse(recipe_data | {"teacher": elsewhere, "student": student, "machine": machine}))


def test_where_the_machine_runs_changes_no_hash(recipe_data):
    assert parse(recipe_data | {"machine": {"shard": "full", "timeout": 5}}).hash == parse(recipe_data).hash


def test_ranks_are_those_of_torchs_launcher(second_of_two):
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (1, 2, 1)
    with pytest.raises(UserError, match="leave out --ranks"):
        start(["run", "x"], 2)
    with pytest.raises(UserError, match="one process"):
        one_process("compare")
    with pytest.raises(UserError, match="one process"):
        limbeck.run("quickstart")


def test_other_launchers_variables_are_not_read(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (environment.rank(), environment.world_size()) == (0, 1)


def test_each_rank_has_a_device_of_its_own(second_of_two, monkeypatch):
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"2 ranks can't share 'cuda:0'"):
        find_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Here(device))
    assert find_device("auto") == find_device("cuda") == torch.device("cuda:1")


class Here:
    """A tensor on a device that is not here."""

    def __init__(self, device):
        self.device = device


def test_the_ranks_get_the_command_without_their_number():
    words = ["run", "quickstart", "--ranks", "4", "--set", "train.lr=1", "--out", "x"]
    assert without_ranks(words) == ["run", "quickstart", "--set", "train.lr=1", "--out", "x"]
    assert without_ranks(["train", "--ranks=2", "x"]) == ["train", "x"]
