"""The loss of reward models against its closed form, its limits, and its place among the other losses."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

import limbeck
from limbeck.data.batches import Row, make_batch
from limbeck.objectives.facts import TextFacts
from limbeck.objectives.forward import Features, StudentForward, TeacherView
from limbeck.objectives.head import Head
from limbeck.objectives.reward_model import bradley_terry, squared_sums
from limbeck.objectives.term import make_term
from limbeck.types import RecipeError

PAIRS = torch.ones(3, 2, dtype=torch.bool)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slope(score, **labels):
    score = score.clone().requires_grad_()
    return torch.autograd.grad(bradley_terry(score, PAIRS[: len(score)], **labels).sum(), score)[0]


def test_pairs_have_the_closed_form_and_its_gradient():
    score = torch.tensor([[1.0, -0.5], [-2.0, 0.3], [0.4, 0.4]], dtype=torch.float64)
    soft, margin = torch.tensor([0.8, 0.25, 0.5]), torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    gaps = (score[:, 0] - score[:, 1]).tolist()
    hard = bradley_terry(score, PAIRS)
    assert hard.tolist() == pytest.approx([-math.log(sigmoid(d)) for d in gaps], rel=1e-14)
    assert slope(score)[:, 0].tolist() == pytest.approx([sigmoid(d) - 1 for d in gaps], rel=1e-13)
    got = bradley_terry(score, PAIRS, soft)
    want = [
        -p * math.log(sigmoid(d)) - (1 - p) * math.log(sigmoid(-d)) for p, d in zip(soft.tolist(), gaps, strict=False)
    ]
    assert got.tolist() == pytest.approx(want, rel=1e-14)
    gradient = slope(score, probability_G=soft)
    assert gradient[:, 0].tolist() == pytest.approx(
        [sigmoid(d) - p for p, d in zip(soft.tolist(), gaps, strict=False)], abs=1e-14
    )
    assert torch.equal(gradient[:, 0], -gradient[:, 1])
    assert (gradient[2] == 0).all()  # as likely as not, and equal
    moved = bradley_terry(score, PAIRS, margin_G=margin)
    assert moved.tolist() == pytest.approx(
        [-math.log(sigmoid(d - m)) for d, m in zip(gaps, margin.tolist(), strict=False)]
    )


def test_limits():
    score = torch.tensor([[1.0, -0.5], [-2.0, 0.3], [0.4, 9.0]], dtype=torch.float64)
    soft = torch.tensor([0.8, 0.25, 0.5])
    for labels in ({}, {"probability_G": soft}, {"probability_G": soft, "margin_G": torch.ones(3)}):
        here = bradley_terry(score, PAIRS, **labels)
        torch.testing.assert_close(bradley_terry(score + 1000, PAIRS, **labels), here, rtol=1e-12, atol=1e-12)
    assert torch.equal(bradley_terry(score, PAIRS, torch.ones(3)), bradley_terry(score, PAIRS))
    swapped = bradley_terry(score.flip(1), PAIRS, 1 - soft.double())
    torch.testing.assert_close(swapped, bradley_terry(score, PAIRS, soft.double()), rtol=1e-12, atol=0)
    far = torch.tensor([[-1e4, 1e4], [1e4, -1e4], [0.0, 0.0]])
    assert bradley_terry(far, PAIRS).tolist() == pytest.approx([2e4, 0.0, math.log(2)])
    alone = torch.tensor([[True, True], [True, True], [True, False]])
    spoilt = score.masked_fill(~alone, math.nan).requires_grad_()
    lost = bradley_terry(spoilt, alone, soft)
    assert lost[2] == 0 and torch.isfinite(torch.autograd.grad(lost.sum(), spoilt)[0]).all()
    with pytest.raises(limbeck.UserError, match="one label each"):
        bradley_terry(score, PAIRS, torch.ones(2))


def test_a_ranking_is_the_mean_of_its_pairs():
    score = torch.tensor([[0.5, 2.0, -1.0, 0.2], [1.0, 0.0, -3.0, 7.0]], dtype=torch.float64)
    present = torch.tensor([[True] * 4, [True, True, True, False]])
    want = []
    for row, count in zip(score.tolist(), (4, 3), strict=False):
        pairs = [-math.log(sigmoid(row[i] - row[j])) for i, j in combinations(range(count), 2)]
        want.append(sum(pairs) / len(pairs))
    assert bradley_terry(score, present).tolist() == pytest.approx(want, rel=1e-14)


def forward(rows, scores):
    batch = make_batch(rows)
    ended = torch.tensor(scores, dtype=torch.float64)[:, None].requires_grad_()
    head = Head(torch.ones(1, 1, dtype=torch.float64))
    data = StudentForward(batch, torch.zeros(1, 1), head, Features(), TeacherView(), ended_BD=ended)
    return data, ended


def pair(name, labels=()):
    return [Row(f"{name}{n}", (1,), (2, 3), group=name, labels=labels if n == 0 else ()) for n in (0, 1)]


def test_a_term_reads_the_labels_of_pairs_alone():
    """A pair without a label beside one with a label is certain and has no margin; `centre` pulls scores to 0."""
    rows = [*pair("a", (("probability", 0.8), ("margin", 0.5))), *pair("b")]
    scores = [1.0, -0.5, 0.3, 0.1]
    data, ended = forward(rows, scores)
    term = make_term("bradley_terry", {"margin": 2, "centre": 0.1})
    at = term.at_step(0.0, {})
    found = at.evaluate(0.5, None, data)
    first = -0.8 * math.log(sigmoid(1.5 - 1)) - 0.2 * math.log(sigmoid(-1.5 - 1))
    want = first - math.log(sigmoid(0.2)) + 0.1 * ((1 - 0.5) ** 2 + (0.3 + 0.1) ** 2)
    assert found.total == pytest.approx(want) and found.loss.item() == pytest.approx(want / 2)
    assert data.batch.amount(term.unit) == 2
    found.loss.backward()
    assert ended.grad.abs().min() > 0
    plain, _ = forward(rows, scores)
    without = make_term("bradley_terry", {}).at_step(0.0, {}).evaluate(1.0, None, plain)
    assert without.total == pytest.approx(
        -0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5)) - math.log(sigmoid(0.2))
    )


def test_the_centre_moves_the_level_alone():
    """The mean of (r_i + r_j)^2 over pairs, by its definition; scores around 0 have none, however far apart."""
    score_GK = torch.tensor([[2.0, -2.0, 7.0], [1.0, -0.5, 0.25]], dtype=torch.float64, requires_grad=True)
    present_GK = torch.tensor([[True, True, False], [True, True, True]])
    found_G = squared_sums(score_GK, present_GK)
    assert found_G.tolist() == pytest.approx([0.0, (0.5**2 + 1.25**2 + 0.25**2) / 3])
    found_G[0].backward()
    assert not score_GK.grad.any()
    assert squared_sums(torch.tensor([[3.0, 0.0]]), torch.tensor([[True, False]])).tolist() == [0.0]


def test_what_scores_and_distributions_refuse_of_each_other():
    ranked = TextFacts(ranked_answers=True, scores=True)
    make_term("bradley_terry", {}).check_text(ranked)
    for name, facts, words in (
        ("bradley_terry", TextFacts(ranked_answers=True), "set student.head: scalar"),
        ("bradley_terry", TextFacts(scores=True), "give a corpus with `chosen`"),
        ("cross_entropy", TextFacts(scores=True), "has none: use bradley_terry"),
        ("dpo", TextFacts(ranked_answers=True, scores=True), "has none: use bradley_terry"),
        ("forward_kl", TextFacts(scores=True), "has none: use bradley_terry"),
    ):
        with pytest.raises(RecipeError, match=words):
            make_term(name, {}).check_text(facts)
    with pytest.raises(RecipeError, match="no line has one"):
        make_term("bradley_terry", {"margin": 1}).check_text(TextFacts(ranked_answers=True, scores=True))
    with pytest.raises(RecipeError, match="can't be limited"):
        make_term("bradley_terry", {"only": "chosen"})
