"""Divergences against definitions in plain Python: values, gradients, limits and inequalities (whitebox sheet, section 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import limbeck
from limbeck.objectives.distribution import least_of_mass
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.on_logits import divergence

# -- the definitions, on lists of numbers: floats for the value, scalars of torch for the gradient by autograd ----------

Numbers = Sequence[Any]


def log(x: Any) -> Any:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def fixed(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def mix(share: float, p: Numbers, q: Numbers) -> Numbers:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def normal(x: Numbers) -> Numbers:
    return [value / sum(x) for value in x]


def kl(p: Numbers, q: Numbers) -> Any:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


def jsd(p: Numbers, q: Numbers, teacher_share: float = 0.5) -> Any:
    m = mix(teacher_share, p, q)
    return teacher_share * kl(p, m) + (1 - teacher_share) * kl(q, m)


def jsd_rescaled(p: Numbers, q: Numbers, teacher_share: float = 0.5) -> Any:
    if teacher_share in (0, 1):
        return kl(p, q) if teacher_share == 0 else kl(q, p)
    return jsd(p, q, teacher_share) / (teacher_share * (1 - teacher_share))


def head_of(p: Numbers, mass: float) -> list[int]:
    """The likeliest tokens until they hold the mass, and what ties with the last of them."""
    order, held = sorted(range(len(p)), key=lambda v: -p[v]), 0.0
    for last in order:
        held += p[last]
        if held >= mass:
            break
    return [v for v in range(len(p)) if p[v] >= p[last]]


def adaptive_kl(p: Numbers, q: Numbers, mu: float = 0.5) -> Any:
    gap = [abs(fixed(a) - fixed(b)) for a, b in zip(p, q, strict=True)]
    share = sum(gap[v] for v in head_of([float(a) for a in p], mu)) / sum(gap)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def taid(p: Numbers, q: Numbers, t: float = 0.4) -> Any:
    return kl(normal([a**t * fixed(b) ** (1 - t) for a, b in zip(p, q, strict=True)]), q)


def dkd(p: Numbers, q: Numbers, alpha: float = 1.0, beta: float = 0.5, target: int | None = None) -> Any:
    y = max(range(len(p)), key=lambda v: p[v]) if target is None else target
    rest = [[*x[:y], *x[y + 1 :]] for x in (p, q)]
    return alpha * kl(*([x[y], sum(r)] for x, r in zip((p, q), rest, strict=True))) + beta * kl(*map(normal, rest))


def todi(p: Numbers, q: Numbers) -> Any:
    weights = [fixed(a / (a + b)) for a, b in zip(p, q, strict=True)]
    return sum(w * a * log(a / b) + (1 - w) * b * log(b / a) for w, a, b in zip(weights, p, q, strict=True))


def entropy_aware_kl(p: Numbers, q: Numbers, threshold: float = 0.8, forward_weight: float = 1.0) -> Any:
    entropy = -sum(a * log(a) for a in p)
    return kl(q, p) + (forward_weight * kl(p, q) if float(entropy) > threshold else 0.0)


def alpha_beta(p: Numbers, q: Numbers, alpha: float = 0.2, beta: float = 0.7) -> Any:
    a, b, both, ratios = alpha, beta, alpha + beta, [log(y / x) for x, y in zip(p, q, strict=True)]
    if both == 0:
        return 0.5 * sum(r**2 for r in ratios)
    if a == 0:
        return sum(b * y**b * r - y**b + x**b for x, y, r in zip(p, q, ratios, strict=True)) / b**2
    if b == 0:
        return sum(-a * x**a * r + y**a - x**a for x, y, r in zip(p, q, ratios, strict=True)) / a**2
    return -sum(x**a * y**b - a / both * x**both - b / both * y**both for x, y in zip(p, q, strict=True)) / (a * b)


def logit_mse(p: Numbers, q: Numbers) -> Any:
    difference = [log(y) - log(x) for x, y in zip(p, q, strict=True)]
    mean = sum(difference) / len(difference)
    return 0.5 * sum((d - mean) ** 2 for d in difference) / len(difference)


def uld(p: Numbers, q: Numbers) -> Any:
    return sum(abs(a - b) for a, b in zip(sorted(p, reverse=True), sorted(q, reverse=True), strict=True))


DEFINITIONS: dict[str, Callable[..., Any]] = {
    "uld": uld,
    "forward_kl": kl, "reverse_kl": lambda p, q: kl(q, p), "jsd": jsd, "jsd_rescaled": jsd_rescaled, "adaptive_kl": adaptive_kl,
    "symmetric_kl": lambda p, q, forward_share=0.5: forward_share * kl(p, q) + (1 - forward_share) * kl(q, p),
    "tvd": lambda p, q: 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
    "hellinger": lambda p, q: 0.5 * sum((a**0.5 - b**0.5) ** 2 for a, b in zip(p, q, strict=True)),
    "skew_kl": lambda p, q, alpha=0.1: kl(p, mix(alpha, p, q)), "skew_reverse_kl": lambda p, q, alpha=0.1: kl(q, mix(1 - alpha, p, q)),
    "skew_reverse_kl_fixed": lambda p, q, alpha=0.1: kl(q, [fixed(m) for m in mix(1 - alpha, p, q)]),
    "taid": taid, "dkd": dkd, "todi": todi, "alpha_beta": alpha_beta, "logit_mse": logit_mse,
    "entropy_aware_kl": entropy_aware_kl,
}  # fmt: skip
AT_ONE: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in DIVERGENCES), ("symmetric_kl", {"forward_share": 0.8}), ("jsd", {"teacher_share": 0.1}),
    ("jsd", {"teacher_share": 0.9}), ("jsd_rescaled", {"teacher_share": 0}), ("jsd_rescaled", {"teacher_share": 1}),
    ("jsd_rescaled", {"teacher_share": 0.9}), ("skew_kl", {"alpha": 0}), ("skew_kl", {"alpha": 0.7}), ("skew_reverse_kl", {"alpha": 0}),
    ("skew_reverse_kl", {"alpha": 0.7}), ("skew_reverse_kl_fixed", {"alpha": 0}), ("skew_reverse_kl_fixed", {"alpha": 0.7}),
    ("taid", {"t": 0.9}), ("adaptive_kl", {"mu": 0.2}), ("adaptive_kl", {"mu": 0.9}), ("dkd", {"alpha": 0.5, "beta": 8}),
    ("alpha_beta", {"alpha": 0, "beta": 0.6}), ("alpha_beta", {"alpha": 0.6, "beta": 0}), ("alpha_beta", {"alpha": 0, "beta": 0}),
    ("alpha_beta", {"alpha": 2, "beta": 1.5}), ("alpha_beta", {"alpha": 1, "beta": 0}), ("alpha_beta", {"alpha": 0, "beta": 1}),
    ("entropy_aware_kl", {"threshold": 0.01}), ("entropy_aware_kl", {"threshold": 1000}), ("entropy_aware_kl", {"forward_weight": 0.3}),
]  # fmt: skip
CASES = AT_ONE + [
    (n, {**params, "temperature": t}) for n, params in AT_ONE for t in (2.5, 0.5) if DIVERGENCES[n].softens
]
STOPPED = {"taid", "adaptive_kl", "todi", "skew_reverse_kl_fixed"}  # part of their definition is held fixed


def definition(name: str, teacher: Numbers, student: Numbers, temperature: float = 1.0, **params: Any) -> Any:
    """The divergence of one position's logits, floats or scalars of torch."""
    if isinstance(student, Tensor):
        p, q = (list(torch.softmax(z / temperature, -1)) for z in (teacher, student))
    else:
        p, q = (normal([math.exp((z - max(logits)) / temperature) for z in logits]) for logits in (teacher, student))
    return temperature**2 * DEFINITIONS[name](p, q, **params)


def logits(n: int, v: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    teacher, student = (scale * torch.randn(n, v, generator=noise, dtype=torch.float64) for _ in range(2))
    return teacher, student


def value_and_gradient(name: str, teacher: Tensor, student: Tensor, **params: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    values = divergence(name, teacher, student, **params)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def close(got: Any, want: Any, rel: float = 1e-9, abs: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=rel, atol=abs)


def test_every_divergence_has_a_definition_here():
    assert DEFINITIONS.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.promise("R5")
def test_value_equals_the_definition(name, params):
    teacher, student = logits(4, 7, seed=1)
    got = divergence(name, teacher, student, **params)
    want = [definition(name, teacher[i].tolist(), student[i].tolist(), **params) for i in range(4)]
    assert got.tolist() == pytest.approx(want, rel=1e-10)
    single = divergence(name, teacher.float(), student.float(), **params)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(want, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_gradient_equals_autograd_of_the_definition(name, params):
    teacher, student = logits(3, 6, seed=2)
    _, got = value_and_gradient(name, teacher, student, **params)
    student.requires_grad_()
    (want,) = torch.autograd.grad(sum(definition(name, teacher[i], student[i], **params) for i in range(3)), student)
    close(got, want)
    close(value_and_gradient(name, teacher.float(), student.float(), **params)[1].double(), want, rel=1e-5, abs=3e-6)


@pytest.mark.parametrize(("name", "params"), [case for case in CASES if case[0] not in STOPPED])
def test_gradient_equals_finite_differences(name, params):
    teacher, student = logits(3, 6, seed=3)
    _, got = value_and_gradient(name, teacher, student, **params)
    for v in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[v] = 1e-4  # a central difference of fourth order: its error is about 1e-12
        f = [divergence(name, teacher, student + k * step, **params) for k in (-2, -1, 1, 2)]
        close((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / 12e-4, got[:, v], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_dkd_takes_the_given_target_and_else_the_teachers_best(beta):
    teacher, student = logits(4, 6, seed=4)
    targets = torch.tensor([0, 5, 2, 2])
    got = divergence("dkd", teacher, student, targets_N=targets, beta=beta)
    pairs = zip(teacher.tolist(), student.tolist(), targets.tolist(), strict=True)
    assert got.tolist() == pytest.approx([definition("dkd", t, s, beta=beta, target=y) for t, s, y in pairs], rel=1e-10)
    close(
        divergence("dkd", teacher, student, beta=beta),
        divergence("dkd", teacher, student, targets_N=teacher.argmax(-1), beta=beta),
    )
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence("dkd", teacher, student, targets_N=targets, beta=beta).sum(), student)
    defined = sum(definition("dkd", teacher[i], student[i], beta=beta, target=int(targets[i])) for i in range(4))
    close(gradient, torch.autograd.grad(defined, student)[0])


@pytest.mark.parametrize(("name", "params"), CASES)
def test_student_equal_to_teacher_gives_zero_loss_and_gradient(name, params):
    teacher, _ = logits(4, 9, seed=5)
    values, gradient = value_and_gradient(name, teacher, teacher, **params)
    assert values.abs().max() < 1e-12 and gradient.abs().max() < 1e-13


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), v=st.integers(2, 40), shift=st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_nothing(seed, v, shift):
    teacher, student = logits(3, v, seed)
    for name, params in CASES:
        before, after = (value_and_gradient(name, teacher + s, student - 2 * s, **params) for s in (0.0, shift))
        close(after[0], before[0], rel=1e-9, abs=1e-10)
        close(after[1], before[1], rel=1e-9, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), v=st.integers(2, 50), scale=st.floats(0.01, 8), share=st.floats(0.01, 0.99))
def test_inequalities(seed, v, scale, share):
    teacher, student = logits(3, v, seed, scale)

    def d(name: str, **params: float) -> Tensor:
        return divergence(name, teacher, student, **params)

    forward, reverse, variation, slack = d("forward_kl"), d("reverse_kl"), d("tvd"), 1e-12
    assert (variation <= 1 + slack).all() and (d("jsd") <= math.log(2) + slack).all()
    assert (variation**2 <= forward / 2 + slack).all(), "Pinsker"
    assert (d("hellinger") <= variation + slack).all() and (variation <= (2 * d("hellinger")).sqrt() + slack).all()
    for skewed, whole in (("skew_kl", forward), ("skew_reverse_kl", reverse)):
        assert (d(skewed, alpha=share) >= -slack).all() and (d(skewed, alpha=share) <= whole + slack).all()
    for name in DIVERGENCES.keys() - {"todi"}:
        assert (d(name) >= -slack).all(), name
    assert (d("jsd", teacher_share=share) <= -share * math.log(share) - (1 - share) * math.log(1 - share) + slack).all()


# -- limits -------------------------------------------------------------------------------------------------------------

SAME = [
    ("symmetric_kl", {"forward_share": 1}, "forward_kl", 1), ("symmetric_kl", {"forward_share": 0}, "reverse_kl", 1),
    ("jsd_rescaled", {"teacher_share": 0}, "forward_kl", 1), ("jsd_rescaled", {"teacher_share": 1}, "reverse_kl", 1),
    ("skew_kl", {"alpha": 0}, "forward_kl", 1), ("skew_kl", {"alpha": 1}, "forward_kl", 0),
    ("skew_reverse_kl", {"alpha": 0}, "reverse_kl", 1), ("skew_reverse_kl", {"alpha": 1}, "reverse_kl", 0),
    ("skew_reverse_kl_fixed", {"alpha": 0}, "reverse_kl", 1), ("skew_reverse_kl_fixed", {"alpha": 1}, "reverse_kl", 0),
    ("taid", {"t": 1}, "forward_kl", 1), ("taid", {"t": 0}, "forward_kl", 0), ("alpha_beta", {"alpha": 1, "beta": 0}, "forward_kl", 1),
    ("alpha_beta", {"alpha": 0, "beta": 1}, "reverse_kl", 1), ("alpha_beta", {"alpha": 0.5, "beta": 0.5}, "hellinger", 4),
]  # fmt: skip
NEAR = [
    ("jsd", {"teacher_share": 1e-8}, "forward_kl", 1e-8), ("jsd", {"teacher_share": 1 - 1e-8}, "reverse_kl", 1e-8),
    ("jsd_rescaled", {"teacher_share": 1e-7}, "forward_kl", 1), ("jsd_rescaled", {"teacher_share": 1 - 1e-7}, "reverse_kl", 1),
    ("skew_kl", {"alpha": 1e-8}, "forward_kl", 1), ("skew_reverse_kl", {"alpha": 1e-8}, "reverse_kl", 1),
    ("alpha_beta", {"alpha": 1, "beta": 1e-7}, "forward_kl", 1), ("alpha_beta", {"alpha": 1e-7, "beta": 1}, "reverse_kl", 1),
    ("adaptive_kl", {"mu": 1 - 1e-12}, "forward_kl", 1), ("forward_kl", {"temperature": 1000}, "logit_mse", 1),
    ("reverse_kl", {"temperature": 1000}, "logit_mse", 1), ("jsd", {"temperature": 1000}, "logit_mse", 0.25),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "other", "factor"), SAME)
def test_a_limit_is_the_other_divergence(name, params, other, factor):
    teacher, student = logits(4, 9, seed=6)
    for got, want in zip(
        value_and_gradient(name, teacher, student, **params), value_and_gradient(other, teacher, student), strict=True
    ):
        close(got, factor * want)


@pytest.mark.parametrize(("name", "params", "other", "factor"), NEAR)
def test_near_a_limit_it_is_near_the_other_divergence(name, params, other, factor):
    teacher, student = logits(4, 9, seed=7, scale=1.0)
    hot = "temperature" in params  # what is left then is of the order of one over the temperature
    for got, want in zip(
        value_and_gradient(name, teacher, student, **params), value_and_gradient(other, teacher, student), strict=True
    ):
        close(got / factor, want, rel=3e-3 if hot else 1e-5, abs=3e-4 if hot else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("alpha", "beta"), [(0, 0.7), (0.7, 0), (0, 0), (0, 2)])
def test_alpha_beta_is_continuous_where_an_exponent_vanishes(alpha, beta, dtype):
    teacher, student = (z.to(dtype) for z in logits(4, 30, seed=8))
    want = value_and_gradient("alpha_beta", teacher, student, alpha=alpha, beta=beta)
    rounding = (
        1e-7 if dtype == torch.float64 else 1e-4 if alpha or beta else 5e-3
    )  # with both small, half of fp32's digits go
    for small in (1e-3, 1e-4, 1e-5, 1e-6):
        got = value_and_gradient("alpha_beta", teacher, student, alpha=alpha or small, beta=beta or small)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() < (20 * small + rounding) * b.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_taid_near_the_student_steps_along_the_logit_difference(temperature):
    teacher, student = logits(3, 8, seed=9)
    t = 1e-7
    values, gradient = value_and_gradient("taid", teacher, student, t=t, temperature=temperature)
    q, d = torch.softmax(student / temperature, -1), student - teacher
    close(gradient / t, q * (d - (q * d).sum(-1, keepdim=True)), rel=1e-6, abs=1e-8)
    assert values.abs().max() < 1e-12, "the value is of second order in t"


CURVATURE = [
    ("forward_kl", {}, 1), ("reverse_kl", {}, 1), ("symmetric_kl", {"forward_share": 0.3}, 1), ("adaptive_kl", {}, 1), ("todi", {}, 2),
    ("jsd", {}, 0.25), ("jsd", {"teacher_share": 0.9}, 0.09), ("jsd_rescaled", {"teacher_share": 0.9}, 1), ("hellinger", {}, 0.25),
    ("skew_kl", {}, 0.81), ("skew_reverse_kl", {}, 0.81), ("skew_reverse_kl_fixed", {}, 0.81), ("skew_kl", {"alpha": 0.5}, 0.25),
    ("entropy_aware_kl", {"threshold": 0}, 2), ("taid", {"t": 0.4}, 0.16), ("alpha_beta", {"alpha": 0.3, "beta": 0.7}, 1), ("alpha_beta", {"alpha": 0, "beta": 1}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "factor"), CURVATURE)
def test_curvature_where_the_models_agree(name, params, factor):
    teacher, direction = logits(4, 9, seed=10, scale=1.0)
    p, eps = torch.softmax(teacher, -1), 1e-4
    fisher = (p * direction**2).sum(-1) - (p * direction).sum(-1) ** 2
    both = divergence(name, teacher, teacher + eps * direction, **params) + divergence(
        name, teacher, teacher - eps * direction, **params
    )
    close(both / eps**2, factor * fisher, rel=1e-5, abs=0)


def test_forward_kl_is_the_targets_part_and_the_rests():
    teacher, student = logits(5, 8, seed=11)
    targets = torch.tensor([0, 1, 7, 3, 3])
    binary, among = (divergence("dkd", teacher, student, targets_N=targets, alpha=a, beta=1 - a) for a in (1, 0))
    p_y = torch.softmax(teacher, -1).gather(-1, targets[:, None])[:, 0]
    close(binary + (1 - p_y) * among, divergence("forward_kl", teacher, student))


def test_skew_bounds_what_forward_kl_does_to_a_vanishing_token():
    """dD/dq of a token with p = 1/2 while q goes to 0, read off the gradient divided by q: -p/q against at most (1-a)/a."""
    coefficients: dict[str, list[float]] = {"forward_kl": [], "skew_kl": []}
    for depth in range(5, 65, 5):
        for name, found in coefficients.items():
            z = torch.tensor([[-float(depth), 0.0]], dtype=torch.float64)
            found.append(
                (value_and_gradient(name, torch.zeros(1, 2).double(), z)[1] / torch.softmax(z, -1))[0, 0].item()
            )
    assert coefficients["forward_kl"] == pytest.approx(
        [-0.5 * math.exp(depth) + 0.5 for depth in range(5, 65, 5)], rel=1e-2
    )
    assert all(-0.9 / 0.1 <= c <= 0 for c in coefficients["skew_kl"]) and coefficients["skew_kl"][-1] < -8


# -- the teacher's head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("v", "scale"), [(1, 1.0), (2, 3.0), (7, 2.0), (300, 1.0), (5000, 0.01), (5000, 8.0)])
def test_least_of_mass_equals_a_plain_sort(v, scale, dtype):
    prob = torch.softmax(logits(40, v, seed=v, scale=scale)[0].to(dtype), -1)
    for mass in (0.001, 0.1, 0.5, 0.9, 0.999):
        got = least_of_mass(prob, mass).tolist()
        for row, least in zip(prob.tolist(), got, strict=True):
            slack = (
                1e-13 if dtype == torch.float64 else 3e-6
            )  # of the sums: a head may end one token off where they are rounded
            assert (
                least in row
                and sum(p for p in row if p >= least) >= mass - slack
                and sum(p for p in row if p > least) < mass + slack
            )
        if dtype == torch.float64:
            assert got == [min(row[i] for i in head_of(row, mass)) for row in prob.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_least_of_mass_takes_ties_and_exact_hits(dtype):
    noise = torch.Generator().manual_seed(12)
    for _ in range(30):
        counts = torch.randint(0, 4, (16, 64), generator=noise).to(dtype)
        counts[:, 0] += 256 - counts.sum(-1)  # rows of dyadic fractions, which add up to 1 without rounding
        prob = counts[:, torch.randperm(64, generator=noise)] / 256
        for mass in (3 / 256, 0.25, 0.5, 0.75, 255 / 256):
            assert least_of_mass(prob, mass).tolist() == [
                min(row[i] for i in head_of(row, mass)) for row in prob.tolist()
            ]


def test_least_of_mass_stops_at_an_exact_hit_between_neighbours():
    prob = torch.tensor([[101, 100, 321, 100, 101, 100, 101, 100]], dtype=torch.float64) / 1024
    for held, last in ((321, 321), (322, 101), (422, 101), (624, 101), (625, 100), (724, 100), (1024, 100)):
        assert least_of_mass(prob, held / 1024).item() == least_of_mass(prob.float(), held / 1024).item() == last / 1024


@pytest.mark.parametrize("mass", [1 - 1e-6, 1 - 1e-7, 1 - 1e-9])
def test_a_mass_that_rounding_leaves_out_of_reach_takes_every_token_that_counts(mass):
    prob = torch.softmax(logits(6, 3000, seed=21, scale=1.0)[0].float(), -1)
    for rows in (prob, prob[:1], prob.flip(0)):
        assert ((rows < least_of_mass(rows, mass)[:, None]) * rows).sum(-1).max() < 5e-5


def test_adaptive_kl_of_the_worked_example_has_two_tokens_in_its_head():
    p, q = (torch.tensor([x], dtype=torch.float64) for x in ([0.3, 0.25, 0.2, 0.15, 0.1], [0.2, 0.1, 0.3, 0.2, 0.2]))
    forward, reverse = ((a * (a / b).log()).sum(-1) for a, b in ((p, q), (q, p)))
    close(divergence("adaptive_kl", p.log(), q.log(), mu=0.5), 0.25 / 0.5 * forward + 0.25 / 0.5 * reverse)
    close(divergence("adaptive_kl", p.log(), q.log(), mu=0.3 - 1e-9), 0.1 / 0.5 * forward + 0.4 / 0.5 * reverse)
    close(divergence("adaptive_kl", p.log(), q.log(), mu=0.6), 0.35 / 0.5 * forward + 0.15 / 0.5 * reverse)


@pytest.mark.parametrize(("wrong", "same_as"), [((0, 1), "forward_kl"), ((2, 3), "reverse_kl")])
def test_adaptive_kl_goes_where_the_student_is_wrong(wrong, same_as):
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    q = p.clone()
    q[0, list(wrong)] += torch.tensor([-0.05, 0.05], dtype=torch.float64)
    for got, want in zip(
        value_and_gradient("adaptive_kl", p.log(), q.log()), value_and_gradient(same_as, p.log(), q.log()), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_order_of_the_vocabulary_changes_nothing(name):
    teacher, student = logits(4, 12, seed=13)
    teacher[:, 3] = teacher[:, 7]  # a tie
    order = torch.randperm(12, generator=torch.Generator().manual_seed(14))
    (value, gradient), (moved, moved_gradient) = (
        value_and_gradient(name, teacher[:, o], student[:, o]) for o in (slice(None), order)
    )
    close(moved, value)
    close(moved_gradient, gradient[:, order])


# -- the ends of the number line ----------------------------------------------------------------------------------------

EXTREME = [
    ([0.0, -200.0, -201.0], [-200.0, 0.0, -200.0]), ([0.0, -200.0, -201.0], [0.0, 1.0, 2.0]), ([0.0, 1.0, 2.0], [0.0, -200.0, -201.0]),
    ([0.0, -200.0, -199.0], [0.0, -199.0, -200.0]), ([100.0, 100.0, -100.0], [-100.0, 100.0, 100.0]),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "params"), CASES)
def test_differences_of_200_give_the_defined_value_and_a_finite_gradient(name, params, dtype):
    for teacher, student in EXTREME:
        value, gradient = value_and_gradient(
            name, torch.tensor([teacher], dtype=dtype), torch.tensor([student], dtype=dtype), **params
        )
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert gradient.sum().abs() < 1e-4 * (1 + gradient.abs().max()), "a softmax has no gradient along a shift"
        assert value.item() == pytest.approx(definition(name, teacher, student, **params), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "params"), [case for case in CASES if case[0] != "logit_mse"])
def test_columns_masked_in_both_count_for_nothing(name, params, dtype):
    teacher, student = (z.to(dtype) for z in logits(3, 8, seed=15))
    keep = torch.tensor([0, 2, 3, 6, 7])
    masked_teacher, masked_student = (
        torch.full_like(z, -torch.inf).index_copy(1, keep, z[:, keep]) for z in (teacher, student)
    )
    value, gradient = value_and_gradient(name, masked_teacher, masked_student, **params)
    want_value, want_gradient = value_and_gradient(name, teacher[:, keep], student[:, keep], **params)
    rel = 1e-6 if dtype == torch.float64 else 4e-6  # sums over 5 and over 8 numbers round apart
    close(value, want_value, rel=rel, abs=1e-6)
    close(gradient[:, keep], want_gradient, rel=rel, abs=1e-6)
    assert (gradient[:, [1, 4, 5]] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_is_computed_in_fp32(name):
    teacher, student = logits(4, 9, seed=16)
    for dtype in (torch.float16, torch.bfloat16):
        value, gradient = value_and_gradient(name, teacher.to(dtype), student.to(dtype))
        want, want_gradient = value_and_gradient(name, teacher.to(dtype).float(), student.to(dtype).float())
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        close(value, want, rel=0, abs=0)
        close(gradient, want_gradient.to(dtype), rel=0, abs=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_models_of_unlike_precision_can_be_compared(name):
    teacher, student = logits(4, 9, seed=17)
    close(
        divergence(name, teacher, student.float()).double(),
        divergence(name, teacher, student.float().double()),
        rel=1e-5,
        abs=1e-6,
    )
    close(
        divergence(name, teacher.float(), student).double(),
        divergence(name, teacher.float().double(), student),
        rel=1e-5,
        abs=1e-6,
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch asks for it while it compiles
def test_compiled_equals_eager():
    torch._dynamo.reset()
    teacher, student = logits(3, 9, seed=18)
    student.requires_grad_()

    def every(t: Tensor, s: Tensor) -> list[Tensor]:
        return [2 * divergence(name, t, s) for name in DIVERGENCES]

    for got, want in zip(
        torch.compile(every, backend="aot_eager")(teacher, student), every(teacher, student), strict=True
    ):
        close(got, want)
        close(*(torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (got, want)))


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_teacher():
    teacher, student = (z.requires_grad_() for z in logits(2, 5, seed=19))
    divergence("jsd", teacher, student).sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("forward_lk", {}, "forward_kl"), ("jsd", {"teacher_shar": 0.5}, "teacher_share"), ("jsd", {"teacher_share": 1.0}, "outside"),
        ("forward_kl", {"temperature": 0}, "outside"), ("forward_kl", {"temperature": float("nan")}, "not a number"),
        ("forward_kl", {"temperature": True}, "not a number"), ("logit_mse", {"temperature": 2}, "no such parameter"),
        ("adaptive_kl", {"mu": 0}, "outside"), ("skew_kl", {"alpha": 1.1}, "outside"), ("taid", {"t": -0.1}, "outside"),
    ],
)  # fmt: skip
def test_errors_name_the_remedy(name, params, words):
    with pytest.raises(limbeck.UserError, match=words):
        divergence(name, *logits(2, 5, seed=20), **params)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("bad", "words"), [(math.nan, "finite"), (math.inf, "finite"), (-math.inf, "masked")])
def test_logits_that_say_nothing_are_refused_by_name(name, bad, words):
    spoilt, sound = torch.tensor([[0.0, bad, 1.0]]), torch.zeros(1, 3)
    for teacher, student in ((spoilt, sound), (sound, spoilt)):
        with pytest.raises(limbeck.UserError, match=f"{name}: .*{words}"):
            divergence(name, teacher, student)


def test_shapes_that_differ_are_refused():
    for teacher, student in ((torch.zeros(2, 5), torch.zeros(2, 6)), (torch.zeros(5), torch.zeros(5))):
        with pytest.raises(limbeck.UserError, match="vocabulary"):
            divergence("jsd", teacher, student)


def test_what_is_no_target_or_no_tensor_is_refused():
    teacher, student = logits(3, 5, seed=40)
    good = torch.tensor([0, 4, 2])
    assert divergence("dkd", teacher, student, targets_N=good).shape == (3,)
    for bad in (
        torch.tensor([0, 5, 2]),
        torch.tensor([0, -100, 2]),
        torch.tensor([0, 1]),
        torch.tensor([0.0, 1.0, 2.0]),
        [0, 1, 2],
    ):
        with pytest.raises(ValueError, match="dkd: targets_N must be a long tensor of 3 token ids"):
            divergence("dkd", teacher, student, targets_N=bad)
    with pytest.raises(ValueError, match="must be torch tensors"):
        divergence("jsd", teacher.tolist(), student.tolist())
    nothing = teacher.index_fill(0, torch.tensor([1]), -torch.inf)
    with pytest.raises(ValueError, match="every token is masked"):
        divergence("jsd", nothing, nothing)
    assert divergence("jsd", teacher[:0], student[:0]).shape == (0,)
