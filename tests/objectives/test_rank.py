"""Ranking losses against float64 definitions in plain Python, closed-form gradients, limits and invariances."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

import limbeck
from limbeck.data.batches import Row, make_batch
from limbeck.objectives.facts import TextFacts
from limbeck.objectives.preference import kto_baseline
from limbeck.objectives.rank import (
    RANKINGS,
    Candidates,
    checked_ranking_params,
    clamped_baseline,
)
from limbeck.objectives.reference_free import plackett_luce
from limbeck.objectives.term import make_term
from limbeck.types import RecipeError

CASES = [
    ("dpo", {}), ("dpo", {"beta": 0.7, "label_smoothing": 0.2}), ("robust_dpo", {}), ("robust_dpo", {"beta": 0.5, "noise": 0.3}),
    ("ipo", {"beta": 0.4}), ("ipo_sum", {"beta": 0.4}), ("hinge", {"beta": 0.2}), ("kto", {}),
    ("kto", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7, "baseline": 0.8}), ("orpo", {}), ("orpo", {"odds_weight": 2.0}),
    ("simpo", {}), ("simpo", {"beta": 3.0, "gamma": 0.4}), ("rrhf", {}), ("rrhf", {"sft_weight": 0.0}), ("pro", {}),
    ("pro", {"sft_weight": 0.6}), ("spin", {"beta": 0.3}), ("dpkd", {"beta": 1.3}),
]  # fmt: skip
COUNTS = [4, 2, 3, 1]
PER_TOKEN = {"ipo", "simpo", "dpkd"}
WITH_REFERENCE = {"dpo", "robust_dpo", "ipo", "ipo_sum", "hinge", "kto", "spin", "dpkd"}
REQUIRED = {"log_prob_GK", "length_GK", "present_GK"}


def make(seed: int = 0, k: int = 4) -> Candidates:
    """Four groups with 4, 2, 3 and 1 answers of different lengths."""
    noise = torch.Generator().manual_seed(seed)
    length = torch.randint(2, 9, (4, k), generator=noise)
    log_prob = -length * (0.2 + 2 * torch.rand(4, k, generator=noise, dtype=torch.float64))
    present = torch.arange(k) < torch.tensor(COUNTS)[:, None]
    reference = log_prob + 3 * torch.randn(4, k, generator=noise, dtype=torch.float64)
    return Candidates(log_prob, length, present, reference)


def pair(
    best: float, worst: float, lengths: tuple[int, int] = (1, 1), reference: tuple[float, float] = (0.0, 0.0)
) -> Candidates:
    """One group of two answers, in float64, with a gradient."""
    log_prob = torch.tensor([[best, worst]], dtype=torch.float64, requires_grad=True)
    present = torch.ones(1, 2, dtype=torch.bool)
    return Candidates(log_prob, torch.tensor([lengths]), present, torch.tensor([reference], dtype=torch.float64))


def value(name: str, candidates: Candidates, **params: float) -> torch.Tensor:
    return RANKINGS[name].fn(candidates, **params)


def gradient(name: str, candidates: Candidates, **params: float) -> torch.Tensor:
    log_prob = candidates.log_prob_GK.detach().clone().requires_grad_()
    (got,) = torch.autograd.grad(value(name, replace(candidates, log_prob_GK=log_prob), **params).sum(), log_prob)
    return got


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def order_loss(scores: list[float]) -> float:
    total = 0.0
    for k in range(len(scores) - 1):
        total -= math.log(math.exp(scores[k]) / sum(math.exp(s) for s in scores[k:]))
    return total


def expected(name: str, lp: list[float], lengths: list[int], ref: list[float], **given: float) -> float:
    """The definitions, in plain Python, on the present answers of one group. Every parameter's default is spelt out again."""
    mean = [a / n for a, n in zip(lp, lengths, strict=True)]
    ratio = [a - b for a, b in zip(lp, ref, strict=True)]
    by_token = [r / n for r, n in zip(ratio, lengths, strict=True)]
    single = len(lp) == 1
    beta = given.get("beta", 2.0 if name == "simpo" else 0.1)
    h, h_token = ratio[0] - ratio[-1], by_token[0] - by_token[-1]
    if name == "kto":
        z = given.get("baseline", 0.0)
        loss = given.get("desirable_weight", 1.0) * (1 - sigmoid(beta * (ratio[0] - z)))
        return loss + sum(given.get("undesirable_weight", 1.0) * (1 - sigmoid(beta * (z - r))) for r in ratio[1:])
    if name == "orpo":
        odds = [math.exp(m) / (1 - math.exp(m)) for m in mean]
        return -mean[0] - (
            0 if single else given.get("odds_weight", 0.1) * math.log(sigmoid(math.log(odds[0] / odds[-1])))
        )
    if name == "rrhf":
        wrong = sum(max(0.0, mean[j] - mean[i]) for i in range(len(mean)) for j in range(i + 1, len(mean)))
        return wrong - given.get("sft_weight", 1.0) * lp[0]
    if name == "pro":
        return order_loss(mean) - given.get("sft_weight", 0.05) * max(1, len(lp) - 1) ** 2 * lp[0]
    if single:
        return 0.0
    if name == "dpo":
        e = given.get("label_smoothing", 0.0)
        return -(1 - e) * math.log(sigmoid(beta * h)) - e * math.log(sigmoid(-beta * h))
    if name == "robust_dpo":
        e = given.get("noise", 0.1)
        return (-(1 - e) * math.log(sigmoid(beta * h)) + e * math.log(sigmoid(-beta * h))) / (1 - 2 * e)
    return {
        "spin": lambda: -math.log(sigmoid(beta * h)),
        "dpkd": lambda: -math.log(sigmoid(beta * h_token)),
        "ipo": lambda: (h_token - 1 / (2 * beta)) ** 2,
        "ipo_sum": lambda: (h - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0.0, 1 - beta * h),
        "simpo": lambda: -math.log(sigmoid(beta * (mean[0] - mean[-1]) - given.get("gamma", 1.0))),
    }[name]()


def test_every_registered_loss_is_tested_and_says_who_its_reference_is():
    assert {name for name, _ in CASES} == set(RANKINGS)
    assert {name for name, ranking in RANKINGS.items() if ranking.reference != "none"} == WITH_REFERENCE
    assert {name for name, ranking in RANKINGS.items() if ranking.reference == "teacher"} == {"dpkd"}
    for ranking in RANKINGS.values():
        assert (
            ranking.defaults
            and set(ranking.defaults) == set(ranking.ranges)
            and "arXiv" in ranking.paper
            and ranking.formula
        )


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_equals_the_float64_definition(name, params, seed):
    c = make(seed)
    got = value(name, c, **params)
    assert got.shape == (4,) and got.dtype == torch.float64
    for g, n in enumerate(COUNTS):
        want = expected(
            name, c.log_prob_GK[g, :n].tolist(), c.length_GK[g, :n].tolist(), c.reference_GK[g, :n].tolist(), **params
        )
        assert got[g].item() == pytest.approx(want, rel=1e-9, abs=1e-12), g
    single = value(name, replace(c, log_prob_GK=c.log_prob_GK.float(), reference_GK=c.reference_GK.float()), **params)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_gradient_equals_the_finite_difference(name, params):
    c, step = make(3), 1e-6
    got = gradient(name, c, **params)
    for g in range(4):
        for k in range(4):
            shift = torch.zeros_like(c.log_prob_GK)
            shift[g, k] = step
            up, down = (
                value(name, replace(c, log_prob_GK=c.log_prob_GK + sign * shift), **params).sum() for sign in (1, -1)
            )
            assert got[g, k].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5, abs=1e-7), (g, k)


def closed_form(name: str, c: Candidates) -> tuple[float, float]:
    """The gradient with respect to (best, worst) of one pair, derived by hand, at the parameters of the test below."""
    (a, b), (n, m) = c.log_prob_GK[0].tolist(), c.length_GK[0].tolist()
    ra, rb = (c.log_prob_GK - c.reference_GK)[0].tolist()
    h, h_token, difference, beta = ra - rb, ra / n - rb / m, a / n - b / m, 0.3
    dpo, token = -beta * sigmoid(-beta * h), -beta * sigmoid(-beta * h_token)
    mine = 2 * sigmoid(1 - 2 * difference)
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (a / n, b / m)]
    pull = 0.1 * odds[1] / (odds[0] + odds[1])
    wrong = float(difference < 0)
    return {
        "dpo": (dpo, -dpo),
        "spin": (dpo, -dpo),
        "robust_dpo": (-beta * (0.9 * sigmoid(-beta * h) + 0.1 * sigmoid(beta * h)) / 0.8,
                       beta * (0.9 * sigmoid(-beta * h) + 0.1 * sigmoid(beta * h)) / 0.8),
        "ipo": (2 * (h_token - 1 / 0.6) / n, -2 * (h_token - 1 / 0.6) / m),
        "ipo_sum": (2 * (h - 1 / 0.6), -2 * (h - 1 / 0.6)),
        "hinge": (-beta, beta),
        "kto": (-beta * sigmoid(beta * ra) * sigmoid(-beta * ra), beta * sigmoid(beta * rb) * sigmoid(-beta * rb)),
        "orpo": (-1 / n - pull / (1 - math.exp(a / n)) / n, pull / (1 - math.exp(b / m)) / m),
        "simpo": (-mine / n, mine / m),
        "rrhf": (-1 - wrong / n, wrong / m),
        "pro": (-sigmoid(-difference) / n - 0.05, sigmoid(-difference) / m),
        "dpkd": (token / n, -token / m),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", sorted(RANKINGS))
@pytest.mark.parametrize("log_probs", [(-4.0, -3.0), (-2.0, -9.0)])
def test_gradient_of_a_pair_equals_the_closed_form(name, log_probs):
    c = pair(*log_probs, lengths=(3, 5), reference=(-3.5, -4.0) if log_probs[0] == -4 else (-2.5, -8.0))
    params = {"beta": 0.3} if name in WITH_REFERENCE else {}
    want = torch.tensor([closed_form(name, c)], dtype=torch.float64)
    torch.testing.assert_close(gradient(name, c, **params), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_gradient_step_raises_the_margin(name, params):
    c = pair(-4.0, -3.0, lengths=(2, 3), reference=(-3.5, -3.4))
    before = c.margin(c.mean_log_prob_GK if name in {"orpo", "simpo", "rrhf", "pro"} else c.per_token(c.log_ratio_GK))
    moved = replace(c, log_prob_GK=c.log_prob_GK - 1e-3 * gradient(name, c, **params))
    after = moved.margin(
        moved.mean_log_prob_GK if name in {"orpo", "simpo", "rrhf", "pro"} else moved.per_token(moved.log_ratio_GK)
    )
    assert after.item() > before.item() + 1e-6
    assert value(name, moved, **params).item() < value(name, c, **params).item()


def test_student_equal_to_the_reference():
    c = make(4)
    same, two = replace(c, reference_GK=c.log_prob_GK), torch.tensor(COUNTS) > 1
    zero, log_two = torch.zeros(4, dtype=torch.float64), math.log(2) * two.double()
    for name in ("dpo", "spin", "dpkd"):
        torch.testing.assert_close(value(name, same, beta=0.6), log_two)
    torch.testing.assert_close(value("dpo", same, label_smoothing=0.3), log_two)
    torch.testing.assert_close(value("robust_dpo", same, noise=0.3), log_two)
    torch.testing.assert_close(value("hinge", same), two.double())
    torch.testing.assert_close(value("ipo", same, beta=0.25), zero + 4 * two)
    # KTO at ratio = z: half the weights, and the lone answer's half is there too.
    params = {"desirable_weight": 1.4, "undesirable_weight": 0.6}
    want = 0.7 + 0.3 * (torch.tensor(COUNTS) - 1).double()
    torch.testing.assert_close(value("kto", same, **params), want)
    shifted = replace(same, reference_GK=same.reference_GK - 0.9)
    torch.testing.assert_close(value("kto", shifted, baseline=0.9, **params), want)


def test_noise_that_vanishes_gives_dpo():
    c = make(5)
    plain = value("dpo", c, beta=0.4)
    assert torch.equal(value("dpo", c, beta=0.4, label_smoothing=0.0), plain)
    torch.testing.assert_close(value("robust_dpo", c, beta=0.4, noise=0.0), plain, rtol=1e-14, atol=0)
    near, far = (value("robust_dpo", c, beta=0.4, noise=e) - plain for e in (1e-6, 0.2))
    assert near.abs().max() < 1e-4 and far.abs().max() > 0.1
    assert torch.equal(value("spin", c, beta=0.4), plain)


def test_robust_dpo_on_flipped_labels_is_dpo_on_average():
    e, c = 0.3, pair(-4.0, -3.0, reference=(-3.0, -5.0))
    flipped = replace(c, log_prob_GK=c.log_prob_GK.flip(-1), reference_GK=c.reference_GK.flip(-1))
    average = (1 - e) * value("robust_dpo", c, noise=e) + e * value("robust_dpo", flipped, noise=e)
    torch.testing.assert_close(average, value("dpo", c), rtol=1e-12, atol=0)
    assert (value("robust_dpo", c, noise=e) - value("dpo", c)).abs().item() > 1e-2


def test_conservative_dpo_rests_at_the_log_odds_of_its_labels():
    c = pair(math.log(0.8 / 0.2) / 0.5, 0.0)
    assert gradient("dpo", c, beta=0.5, label_smoothing=0.2).abs().max() < 1e-12
    assert gradient("dpo", c, beta=0.5).abs().max() > 1e-2


def test_a_pair_s_own_probability_is_its_smoothing_and_a_pair_without_has_the_recipe_s():
    c = make(2)
    told = torch.tensor([1.0, 0.9, 0.5, float("nan")], dtype=torch.float64)
    got = value("dpo", replace(c, probability_G=told), beta=0.4, label_smoothing=0.2)
    for group, smoothing in enumerate((0.0, 0.1, 0.5, 0.2)):
        assert got[group] == value("dpo", c, beta=0.4, label_smoothing=smoothing)[group]
    even = replace(pair(-3.0, -3.0), probability_G=torch.tensor([0.5]))
    assert gradient("dpo", even, beta=0.4).abs().max() == 0 < gradient("dpo", pair(-3.0, -3.0)).abs().max()


@pytest.mark.parametrize("name", sorted(set(RANKINGS) - {"dpo"}))
def test_what_lines_say_of_pairs_is_read_or_refused(name):
    term = make_term(name, {})
    facts = TextFacts(several_answers=True, ranked_answers=True, labels=frozenset({"probability"}))
    with pytest.raises(RecipeError, match=r"does not read the probability.*bradley_terry, or for a probability dpo"):
        term.loss.check_text(term.settings, facts)
    make_term("dpo", {}).loss.check_text(make_term("dpo", {}).settings, facts)


def test_a_group_counts_by_its_weight():
    """Weights 1 and 3 are a group once and a group three times, in the sum and in what it is divided by."""
    rows = {name: Row(name, (1,), (2, 3), group=name[0]) for name in ("a1", "a2", "b1", "b2")}
    heavy = [replace(row, weight=3.0) if row.group == "b" else row for row in rows.values()]
    batch = make_batch(heavy)
    assert batch.amount("group") == 4 and batch.amount("row") == 8 and batch.amount("token") == 16
    assert batch.group_weights().tolist() == [1, 3] and make_batch(list(rows.values())).amount("group") == 2


def test_ipo_rests_at_its_target():
    lengths, beta = (3, 6), 0.25
    at = pair(-1.0, -20.0, lengths, reference=(-1.0 - 3 * 1.5, -20.0 + 6 * 0.5))
    assert (
        value("ipo", at, beta=beta).item() == pytest.approx(0, abs=1e-20)
        and gradient("ipo", at, beta=beta).abs().max() < 1e-12
    )
    assert value("ipo_sum", at, beta=beta).item() == pytest.approx((4.5 + 3 - 2) ** 2)
    summed = pair(-1.0, -20.0, lengths, reference=(-2.5, -19.5))
    assert value("ipo_sum", summed, beta=beta).item() == pytest.approx(0, abs=1e-20)
    assert value("ipo", summed, beta=beta).item() > 1


def test_hinge_is_flat_beyond_its_margin():
    beyond, short = pair(-1.0, -6.1, reference=(0.0, 0.0)), pair(-1.0, -5.9, reference=(0.0, 0.0))
    assert value("hinge", beyond, beta=0.2).item() == 0 and gradient("hinge", beyond, beta=0.2).abs().max() == 0
    assert (
        value("hinge", short, beta=0.2).item() == pytest.approx(0.02)
        and gradient("hinge", short, beta=0.2)[0, 0] == -0.2
    )


def test_plackett_luce_of_two_is_simpo_without_margin():
    c = make(6, k=4)
    two = replace(c, present_GK=torch.arange(4) < torch.tensor([2, 2, 2, 1])[:, None])
    torch.testing.assert_close(
        value("pro", two, sft_weight=0.0), value("simpo", two, beta=1.0, gamma=0.0), rtol=1e-12, atol=0
    )


def test_plackett_luce_of_equals_is_log_factorial():
    c = make()
    equal = replace(c, log_prob_GK=-1.7 * c.length_GK.double())
    want = torch.tensor([math.lgamma(n + 1) for n in COUNTS], dtype=torch.float64)
    torch.testing.assert_close(value("pro", equal, sft_weight=0.0), want)


def test_plackett_luce_is_a_probability_over_orders():
    scores, present = [0.3, -1.2, 0.9], torch.ones(1, 3, dtype=torch.bool)
    losses = [
        plackett_luce(torch.tensor([order], dtype=torch.float64), present).item() for order in permutations(scores)
    ]
    assert sum(math.exp(-x) for x in losses) == pytest.approx(1, rel=1e-12) and max(losses) - min(losses) > 1


def test_rrhf_pays_nothing_for_the_right_order():
    present = torch.ones(1, 3, dtype=torch.bool)
    right = Candidates(torch.tensor([[-4.0, -3.0, -9.0]]), torch.tensor([[8, 3, 3]]), present)
    assert right.mean_log_prob_GK.tolist() == [[-0.5, -1.0, -3.0]]
    assert value("rrhf", right, sft_weight=0.0).item() == 0 and gradient("rrhf", right, sft_weight=0.0).abs().max() == 0
    assert value("rrhf", right).item() == 4 and value("rrhf", right, sft_weight=0.5).item() == 2
    wrong = replace(right, log_prob_GK=right.log_prob_GK.flip(-1), length_GK=right.length_GK.flip(-1))
    assert value("rrhf", wrong, sft_weight=0.0).item() == pytest.approx(2.0 + 2.5 + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_probs", [(0.0, -3.0), (-3.0, 0.0), (0.0, 0.0), (-1e-9, -1e-9), (-1e-30, -4.0)])
def test_orpo_stays_finite_where_an_answer_is_certain(dtype, log_probs):
    c = Candidates(torch.tensor([log_probs], dtype=dtype), torch.tensor([[2, 2]]), torch.ones(1, 2, dtype=torch.bool))
    got, slope = value("orpo", c), gradient("orpo", c)
    assert torch.isfinite(got).all() and torch.isfinite(slope).all()
    assert slope[0, 0] < 0 and slope[0, 1] > 0
    if log_probs[0] == log_probs[1]:
        assert got.item() == pytest.approx(0.1 * math.log(2) - log_probs[0] / 2, rel=1e-4)


def test_orpo_is_accurate_near_certainty_in_single_precision():
    c = Candidates(
        torch.tensor([[-2e-5, -6e-5]]), torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    )
    assert value("orpo", c, odds_weight=1.0).item() == pytest.approx(
        expected("orpo", [-2e-5, -6e-5], [1, 1], [0, 0], odds_weight=1.0), rel=1e-5
    )


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("log_probs", [(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4)])
def test_very_unlikely_answers_cost_no_infinity(name, params, log_probs):
    c = pair(*log_probs, lengths=(2, 3), reference=(-5.0, -5.0))
    c = replace(c, log_prob_GK=c.log_prob_GK.detach().float(), reference_GK=c.reference_GK.float())
    got = value(name, c, **params)
    assert torch.isfinite(got).all() and torch.isfinite(gradient(name, c, **params)).all()
    want = expected_far(name, log_probs, params)
    if want is not None:
        assert got.item() == pytest.approx(want, rel=1e-5)


def expected_far(name: str, log_probs: tuple[float, float], params: dict[str, float]) -> float | None:
    """Far out the logistic losses are straight lines: beta times the margin where the worst is far ahead."""
    if name in {"dpo", "spin"} and not params.get("label_smoothing") and log_probs == (-1e4, -1.0):
        return params.get("beta", 0.1) * 9999
    if name == "simpo" and log_probs == (-1e4, -1.0):
        return params.get("beta", 2.0) * (5000 - 1 / 3) + params.get("gamma", 1.0)
    return None


@pytest.mark.parametrize(("name", "params"), CASES)
def test_doubling_length_and_log_probability_leaves_per_token_losses_alone(name, params):
    c = make(1)
    double = replace(c, log_prob_GK=2 * c.log_prob_GK, reference_GK=2 * c.reference_GK, length_GK=2 * c.length_GK)
    before, after = value(name, c, **params), value(name, double, **params)
    if name in PER_TOKEN | {"orpo"} or (name == "rrhf" and params):
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-14)
    else:
        assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_shift_of_student_and_reference_leaves_ratio_losses_alone(name, params):
    c = make(8)
    shift = torch.randn(c.log_prob_GK.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    moved = replace(c, log_prob_GK=c.log_prob_GK + shift, reference_GK=c.reference_GK + shift)
    before, after = value(name, c, **params), value(name, moved, **params)
    if name in WITH_REFERENCE:
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    else:
        assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("rubbish", [7.0, -1e30, float("inf"), float("nan")])
def test_absent_answers_change_nothing(name, params, rubbish):
    c, absent = make(10), ~make().present_GK
    spoilt = replace(
        c,
        log_prob_GK=c.log_prob_GK.masked_fill(absent, rubbish),
        reference_GK=c.reference_GK.masked_fill(absent, -rubbish),
        length_GK=c.length_GK.masked_fill(absent, 0),
    )
    assert torch.equal(value(name, spoilt, **params), value(name, c, **params))
    slope = gradient(name, spoilt, **params)
    assert (
        torch.equal(slope, gradient(name, c, **params))
        and slope[absent].abs().max() == 0
        and slope[~absent].abs().max() > 0
    )


def test_what_candidates_derive_is_zero_where_absent():
    c = make(10)
    c = replace(
        c,
        log_prob_GK=c.log_prob_GK.masked_fill(~c.present_GK, math.nan),
        length_GK=c.length_GK.masked_fill(~c.present_GK, 0),
    )
    for derived in (c.mean_log_prob_GK, c.log_ratio_GK, c.per_token(c.log_ratio_GK)):
        assert (derived[~c.present_GK] == 0).all() and (derived[c.present_GK] != 0).all()
    assert c.best(c.mean_log_prob_GK).tolist() == c.mean_log_prob_GK[:, 0].tolist()
    assert c.worst(c.mean_log_prob_GK).tolist() == [c.mean_log_prob_GK[g, n - 1].item() for g, n in enumerate(COUNTS)]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_gap_among_the_answers_is_closed(name, params):
    """Absent in front and in the middle: the first present is the best, the last present the worst."""
    c = make(11)
    present = torch.tensor([[False, True, False, True]]).expand(4, 4)
    packed = Candidates(
        c.log_prob_GK[:, 1::2], c.length_GK[:, 1::2], torch.ones(4, 2, dtype=torch.bool), c.reference_GK[:, 1::2]
    )
    torch.testing.assert_close(
        value(name, replace(c, present_GK=present), **params), value(name, packed, **params), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_lone_answer_has_no_preference_loss(name, params):
    c = make(12)
    lone = replace(c, present_GK=torch.arange(4).expand(4, 4) == 0)
    got, slope = value(name, lone, **params), gradient(name, lone, **params)
    best, length = c.log_prob_GK[:, 0], c.length_GK[:, 0]
    if name == "kto":  # unpaired by design: a lone answer is a desirable one
        assert (slope[:, 0] < 0).all()
        return
    sft = {
        "orpo": -best / length,
        "rrhf": -params.get("sft_weight", 1.0) * best,
        "pro": -params.get("sft_weight", 0.05) * best,
    }
    want = sft.get(name, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(got, want) or torch.allclose(got, want, rtol=1e-14, atol=0)
    if name not in sft:
        assert (got == 0).all() and (slope == 0).all()


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_group_without_answers_gives_nothing(name, params):
    c = make(13)
    none = replace(c, present_GK=torch.zeros(4, 4, dtype=torch.bool))
    assert (value(name, none, **params) == 0).all() and (gradient(name, none, **params) == 0).all()


@pytest.mark.parametrize("name", sorted(WITH_REFERENCE))
def test_no_gradient_reaches_the_reference(name):
    c = make(14)
    reference, log_prob = c.reference_GK.clone().requires_grad_(), c.log_prob_GK.clone().requires_grad_()
    value(name, replace(c, log_prob_GK=log_prob, reference_GK=reference)).sum().backward()
    assert reference.grad is None and log_prob.grad.abs().max() > 0


def test_half_precision_is_computed_in_single():
    c = make(15)
    half = replace(c, log_prob_GK=c.log_prob_GK.bfloat16(), reference_GK=c.reference_GK.bfloat16())
    for name in RANKINGS:
        got = value(name, half)
        assert got.dtype == torch.float32
        same = replace(c, log_prob_GK=half.log_prob_GK.float(), reference_GK=half.reference_GK.float())
        assert torch.equal(got, value(name, same)), name


def test_kto_baseline_sums_before_it_clamps():
    c = make(16)
    c = replace(c, log_prob_GK=c.log_prob_GK.requires_grad_())
    total, count = kto_baseline(c)
    ratios = [(c.log_prob_GK - c.reference_GK)[g, k].item() for g, n in enumerate(COUNTS) for k in range(n)]
    assert total.item() == pytest.approx(sum(ratios)) and count.item() == 10 and not total.requires_grad
    for shift in (5.0, -5.0):
        t, n = kto_baseline(replace(c, reference_GK=c.log_prob_GK.detach() - shift))
        assert clamped_baseline(t.item(), n.item()) == pytest.approx(max(0.0, shift))
    # Two parts, one below zero: the mean of all, not the mean of the clamped.
    (t1, n1), (t2, n2) = (kto_baseline(replace(c, reference_GK=c.log_prob_GK.detach() - s)) for s in (3.0, -1.0))
    assert clamped_baseline((t1 + t2).item(), (n1 + n2).item()) == pytest.approx(1.0)
    assert clamped_baseline(0.0, 0) == 0


def test_parameters_are_checked():
    assert checked_ranking_params("simpo", {"gamma": 0}) == {"beta": 2.0, "gamma": 0.0}
    assert checked_ranking_params("kto", {}) == {
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "baseline": 0.0,
    }


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("dop", {}, "'dpo'"), ("dpo", {"beat": 0.1}, "'beta'"), ("dpo", {"beta": 0}, "outside"), ("dpo", {"beta": True}, "not a number"),
        ("dpo", {"label_smoothing": 0.5}, "outside"), ("robust_dpo", {"noise": 0.5}, "outside"), ("ipo", {"beta": -1}, "outside"),
        ("kto", {"baseline": -0.1}, "outside"), ("simpo", {"gamma": float("inf")}, "not a number"), ("rrhf", {"sft_weight": -1}, "outside"),
    ],
)  # fmt: skip
def test_errors_name_the_remedy_and_the_place(name, params, words):
    with pytest.raises(limbeck.UserError, match=words) as error:
        checked_ranking_params(name, params, "loss[0].here")
    assert error.value.path == ".".join(["loss[0].here", *params])


@pytest.mark.parametrize("name", sorted(RANKINGS))
def test_a_missing_reference_is_named(name):
    without = replace(make(), reference_GK=None)
    if name in WITH_REFERENCE:
        with pytest.raises(limbeck.UserError, match="reference_GK"):
            value(name, without)
    else:
        assert torch.equal(value(name, without), value(name, make()))


def test_candidates_that_do_not_fit_are_refused():
    c = make()
    for field in REQUIRED:
        with pytest.raises(limbeck.UserError, match="groups, answers"):
            replace(c, **{field: getattr(c, field)[:, :3]})
    with pytest.raises(limbeck.UserError, match="boolean"):
        replace(c, present_GK=c.present_GK.int())
    with pytest.raises(limbeck.UserError, match="without tokens"):
        replace(c, length_GK=c.length_GK * 0)
