"""Compute in bfloat16 with everything kept in float32, and sizes of passes that change no number."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import limbeck
from limbeck.config.machine import Machine
from limbeck.config.recipe import parse
from limbeck.config.sections import Rollout, Train
from limbeck.data.batches import CHOSEN, REJECTED, Row
from limbeck.models.copy import Copy
from limbeck.models.model import Model
from limbeck.models.prune import drop_layers
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives import head as chunked
from limbeck.objectives.head import Head, PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.progress import Silent, StoppedError
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.signals.dense import DenseSignal
from limbeck.training import loop, student_writer
from limbeck.training.job import Objective, TrainingJob
from limbeck.training.setup import TrainingPlan
from limbeck.training.setup import make_job as set_up
from limbeck.training.student_writer import writing_dtype
from limbeck.types import RecipeError, UserError

ROWS = [Row(f"s{i}", tuple(range(5, 9 + i % 4)), (*range(20 + i, 24 + i + i % 3), 0)) for i in range(24)]


@pytest.fixture
def make_job(tiny, tmp_path):
    def make(name="run", machine=None, teacher=None, **settings):
        net = drop_layers(tiny.net, [0, 1, 3])
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = {"steps": 6, "tokens_per_step": 60, "lr": 1e-3, "save_seconds": 1e9, "seed": 1, **settings}
        rounded = {"bfloat16": torch.bfloat16}.get(settings.get("precision"))
        view = (teacher or InProcessTeacher(tiny)).view
        objective = Objective(net, [make_term("forward_kl", {})], view, rounded=rounded)
        return TrainingJob(objective, ROWS, Train(**values), folder, "key", machine=Machine(**(machine or {})))

    return make


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_to_the_end(job):
    assert loop.train(job)
    return losses(job.folder)


# train.precision


def test_bfloat16_learns_as_float32_does(make_job):
    plain, short = (run_to_the_end(make_job(str(p), precision=p, steps=20)) for p in (None, "bfloat16"))
    assert short != plain and plain[-1] < 0.7 * plain[0]
    assert sum(short[-3:]) == pytest.approx(sum(plain[-3:]), rel=0.02)


def test_the_matrices_are_multiplied_in_bfloat16(make_job):
    job = make_job(precision="bfloat16")
    seen = set()
    job.net.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    loop.train(job)
    assert seen == {torch.bfloat16}


def test_weights_gradients_and_moments_stay_in_float32(make_job, monkeypatch):
    job = make_job(precision="bfloat16")
    seen, kept = set(), {}

    class Watched(torch.optim.AdamW):
        def step(self, *arguments, **named):
            parameters = [p for group in self.param_groups for p in group["params"]]
            seen.update((p.dtype, p.grad.dtype) for p in parameters)
            result = super().step(*arguments, **named)
            kept.update({str(p.data_ptr()): {value.dtype for value in self.state[p].values()} for p in parameters})
            return result

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    loop.train(job)
    assert seen == {(torch.float32, torch.float32)}
    assert len(kept) == len(list(job.net.parameters())) and all(dtypes == {torch.float32} for dtypes in kept.values())


def head_gradient(dtype, rounded):
    """The gradient of the head for forward KL at 512 positions, from the same numbers in `dtype`."""
    noise = torch.Generator().manual_seed(5)
    numbers = [torch.randn(*shape, generator=noise, dtype=torch.float64) for shape in ((512, 32), (300, 32), (512, 32))]
    hidden_ND, weight_VD, teacher_ND = (value.to(dtype) for value in numbers)
    weight_VD = (0.3 * weight_VD).requires_grad_()
    signal = DenseSignal(teacher_ND, Head((0.3 * numbers[1].roll(1, 0)).to(dtype)))
    term = make_term("forward_kl", {}).at_step(0.0, {})
    evidence = PositionEvidence(torch.arange(512) % 300, signal)
    ones_1N = torch.ones(1, 512, dtype=dtype)
    head = Head(weight_VD, rounded=rounded)
    fused_loss(hidden_ND, head, [term], [1 / 512], ones_1N, evidence).loss.backward()
    return weight_VD.grad.double()


def test_the_heads_gradient_is_as_exact_in_many_chunks_as_in_one(monkeypatch):
    exact = head_gradient(torch.float64, None)
    errors = []
    for positions in (512, 1):
        monkeypatch.setattr(chunked.SIZES, "head_bytes", positions * 300 * 4)
        assert len(list(chunked.chunks(512, 300, chunked.chunk_elements(torch.device("cpu"))))) == 512 // positions
        errors.append(float((head_gradient(torch.float32, torch.bfloat16) - exact).norm() / exact.norm()))
    assert 1e-4 < errors[0] < 0.01 and errors[1] == pytest.approx(errors[0], rel=0.1)


def test_a_folder_goes_on_elsewhere_but_not_in_another_precision(recipe_data, tmp_path):
    out = tmp_path / "out"
    recipe_data["evaluate"] |= {"controls": []}
    recipe_data["train"]["save_seconds"] = 0
    limbeck.run(parse(recipe_data), tmp_path / "straight", stages=("elicit", "train"))
    with pytest.raises(StoppedError):
        limbeck.run(parse(recipe_data), out, stop=lambda: (out / "metrics.jsonl").exists(), stages=("elicit", "train"))
    assert 0 < len(losses(out)) < 6
    shorter = {**recipe_data, "train": recipe_data["train"] | {"precision": "bfloat16"}}
    with pytest.raises(UserError, match="another"):
        limbeck.run(parse(shorter), out, stages=("train",))
    elsewhere = parse({**recipe_data, "machine": {"device": "cpu", "micro_tokens": 40, "checkpointing": True}})
    assert elsewhere.hash == parse(recipe_data).hash
    limbeck.run(elsewhere, out, stages=("train",))
    assert losses(out) == pytest.approx(losses(tmp_path / "straight"), abs=1e-6)


# machine: the same numbers in other sizes


@pytest.mark.parametrize(
    "machine", [{"micro_tokens": 16}, {"micro_tokens": 64}, {"micro_tokens": 10**6}, {"checkpointing": True}]
)
def test_sizes_of_the_machine_change_no_loss(make_job, tiny, tmp_path, machine):
    plain = run_to_the_end(make_job("plain"))
    if "checkpointing" in machine:
        student = drop_layers(tiny.net, [0, 1, 3])
        plan = TrainingPlan(
            [make_term("forward_kl", {})], ROWS, make_job("settings").settings, tmp_path / "other", "key", store=tmp_path / "s", machine=Machine(**machine)
        )  # fmt: skip
        plan.folder.mkdir()
        job = set_up(plan, type(tiny)(student, tiny.tokenizer, "student"), lambda: InProcessTeacher(tiny))
        assert job.net.is_gradient_checkpointing
    else:
        job = make_job("other", machine)
    passes = []
    part = job.net.model.layers[0].mlp
    part.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape[:2])))
    assert run_to_the_end(job) == pytest.approx(plain, abs=1e-6)
    if "checkpointing" in machine:
        assert passes[0::2] == passes[1::2]  # each layer runs again in the backward pass
    elif machine["micro_tokens"] < 100:
        assert all(rows * width <= machine["micro_tokens"] or rows == 1 for rows, width in passes) and len(passes) > 6
    else:
        assert len(passes) == 6  # a step is one pass


def test_a_model_that_can_not_compute_activations_again_is_refused(tiny, tmp_path, monkeypatch):
    student = drop_layers(tiny.net, [0, 1])
    plan = TrainingPlan(
        [make_term("cross_entropy", {})],
        ROWS,
        Train(steps=1),
        tmp_path,
        "key",
        store=tmp_path / "s",
        machine=Machine(checkpointing=True),
    )
    monkeypatch.setattr(type(student), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"machine.checkpointing: a llama can't"):
        set_up(plan, type(tiny)(student, tiny.tokenizer, "student"), lambda: InProcessTeacher(tiny))


class Crowded(InProcessTeacher):
    """A teacher on a device that has no room for more than so many padded tokens."""

    def __init__(self, model, room):
        super().__init__(model)
        self.room = room
        self.refused = 0

    def view(self, batch, *arguments, **named):
        if batch.tokens_BT.numel() > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().view(batch, *arguments, **named)


@pytest.mark.promise("R15")
def test_where_memory_runs_out_a_step_is_replayed_in_smaller_passes_and_the_size_is_kept(make_job, tiny):
    plain = run_to_the_end(make_job("plain"))
    teacher = Crowded(tiny, room=40)
    job, done = make_job("crowded", teacher=teacher), []
    assert not loop.train(job, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= 3)
    assert teacher.refused > 0 and losses(job.folder) == pytest.approx(plain[:3], abs=1e-6)
    record = json.loads((job.folder / "room.json").read_text())
    assert record["device"] == "cpu" and 16 <= record["micro_tokens"] <= 40
    rested = Crowded(tiny, room=40)
    assert run_to_the_end(make_job("crowded", teacher=rested)) == pytest.approx(plain, abs=1e-6)
    assert rested.refused == 0, "what was learned is used after a resume"


@pytest.mark.promise("R15")
def test_no_room_for_one_row_is_said_and_loses_nothing(make_job, tiny):
    plain = run_to_the_end(make_job("plain"))
    first, done = make_job("crowded"), []
    assert not loop.train(first, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= 2)
    with pytest.raises(UserError, match=r"no room for one row of \d+ tokens \(cpu: .*machine.checkpointing=true"):
        loop.train(make_job("crowded", teacher=Crowded(tiny, room=5)))
    assert losses(first.folder) == plain[:2]
    assert run_to_the_end(make_job("crowded")) == pytest.approx(plain, abs=1e-6)


def test_an_error_that_is_not_about_memory_is_not_taken_for_it(make_job, tiny):
    class Broken(InProcessTeacher):
        def view(self, *_, **__):
            raise RuntimeError("shape mismatch")

    job = make_job(teacher=Broken(tiny))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        loop.train(job)
    assert not (job.folder / "room.json").exists()


# Rollouts


@pytest.fixture
def writing_data(recipe_data):
    recipe_data["writer"] = [{"by": "student", "max_tokens": 6}]
    recipe_data["loss"] = ["reverse_kl"]
    recipe_data["train"]["steps"] = 2
    recipe_data["evaluate"]["controls"] = []
    return recipe_data


def copies_made(data, folder, monkeypatch):
    made = []

    class Noted(Copy):
        def __init__(self, net, dtype):
            super().__init__(net, dtype)
            made.append((net, dtype))

    monkeypatch.setattr(student_writer, "Copy", Noted)
    run = Run(resolve(parse(data)), folder, Silent())
    student = run.models.student_to_train()
    assert loop.train(run.job("student", student))
    assert all(net is student.net for net, _ in made)
    return [dtype for _, dtype in made]


def test_what_trains_in_bfloat16_writes_in_bfloat16_unless_it_says_otherwise(writing_data, tmp_path, monkeypatch):
    assert copies_made(writing_data, tmp_path / "a", monkeypatch) == []
    writing_data["train"]["precision"] = "bfloat16"
    assert copies_made(writing_data, tmp_path / "b", monkeypatch) == [torch.bfloat16]
    writing_data["rollout"] = {"dtype": "float32"}
    assert copies_made(writing_data, tmp_path / "c", monkeypatch) == []


def test_a_loss_that_takes_the_student_for_the_writer_gets_no_copy_and_refuses_one(writing_data, tmp_path, monkeypatch):
    writing_data["loss"] = ["minillm_long"]
    writing_data["train"]["precision"] = "bfloat16"
    assert copies_made(writing_data, tmp_path / "a", monkeypatch) == []
    writing_data["rollout"] = {"dtype": "bfloat16"}
    with pytest.raises(RecipeError, match="its copy is another"):
        resolve(parse(writing_data))


def test_so_does_one_on_rewards_without_the_writers_probabilities(recipe_data, tmp_path, monkeypatch):
    data = recipe_data | {"writer": [{"by": "student", "max_tokens": 8}], "loss": ["reinforce"]}
    data["rollout"] = {"prompts": 2, "group": 2, "rewards": [{"length": {"free": 1}}]}
    data["train"]["precision"] = "bfloat16"
    assert not any(term.loss.is_on_policy for term in resolve(parse(data | {"loss": ["ppo_clip"]})).terms)
    assert writing_dtype(parse(data | {"loss": ["ppo_clip"]}), resolve(parse(data | {"loss": ["ppo_clip"]})).terms)
    assert writing_dtype(parse(data), resolve(parse(data)).terms) is None
    data["rollout"]["dtype"] = "bfloat16"
    with pytest.raises(RecipeError, match="its copy is another"):
        resolve(parse(data))


def test_a_copy_follows_the_weights_that_train(tiny):
    net = drop_layers(tiny.net, [0, 1, 3])
    copy = Copy(net, torch.bfloat16)
    first = copy.now()
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        net.model.norm.weight.mul_(2)
    assert copy.now() is first and torch.equal(first.model.norm.weight, net.model.norm.weight.bfloat16())
    assert isinstance(first.lm_head, nn.Linear) and first.lm_head.weight is first.model.embed_tokens.weight
    assert Rollout().dtype is None


def test_a_frozen_start_is_scored_as_the_student_computes(tiny, tmp_path):
    """So that a loss on their difference begins where it should: DPO at ln 2, whatever the lengths."""
    rows = [
        replace(row, group=f"g{n // 2}", tags=frozenset({CHOSEN if n % 2 == 0 else REJECTED}))
        for n, row in enumerate(ROWS)
    ]
    for precision in (None, "bfloat16"):
        folder = tmp_path / str(precision)
        folder.mkdir()
        student = Model(drop_layers(tiny.net, [0, 1, 3]), tiny.tokenizer, "student")
        settings = Train(steps=1, tokens_per_step=4096, lr=1e-3, seed=1, precision=precision)
        plan = TrainingPlan([make_term("dpo", {})], rows, settings, folder, "key", store=folder / "store.sqlite")
        job = set_up(plan, student, lambda: InProcessTeacher(tiny))
        loop.train(job)
        (record,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert record["loss"] == pytest.approx(math.log(2), abs=2e-6), precision
