"""The loop: resumed to the bit, blind to the split into micro-batches, and never a step from what is not finite."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from limbeck.config.sections import Lora, Train
from limbeck.data.batches import Row, make_batch
from limbeck.models.model import hidden_states
from limbeck.models.prune import drop_layers
from limbeck.models.start import add_adapters, merge_adapters
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.forward import Sums
from limbeck.objectives.term import make_term
from limbeck.training import loop as train
from limbeck.training.job import Objective, TrainingJob
from limbeck.types import UserError
from tests.conftest import make_net

ROWS = [Row(f"s{i}", tuple(range(5, 9 + i % 4)), (*range(20 + i, 24 + i + i % 3), 0)) for i in range(24)]


@pytest.fixture
def make_job(tiny, tmp_path):
    def make(name="run", names=("forward_kl", "cross_entropy"), lora=False, **settings):
        net = drop_layers(tiny.net, [0, 1, 3])
        if lora:
            add_adapters(net, Lora(rank=2, alpha=4), seed=0)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = {"steps": 9, "tokens_per_step": 30, "lr": 1e-3, "save_seconds": 1e9, "seed": 1, **settings}
        terms = [make_term(term, {}, 0.5) for term in names]
        objective = Objective(net, terms, InProcessTeacher(tiny).view)
        return TrainingJob(objective, ROWS, Train(**values), folder, "key")

    return make


def losses(job):
    return [(json.loads(line)["loss"]).hex() for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


def go_backward(job, micro_batches, pad_id=0):
    """Forward and backward of one whole step, in these micro-batches: each term's mean."""
    terms, batches = (
        [term.at_step(0.0, {}) for term in job.terms],
        [make_batch(job.rows, micro, pad_id) for micro in micro_batches],
    )
    amounts = {t.label: sum(batch.amount(t.term.unit, t.term.only) for batch in batches) for t in terms}
    sums = Sums()
    for batch in batches:
        sums.add(train.backward(job, batch, terms, amounts))
    return {label: value / amounts[label] for label, value in sums.terms.items()}


def weights(job):
    return {name: parameter.detach().clone() for name, parameter in job.net.named_parameters()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stop_after", [1, 4, 8])
@pytest.mark.promise("R3", "R14")
def test_a_stopped_run_goes_on_to_the_same_losses_bit_for_bit(make_job, stop_after, lora):
    straight = make_job("straight", lora=lora)
    assert train.train(straight)
    first, done = make_job("broken", lora=lora), []
    assert not train.train(first, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= stop_after)
    second = make_job("broken", lora=lora)
    assert train.train(second)
    assert losses(second) == losses(straight) and len(losses(straight)) == 9
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.mark.promise("R3")
def test_dropout_is_replayed_to_the_bit_too(make_job):
    def run(name, stop_after=99):
        job, done = make_job(name), []
        for layer in job.net.model.layers:
            layer.self_attn.attention_dropout = 0.2
        train.train(job, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= stop_after)
        return job

    straight = run("straight")
    torch.manual_seed(99)
    run("broken", stop_after=4)
    torch.rand(3)
    assert losses(run("broken")) == losses(straight)
    plain = make_job("plain")
    train.train(plain)
    assert losses(plain) != losses(straight)


@pytest.mark.promise("R18")
def test_metrics_beyond_the_checkpoint_are_cut_and_written_again(make_job):
    straight, broken = make_job("straight"), make_job("broken", save_seconds=0.0)
    train.train(straight)
    done = []
    train.train(broken, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= 4)
    with (broken.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    again = make_job("broken")
    train.train(again)
    assert losses(again) == losses(straight)


@pytest.mark.promise("R5")
def test_gradient_does_not_depend_on_micro_batches_or_padding(make_job, tiny):
    tiny.net.double()  # the student is cut from it

    def gradient(split):
        job = make_job()
        go_backward(job, split, pad_id=len(split))
        return {name: parameter.grad for name, parameter in job.net.named_parameters()}

    whole = gradient([(0, 1, 2, 3, 4, 5)])
    for split in ([(0,), (1,), (2,), (3,), (4,), (5,)], [(5, 0, 3), (1, 2), (4,)]):
        for name, value in gradient(split).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-12)


def test_prompt_positions_get_exactly_no_gradient_and_the_end_token_is_trained(tiny):
    batch = make_batch([Row("a", (5, 6, 7), (8, 9, 0))], (0,))
    rows, positions = batch.response_positions()
    assert batch.tokens_BT[rows, positions + 1].tolist() == [8, 9, 0]
    states = hidden_states(tiny.net, batch.tokens_BT).detach().requires_grad_()
    states[rows, positions].sum().backward()
    assert not states.grad[0, :2].any() and states.grad[0, 2:5].all() and not states.grad[0, 5].any()


def test_a_student_equal_to_its_teacher_is_not_moved(tiny, tmp_path):
    net = copy.deepcopy(tiny.net)
    (tmp_path / "run").mkdir()
    settings = Train(steps=2, tokens_per_step=30, lr=1e-3)
    objective = Objective(net, [make_term("forward_kl", {}, 1.0)], InProcessTeacher(tiny).view)
    job = TrainingJob(objective, ROWS, settings, tmp_path / "run", "k")
    train.train(job)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(records[0]["loss"]) < 1e-6 and records[0]["grad_norm"] < 1e-4


def test_the_first_step_lowers_the_loss_by_the_squared_gradient_times_the_rate(make_job):
    job = make_job(names=("forward_kl",))
    before = go_backward(job, [tuple(range(8))])["forward_kl"] * 0.5
    squared = sum(float((p.grad**2).sum()) for p in job.net.parameters())
    rate = 1e-4 * before / squared
    with torch.no_grad():
        for parameter in job.net.parameters():
            parameter -= rate * parameter.grad
    after = go_backward(job, [tuple(range(8))])["forward_kl"] * 0.5
    assert before - after == pytest.approx(rate * squared, rel=0.05)


@pytest.mark.promise("R6")
def test_no_update_is_made_from_a_loss_that_is_not_finite(make_job):
    job = make_job()
    with torch.no_grad():
        job.net.model.norm.weight[0] = float("nan")
    before = weights(job)
    with pytest.raises(UserError, match="no update was made"):
        train.train(job)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in weights(job).items())
    assert not (job.folder / "checkpoints").exists()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.promise("R6")
def test_the_guilty_sample_of_a_step_is_named_whole_with_what_replays_it(make_job, backwards):
    """A token that only s23 has makes the loss, or only its gradient, not finite."""
    job = make_job()

    def poison(module, inputs, output):
        hit = (inputs[0] == 48)[..., None]
        if backwards:
            return output + Poison.apply(output, hit)
        return output.masked_fill(hit, float("nan"))

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context, output, hit):
            context.save_for_backward(hit)
            return torch.zeros_like(output)

        @staticmethod
        def backward(context, gradient):
            (hit,) = context.saved_tensors
            return gradient.masked_fill(hit, float("inf")), None

    job.net.model.embed_tokens.register_forward_hook(poison)
    with pytest.raises(UserError, match=r"samples s23: .*nonfinite\.json has them whole"):
        train.train(job)
    record = json.loads((job.folder / "nonfinite.json").read_text())
    assert record["guilty"] == ["s23"] and len(record["samples"]) > 1
    assert record["seed"] == job.settings.seed * 2**24 + record["step"] - 1
    assert (record["loss"] != "nan") == backwards and record["grad_norm"] in ("nan", "inf")


def test_a_checkpoint_of_other_text_or_settings_is_refused(make_job):
    job = make_job()
    train.train(job)
    with pytest.raises(UserError, match="other settings"):
        train.train(replace(make_job(), key="another"))
    with pytest.raises(UserError, match="other text"):
        train.train(replace(make_job(), rows=ROWS[1:]))


def test_learning_rate_warms_up_and_falls_to_its_floor():
    settings = Train(steps=100, lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [train.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.2, abs=1e-3) and all(a >= b for a, b in pairwise(rates[10:]))


def test_adapters_change_nothing_at_first_train_alone_and_merge_exactly(tiny):
    tokens = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    net = copy.deepcopy(tiny.net).double()
    with torch.inference_mode():
        plain = net(tokens).logits
    add_adapters(net, Lora(rank=3, alpha=6), seed=1)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with torch.inference_mode():
        assert torch.equal(net(tokens).logits, plain)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    with torch.inference_mode():
        adapted = net(tokens).logits
        merge_adapters(net)
        torch.testing.assert_close(net(tokens).logits, adapted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(adapted, plain)
    assert {name for name, _ in net.named_parameters()} == {name for name, _ in make_net().named_parameters()}
