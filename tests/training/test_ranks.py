"""Several ranks, with whole or divided weights, train the student of one process: losses, weights, checkpoints."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from limbeck.commands.serve_states import StatesServer
from limbeck.config.machine import Machine
from limbeck.config.sections import Lora, Train
from limbeck.config.server import Served
from limbeck.data.batches import Row, make_batch
from limbeck.models import sharding, states
from limbeck.models.api import ApiTeacher
from limbeck.models.model import Model
from limbeck.models.start import add_adapters
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.term import make_term
from limbeck.training import loop, sharded
from limbeck.training.distributed import add_gradients, shares
from limbeck.training.job import Objective, TrainingJob
from tests.conftest import make_net, make_tokenizer
from tests.training.test_invariance import ROWS

KEY = "sk-canary-4711"
PREFIX = tuple(range(40, 50))  # of some prompts: one process computes it once for all rows of a micro-batch
LONG = [replace(row, prompt_ids=PREFIX + row.prompt_ids, references=()) for row in ROWS]
MIXES = {
    "text": [("cross_entropy", {})],
    "dense": [("forward_kl", {}), ("cross_entropy", {})],
    "some": [("reverse_kl", {"only": "teacher"}), ("jsd", {"only": "untouched"})],
}


def make_job(
    folder: Path, mix: str = "dense", tied: bool = True, steps: int = 4, lora: bool = False, **settings: Any
) -> TrainingJob:
    """A student of two layers and a teacher of four, on rows of which some steps make three micro-batches."""
    teacher, net = make_net(), make_net(layers=2, seed=4)
    if not tied:
        for model in (teacher, net):
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.9 + 0.01)
    if lora:
        add_adapters(net, Lora(rank=4, alpha=8), 0)
    terms = [make_term(name, params, 0.5 + 0.2 * i) for i, (name, params) in enumerate(MIXES[mix])]
    elsewhere = settings.pop("elsewhere", False)
    if elsewhere:
        served = Served(url=os.environ["STATES_URL"], name="toy", kind="states")
        own: Any = StatesTeacher(ApiTeacher(served), make_tokenizer())
    else:
        own = InProcessTeacher(Model(teacher, make_tokenizer(), "teacher"))
    rounded = settings.pop("precision", None)
    machine = Machine(micro_tokens=90, shard=settings.pop("shard", "none"), checkpointing=settings.pop("again", False))
    values = {
        "steps": steps,
        "tokens_per_step": 150,
        "lr": 1e-3,
        "seed": 1,
        "clip": 0.5,
        "save_seconds": 1e9,
    } | settings
    if machine.checkpointing:
        net.activation_checkpointing_enable({"use_reentrant": False})
    objective = Objective(net, terms, own.view, rounded=rounded) if mix != "text" else Objective(net, terms)
    if elsewhere:
        objective = replace(objective, expect=own.expect)
    frozen = [teacher] if mix != "text" and not elsewhere else []
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingJob(objective, LONG, Train(**values), folder, "key", frozen=frozen, machine=machine)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(folder: Path, other: Path) -> None:
    ours, theirs = results(folder), results(other)
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        size = max(abs(one["loss"]), sum(map(abs, one["terms"].values())))  # terms of a policy gradient cancel out
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6 * size)
        # Adam moves a weight whose gradient is rounding error by up to lr a step, which later norms show
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5 if one["step"] == 1 else 1e-3)
        assert two["response_tokens"] == one["response_tokens"]
        assert two["tokens"] - two["padding"] == one["tokens"] - one["padding"]
    assert len({record["loss"] for record in ours}) == len(ours), "the student learns"


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, text": {"mix": "text"},
    "tied": {"shard": "full"},
    "untied": {"shard": "full", "tied": False},
    "some rows for each term": {"shard": "full", "mix": "some", "tied": False},
    "text": {"shard": "full", "mix": "text", "tied": False},
    "again": {"shard": "full", "again": True},
    "few micro-batches": {"shard": "full", "tokens_per_step": 20},
    "bfloat16": {"shard": "full", "precision": torch.bfloat16},
    "adapters": {"shard": "full", "lora": True},
    "a teacher elsewhere": {"shard": "full", "tokens_per_step": 20, "elsewhere": True},
}


def alone(name: str) -> dict[str, Any]:
    return {key: value for key, value in CASES[name].items() if key not in ("shard", "elsewhere")}


@pytest.fixture
def states_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The teacher of all cases, as a server of its states."""
    monkeypatch.setenv("LIMBECK_API_KEY", KEY)
    model = Model(make_net(), make_tokenizer(), "teacher")
    with StatesServer(model, "toy", "c", KEY, address=("127.0.0.1", 0), context=256, slots=4) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("STATES_URL", server.url)
        yield
        server.shutdown()


def run_rank(rank: int, size: int, folder: str, names: list[str]) -> None:
    """Train every case on this rank, and leave what it has to say in files."""
    torch.set_num_threads(1)
    where = Path(folder)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    facts: dict[str, Any] = {}
    for name in names:
        job = make_job(where / name, **CASES[name])
        loop.train(job)
        whole = sum(p.numel() for p in job.net.parameters())
        if job.machine.shard == "full":
            job.net.reshard()
        facts[name] = [
            sharding.held(net.parameters()) / sum(p.numel() for p in net.parameters()) for net in (job.net, *job.frozen)
        ]
        made = sharded.plain(job.net, lambda name=name: make_job(where / "fresh", **alone(name)).net)
        if rank == 0:
            assert sum(p.numel() for p in made.parameters()) == whole
            torch.save({key: p.detach() for key, p in made.named_parameters()}, where / name / "weights.pt")
    (where / f"facts-{rank}.json").write_text(json.dumps(facts))
    distributed.barrier()
    distributed.destroy_process_group()


def train_on(size: int, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    multiprocessing.spawn(run_rank, (size, str(folder), names), nprocs=size)
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(size)]


def check(size: int, tmp_path: Path, names: list[str]) -> None:
    facts = train_on(size, tmp_path / "together", names)
    for name in names:
        job = make_job(tmp_path / name, **alone(name))
        with pytest.MonkeyPatch.context() as patch:
            if name == "bfloat16":  # a prefix computed for all rows at once is rounded elsewhere
                patch.setattr(states, "_may_share", lambda _: False)
            loop.train(job)
        assert_equal(tmp_path / name, tmp_path / "together" / name)
        weights = torch.load(tmp_path / "together" / name / "weights.pt")
        for key, p in job.net.named_parameters():
            # Adam moves a weight whose gradient is rounding error by up to lr a step
            assert (weights[key] - p).abs().max() <= 4e-3 and (weights[key] - p).norm() <= 1e-3 * p.norm() + 1e-6, key
        if "shard" in CASES[name]:
            for rank in facts:
                divided = rank[name][1:] if "lora" in CASES[name] else rank[name]  # every rank holds the adapters
                assert all(part < 1 / size + 0.05 for part in divided), rank[name]


@pytest.mark.promise("R4")
def test_two_ranks_with_whole_and_divided_weights_train_the_student_of_one(tmp_path, states_server):
    check(
        2, tmp_path, ["whole", "tied", "untied", "some rows for each term", "few micro-batches", "a teacher elsewhere"]
    )


def run_on(rank: int, size: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{size}-{steps}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    job, done = make_job(Path(folder) / "run", shard="full"), []
    loop.train(job, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= steps)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.promise("R4")
def test_divided_weights_resume_on_any_number_of_ranks(tmp_path):
    """Two ranks, then three, then one; each rank wrote its rows, and nobody gathered the whole."""
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    multiprocessing.spawn(run_on, (2, str(tmp_path), 2), nprocs=2)
    assert [record["step"] for record in results(run)] == [1, 2]
    folder = checkpoints / "step-00000002"
    parts = [folder / f"part-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(folder.glob("part-*")) == parts
    whole, one, two = (load_file(file) for file in (folder / "tensors.safetensors", *parts))
    weights = dict(make_job(tmp_path / "other").net.named_parameters())
    for name, p in weights.items():
        at = f"weight/{name}"
        assert (at in whole) == (p.ndim < 2) and (p.ndim < 2 or len(one[at]) + len(two[at]) == len(p)), name
    assert sum(file.stat().st_size for file in parts) > 5 * (folder / "tensors.safetensors").stat().st_size

    multiprocessing.spawn(run_on, (3, str(tmp_path), 1), nprocs=3)
    assert len(list((checkpoints / "step-00000003").glob("part-*-of-00003.safetensors"))) == 3
    loop.train(make_job(run))
    assert not list((checkpoints / "step-00000004").glob("part-*")), "one process holds all"
    loop.train(make_job(tmp_path / "alone"))
    assert_equal(tmp_path / "alone", run)


def add_on(rank: int, size: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0])
    if rank == 1:
        one.grad = torch.tensor([3.0, 4.0])
    add_gradients([both, one, none])
    found = [None if p.grad is None else p.grad.tolist() for p in (both, one, none)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.mark.promise("R4")
def test_a_parameter_that_no_rank_has_a_gradient_of_keeps_none(tmp_path):
    """Zeros would have the optimiser move it by its momentum and decay, as it does not on one rank."""
    multiprocessing.spawn(add_on, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[2.0, 4.0], [3.0, 4.0], None]


def test_micro_batches_are_dealt_by_their_tokens(monkeypatch):
    monkeypatch.setattr("limbeck.training.distributed.world_size", lambda: 2)
    rows = [Row(str(n), tuple(range(5, 5 + length)), (3, 0)) for n, length in enumerate((30, 4, 4, 10, 12))]
    dealt = shares([make_batch([row]) for row in rows])
    assert [[batch.tokens_BT.numel() for batch in share] for share in dealt] == [[32, 6], [6, 12, 14]]
    monkeypatch.setattr("limbeck.training.distributed.world_size", lambda: 4)
    assert [len(share) for share in shares([make_batch([rows[0]])])] == [1, 0, 0, 0]
