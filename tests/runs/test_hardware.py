"""Estimates for devices, here or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from limbeck.config.machine import Machine
from limbeck.config.recipe import parse
from limbeck.models import named
from limbeck.models.load import load_config
from limbeck.runs.cost import Plan
from limbeck.runs.hardware import GIB, LISTED, listed, matrix_rate, measured
from limbeck.runs.memory import teacher_shares_device
from limbeck.runs.preflight import check
from limbeck.runs.rewarded import rewarded_bytes
from limbeck.runs.shapes import Shape
from limbeck.types import UserError

RECIPE = {
    "name": "tiny",
    "teacher": {"model": "smollm2-135m-instruct"},
    "student": {"start": {"prune": {"layers": 24, "keep": "first"}}},
    "prompts": {"from": "builtin/everyday", "limit": 40},
    "loss": ["forward_kl"],
    "train": {"steps": 10, "tokens_per_step": 4096},
}


@pytest.fixture
def tokenizer(monkeypatch, tiny):
    monkeypatch.setattr("limbeck.runs.preflight.load_tokenizer", lambda *_: tiny.tokenizer)


def planned(device_like: str = "h100-80gb", **sections) -> Plan:
    data = {key: RECIPE[key] | value if isinstance(RECIPE.get(key), dict) else value for key, value in sections.items()}
    return check(parse(RECIPE | data), device_like)


def test_a_plan_for_another_device_needs_nothing_of_this_one(tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = planned(machine={"device": "cuda:3"})
    assert (plan.device, plan.device_memory, plan.measured, plan.fits) == ("h100-80gb", 80 * GIB, False, True)
    assert "data sheet" in dict(plan.lines())["time, all"] and "of 80 GiB" in dict(plan.lines())["peak memory"]


def test_the_same_plan_without_a_device_that_is_not_here_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"machine\.device.*cuda:97"):
        check(parse(RECIPE | {"machine": {"device": "cuda:97"}}))


def test_a_faster_device_takes_less_time_and_bfloat16_is_faster_there(tokenizer):
    slow, fast = planned("l4-24gb"), planned("h100-80gb")
    assert sum(fast.seconds.values()) < sum(slow.seconds.values())
    assert planned(train={"precision": "bfloat16"}).seconds["train"] < fast.seconds["train"] / 5


def test_memory_follows_from_precision_and_placement(tokenizer, monkeypatch):
    weights = named.NAMED["smollm2-135m-instruct"].config
    monkeypatch.setitem(weights, "hidden_size", 4096)  # an 8B teacher, its student half as deep
    monkeypatch.setitem(weights, "intermediate_size", 14336)
    monkeypatch.setitem(weights, "num_hidden_layers", 32)
    monkeypatch.setitem(weights, "num_attention_heads", 32)
    monkeypatch.setitem(weights, "num_key_value_heads", 8)
    full = planned(train={"tokens_per_step": 1024})
    assert not full.fits and "TOO MUCH" in dict(full.lines())["peak memory"]
    short = planned(train={"tokens_per_step": 1024}, teacher={"dtype": "bfloat16"})
    eight = planned(train={"tokens_per_step": 1024}, teacher={"dtype": "bfloat16", "quantise": "int8"})
    four = planned(train={"tokens_per_step": 1024}, teacher={"dtype": "bfloat16", "quantise": "int4"})
    apart = planned(train={"tokens_per_step": 1024}, machine={"teacher_device": "cpu"})
    needed = [plan.memory_bytes for plan in (full, short, eight, four, apart)]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 5
    kept = planned(train={"tokens_per_step": 1024}, machine={"checkpointing": True})
    assert kept.memory_bytes < full.memory_bytes


@pytest.mark.parametrize(
    ("names", "shared"),
    [(("auto", "cuda"), True), (("cuda:0", "cuda"), True), (("auto", "cuda:1"), False), (("auto", "cpu"), False)],
)
def test_a_teacher_on_the_same_device_takes_room_under_each_of_its_names(tokenizer, names, shared):
    device, teacher_device = names
    alone = planned()
    named_apart = planned(machine={"device": device, "teacher_device": teacher_device})
    assert (named_apart.memory_bytes == alone.memory_bytes) is shared


def test_auto_is_the_processor_where_there_is_no_other_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, machine = measured(torch.device("cpu")), Machine(device="auto", teacher_device="cpu")
    assert teacher_shares_device(machine, here) and not teacher_shares_device(machine, listed("l4-24gb"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not teacher_shares_device(Machine(device="cpu", teacher_device="auto"), here)


def test_reward_models_on_the_same_device_take_room_under_each_of_its_names():
    scorer = Shape.of(load_config("smollm2-135m-instruct"))
    for teacher_device, count in (("cuda:0", 1), ("cuda:1", 0)):
        recipe = parse(RECIPE | {"machine": {"teacher_device": teacher_device}})
        taken = rewarded_bytes(recipe, (), scorer, (scorer,), hardware=listed("l4-24gb"))
        assert taken == count * 4 * scorer.parameters


def test_checkpoints_of_adapters_hold_no_other_weights(tokenizer):
    whole, adapters = planned(), planned(student={"lora": {"rank": 8}})
    assert adapters.trainings == whole.trainings and adapters.disk_bytes < whole.disk_bytes / 3


def test_computing_activations_again_takes_time(tokenizer):
    plain, again = planned(), planned(machine={"checkpointing": True})
    assert 1.05 < again.seconds["train"] / plain.seconds["train"] < 4 / 3


def test_a_teacher_that_no_term_reads_takes_no_room_beside_the_training(tokenizer):
    read, text = planned(), planned(loss=["cross_entropy"])
    assert text.memory_bytes < read.memory_bytes


def test_hardware_that_is_not_listed_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="h100-80gb"):
        listed("h100-80")
    assert listed("H100-80GB") is LISTED["h100-80gb"]
    assert all(replace(hardware, name="").rate(torch.bfloat16) > 1e12 for hardware in LISTED.values())


def test_the_rate_of_this_machine_is_measured():
    here = measured(torch.device("cpu"))
    assert here.measured and here.memory is None and here.rate(torch.bfloat16) == here.rate(torch.float32) > 1e6
    assert matrix_rate(seconds=0.05, shape=(64, 64, 64)) > 1e6


@pytest.mark.parametrize("has", [True, False])
def test_the_rate_in_bfloat16_is_measured_where_the_processor_has_its_products(monkeypatch, has):
    monkeypatch.setattr("limbeck.runs.hardware.multiplies_in_bfloat16", lambda: has)
    monkeypatch.setattr("limbeck.runs.hardware.matrix_rate", lambda device, dtype: 2.0 * (4 - dtype.itemsize) + 1.0)
    here = measured(torch.device("cpu"), torch.bfloat16)
    assert here.rate(torch.bfloat16) / here.rate(torch.float32) == (5.0 if has else 1.0)
