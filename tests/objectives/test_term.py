"""Terms of a recipe: every name with its defaults, schedules that settle, errors with their place, values on a block."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.objectives.bindable import BINDABLE
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.head import Block
from limbeck.objectives.on_logits import divergence
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS, Candidates
from limbeck.objectives.supervised import cross_entropy
from limbeck.objectives.term import make_term
from limbeck.signals.dense import DenseRows
from limbeck.types import RecipeError, UserError

VOCABULARY = ["cross_entropy", *DIVERGENCES, *POLICIES]
NAMES = [*VOCABULARY, *RANKINGS, *BINDABLE]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(columns: dict[str, Tensor] | None = None, targets: Tensor | None = None) -> tuple[Block, Tensor, Tensor]:
    """A block of 6 positions and 9 tokens, with the logits of student and teacher."""
    student, teacher = randn(6, 9, seed=1).requires_grad_(), randn(6, 9, seed=2)
    targets = torch.tensor([0, 8, 3, 3, 5, 1]) if targets is None else targets
    return (
        Block(Distribution(student.detach()), targets, DenseRows(Distribution(teacher)), columns or {}),
        student,
        teacher,
    )


# -- making -------------------------------------------------------------------------------------------------------------


def test_no_two_losses_share_a_name():
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_term_with_its_defaults(name):
    term = make_term(name, {})
    settled = term.at_step(0.5, {})
    assert term.name == name and term.label == settled.label == (f"{name}@student" if name in POLICIES else name)
    assert settled.weight == 1.0
    if name in BINDABLE:
        assert term.loss.binds and not term.loss.fused and term.settings.values == BINDABLE[name].defaults
        assert term.unit == ("row" if name in ("contrast", "cka") else "token") and not settled.params
        assert term.reads == {"teacher_states" if name == "dual_space" else "teacher_features"}
    elif name in RANKINGS:
        known = RANKINGS[name]
        assert (term.loss.ranks, term.unit, settled.params) == (True, "group", known.defaults)
        assert term.reads == {"answers"} | ({f"reference_{known.reference}"} if known.reference != "none" else set())
    else:
        assert (term.loss.fused, term.unit) == (True, "token")
        known = DIVERGENCES.get(name) or POLICIES.get(name)
        assert settled.params == (known.defaults if known else {"label_smoothing": 0.0})
        if (
            name in POLICIES
        ):  # the teacher's log-probability, and what is made of whole responses, come from its distribution
            made = {"teacher_log_prob"} | (set(known.needed) if known.prepare else set())
            taught = {"teacher_distribution"} if made & set(known.needed) else set()
            assert term.reads == set(known.needed) - made | taught | {"student"}
        else:
            assert term.reads == {"tokens" if known is None else "teacher_distribution"}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_range_that_holds_its_default(name):
    known = DIVERGENCES.get(name) or POLICIES.get(name) or RANKINGS.get(name)
    for key, value in (known.defaults if known else {}).items():
        assert known.ranges[key].check(key, value) == value
    assert known is None or known.ranges.keys() == known.defaults.keys()


@pytest.mark.parametrize("name", [*VOCABULARY, *BINDABLE])
def test_the_label_says_whose_text_it_is_limited_to(name):
    term = make_term(name, {"only": "student"})
    assert (term.label, term.only, term.at_step(0, {}).label) == (f"{name}@student", "student", f"{name}@student")
    assert "only" not in term.params


@pytest.mark.parametrize(
    ("name", "params", "weight", "path", "words"),
    [
        ("forward_lk", {}, 1, "loss[2]", "forward_kl"), ("dpoo", {}, 1, "loss[2]", "dpo"), ("cross_entrop", {}, 1, "loss[2]", "cross_entropy"),
        ("hidden_mach", {}, 1, "loss[2]", "hidden_match"), ("ppo_clipp", {}, 1, "loss[2]", "ppo_clip"),
        ("jsd", {"teacher_shar": 0.5}, 1, "loss[2].teacher_shar", "teacher_share"), ("jsd", {"teacher_share": 1}, 1, "loss[2].teacher_share", "(0, 1)"),
        ("jsd", {"teacher_share": "half"}, 1, "loss[2].teacher_share", "not a number"), ("logit_mse", {"t": 1}, 1, "loss[2].t", "none but weight and only"),
        ("jsd", {"teacher_share": {"from": 0.1, "to": 1}}, 1, "loss[2].teacher_share.to", "(0, 1)"),
        ("jsd", {"teacher_shar": {"from": 0.1, "to": 1}}, 1, "loss[2].teacher_shar", "teacher_share"),
        ("taid", {"t": {"from": 0.4, "to": 1, "shape": "adaptiv"}}, 1, "loss[2].t.shape", "adaptive"),
        ("cross_entropy", {"label_smoothing": 1}, 1, "loss[2].label_smoothing", "[0, 1)"), ("cross_entropy", {"smoothing": 0.1}, 1, "loss[2].smoothing", "label_smoothing"),
        ("dpo", {"beta": 0}, 1, "loss[2].beta", "outside"), ("dpo", {"bet": 1}, 1, "loss[2].bet", "beta"),
        ("ppo_clip", {"clip_low": 2}, 1, "loss[2].clip_low", "outside"), ("ppo_clip", {"clip": 0.2}, 1, "loss[2].clip", "clip_low"),
        ("reinforce", {"beta": 2}, 1, "loss[2].beta", "none but weight and only"),
        ("hidden_match", {"distance": "far"}, 1, "loss[2].distance", "squared"), ("hidden_match", {"layer": "last"}, 1, "loss[2].layer", "layers"),
        ("forward_kl", {"only": 3}, 1, "loss[2].only", "writer"), ("dpo", {"only": "teacher"}, 1, "loss[2].only", "all writers"),
        ("forward_kl", {}, -1, "loss[2].weight", "outside"), ("forward_kl", {}, float("inf"), "loss[2].weight", "not a number"),
        ("forward_kl", {}, "much", "loss[2].weight", "not a number"), ("forward_kl", {}, {"from": 1, "to": -1}, "loss[2].weight.to", "outside"),
        ("forward_kl", {}, {"from": 1, "to": 0, "shape": "plateau"}, "loss[2].weight", "rises"),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_the_remedy(name, params, weight, path, words):
    with pytest.raises(RecipeError) as error:
        make_term(name, params, weight, "loss[2]")
    assert error.value.path == path and words in str(error.value)


def test_an_error_without_a_place_starts_with_the_parameter():
    with pytest.raises(RecipeError) as error:
        make_term("jsd", {"teacher_share": 7})
    assert error.value.path == "teacher_share"


@pytest.mark.parametrize(("name", "params", "weight"), [("taid", {"t": {"from": 0, "to": 1, "shape": "measured"}}, 1),
                                                        ("kto", {"beta": {"from": 0.1, "to": 0.1, "shape": "measured"}}, 1),
                                                        ("forward_kl", {}, {"from": 0, "to": 1, "shape": "measured"})])  # fmt: skip
def test_what_no_term_measures_cannot_be_a_measured_number(name, params, weight):
    with pytest.raises(RecipeError, match="measured"):
        make_term(name, params, weight, "loss[2]")


# -- schedules ----------------------------------------------------------------------------------------------------------


def test_settling_turns_schedules_into_numbers():
    term = make_term(
        "jsd",
        {"teacher_share": {"from": 0.2, "to": 0.6}, "only": "code"},
        {"from": 1, "to": 0, "shape": "step", "at": 0.5},
    )
    for progress, weight, share in ((0.0, 1.0, 0.2), (0.25, 1.0, 0.3), (0.5, 0.0, 0.4), (1.0, 0.0, 0.6)):
        settled = term.at_step(progress, {})
        assert settled.weight == weight and settled.params == {
            "teacher_share": pytest.approx(share),
            "temperature": 1.0,
        }


def test_adaptive_numbers_follow_their_own_state_through_a_checkpoint():
    rises = {"from": 0.0, "to": 1.0, "shape": "plateau", "rise": 0.25, "tolerance": 0.5}
    term = make_term(
        "taid", {"t": {"from": 0.4, "to": 1.0, "shape": "adaptive", "rate": 0.1}, "only": "teacher"}, rises
    )
    other = make_term("taid", {"t": {"from": 0.4, "to": 1.0, "shape": "adaptive", "rate": 0.1}, "only": "student"})
    states: dict = {}
    for step, loss in enumerate([2.0, 1.0, 2.5, 2.6]):
        term.after(states, (step + 1) / 10, loss, None)
        states = json.loads(json.dumps(states))
    settled = term.at_step(0.4, states)
    assert len(states) == 2 and all(key.startswith("taid@teacher") for key in states)
    assert settled.weight == 0.25 and settled.params["t"] == states["taid@teacher.t"]["value"] > 0.4 + 0.6 * 0.4 - 1e-12
    assert other.at_step(0.4, states).params["t"] == 0.4, "another term's state is not its own"


@pytest.mark.parametrize("name", RANKINGS)
def test_a_terms_weight_and_a_parameter_of_that_name_are_two_things(name):
    """A schedule of the weight is one of the weight, whatever the loss calls its parameters."""
    term = make_term(name, {}, {"from": 0.0, "to": 1.0, "shape": "plateau", "rise": 0.5, "tolerance": 0.1})
    before, states = term.at_step(0.0, {}), {}
    for loss in (1.0, 2.0):
        term.after(states, 0.5, loss, None)
    settled = term.at_step(0.5, states)
    assert (before.weight, settled.weight) == (0.0, 0.5) and settled.params == before.params


def test_ktos_baseline_is_measured_unless_it_is_given():
    term, states = make_term("kto", {}), {}
    assert term.params["baseline"].shape == "measured" and term.at_step(0.0, states).params["baseline"] == 0.0
    term.after(states, 0.1, loss=5.0, measured=(3.0, 4.0))
    assert term.at_step(0.1, states).params["baseline"] == 0.75 and states == {"kto.baseline": {"value": 0.75}}
    term.after(states, 0.2, loss=5.0, measured=None)
    assert term.at_step(0.2, states).params["baseline"] == 0.75, "a step without answers measures nothing"
    given = make_term("kto", {"baseline": 0.3})
    given.after(states, 0.3, loss=5.0, measured=(9.0, 1.0))
    assert given.at_step(0.3, {}).params["baseline"] == 0.3


# -- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_terms_equal_the_public_function(name):
    b, student, teacher = block()
    values, gradient = make_term(name, {}).at_step(0.0, {}).values(b)
    want = divergence(name, teacher, student, targets_N=b.targets_R)
    torch.testing.assert_close(values, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), student)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_equals_torchs(smoothing):
    b, student, _ = block()
    values, gradient = make_term("cross_entropy", {"label_smoothing": smoothing}).at_step(0.0, {}).values(b)
    want = F.cross_entropy(student, b.targets_R, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(values, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), student)[0], rtol=1e-12, atol=1e-15)
    cross_entropy(b.q, b.targets_R)[1].zero_()
    torch.testing.assert_close(
        b.q.prob, torch.softmax(student.detach(), -1)
    )  # the gradient is the caller's to overwrite


@pytest.mark.parametrize("name", VOCABULARY)
def test_the_gradient_is_the_callers_to_overwrite(name):
    """The head multiplies it in place: no term may hand out what the next one reads."""
    b, _, _ = block(columns(6))
    settled = make_term(name, {}).at_step(0.0, {})
    first, gradient = settled.values(b)
    kept = gradient.clone()
    gradient.zero_()
    again, second = settled.values(b)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(second, kept, rtol=0, atol=0)


def columns(n: int) -> dict[str, Tensor]:
    names = (
        "advantage",
        "old_log_prob",
        "teacher_log_prob",
        "reference_log_prob",
        "importance_weight",
        "position_weight",
    )
    return {name: randn(n, seed=10 + i) * (1 if name == "advantage" else -1) for i, name in enumerate(names)}


@pytest.mark.parametrize("given", ["all", "only what it reads"])
@pytest.mark.parametrize("name", POLICIES)
def test_policy_terms_equal_autograd_on_the_logits(name, given):
    policy, c = POLICIES[name], columns(6)
    c = c if given == "all" else {key: c[key] for key in policy.needed}
    b, student, _ = block(c)
    with torch.no_grad():  # as the head calls it
        values, gradient = make_term(name, {}).at_step(0.0, {}).values(b)
    log_prob = torch.log_softmax(student, -1).gather(-1, b.targets_R[:, None])[:, 0]
    want = policy.fn(log_prob, {key: c[key] for key in (*policy.needed, *policy.optional) if key in c})
    torch.testing.assert_close(values, want.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), student)[0], rtol=1e-10, atol=1e-14)
    assert gradient.abs().max() > 0 and not values.requires_grad and not gradient.requires_grad


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_term_without_its_columns_says_which(name):
    """The teacher's log-probability is taken from its distribution, where no column holds it."""
    b, _, _ = block()
    lacking = [column for column in POLICIES[name].needed if column != "teacher_log_prob"]
    if not lacking:
        values, _ = make_term(name, {}).at_step(0.0, {}).values(b)
        p, q = b.teacher.p.log, b.q.log
        torch.testing.assert_close(values, (q - p).gather(1, b.targets_R[:, None])[:, 0])
        return
    with pytest.raises(UserError, match=lacking[0]):
        make_term(name, {}).at_step(0.0, {}).values(b)


@pytest.mark.parametrize("name", RANKINGS)
def test_ranking_terms_give_a_value_per_group(name):
    log_prob, length = (
        randn(4, 3, seed=20).sub(6).requires_grad_(),
        torch.randint(1, 6, (4, 3), generator=torch.Generator().manual_seed(21)),
    )
    candidates = Candidates(log_prob, length, torch.ones(4, 3, dtype=torch.bool), randn(4, 3, seed=22) - 6)
    values = RANKINGS[name].values(candidates, make_term(name, {}).at_step(0.0, {}).params)
    torch.testing.assert_close(values, RANKINGS[name].fn(candidates))
    values.sum().backward()
    assert values.shape == (4,) and log_prob.grad.abs().sum() > 0
