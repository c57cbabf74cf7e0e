"""A student that teaches itself: the same weights shown more, adapters switched off, a moving average."""

from __future__ import annotations

import json

import pytest
import torch

import limbeck
from limbeck.config.recipe import parse
from limbeck.config.sections import Lora
from limbeck.data.batches import Row, make_batch
from limbeck.models.context import PromptContext
from limbeck.models.load import load_model
from limbeck.models.model import hidden_states
from limbeck.models.self_teacher import Average, adapters_off, self_teacher
from limbeck.models.start import add_adapters
from limbeck.models.teacher import InProcessTeacher
from tests.training.test_rollout import STUDENT, losses, records, weights

USER = ({"role": "user", "content": "why is the sky blue"},)


def test_what_is_seen_is_filled_in_once_and_literally():
    prompt_context = PromptContext(
        "Be brief.", "{prompt} / {answer}", {"why is the sky blue": {"answer": "{prompt} {feedback}"}}
    )
    assert prompt_context(USER) == (
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "why is the sky blue / {prompt} {feedback}"},
    )  # fmt: skip
    other = ({"role": "system", "content": "Old."}, {"role": "user", "content": "unknown"})
    assert prompt_context(other) == (
        {"role": "system", "content": "Be brief.\n\nOld."},
        {"role": "user", "content": "unknown"},
    ), "stays as it is"


def test_models_that_see_other_things_have_other_names(tiny):
    names = {
        tiny.with_context(prompt_context).identity
        for prompt_context in (None, PromptContext("a"), PromptContext("b"), PromptContext(None, "{prompt} a"))
    }
    assert len(names) == 4 and tiny.with_context(PromptContext("a")).with_context(None).identity == tiny.identity


def test_responses_are_aligned_although_the_prompts_differ(tiny):
    """The teacher's distribution at a token is the one after its own prompt and the same response tokens."""
    rows = [
        Row("a", (5, 6), (8, 9, 0), teacher_prompt_ids=(7, 7, 7, 5, 6)),
        Row("b", (5, 6, 7, 8), (9, 0)),
        Row("c", (4,), (11, 12, 13, 0), teacher_prompt_ids=(9, 4)),
    ]
    batch = make_batch(rows)
    got = InProcessTeacher(tiny).signal(batch).hidden_NE
    want = []
    for row in rows:
        prompt = row.teacher_prompt_ids or row.prompt_ids
        states = hidden_states(tiny.net, torch.tensor([[*prompt, *row.response_ids]]))[0]
        want.append(states[len(prompt) - 1 : -1])
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)


def test_with_adapters_off_the_model_is_its_start_to_the_bit(tiny, tiny_folder):
    student = load_model(str(tiny_folder))
    add_adapters(student.net, Lora(rank=2, alpha=4), 0)
    for name, parameter in student.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    batch = make_batch([Row("a", (5, 6, 7), (8, 9, 0))])
    trained = [name for name, parameter in student.net.named_parameters() if parameter.requires_grad]
    taught = self_teacher(student, None, lambda: adapters_off(student.net))
    student.net.train()
    assert torch.equal(taught.signal(batch).hidden_NE, InProcessTeacher(tiny).signal(batch).hidden_NE)
    assert student.net.training and trained == [
        name for name, parameter in student.net.named_parameters() if parameter.requires_grad
    ]
    assert not torch.equal(InProcessTeacher(student).signal(batch).hidden_NE, taught.signal(batch).hidden_NE)


def test_the_average_follows_its_formula_and_its_head_is_its_own(tiny_folder):
    student = load_model(str(tiny_folder))
    average = Average(0.75)
    average.start(student.net)
    name = "model.embed_tokens.weight"
    before = student.net.get_parameter(name).detach().clone()
    batch = make_batch([Row("a", (5, 6, 7), (8, 9, 0))])
    untouched = InProcessTeacher(load_model(str(tiny_folder))).signal(batch)
    with torch.no_grad():
        for parameter in student.net.parameters():
            parameter.add_(1.0)
    signal = self_teacher(student, None, average.in_place).signal(batch)
    assert torch.equal(signal.hidden_NE, untouched.hidden_NE) and torch.equal(signal.head.weight_VD, before)
    assert torch.equal(student.net.get_parameter(name), before + 1), "the student's own numbers are back"
    average.update()
    torch.testing.assert_close(average.tensors[name], before + 0.25)


@pytest.fixture
def itself(recipe_data, tiny_folder, tmp_path, prompt_file):
    """Train a tiny student that is its own teacher."""
    prompt_file.write_text(
        "".join(
            json.dumps(json.loads(line) | {"answer": "a mat"}) + "\n" for line in prompt_file.read_text().splitlines()
        )
    )

    def go(name, teacher, lora=None, writer=STUDENT, **train):
        data = recipe_data | {
            "writer": [writer],
            "loss": ["reverse_kl"],
            "teacher": {"model": str(tiny_folder), **teacher},
        }
        data["student"] = {"start": {"pretrained": str(tiny_folder)}} | ({"lora": lora} if lora else {})
        data["evaluate"], data["train"] = (
            recipe_data["evaluate"] | {"controls": ["untouched"]},
            recipe_data["train"] | train,
        )
        limbeck.run(parse(data), tmp_path / name, stages=("elicit", "train"))
        return tmp_path / name

    return go


@pytest.mark.parametrize(
    ("teacher", "lora"),
    [({}, None), ({}, {"rank": 2, "alpha": 4}), ({"weights": "live"}, None), ({"weights": "average"}, None)],
)
def test_with_nothing_more_to_see_the_loss_at_the_first_step_is_zero(itself, teacher, lora):
    found = records(itself("none", teacher, lora))
    assert abs(found[0]["loss"]) < 1e-6
    seen = records(itself("seen", teacher | {"context": {"system": "the red house"}}, lora))
    assert seen[0]["loss"] > 1e-3, "and with a context it is not"


def test_a_live_teacher_stays_with_the_student_and_a_frozen_one_does_not(itself):
    live = records(itself("live", {"weights": "live"}, steps=5, lr=1e-2))
    assert max(abs(record["loss"]) for record in live) < 1e-6, "the same model at every step"


def test_learning_a_context_brings_the_student_nearer_to_what_the_teacher_says_with_it(itself):
    teacher = {"context": {"user": "{prompt} {answer}"}}
    out = itself("baked", teacher, writer={"by": "teacher", "max_tokens": 12}, steps=40, lr=3e-3, tokens_per_step=100)
    found = [record["loss"] for record in records(out)]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_a_stopped_run_with_an_average_goes_on_to_the_bit(itself, recipe_data, tmp_path):
    straight = itself("straight", {"weights": "average", "decay": 0.5}, steps=6)
    recipe = parse(json.loads(json.dumps(__import__("yaml").safe_load((straight / "recipe.yaml").read_text()))))
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > 60

    from limbeck.progress import StoppedError

    broken = tmp_path / "broken"
    with pytest.raises(StoppedError):
        limbeck.run(recipe, broken, stop=stop, stages=("elicit", "train"))
    done = len(losses(broken)) if (broken / "metrics.jsonl").exists() else 0
    limbeck.run(recipe, broken, stages=("elicit", "train"))
    assert losses(broken) == losses(straight) and done < 6
    ours, theirs = weights(broken), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_whole_run_measures_against_the_teacher_with_its_context(recipe_data, tiny_folder, tmp_path):
    recipe_data |= {
        "teacher": {"model": str(tiny_folder), "context": {"system": "the red house"}},
        "loss": ["forward_kl"],
    }
    recipe_data["student"] = {"start": {"pretrained": str(tiny_folder)}, "lora": {"rank": 4, "alpha": 8}}
    recipe_data["train"] |= {"steps": 60, "lr": 2e-3, "tokens_per_step": 80}
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out)
    systems = json.loads((out / "evaluation" / "summary.json").read_text())["systems"]
    kl = {name: metrics["forward_kl"]["value"] for name, metrics in systems.items()}
    assert kl["teacher"] == pytest.approx(0, abs=1e-6) and kl["untouched"] > 0.01, (
        "the start is the teacher without its context"
    )
    assert kl["student"] < kl["untouched"]
    own = systems["teacher"]["own_reverse_kl"]["value"], systems["untouched"]["own_reverse_kl"]["value"]
    assert own[0] == pytest.approx(0, abs=1e-6) and own[1] > 0.01
