"""A new loss is one function or one class: registered from outside the package, named in a recipe, and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import limbeck
from limbeck.data.batches import Row, make_batch
from limbeck.objectives.bindable import register_bound
from limbeck.objectives.bound import BoundLoss, ModelPair
from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence_loss import DIVERGENCES, register_divergence
from limbeck.objectives.facts import TextFacts
from limbeck.objectives.forward import Features, Positions, StudentForward, TeacherView, TermSum
from limbeck.objectives.head import Head
from limbeck.objectives.layers import mean_over_pairs
from limbeck.objectives.loss import Loss, LossAtStep
from limbeck.objectives.parameters import Anything, Number, Range, Setting
from limbeck.objectives.registry import LOSSES, register
from limbeck.objectives.term import Term, make_term
from limbeck.objectives.total import total_loss
from limbeck.runs.catalogue import methods
from limbeck.signals.dense import DenseSignal
from limbeck.types import RecipeError

ROWS = [Row("a", (1, 2), (3, 4, 0), frozenset({"teacher"})), Row("b", (5,), (6, 0), frozenset({"student"}))]
N, D, E, V, T = 5, 4, 6, 9, 5


@pytest.fixture(autouse=True)
def _unregistered_afterwards():
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forward() -> StudentForward:
    """A micro-batch of two rows, layer 2 of the student and layer 3 of the teacher recorded."""
    teacher = TeacherView(DenseSignal(noise(1, N, E), Head(noise(2, V, E))), Features({3: noise(3, 2, T, E)}))
    hidden_ND = noise(4, N, D).requires_grad_()
    return StudentForward(
        make_batch(ROWS), hidden_ND, Head(noise(5, V, D)), Features({2: noise(6, 2, T, D).requires_grad_()}), teacher
    )


def summed(term: Term, data: StudentForward, learned: Mapping[str, BoundLoss]) -> tuple[Tensor, float]:
    amounts = {term.label: data.batch.amount(term.unit, term.only)}
    loss, sums = total_loss([term.at_step(0.0, {})], amounts, learned, data)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sums.terms[term.label] / amounts[term.label])
    return loss, sums.terms[term.label]


def test_a_divergence_is_one_function():
    @register_divergence("sum (p - q)^2", "an example", scale=Range(0, 10))
    def squared(p: Distribution, q: Distribution, *, scale: float = 1.0) -> ValueAndGradient:
        gap_RV = q.prob - p.prob
        slope_RV = 2 * scale * gap_RV * q.prob
        return scale * gap_RV.square().sum(-1), slope_RV - q.prob * slope_RV.sum(-1, keepdim=True)

    data = forward()
    _, total = summed(make_term("squared", {"scale": 2, "only": "teacher"}), data, {})
    p, q = (
        torch.softmax(hidden.detach() @ head.weight_VD.T, -1)
        for hidden, head in (
            (data.teacher.signal.hidden_NE, data.teacher.signal.head),
            (data.hidden_ND, data.head),
        )
    )
    assert total == pytest.approx(2 * float((p - q)[:3].square().sum()))
    assert data.hidden_ND.grad[:3].abs().min() > 0 and not data.hidden_ND.grad[3:].any()
    assert methods()["divergences"]["squared"] == {
        "formula": "sum (p - q)^2", "paper": "an example", "parameters": {"scale": 1.0, "temperature": 1.0},
    }  # fmt: skip
    logits = noise(7, 3, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: limbeck.divergence("squared", noise(8, 3, V), z, scale=3.0), [logits])
    with pytest.raises(RecipeError, match="outside") as error:
        make_term("squared", {"scale": 11}, path="loss[0].squared")
    assert error.value.path == "loss[0].squared.scale"


def test_a_feature_loss_is_one_class():
    @register_bound("norm_match", "(|h_q| - a |h_p|)^2", "an example")
    class NormMatch(BoundLoss):
        settings: ClassVar[Mapping[str, Setting]] = {
            "layers": Anything("last"), "start": Number(1.0, Range(0, 10)),
        }  # fmt: skip

        def __init__(self, values, models):
            super().__init__(values, models)
            self.factor = torch.nn.Parameter(torch.tensor(values["start"], dtype=torch.float64))

        def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
            where = (positions.row_N, positions.position_N)
            ours, theirs = student.hidden, teacher.hidden
            return mean_over_pairs(
                [
                    (ours[i][where].norm(dim=-1) - self.factor * theirs[j][where].norm(dim=-1)).square()
                    for i, j in self.pairs
                ]
            )

    term = make_term("norm_match", {"start": 2})
    assert (term.reads, term.unit, term.loss.fused) == ({"teacher_features"}, "token", False)
    learned = term.bind(ModelPair((2, 3), (D, E), seed=0, embed=lambda token_N: token_N, dense=DenseSignal))
    assert learned.taps(0).hidden == {2} and learned.taps(1).hidden == {3} and not learned.taps(1).attention
    data = forward()
    _, total = summed(term, data, {"norm_match": learned})
    where = data.batch.response_positions()
    gap = data.features.hidden[2][where].norm(dim=-1) - 2 * data.teacher.features.hidden[3][where].norm(dim=-1)
    assert total == pytest.approx(float(gap.detach().square().sum()))
    assert data.features.hidden[2].grad.any() and learned.factor.grad != 0
    assert methods()["losses"]["norm_match"]["parameters"] == {"layers": "last", "start": 1.0}
    with pytest.raises(RecipeError, match="did you mean 'start'"):
        make_term("norm_match", {"strat": 2})


def test_a_family_is_one_class_and_what_it_refuses_is_its_own():
    @dataclass(frozen=True, kw_only=True)
    class Shrink(Loss):
        unlimited: ClassVar[str] = "looks at all text"

        def check_text(self, settings, facts):
            super().check_text(settings, facts)
            if not facts.several_answers:
                raise RecipeError(settings.path, f"{self.name} wants several answers")

        def evaluate(self, at_step: LossAtStep, data: StudentForward) -> TermSum:
            total = data.hidden_ND.square().sum()
            return TermSum(at_step.scale * total, float(total.detach()))

    register(Shrink(name="shrink", formula="sum h^2", paper="an example", reads=frozenset({"tokens"}), unit="row"))
    data, term = forward(), make_term("shrink", {}, weight=3.0, path="loss[0].shrink")
    loss, _ = total_loss([term.at_step(0.0, {})], {"shrink": 2.0}, {}, data)
    assert float(loss.detach()) == pytest.approx(3 / 2 * float(data.hidden_ND.detach().square().sum()))
    term.check_text(TextFacts(several_answers=True))
    with pytest.raises(RecipeError, match="wants several answers"):
        term.check_text(TextFacts())
    with pytest.raises(RecipeError, match="looks at all text"):
        make_term("shrink", {"only": "teacher"})
    with pytest.raises(RecipeError, match="no number beside every token"):
        make_term("shrink", {"by": "importance_weight"})


def test_a_name_is_given_once_and_what_is_unregistered_is_gone():
    assert "squared" not in DIVERGENCES and "norm_match" not in methods()["losses"]
    with pytest.raises(AssertionError, match="forward_kl"):
        register(LOSSES["forward_kl"])


@pytest.mark.parametrize("name", ["reinforce", "ppo_clip"])
def test_losses_on_rewards_ask_for_rewards(name):
    term = make_term(name, {}, path="loss[0]")
    with pytest.raises(RecipeError, match="which rewards give"):
        term.check_text(TextFacts(writers=frozenset({"student"}), temperature=1.0))
    term.check_text(TextFacts(writers=frozenset({"student"}), temperature=1.0, rewarded=True))
    assert name in methods()["losses"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_evaluated_in_one_way(name):
    """Fused losses give values of a block, all others their own sum; those that bind give a module."""
    kind = type(LOSSES[name])
    assert (kind.token_values is not Loss.token_values) == kind.fused
    assert (kind.evaluate is not Loss.evaluate) == (not kind.fused)
    assert (kind.bind is not Loss.bind) == kind.binds
