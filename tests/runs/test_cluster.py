"""Predictions for machines that are not here: sums by hand, limits, and what two ranks really hold and send."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.config.builtin import machine_files
from limbeck.config.cluster import Cluster
from limbeck.config.recipe import load_recipe, parse
from limbeck.models.placement import Precision
from limbeck.objectives.term import make_term
from limbeck.runs import memory
from limbeck.runs.cluster import _Setting, predict, writing_time
from limbeck.runs.cost import Plan
from limbeck.runs.hardware import stated
from limbeck.runs.prediction import LOADING, PASSES, TEXT, TRAINING, UPDATE, WIRE, WRITING, Prediction, Work
from limbeck.runs.preflight import check
from limbeck.runs.shapes import Shape, Shapes
from limbeck.training import loop, sharded
from limbeck.types import RecipeError, UserError
from tests.conftest import make_net
from tests.runs.test_hardware import RECIPE
from tests.training.test_ranks import make_job

DEVICE = {
    "name": "toy",
    "memory_gb": 10,
    "tflops": {"float32": 2, "bfloat16": 20},
    "memory_gb_s": 100,
    "utilisation": 0.5,
}
EIGHT = DEVICE | {"devices_per_node": 8, "link_gb_s": 50, "price_per_hour": 2}
# 10 layers of a million numbers in matrices and a thousand in vectors, and a head of 2 million that is tied
STUDENT = Shape(
    layers=10, layer_parameters=1_001_000, head_parameters=2_000_000, width=100, key_value_width=50, layer_vectors=1_000
)
TEACHER = replace(STUDENT, layers=20, tied=False)
WORK = Work(tokens=8192, responses=4096)


def setting(cluster: dict[str, Any], loss: str = "forward_kl", **sections: Any) -> _Setting:
    recipe = parse(RECIPE | sections | {"loss": [loss]})
    machines = Cluster.model_validate(cluster)
    shapes = Shapes(STUDENT, None if loss == "cross_entropy" else TEACHER)
    return _Setting(recipe, [make_term(loss, {}, 1.0)], shapes, stated(machines))


def predicted(cluster: dict[str, Any], work: Work = WORK, controls: int = 0, **sections: Any) -> Prediction:
    it = setting(cluster, **sections)
    return predict(it.recipe, it.terms, it.shapes, work, hardware=it.hardware, steps=10, controls=controls)


def micro(tokens: int, shard: str = "none", **more: Any) -> dict[str, Any]:
    return {"machine": {"micro_tokens": tokens, "shard": shard, **more}}


# Sums by hand


def test_memory_of_one_device_is_the_sum_of_its_tensors():
    (loading, training) = predicted(DEVICE, **micro(1024)).memory.values()
    numbers = 10 * 1_001_000 + 2_000_000
    assert training["weights"] == training["gradients"] == 4 * numbers and training["moments"] == 8 * numbers
    assert training["teacher"] == loading["teacher"] == 4 * (20 * 1_001_000 + 4_000_000)
    assert training["activations"] == pytest.approx(1024 * 10 * 33 * math.sqrt(1_001_000))
    assert training["gradient of the head"] == 4 * 2_000_000
    # 1/64 of the memory in each of four tensors, but no more than the micro-batch's positions have
    assert training["logits"] == 4 * 4 * 1024 * 20_000
    assert training["gathered"] == 0 and "rounded copies" not in training
    assert predicted(DEVICE, **micro(10**6)).memory[TRAINING]["logits"] == 4 * 4 * (10**10 // 256)
    small = predicted(DEVICE, **micro(1024, head_mib=8)).memory[TRAINING]
    assert small["logits"] == 4 * 8 * 2**20


def test_divided_parts_are_an_nth_and_vectors_are_whole():
    whole = predicted(EIGHT, **micro(512)).memory[TRAINING]
    part = predicted(EIGHT, **micro(512, "full")).memory[TRAINING]
    matrices, vectors = 10 * 1_000_000 + 2_000_000, 10 * 1_000
    assert whole["weights"] == 4 * (matrices + vectors)
    assert part["weights"] == part["gradients"] == 4 * (matrices / 8 + vectors)
    assert part["moments"] == 8 * (matrices / 8 + vectors)
    assert part["teacher"] == 4 * ((20 * 1_000_000 + 4_000_000) / 8 + 20_000)
    assert part["activations"] == whole["activations"] and part["logits"] == whole["logits"]
    # embeddings with head, and two layers: weights and gradients of the student, weights of the teacher
    assert part["gathered"] == 4 * 2 * (2_000_000 + 2 * 1_001_000) + 4 * (4_000_000 + 2 * 1_001_000)
    # before it is divided, everything is whole
    assert predicted(EIGHT, **micro(512, "full")).memory[LOADING]["weights"] == whole["weights"]


def test_a_step_is_operations_by_rate_and_bytes_by_bandwidth():
    step = predicted(EIGHT, **micro(1024)).step
    operations = 6 * (10_010_000 * 8192 + 2_000_000 * 4096) + 2 * (20_020_000 * 8192 + 2_000_000 * 4096)
    assert step[PASSES].seconds == pytest.approx(operations / 8 / (2e12 * 0.5))
    assert step[WIRE].seconds == pytest.approx(2 * 7 / 8 * 4 * 12_010_000 / 50e9)
    assert step[UPDATE].seconds == pytest.approx(28 * 12_010_000 / 100e9)
    assert step[TEXT].seconds == 0
    short = predicted(EIGHT, train=RECIPE["train"] | {"precision": "bfloat16"}, **micro(1024)).step
    assert short[PASSES].seconds == pytest.approx(step[PASSES].seconds / 10)
    assert (step[PASSES].limit, short[PASSES].limit) == (
        "tflops.float32 x utilisation",
        "tflops.bfloat16 x utilisation",
    )


def test_divided_weights_are_sent_in_every_pass():
    vectors = 2 * 4 * 10_000  # summed once a step
    once = predicted(EIGHT, **micro(1024, "full"))
    student, teacher = 4 * (3 * 10_000_000 + 2 * 2_000_000), 4 * (20_000_000 + 4_000_000)
    assert once.micro_batches == 8
    assert once.sent == pytest.approx(7 / 8 * (student + teacher + vectors))
    twice = predicted(EIGHT, **micro(512, "full"))
    assert twice.sent == pytest.approx(7 / 8 * (2 * (student + teacher) + vectors))
    short = predicted(EIGHT, train=RECIPE["train"] | {"precision": "bfloat16"}, **micro(1024, "full"))
    assert once.sent - short.sent == pytest.approx(7 / 8 * 2 * 2 * 10_000_000)  # layers are gathered in two bytes
    assert once.all_sent == 10 * once.sent
    with_control = predicted(EIGHT, controls=1, **micro(1024, "full"))
    assert with_control.all_sent == pytest.approx(10 * (2 * once.sent - 7 / 8 * teacher))
    assert with_control.seconds(10, 1) > once.seconds(10, 0)


def test_adapters_alone_are_summed_and_updated():
    student = {"start": {"pretrained": "smollm2-135m-instruct"}, "lora": {"rank": 4}}
    adapters = 4 * 10 * 20 * 100
    made = predicted(EIGHT, student=student, **micro(1024))
    assert made.sent == pytest.approx(7 / 8 * 2 * 4 * adapters)
    assert made.memory[TRAINING]["gradients"] == 4 * adapters and made.memory[TRAINING]["gradient of the head"] == 0
    divided = predicted(EIGHT, student=student, **micro(1024, "full"))
    frozen = 4 * (2 * 10_000_000 + 2_000_000) + 4 * (20_000_000 + 4_000_000)
    assert divided.sent == pytest.approx(7 / 8 * (frozen + 2 * 4 * adapters))


def test_writing_reads_all_weights_for_each_token_or_computes():
    hardware = stated(Cluster.model_validate(DEVICE))
    few = writing_time(hardware, STUDENT, Precision(), answers=1, prompt=0, answer=100, read=0)
    cached = 2 * 4 * 10 * 50 * 50
    first = 2 * 2_000_000 / 1e12
    assert few.seconds == pytest.approx(100 * (4 * 12_010_000 + cached) / 100e9 + first) and few.limit == "memory_gb_s"
    slow = replace(hardware, rates={torch.float32: 2e9})
    bound = writing_time(slow, STUDENT, Precision(), answers=128, prompt=0, answer=100, read=0)
    assert bound.seconds == pytest.approx(128 * 100 * 2 * 12_010_000 / 1e9 + 128 * 2 * 2_000_000 / 1e9)
    assert bound.limit == "tflops.float32 x utilisation"


def test_what_the_student_writes_needs_room_for_keys_and_values():
    writer = [{"by": "student", "max_tokens": 100}]
    work = replace(WORK, written=80.0, read=8000.0, prompt=100.0, answer=51.2, most=100)
    made = predicted(EIGHT, work, loss="reverse_kl", writer=writer, **micro(1024))
    row = 2 * 4 * 10 * 50 * (100 + 100 + 64)
    assert made.memory[WRITING]["keys and values"] == 10 * row  # a tenth of the answers on each of eight ranks
    assert "gradients" not in made.memory[WRITING] and made.step[TEXT].seconds > 0
    tight = predicted(EIGHT, work, loss="reverse_kl", writer=writer, **micro(1024, cache_gib=3 * row / 2**30))
    assert tight.memory[WRITING]["keys and values"] == 3 * row
    assert tight.step[TEXT].seconds > made.step[TEXT].seconds
    short = RECIPE["train"] | {"precision": "bfloat16"}
    copied = predicted(EIGHT, work, loss="reverse_kl", writer=writer, train=short, **micro(1024))
    assert copied.memory[WRITING]["other models"] == 2 * 12_010_000


# Limits


def test_one_device_sends_nothing_and_two_nodes_send_over_the_network():
    one = predicted(DEVICE, **micro(1024, "full"))
    assert one.sent == 0 == one.step[WIRE].seconds and not one.divided
    assert one.memory == predicted(DEVICE, **micro(1024)).memory
    assert "sent by each device" not in dict(one.lines())
    nodes = EIGHT | {"nodes": 2, "network_gb_s": 5}
    assert predicted(nodes, **micro(512)).step[WIRE].limit == "network_gb_s"
    assert predicted(nodes | {"network_gb_s": 500}, **micro(512)).step[WIRE].limit == "link_gb_s"
    assert predicted(nodes | {"devices_per_node": 1}, **micro(512)).step[WIRE].limit == "network_gb_s"
    slow = predicted(EIGHT | {"link_gb_s": 0.001}, **micro(1024, "full"))
    assert slow.bound == WIRE and "link_gb_s" in dict(slow.lines())["bound by"]


def test_devices_without_a_micro_batch_are_idle():
    few = replace(WORK, tokens=2000, responses=1000, prompt=600, answer=400)  # two rows
    made = predicted(EIGHT, few, **micro(1024))
    assert made.micro_batches == 2 and "6 of 8 devices" in dict(made.lines())["idle in training"]
    alone = predicted(DEVICE, few, **micro(1024))
    assert made.step[PASSES].seconds == pytest.approx(alone.step[PASSES].seconds / 2)
    assert "idle in training" not in dict(alone.lines())


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("nodes", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_nothing_is_negative(shard, nodes, kind):
    cluster = EIGHT | {"nodes": nodes, "network_gb_s": 1, "kind": kind, "memory_gb": 0.001}
    made = predicted(cluster, Work(tokens=1, responses=1), machine={"shard": shard, "checkpointing": True})
    sizes = [size for parts in made.memory.values() for size in parts.values()]
    assert all(size >= 0 for size in sizes) and made.sent >= 0
    assert all(share.seconds >= 0 for share in made.step.values()) and made.step_seconds > 0


# In a plan


@pytest.fixture
def tokenizer(monkeypatch, tiny):
    monkeypatch.setattr("limbeck.runs.preflight.load_tokenizer", lambda *_: tiny.tokenizer)


def planned(machine: dict[str, Any], **sections: Any) -> Plan:
    return check(parse(RECIPE | sections | {"machine": machine}))


def test_a_plan_says_what_the_machines_take_and_cost(tokenizer):
    plan = planned({"cluster": EIGHT, "micro_tokens": 512})
    lines = dict(plan.lines())
    assert plan.prediction is not None and plan.fits and not plan.measured
    assert "1 node of 8 devices" in lines["device"] and "on each device" in lines["peak memory"]
    assert plan.cost == pytest.approx(sum(plan.seconds.values()) / 3600 * 8 * 2)
    assert plan.seconds["train"] == pytest.approx(plan.prediction.seconds(plan.steps, plan.trainings - 1))
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["prediction"]["devices"] == 8 and data["cost"] == plan.cost
    assert data["prediction"]["step"]["wire"]["limit"] == "link_gb_s"
    twice = planned({"cluster": EIGHT | {"price_per_hour": 4}, "micro_tokens": 512})
    assert twice.cost == pytest.approx(2 * plan.cost)
    free = planned({"cluster": EIGHT | {"price_per_hour": None}})
    assert free.cost is None and "cost of the machines" not in dict(free.lines())


def test_what_does_not_fit_says_what_would_help(tokenizer):
    small = planned({"cluster": EIGHT | {"memory_gb": 4}, "micro_tokens": 512})
    divided = planned({"cluster": EIGHT | {"memory_gb": 4}, "micro_tokens": 512, "shard": "full"})
    assert not small.fits and "machine.shard: full" in dict(small.lines())["peak memory"]
    assert divided.memory_bytes < small.memory_bytes
    assert not planned({"cluster": DEVICE | {"memory_gb": 1}}).fits


def test_what_ranks_can_not_do_is_refused_before_the_machines_are_paid(tokenizer):
    writer = {"writer": [{"by": "student", "max_tokens": 8}], "loss": ["on_policy_distillation"]}
    with pytest.raises(RecipeError, match=r"machine\.shard: full"):
        planned({"cluster": EIGHT, "shard": "full"}, **writer)
    assert planned({"cluster": EIGHT}, **writer).prediction is not None
    with pytest.raises(UserError, match="leave one of them out"):
        check(parse(RECIPE | {"machine": {"cluster": EIGHT}}), "h100-80gb")


# Files


@pytest.mark.parametrize("name", machine_files())
def test_built_in_machines_are_found_by_name(name, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    cluster = load_recipe(file, [], name).machine.cluster
    assert cluster is not None and cluster.devices >= 1
    assert load_recipe(file, ["machine.cluster.nodes=1"], name).hash == load_recipe(file).hash


@pytest.mark.parametrize(
    ("change", "path", "word"),
    [
        ({"node": 2}, "machine.cluster.node", "nodes"),
        ({"nodes": 0}, "machine.cluster.nodes", "greater"),
        ({"nodes": True}, "machine.cluster.nodes", "number"),
        ({"nodes": 2}, "machine.cluster", "network_gb_s is missing"),
        ({"link_gb_s": None}, "machine.cluster", "link_gb_s is missing"),
        ({"tflops": {"bfloat16": 2}}, "machine.cluster.tflops.float32", "required"),
        ({"tflops": 989}, "machine.cluster.tflops", "989"),
        ({"utilisation": 40}, "machine.cluster.utilisation", "less"),
        ({"memory_gb": -1}, "machine.cluster.memory_gb", "greater"),
        ({"memory_gb": float("nan")}, "machine.cluster.memory_gb", "finite"),
        ({"price_per_hour": "cheap"}, "machine.cluster.price_per_hour", "number"),
    ],
)
def test_what_a_cluster_file_gets_wrong_is_named(tmp_path, change, path, word):
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    file.write_text(yaml.safe_dump({"cluster": EIGHT | change}))
    with pytest.raises(RecipeError, match=word) as refusal:
        load_recipe(recipe, [], file)
    assert refusal.value.path == path


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(RecipeError, match="h100-8"):
        load_recipe(recipe, [], "h100-9")


# Against what ranks do


class Sent(TorchDispatchMode):
    """Counts what a ring sends for the collectives of this rank, in bytes; those of the loop's few numbers apart."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.around = (ranks - 1) / ranks
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        tensors = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}
        for kind, place in tensors.items():
            if f"c10d.{kind}." in name:
                tensor = args[place][0] if isinstance(args[place], list | tuple) else args[place]
                if tensor.numel() > 1:
                    self.bytes += self.around * tensor.nbytes * (2 if kind == "allreduce_" else 1)
        return func(*args, **(kwargs or {}))


def local(tensor: torch.Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).nbytes


def count(rank: int, size: int, folder: str) -> None:
    """One step on this rank; writes what it held and sent."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    facts = {}
    for shard in ("none", "full"):
        job, held, passes = make_job(Path(folder) / shard, shard=shard, steps=1), {}, []
        update, forward, empty = torch.optim.AdamW.step, loop.backward, sharded.empty_pass

        def step(self, *args, held=held, job=job, update=update):
            for net in (job.net, *job.frozen):
                getattr(net, "reshard", lambda: None)()
            held["weights"] = sum(local(p) for p in job.net.parameters())
            held["teacher"] = sum(local(p) for net in job.frozen for p in net.parameters())
            held["gradients"] = sum(local(p.grad) for p in job.net.parameters())
            result = update(self, *args)
            held["moments"] = sum(local(s[key]) for s in self.state.values() for key in ("exp_avg", "exp_avg_sq"))
            return result

        def counted(*args, passes=passes, forward=forward, **kwargs):
            passes.append(1)
            return forward(*args, **kwargs)

        def counted_empty(*args, passes=passes, empty=empty, **kwargs):
            passes.append(1)
            return empty(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, Sent(size) as sent:
            patch.setattr(torch.optim.AdamW, "step", step)
            patch.setattr(loop, "backward", counted)
            patch.setattr(sharded, "empty_pass", counted_empty)
            loop.train(job)
        facts[shard] = {**held, "sent": sent.bytes, "passes": len(passes)}
    (Path(folder) / f"facts-{rank}.json").write_text(json.dumps(facts))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_hold_and_send_what_is_predicted(tmp_path, size):
    multiprocessing.spawn(count, (size, str(tmp_path)), nprocs=size)
    shapes = Shapes(Shape.of(make_net(layers=2).config), Shape.of(make_net().config))
    cluster = Cluster.model_validate(DEVICE | {"kind": "cpu", "devices_per_node": size, "link_gb_s": 1})
    for shard in ("none", "full"):
        recipe = parse(RECIPE | {"machine": {"micro_tokens": 90, "shard": shard}})
        it = _Setting(recipe, [make_term("forward_kl", {}, 1.0)], shapes, stated(cluster))
        parts = memory.student_bytes(recipe, shapes.student, it.parts) | {"teacher": it._teacher_bytes()}
        for rank in range(size):
            facts = json.loads((tmp_path / f"facts-{rank}.json").read_text())[shard]
            for name in ("weights", "gradients", "moments", "teacher"):
                # the last norm is a vector outside the layers, which the shape counts among the matrices
                assert facts[name] == pytest.approx(parts[name], rel=5e-3), (shard, rank, name)
            assert facts["sent"] == pytest.approx(it.sent(it.teacher, facts["passes"]), rel=0.02), (shard, rank)
