"""The chunked head equals the naive loss, whatever the chunks; pinned losses guard every refactor."""

from __future__ import annotations

import pytest
import torch

from limbeck.objectives import head
from limbeck.objectives.head import fused_loss
from limbeck.objectives.term import Chunk, make_term
from limbeck.signals.dense import DenseSignal


def setting(n: int = 13, v: int = 29, d: int = 6, e: int = 4, dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype)

    hidden, weight, teacher = draw(n, d), draw(v, d), DenseSignal(draw(n, e), draw(v, e))
    targets = torch.randint(0, v, (n,), generator=noise)
    weights = torch.rand(n, generator=noise, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, targets, weights


TERMS = [("forward_kl", {}, 0.7), ("jsd", {"teacher_share": 0.3}, 1.1), ("cross_entropy", {}, 0.2)]


def naive(hidden, weight, teacher, targets, weights, terms, scales):
    logits = hidden @ weight.T
    chunk = Chunk(targets, teacher.logits(slice(None)))
    values = [(term.values(logits, chunk) * weights).sum() for term in terms]
    return sum(scale * value for scale, value in zip(scales, values, strict=True)), values


@pytest.mark.parametrize("chunk_elements", [1, 29 * 4, 29 * 5, 10**6])
def test_fused_equals_naive(monkeypatch, chunk_elements):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, teacher, targets, weights = setting()
    terms, scales = [make_term(*term) for term in TERMS], [0.5, 0.25, 2.0]
    got = fused_loss(hidden, weight, terms, scales, targets, weights, teacher)
    got_grads = torch.autograd.grad(got.total, (hidden, weight))
    want, values = naive(hidden, weight, teacher, targets, weights, terms, scales)
    want_grads = torch.autograd.grad(want, (hidden, weight))
    torch.testing.assert_close(got.total, want.detach(), rtol=1e-6, atol=0)  # the teacher's logits are fp32
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert list(got.sums.values()) == pytest.approx([v.item() for v in values], rel=1e-6)


def test_split_into_micro_batches_changes_nothing():
    hidden, weight, teacher, targets, weights = setting()
    terms = [make_term("forward_kl", {}, 1.0)]
    whole = torch.autograd.grad(fused_loss(hidden, weight, terms, [0.1], targets, weights, teacher).total, (hidden, weight))
    parts_h, parts_w = torch.zeros_like(hidden), torch.zeros_like(weight)
    for part in (slice(0, 2), slice(2, 9), slice(9, 13)):
        signal = DenseSignal(teacher.hidden_NE[part], teacher.head_VE)
        total = fused_loss(hidden[part], weight, terms, [0.1], targets[part], weights[part], signal).total
        a, b = torch.autograd.grad(total, (hidden, weight))
        parts_h += a
        parts_w += b
    torch.testing.assert_close(parts_h, whole[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts_w, whole[1], rtol=1e-9, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do():
    hidden, weight, teacher, targets, weights = setting()
    weight = weight.detach()
    total = fused_loss(hidden, weight, [make_term("cross_entropy", {}, 1.0)], [1.0], targets, weights, None).total
    total.backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_position_gives_exactly_zero_with_a_gradient_path():
    hidden, weight, teacher, targets, weights = setting()
    total = fused_loss(hidden[:0], weight, [make_term("cross_entropy", {}, 1.0)], [1.0], targets[:0], weights[:0], None).total
    assert total.item() == 0.0
    total.backward()
    assert weight.grad is not None and not weight.grad.any()


def test_outer_factor_scales_the_gradient():
    hidden, weight, teacher, targets, weights = setting()
    terms = [make_term("cross_entropy", {}, 1.0)]
    (one,) = torch.autograd.grad(fused_loss(hidden, weight, terms, [1.0], targets, weights, None).total, hidden)
    (three,) = torch.autograd.grad(3 * fused_loss(hidden, weight, terms, [1.0], targets, weights, None).total, hidden)
    torch.testing.assert_close(three, 3 * one)


PINNED = {"forward_kl": 16.926063627, "reverse_kl": 16.930324688, "jsd": 2.4308123011, "cross_entropy": 29.867903888}


@pytest.mark.parametrize("name", PINNED)
def test_pinned_loss(name):
    hidden, weight, teacher, targets, weights = setting(dtype=torch.float32)
    got = fused_loss(hidden, weight, [make_term(name, {}, 1.0)], [1.0], targets, weights, teacher)
    assert got.sums[name] == pytest.approx(PINNED[name], rel=2e-6)
