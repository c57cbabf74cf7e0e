"""Divergences against float64 definitions, closed-form gradients, limits and inequalities (whitebox sheet, section 0)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import limbeck
from limbeck.objectives.divergence import DIVERGENCES, divergence

CASES = [
    ("forward_kl", {}), ("forward_kl", {"temperature": 2.5}), ("reverse_kl", {}), ("reverse_kl", {"temperature": 0.5}),
    ("jsd", {}), ("jsd", {"teacher_share": 0.1}), ("jsd", {"teacher_share": 0.9}),
]  # fmt: skip


def logits(n: int, v: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, v, generator=noise, dtype=torch.float64) for _ in range(2))


def reference(name: str, p: list[float], q: list[float], temperature: float = 1.0, teacher_share: float = 0.5) -> float:
    """The definitions, in plain Python, on the temperature-scaled probabilities."""
    if name == "forward_kl":
        return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if name == "reverse_kl":
        return temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    b = teacher_share
    total = 0.0
    for x, y in zip(p, q, strict=True):
        m = b * x + (1 - b) * y
        total += b * x * math.log(x / m) + (1 - b) * y * math.log(y / m)
    return total


@pytest.mark.parametrize(("name", "params"), CASES)
def test_value_equals_the_float64_definition(name, params):
    teacher, student = logits(5, 11, seed=1)
    got = divergence(name, teacher, student, **params)
    t = params.get("temperature", 1.0)
    for row in range(5):
        p, q = (torch.softmax(x[row] / t, -1).tolist() for x in (teacher, student))
        assert got[row].item() == pytest.approx(reference(name, p, q, **params), rel=1e-9)
    single = divergence(name, teacher.float(), student.float(), **params)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=2e-5, atol=1e-6)


def softmax_jacobian(q: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return q * (g - (q * g).sum(-1, keepdim=True))


@pytest.mark.parametrize(("name", "params"), CASES)
def test_gradient_equals_the_closed_form(name, params):
    teacher, student = logits(4, 9, seed=2)
    student.requires_grad_()
    (got,) = torch.autograd.grad(divergence(name, teacher, student, **params).sum(), student)
    t = params.get("temperature", 1.0)
    p, q = torch.softmax(teacher / t, -1), torch.softmax(student.detach() / t, -1)
    if name == "forward_kl":
        want = t * (q - p)
    elif name == "reverse_kl":
        want = t * softmax_jacobian(q, (q / p).log())
    else:
        b = params.get("teacher_share", 0.5)
        want = (1 - b) * softmax_jacobian(q, (q / (b * p + (1 - b) * q)).log())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_student_equal_to_teacher_gives_zero_loss_and_gradient(name, params):
    teacher, _ = logits(4, 9, seed=3)
    student = teacher.clone().requires_grad_()
    loss = divergence(name, teacher, student, **params)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_forward_kl_at_high_temperature_is_half_the_variance_of_the_logit_difference():
    teacher, student = logits(3, 40, seed=4, scale=1.0)
    want = 0.5 * (student - teacher).var(-1, unbiased=False)
    torch.testing.assert_close(divergence("forward_kl", teacher, student, temperature=1000.0), want, rtol=5e-3, atol=0)


def test_jsd_ends_are_the_scaled_kls():
    teacher, student = logits(3, 12, seed=5, scale=1.0)
    small = 1e-6
    torch.testing.assert_close(
        divergence("jsd", teacher, student, teacher_share=small) / small, divergence("forward_kl", teacher, student), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        divergence("jsd", teacher, student, teacher_share=1 - small) / small, divergence("reverse_kl", teacher, student), rtol=1e-3, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), v=st.integers(2, 50), scale=st.floats(0.1, 8), shift=st.floats(-50, 50), share=st.floats(0.01, 0.99))
def test_inequalities_and_shift_invariance(seed, v, scale, shift, share):
    teacher, student = logits(3, v, seed, scale)
    forward, half = divergence("forward_kl", teacher, student), divergence("jsd", teacher, student)
    assert (forward >= -1e-12).all() and (divergence("reverse_kl", teacher, student) >= -1e-12).all()
    assert (half <= math.log(2) + 1e-12).all()
    total_variation = 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)
    assert (total_variation**2 <= forward / 2 + 1e-12).all()
    for name, params in (("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"teacher_share": share})):
        before = divergence(name, teacher, student, **params)
        torch.testing.assert_close(divergence(name, teacher + shift, student - shift, **params), before, rtol=1e-7, atol=1e-10)


def test_unlikely_tokens_cost_no_infinity():
    teacher, student = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]], requires_grad=True)
    for name in DIVERGENCES:
        value = divergence(name, teacher, student)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all(), name


def test_no_gradient_reaches_the_teacher():
    teacher, student = logits(2, 5, seed=6)
    teacher.requires_grad_()
    student.requires_grad_()
    divergence("jsd", teacher, student).sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("forward_lk", {}, "forward_kl"), ("jsd", {"teacher_shar": 0.5}, "teacher_share"), ("jsd", {"teacher_share": 1.0}, "outside"),
        ("forward_kl", {"temperature": 0}, "outside"), ("forward_kl", {"temperature": float("nan")}, "not a number"),
        ("forward_kl", {"temperature": True}, "not a number"),
    ],
)  # fmt: skip
def test_errors_name_the_remedy(name, params, words):
    teacher, student = logits(2, 5, seed=7)
    with pytest.raises(limbeck.UserError, match=words):
        divergence(name, teacher, student, **params)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        divergence("jsd", torch.tensor([[0.0, bad]]), torch.zeros(1, 2))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        divergence("jsd", torch.zeros(2, 5), torch.zeros(2, 6))
