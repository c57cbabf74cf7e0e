"""Policy losses, advantages and MiniLLM's returns against plain-Python definitions; expectations are summed over the vocabulary."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

import limbeck
from limbeck.objectives import policy, returns, rewards
from limbeck.objectives.loss import Responses
from limbeck.objectives.policy import POLICIES, checked_params, policy_loss
from limbeck.objectives.returns import RETURN_FORMS, importance_weights, minillm_returns, teacher_mixed, whiten
from limbeck.objectives.rewards import grpo, kl_estimate, kl_penalty, length_weights, rloo
from limbeck.types import RecipeError, UserError


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), at, retain_graph=True)[0]


def columns(n: int, seed: int) -> dict[str, torch.Tensor]:
    names = ("advantage", "old_log_prob", "teacher_log_prob", "reference_log_prob", "importance_weight")
    values = {name: randn(n, seed=seed + i) for i, name in enumerate(names)}
    positive = {
        "importance_weight": values["importance_weight"].exp(),
        "position_weight": 1 + randn(n, seed=seed + 9).abs(),
    }
    return values | {name: -values[name].abs() for name in names[1:4]} | positive


# -- the losses, token by token ----------------------------------------------------------------------------------------


def reference(name: str, x: float, c: dict[str, float], params: dict[str, float]) -> tuple[float, float]:
    """Value and derivative with respect to log q, in plain Python."""
    a, ratio = c["advantage"], math.exp(x - c["old_log_prob"])
    if name == "reinforce":
        return -a * x, -a
    if name == "minillm_long":
        return -c["importance_weight"] * a * x, -c["importance_weight"] * a
    if name == "ppo_clip":
        low, high = 1 - params.get("clip_low", 0.2), 1 + params.get("clip_high", 0.2)
        clipped = min(max(ratio, low), high)
        alive = ratio * a <= clipped * a
        return -min(ratio * a, clipped * a), -a * ratio if alive else 0.0
    if name in ("on_policy_distillation", "iw_on_policy_distillation"):
        a = -params.get("coefficient", 1.0) * (x - c["teacher_log_prob"])
        a *= c["position_weight"] if name.startswith("iw") else 1.0
        return -a * ratio, -a * ratio
    d = x - c["reference_log_prob"]
    if name == "kl_penalty_k2":
        return d * d / 2, d
    return math.exp(-d) - 1 + d, 1 - math.exp(-d)


CASES = [(name, {}) for name in POLICIES] + [
    ("ppo_clip", {"clip_low": 0.5, "clip_high": 0.05}),
    ("on_policy_distillation", {"coefficient": 0.3}),
]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_value_and_gradient_equal_the_definition(name, params):
    n, given = 40, columns(40, seed=10)
    log_prob = (-randn(n, seed=5).abs()).requires_grad_()
    values = policy_loss(name, log_prob, given, **params)
    assert values.shape == (n,) and values.dtype == torch.float64
    got = gradient(values, log_prob)
    for i in range(n):
        want = reference(name, log_prob[i].item(), {k: v[i].item() for k, v in given.items()}, params)
        assert (values[i].item(), got[i].item()) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_every_registered_loss_says_what_it_is():
    for name, known in POLICIES.items():
        assert known.name == name and known.formula and known.paper and known.fn.__doc__
        assert set(known.defaults) == set(known.ranges)
        assert checked_params(name, {}) == known.defaults
        given = {column: columns(4, 1)[column] for column in known.needed}
        assert torch.isfinite(policy_loss(name, -torch.ones(4), given)).all(), "a loss reads no more than it says"


@pytest.mark.parametrize("name", POLICIES)
def test_half_precision_is_computed_in_fp32_and_no_gradient_reaches_a_column(name):
    given = {k: v.bfloat16().requires_grad_() for k, v in columns(6, seed=3).items()}
    log_prob = torch.full((6,), -1.25, dtype=torch.bfloat16, requires_grad=True)
    values = policy_loss(name, log_prob, given)
    assert values.dtype == torch.float32
    wide = policy_loss(name, log_prob.detach().double(), {k: v.detach().double() for k, v in given.items()})
    torch.testing.assert_close(values.double(), wide, rtol=1e-5, atol=1e-6)
    values.sum().backward()
    assert log_prob.grad is not None and all(column.grad is None for column in given.values())


def test_ratio_one_makes_ppo_and_on_policy_distillation_reinforce():
    given, log_prob = columns(30, seed=20), (-randn(30, seed=6).abs()).requires_grad_()
    on_policy = given | {"old_log_prob": log_prob.detach()}
    want = gradient(policy_loss("reinforce", log_prob, given), log_prob)
    torch.testing.assert_close(gradient(policy_loss("ppo_clip", log_prob, on_policy), log_prob), want)
    own = {"advantage": given["teacher_log_prob"] - log_prob.detach()}
    want = gradient(policy_loss("reinforce", log_prob, own), log_prob)
    for read in ({"teacher_log_prob": given["teacher_log_prob"]}, on_policy):
        torch.testing.assert_close(gradient(policy_loss("on_policy_distillation", log_prob, read), log_prob), want)
    weighted = policy_loss("minillm_long", log_prob, given | {"importance_weight": torch.ones(30)})
    torch.testing.assert_close(weighted, policy_loss("reinforce", log_prob, given))


@pytest.mark.parametrize(
    ("advantage", "ratio", "alive"),
    [(1, 1.5, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.5, True), (1, 1.1, True), (-1, 0.9, True)],
)
def test_clipping_stops_the_gradient_on_the_right_side_only(advantage, ratio, alive):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    given = {"advantage": torch.tensor([float(advantage)]), "old_log_prob": torch.zeros(1)}
    got = gradient(policy_loss("ppo_clip", log_prob, given), log_prob).item()
    assert got == pytest.approx(-advantage * ratio if alive else 0.0)


def test_ppo_against_the_mixture_is_the_clipped_loss_of_the_minillm_code():
    now, old, sampler, advantage = (-randn(50, seed=30 + i).abs() if i < 3 else randn(50, seed=33) for i in range(4))
    ratio = (now - old).exp() * (old - sampler).exp()
    want = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(policy_loss("ppo_clip", now, {"advantage": advantage, "old_log_prob": sampler}), want)


@pytest.mark.parametrize("name", ["ppo_clip", "on_policy_distillation", "kl_penalty_k3"])
@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_far_log_ratios_stay_finite_in_fp32(name, gap):
    log_prob = torch.tensor([-600.0], requires_grad=True)
    other = log_prob.detach() - gap
    for advantage in (-1.0, 1.0):
        given = {
            "advantage": torch.tensor([advantage]),
            "old_log_prob": other,
            "teacher_log_prob": other,
            "reference_log_prob": other,
        }
        values = policy_loss(name, log_prob, given)
        assert torch.isfinite(values).all() and torch.isfinite(gradient(values, log_prob)).all()


# -- expectations, summed over the vocabulary --------------------------------------------------------------------------


@pytest.fixture
def pair():
    """Teacher p, and a student whose log-probability of every token depends on logits: sums over y are exact."""
    p, logits = torch.log_softmax(2 * randn(7, seed=41), -1), (2 * randn(7, seed=42)).requires_grad_()
    return p, logits, torch.log_softmax(logits, -1)


def closed_form(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Gradient of KL(q || p) in the logits: q (log(q / p) - KL)."""
    ratio, q = (log_q - p).detach(), log_q.detach().exp()
    return q * (ratio - (q * ratio).sum())


def expected_gradient(values: torch.Tensor, sampler: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return gradient(sampler.detach().exp() * values, logits)


def test_k1_k2_k3_give_zero_reverse_and_forward_gradients(pair):
    p, logits, log_q = pair
    q = log_q.detach().exp()
    k1 = rewards._k1_k2_k3(log_q, p, "k1")
    assert expected_gradient(k1, log_q, logits).abs().max() < 1e-14
    assert closed_form(p, log_q).abs().max() > 0.01, "there was something to learn"
    for values in (kl_penalty(log_q, p, "k2"), policy_loss("kl_penalty_k2", log_q, {"reference_log_prob": p})):
        torch.testing.assert_close(
            expected_gradient(values, log_q, logits), closed_form(p, log_q), rtol=1e-10, atol=1e-13
        )
    for values in (kl_penalty(log_q, p, "k3"), policy_loss("kl_penalty_k3", log_q, {"reference_log_prob": p})):
        torch.testing.assert_close(expected_gradient(values, log_q, logits), q - p.exp(), rtol=1e-10, atol=1e-13)


def test_the_estimators_values(pair):
    p, _, log_q = pair
    q = log_q.detach().exp()
    kl = (q * (log_q - p)).sum()
    k1, k2, k3 = (kl_estimate(log_q, p, name) for name in ("k1", "k2", "k3"))
    for unbiased in (k1, k3):
        torch.testing.assert_close((q * unbiased).sum(), kl.detach())
    assert abs((q * k2).sum() - kl) > 0.01 * kl, "k2 is biased"
    assert (k1 < 0).any() and (k2 >= 0).all() and (k3 >= 0).all()
    assert not any(values.requires_grad for values in (k1, k2, k3))


@pytest.mark.parametrize("coefficient", [1.0, 0.25])
def test_on_policy_distillation_expects_the_reverse_kl_gradient_under_any_old_student(pair, coefficient):
    p, logits, log_q = pair
    want = coefficient * closed_form(p, log_q)
    values = policy_loss("on_policy_distillation", log_q, {"teacher_log_prob": p}, coefficient=coefficient)
    torch.testing.assert_close(expected_gradient(values, log_q, logits), want, rtol=1e-10, atol=1e-13)
    (autograd,) = torch.autograd.grad(limbeck.divergence("reverse_kl", p[None], logits[None]).sum(), logits)
    torch.testing.assert_close(coefficient * autograd, want, rtol=1e-8, atol=1e-10)
    old = torch.log_softmax(randn(7, seed=43), -1)
    values = policy_loss(
        "on_policy_distillation", log_q, {"teacher_log_prob": p, "old_log_prob": old}, coefficient=coefficient
    )
    torch.testing.assert_close(expected_gradient(values, old, logits), want, rtol=1e-10, atol=1e-13)
    assert (expected_gradient(values, log_q, logits) - want).abs().max() > 1e-3, "the sampler matters"


# -- advantages --------------------------------------------------------------------------------------------------------


def test_rloo_equals_the_definition_and_sums_to_zero():
    reward = randn(5, 4, seed=50)
    got = rloo(reward)
    for row, advantages in zip(reward.tolist(), got.tolist(), strict=True):
        want = [r - statistics.fmean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)]
        assert advantages == pytest.approx(want, rel=1e-12)
    assert got.sum(1).abs().max() < 1e-14


def test_grpo_equals_the_definition():
    reward = randn(5, 6, seed=51)
    scaled, _ = grpo(reward, eps=1e-3)
    plain, equal = grpo(reward, scale_std=False)
    assert equal == 0
    for g, row in enumerate(reward.tolist()):
        mean = statistics.fmean(row)
        assert plain[g].tolist() == pytest.approx([r - mean for r in row], rel=1e-9, abs=1e-12)
        assert scaled[g].tolist() == pytest.approx(
            [(r - mean) / (statistics.stdev(row) + 1e-3) for r in row], rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("scale_std", [True, False])
def test_groups_of_equal_rewards_are_exactly_zero_and_counted(scale_std):
    reward = torch.tensor([[0.1] * 7, [0.1 * i for i in range(7)], [0.7] * 7])
    assert (reward - reward.sum(1, keepdim=True) / 7)[[0, 2]].any(), (
        "their mean is rounded: subtracting it leaves dust to divide"
    )
    advantage, equal = grpo(reward, scale_std=scale_std)
    assert equal == 2 and (advantage[[0, 2]] == 0).all() and (advantage[1] != 0).any()


def test_whole_number_rewards_are_taken():
    assert rloo(torch.tensor([[1, 0]])).tolist() == [[1.0, -1.0]]
    assert grpo(torch.tensor([[True, True]]))[1] == 1


def test_absent_samples_change_nothing_and_get_nothing():
    reward, present = randn(3, 5, seed=52), torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    reward[~present] = math.nan
    small = reward[:1, [0, 1, 3]]
    for advantage, want in ((rloo(reward, present), rloo(small)), (grpo(reward, present)[0], grpo(small)[0])):
        torch.testing.assert_close(advantage[:1, [0, 1, 3]], want)
        assert (advantage[~present] == 0).all() and (advantage[1:] == 0).all()
    assert grpo(reward, present)[1] == 1, "one sample alone tells nothing and is counted; an empty group is not"


@pytest.mark.parametrize("make", [rloo, grpo])
def test_rewards_that_cannot_be_compared_are_refused(make):
    with pytest.raises(UserError, match="at least 2"):
        make(torch.zeros(3, 1))
    with pytest.raises(UserError, match="absent"):
        make(torch.tensor([[0.0, math.nan]]))


def test_length_weights_reproduce_the_three_sums():
    length, per_token = torch.tensor([[2, 5], [0, 3]]), randn(2, 2, 5, seed=53)
    inside = torch.arange(5) < length[..., None]
    n = int(length.sum())

    def loop(mode: str, constant: float | None = None) -> float:
        weight = length_weights(length, mode, constant=constant)
        return ((weight[..., None] * per_token)[inside].sum() / n).item()

    sums = [per_token[g, k, : length[g, k]].tolist() for g, k in ((0, 0), (0, 1), (1, 1))]
    assert loop("token") == pytest.approx(sum(map(sum, sums)) / 10, rel=1e-6)
    assert loop("sequence") == pytest.approx(sum(sum(s) / len(s) for s in sums) / 3, rel=1e-6)
    assert loop("constant", 8) == pytest.approx(sum(sum(s) / 8 for s in sums) / 3, rel=1e-6)
    for mode in ("token", "sequence"):
        assert (length_weights(length, mode) * length).sum().item() == pytest.approx(n, rel=1e-6)
        assert length_weights(length, mode)[1, 0] == 0


# -- MiniLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 0.0, 1.0])
def test_teacher_mixed_is_the_mixture(alpha):
    teacher, student = (3 * randn(2, 4, 6, seed=60 + i) for i in range(2))
    got = teacher_mixed(teacher, student.requires_grad_(), alpha)
    want = alpha * teacher.softmax(-1) + (1 - alpha) * student.softmax(-1)
    torch.testing.assert_close(got.exp(), want.detach())
    assert not got.requires_grad


def test_teacher_mixed_survives_underflow():
    far = torch.tensor([0.0, -300.0])
    assert torch.isfinite(teacher_mixed(far, far)).all()


def pad(
    values: torch.Tensor, lengths: list[int], side: str, junk: float = math.nan
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths) + 2
    out, mask = (
        torch.full((len(lengths), width), junk, dtype=values.dtype),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        if side == "inside":
            place = [*range(n - 1), n + 1]
        out[row, place], mask[row, place] = values[row, :n], 1
    return out, mask


LENGTHS = [4, 1, 6]
FORMS = [
    RETURN_FORMS["paper"], RETURN_FORMS["code"], replace(RETURN_FORMS["paper"], length_norm=False, gamma=0.7),
    replace(RETURN_FORMS["code"], whiten=False, length_norm=False, clip=1.0),
]  # fmt: skip


def direct_returns(
    rows: list[list[float]], how: returns.ReturnForm, weights: list[list[float]] | None = None
) -> list[list[float]]:
    """The double sum with absolute exponents, in plain Python."""
    every = []
    for row_number, row in enumerate(rows):
        rewards = [max(-how.clip, min(how.clip, r / how.reward_scale)) for r in row]
        values = []
        for t in range(len(row)):
            total, product = 0.0, 1.0
            for later in range(t, len(row)):
                product *= weights[row_number][later] if weights and later > t else 1.0
                if later > t or how.own_token:
                    total += how.gamma ** (later - t) * product * rewards[later]
            terms = len(row) - t - (0 if how.own_token else 1)
            values.append(total / max(terms, 1) if how.length_norm else total)
        every.append(values)
    flat = [v for values in every for v in values]
    if not how.whiten:
        return every
    mean, variance = statistics.fmean(flat), statistics.pvariance(flat)
    return [[(v - mean) / math.sqrt(variance + 1e-8) for v in values] for values in every]


@pytest.mark.parametrize("side", ["right", "left", "inside"])
@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_returns_equal_the_double_sum_whatever_the_padding(how, side, weighted):
    values, weight = 2 * randn(3, 6, seed=70), randn(3, 6, seed=71).exp()
    padded, mask = pad(values, LENGTHS, side)
    got = minillm_returns(padded, mask, how, token_weight_BT=pad(weight, LENGTHS, side)[0] if weighted else None)
    rows, weights = ([x[i, :n].tolist() for i, n in enumerate(LENGTHS)] for x in (values, weight))
    want = direct_returns(rows, how, weights if weighted else None)
    for row in range(3):
        assert got[row][mask[row].bool()].tolist() == pytest.approx(want[row], rel=1e-9, abs=1e-10)
    assert (got[mask == 0] == 0).all() and not got.requires_grad


def test_the_forms_have_the_papers_and_the_codes_parts():
    log_ratio, mask = torch.tensor([[1.0, -3.0, 200.0]], dtype=torch.float64), torch.ones(1, 3)
    assert minillm_returns(log_ratio, mask).tolist() == [[98.5, 200.0, 0.0]]
    raw = minillm_returns(log_ratio, mask, replace(RETURN_FORMS["code"], whiten=False))
    want = [(2 - 6 * 0.95 + 100 * 0.95**2) / 3, (-6 + 95) / 2, 100.0]
    assert raw[0].tolist() == pytest.approx(want)
    torch.testing.assert_close(minillm_returns(log_ratio, mask, "code"), whiten(raw, mask))


def test_a_long_response_does_not_underflow_the_discount():
    log_ratio, mask = torch.ones(1, 4000), torch.ones(1, 4000)
    got = minillm_returns(log_ratio, mask, returns.ReturnForm(own_token=True, gamma=0.9, length_norm=False))
    torch.testing.assert_close(got[0, :3000], torch.full((3000,), 10.0))


def test_gamma_zero_leaves_the_own_token_or_nothing():
    log_ratio, mask = randn(2, 5, seed=72), torch.ones(2, 5)
    own = returns.ReturnForm(own_token=True, gamma=0.0, length_norm=False)
    torch.testing.assert_close(minillm_returns(log_ratio, mask, own), log_ratio)
    assert (minillm_returns(log_ratio, mask, replace(own, own_token=False)) == 0).all()


def test_whitening_ignores_padding():
    values = 3 + randn(3, 6, seed=73)
    for side in ("right", "left"):
        for junk in (0.0, 1e6, math.nan):
            padded, mask = pad(values, LENGTHS, side, junk)
            white = whiten(padded, mask)
            inside = white[mask.bool()].tolist()
            assert statistics.fmean(inside) == pytest.approx(0, abs=1e-12)
            assert statistics.pvariance(inside) == pytest.approx(1, rel=1e-6)
            assert (white[mask == 0] == 0).all()


@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_importance_weights_equal_the_products(side):
    log_prob, sampler = -randn(3, 6, seed=74).abs(), -randn(3, 6, seed=75).abs()
    padded, mask = pad(log_prob, LENGTHS, side)
    padded_sampler, _ = pad(sampler, LENGTHS, side)
    for mode in ("token", "prefix"):
        got = importance_weights(padded.requires_grad_(), padded_sampler, mask, mode)
        assert (got[mask == 0] == 0).all() and not got.requires_grad
        for row, n in enumerate(LENGTHS):
            ratios = [math.exp(log_prob[row, t] - sampler[row, t]) for t in range(n)]
            want = ratios if mode == "token" else [math.prod(ratios[: t + 1]) for t in range(n)]
            assert got[row][mask[row].bool()].tolist() == pytest.approx(want, rel=1e-9)


def test_prefix_weights_do_not_overflow():
    weights = importance_weights(torch.zeros(1, 50), torch.full((1, 50), -10.0), torch.ones(1, 50), "prefix")
    assert torch.isfinite(weights).all() and weights.max().item() == pytest.approx(math.exp(20), rel=1e-4)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda: kl_penalty(torch.zeros(2), torch.zeros(2), "k1"),
        lambda: policy_loss("kl_penalty_k1", torch.zeros(2), {"reference_log_prob": torch.zeros(2)}),
        lambda: checked_params("kl_penalty_k1", {}, "loss[0]"),
    ],
)
def test_k1_as_a_loss_is_refused_with_the_remedy(ask):
    assert "kl_penalty_k1" not in POLICIES
    with pytest.raises(UserError, match=r"trains nothing on average.*k2.*on_policy_distillation"):
        ask()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: policy_loss("reinforc", torch.zeros(2), {}), "did you mean 'reinforce'"),
        (lambda: policy_loss("ppo_clip", torch.zeros(2), {}, clip_lo=0.1), "clip_low"),
        (lambda: policy_loss("ppo_clip", torch.zeros(2), {}, clip_low=0.0), "outside"),
        (
            lambda: policy_loss("reinforce", torch.zeros(2), {"importance_weight": torch.zeros(2)}),
            "'advantage'.*importance_weight",
        ),
        (lambda: policy_loss("reinforce", torch.zeros(2), {"advantage": torch.zeros(2, 1)}), "tokens"),
        (lambda: kl_penalty(torch.zeros(2), torch.zeros(2), "k4"), "k1, k2, k3"),
        (lambda: length_weights(torch.ones(2, 2), "sequences"), "sequence"),
        (lambda: length_weights(torch.ones(2, 2), "constant"), "above 0"),
        (lambda: length_weights(torch.zeros(2, 2), "token"), "nothing to weigh"),
        (lambda: teacher_mixed(torch.zeros(2, 3), torch.zeros(2, 4)), "shape"),
        (lambda: teacher_mixed(torch.zeros(2, 3), torch.zeros(2, 3), 1.5), "outside"),
        (lambda: importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "suffix"), "token, prefix"),
        (lambda: minillm_returns(torch.zeros(1, 1), torch.ones(1, 1), "papr"), "paper"),
    ],
)
def test_errors_name_the_remedy(ask, words):
    with pytest.raises(UserError, match=words):
        ask()


def test_a_recipe_error_names_its_path():
    with pytest.raises(RecipeError, match=r"loss\[1\].ppo_clip.clip_low") as caught:
        checked_params("ppo_clip", {"clip_low": 2.0}, "loss[1].ppo_clip")
    assert caught.value.path == "loss[1].ppo_clip.clip_low"


def test_no_mean_in_a_term():
    from pathlib import Path

    assert ".mean(" not in Path(policy.__file__).read_text()


# -- what is made of whole responses -----------------------------------------------------------------------------------


def responses(b=3, t=5):
    lengths = [t, 3, 1][:b]
    mask = torch.tensor([[float(at < n) for at in range(t)] for n in lengths], dtype=torch.float64)
    log_q, log_p = (-randn(b, t, seed=s).abs() * mask for s in (31, 32))
    return Responses(log_q, (log_q + 0.3 * randn(b, t, seed=33)) * mask, log_p, mask)


def test_minillms_columns_are_its_returns_and_weights():
    text, known = responses(), POLICIES["minillm_long"]
    columns = known.columns(text, known.defaults)
    ratio = text.teacher_log_prob_BT - text.log_prob_BT
    torch.testing.assert_close(columns["advantage"], minillm_returns(ratio, text.mask_BT, "paper"))
    torch.testing.assert_close(
        columns["importance_weight"], importance_weights(text.log_prob_BT, text.sampler_log_prob_BT, text.mask_BT)
    )
    code = known.defaults | {"own_token": 1.0, "gamma": 0.95, "reward_scale": 0.5, "clip": 100.0, "whiten": 1.0}
    torch.testing.assert_close(known.columns(text, code)["advantage"], minillm_returns(ratio, text.mask_BT, "code"))


def test_position_weights_fall_from_1_plus_boost_to_1_with_the_gap_behind():
    text, known = responses(), POLICIES["iw_on_policy_distillation"]
    got = known.columns(text, known.defaults | {"boost": 0.5})["position_weight"]
    for row in range(3):
        length = int(text.mask_BT[row].sum())
        gaps = [abs(float(text.log_prob_BT[row, t] - text.teacher_log_prob_BT[row, t])) for t in range(length)]
        want = [1 + 0.5 * (1 - sum(gaps[:t]) / sum(gaps)) for t in range(length)] + [0.0] * (5 - length)
        assert got[row].tolist() == pytest.approx(want)
    assert (known.columns(text, known.defaults | {"boost": 0.0})["position_weight"] == text.mask_BT).all()
