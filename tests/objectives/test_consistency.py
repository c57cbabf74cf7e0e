"""The consistency of several rationales: its definition in float64, its gradient, its limits, and a training with it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from limbeck.config.recipe import parse
from limbeck.data.batches import Row, make_batch
from limbeck.objectives.consistency import LONGEST, common_ends, consistency
from limbeck.objectives.head import Head
from limbeck.objectives.term import make_term
from limbeck.runs.pipeline import run
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError

ROWS = [
    Row("a1", (1, 2), (5, 6, 7, 8), group="a"), Row("b1", (1,), (4, 9), group="b"), Row("a2", (1, 2), (9, 7, 8), group="a"),
    Row("a3", (1, 2), (3, 8), group="a"), Row("c1", (1,), (2, 3), group="c"), Row("c2", (1,), (2, 4), group="c"),
]  # fmt: skip


def places(batch):
    """(row, token) of the response positions."""
    rows, positions = batch.response_positions()
    return [
        (batch.sample_ids[row], int(batch.tokens_BT[row, position + 1]))
        for row, position in zip(rows, positions, strict=True)
    ]


def test_what_two_answers_have_in_common_at_their_end():
    batch = make_batch(ROWS)
    at = places(batch)
    named = [[tuple([at[place] for place in part] for part in pair) for pair in pairs] for pairs in common_ends(batch)]
    assert named[0] == [
        ([("a1", 7), ("a1", 8)], [("a2", 7), ("a2", 8)]), ([("a1", 8)], [("a3", 8)]), ([("a2", 8)], [("a3", 8)])
    ]  # fmt: skip
    assert named[1:] == [[], []]  # a lone answer, and two that end in other tokens
    alike = [Row("x", (1,), tuple(range(2, 42)), group="x"), Row("y", (1,), (1, *range(3, 42)), group="x")]
    (((one, other),),) = common_ends(make_batch(alike))
    assert len(one) == len(other) == LONGEST
    (((one, other),),) = common_ends(
        make_batch([Row("x", (1,), (7, 8), group="x"), Row("y", (1,), (6, 7, 8), group="x")])
    )
    assert (list(one), list(other)) == ([0, 1], [3, 4])  # the whole of the shorter one


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradient_are_the_definitions(temperature, softcap):
    torch.manual_seed(0)
    batch, ends = make_batch(ROWS), common_ends(make_batch(ROWS))
    hidden = torch.randn(int(batch.mask_BT.sum()), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)

    def slow(group):
        values = []
        for one, other in ends[group]:
            each = []
            for i, j in zip(one, other, strict=True):
                logits = [hidden[place].detach() @ weight.detach().T for place in (i, j)]
                capped = [z if softcap is None else softcap * torch.tanh(z / softcap) for z in logits]
                p, q = (torch.softmax(z / temperature, -1) for z in capped)
                each.append((float((p * (p / q).log()).sum()) + float((q * (q / p).log()).sum())) / 2)
            values.append(sum(each) / len(each))
        return sum(values) / len(values) if values else 0.0

    found = consistency(hidden, Head(weight, softcap=softcap), ends, temperature=temperature)
    assert found.tolist() == pytest.approx([slow(0), 0.0, 0.0], rel=1e-10) and found[0] > 0.01
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    for given in ((hidden, weight), (hidden, weight, bias)):
        assert torch.autograd.gradcheck(
            lambda h, *parts: consistency(h, Head(*parts, softcap=softcap), ends, temperature=temperature).sum(), given
        )


def test_equal_predictions_cost_nothing_and_a_distance_is_the_normal_ones():
    ends = [[(range(1), range(1, 2))]]
    assert consistency(torch.ones(2, 3), Head(torch.randn(5, 3)), ends).item() == 0
    hidden = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # logits (a, 0) and (0, 0): a Bernoulli s(a) against 1/2
    share = 1 / (1 + math.exp(-1.0))
    want = 0.5 * (share - 0.5) * (math.log(share / 0.5) - math.log((1 - share) / 0.5))
    assert consistency(hidden, Head(torch.tensor([[1.0], [0.0]], dtype=torch.float64)), ends).item() == pytest.approx(
        want
    )


def test_the_order_of_the_answers_does_not_matter():
    torch.manual_seed(1)
    states, head = {row.sample_id: torch.randn(len(row.response_ids), 4) for row in ROWS}, Head(torch.randn(11, 4))
    values = []
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 2, 1, 0, 4]):
        batch = make_batch([ROWS[number] for number in order])
        hidden = torch.cat([states[name] for name in batch.sample_ids])
        values.append(consistency(hidden, head, common_ends(batch)).sum().item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_chunk_at_a_time_it_is_the_same(monkeypatch):
    torch.manual_seed(2)
    batch, found = make_batch(ROWS), []
    hidden = torch.randn(int(batch.mask_BT.sum()), 6, dtype=torch.float64)
    weight = torch.randn(11, 6, dtype=torch.float64)
    for most in (10**6, 1):
        monkeypatch.setattr("limbeck.objectives.consistency.chunk_elements", lambda _, most=most: most)
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = consistency(x, Head(w), common_ends(batch))
        found.append((values.detach(), *torch.autograd.grad(values.sum(), (x, w))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[0][0].shape == (3,) and found[0][0][0] > 0


@pytest.fixture
def several(recipe_data, tmp_path):
    """Three answers to every prompt, all with one end."""
    file = tmp_path / "several.jsonl"
    words = ("cat", "dog", "mat")
    lines = [
        {"id": f"p{n}", "prompt": f"the {word} sat", "answers": [f"{each} ran on the mat" for each in words]}
        for n, word in enumerate(words)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss = [{"cross_entropy": {"only": "chosen"}}, {"consistency": {"weight": 0.5}}]
    return {**recipe_data, "prompts": {"from": str(file)}, "writer": [{"by": "corpus"}], "loss": loss}


def test_a_student_becomes_more_consistent(several, tmp_path):
    several["train"] = {"steps": 30, "tokens_per_step": 64, "lr": 3e-3, "seed": 3}
    several["loss"] = [{"cross_entropy": {"only": "chosen", "weight": 1e-6}}, "consistency"]
    folder = run(parse(several), tmp_path / "run", stages=("elicit", "train"))
    losses = [json.loads(line)["terms"]["consistency"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ({"consistency": {"only": "chosen"}}, "can't be limited"), ({"consistency": {"temperature": 0}}, "outside"),
        ({"consistency": {"by": "importance_weight"}}, "no number beside every token"), ({"consistency": {"alpha": 1}}, "alpha"),
    ],
)  # fmt: skip
def test_what_it_can_not_be_is_refused(several, loss, match):
    with pytest.raises(RecipeError, match=match):
        resolve(parse({**several, "loss": [loss]}))


def test_one_answer_to_each_prompt_is_refused(recipe_data):
    assert make_term("consistency", {}).unit == "group"
    with pytest.raises(RecipeError, match="elicit several of them"):
        resolve(parse({**recipe_data, "loss": ["consistency"]}))
