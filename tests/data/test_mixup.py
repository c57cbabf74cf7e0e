"""Texts mixed in their embeddings: against the formula, its limits, and through the loop with a killed run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from limbeck.config.recipe import parse
from limbeck.data.batches import FixedText, Row, make_batch
from limbeck.data.mixup import MixupSource
from limbeck.models.model import Model, head_of
from limbeck.models.taps import features
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs.pipeline import run
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError
from tests.conftest import make_net, make_tokenizer

ROWS = [
    Row(f"s{n}", (3, 4, 5 + n), tuple(range(10 + n, 14 + 2 * n)), frozenset({"teacher"}), f"g{n}") for n in range(6)
]


def mixed(row, other, weight):
    return replace(row, mixed=(other, weight))


@pytest.fixture
def net():
    return make_net(layers=2)


def test_mixed_states_are_those_of_mixed_embeddings(net):
    short, long = ROWS[0], ROWS[4]
    batch = make_batch([mixed(long, short, 0.7), mixed(short, long, 0.6), ROWS[2]])
    found, _ = features(net, batch.tokens_BT, mixed=batch.mixed)
    embed = net.get_input_embeddings()
    for number, (row, other, weight) in enumerate([(long, short, 0.7), (short, long, 0.6), (ROWS[2], ROWS[2], 1.0)]):
        ids, others = (torch.tensor(each.prompt_ids + each.response_ids) for each in (row, other))
        wanted = embed(ids).clone()
        width = min(len(ids), len(others))
        wanted[:width] = weight * embed(ids[:width]) + (1 - weight) * embed(others[:width])
        states = net.model(inputs_embeds=wanted[None]).last_hidden_state[0]
        assert torch.allclose(found[number, : len(ids)], states, atol=1e-5)


def test_with_its_own_weight_alone_nothing_is_mixed(net):
    plain, alone = make_batch(ROWS), make_batch([mixed(row, ROWS[0], 1.0) for row in ROWS])
    assert plain.mixed is None
    assert torch.allclose(
        features(net, plain.tokens_BT)[0], features(net, alone.tokens_BT, mixed=alone.mixed)[0], atol=1e-5
    )


def test_the_teacher_reads_the_same_mixture(net):
    teacher = InProcessTeacher(Model(net, make_tokenizer(), "t"))
    batch = make_batch([mixed(ROWS[1], ROWS[3], 0.8), mixed(ROWS[3], ROWS[1], 0.9)])
    hidden, _ = features(net, batch.tokens_BT, mixed=batch.mixed)
    wanted = head_of(net).logits(hidden[batch.response_positions()])
    signal = teacher.signal(batch)
    assert torch.allclose(signal.head.logits(signal.hidden_NE), wanted, atol=1e-5)


def test_every_micro_batch_is_followed_by_its_mixed_twin():
    text = MixupSource(FixedText(ROWS, 7, 20), 7, 0.4)
    for step in range(4):
        turn, plain = text.step_batch(step, 0.0, {}), text.source.step_batch(step, 0.0, {})
        assert turn.micro_batches[::2] == plain.micro_batches
        twins = [row for micro_batch in turn.micro_batches[1::2] for row in micro_batch]
        rows = [row for micro_batch in plain.micro_batches for row in micro_batch]
        assert [row.response_ids for row in twins] == [row.response_ids for row in rows]
        assert all(row.tags == {"mixed"} and 0.5 <= row.mixed[1] <= 1 for row in twins)
        assert sorted(row.mixed[0].sample_id for row in twins) == sorted(row.sample_id for row in rows)
        assert text.step_batch(step, 0.0, {}) == turn  # a step is replayed alone
    assert text.step_batch(0, 0.0, {}) != MixupSource(FixedText(ROWS, 7, 20), 8, 0.4).step_batch(0, 0.0, {})


def recipe_of(recipe_data, **changes):
    train = recipe_data["train"] | {"mixup": 0.4}
    losses = [{"cross_entropy": {"only": "teacher"}}, {"forward_kl": {"only": "mixed"}}]
    return parse(
        {**recipe_data, "train": train, "loss": losses, "evaluate": {"metrics": ["fidelity"], "controls": []}} | changes
    )


def test_a_student_that_is_the_teacher_loses_nothing_on_mixed_text(recipe_data, tmp_path):
    student = {"start": {"pretrained": recipe_data["teacher"]}}
    folder = run(
        recipe_of(recipe_data, student=student, loss=["forward_kl"]), tmp_path / "run", stages=("elicit", "train")
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(record["loss"]) < 1e-5 for record in records)


def test_mixed_text_has_its_own_term_and_trains(recipe_data, tmp_path):
    folder = run(recipe_of(recipe_data), tmp_path / "run", stages=("elicit", "train"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(len(record["terms"]) == 2 and min(record["terms"].values()) > 0 for record in records)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": ["cross_entropy"]}, "no label but the teacher's distribution"),
        ({"loss": [{"cross_entropy": {"only": "mixed"}}]}, "no label but"),
        ({"writer": [{"by": "student", "max_tokens": 8}], "loss": ["forward_kl"]}, "train.mixup"),
        ({"writer": [{"by": "teacher"}, {"by": "untouched"}], "loss": ["dpo"]}, "train.mixup|answers to one prompt"),
    ],
)
def test_what_a_mixture_cannot_teach_is_refused(recipe_data, changes, match):
    with pytest.raises(RecipeError, match=match):
        resolve(recipe_of(recipe_data, **changes))
