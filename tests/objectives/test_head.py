"""The chunked head equals the naive loss, whatever the chunks; pinned losses guard every refactor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.objectives import head as head_module
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.head import Head, PositionEvidence, distribution_pairs, fused_loss
from limbeck.objectives.log_probs import token_log_probs
from limbeck.objectives.on_logits import divergence
from limbeck.objectives.term import TermAtStep, make_term
from limbeck.signals.dense import DenseSignal
from limbeck.signals.sparse import TopK

N, V, D = 13, 29, 6


def setting(n: int = N, v: int = V, d: int = D, e: int = 4, dtype: torch.dtype = torch.float64):
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype)

    hidden, weight, teacher = draw(n, d), draw(v, d), DenseSignal(draw(n, e), Head(draw(v, e)))
    targets = torch.randint(0, v, (n,), generator=noise)
    weights = torch.rand(n, generator=noise, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, targets, weights


def term(name: str, **params: float) -> TermAtStep:
    return make_term(name, params).at_step(0.0, {})


def make_head(weight: Tensor, parts: str) -> tuple[Head, list[Tensor]]:
    """A head with the named parts, and what of it is trained."""
    noise = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(weight.dtype).requires_grad_()

    bias = leaf(len(weight)) if "bias" in parts else None
    low_rank = (leaf(2, weight.shape[1]), leaf(len(weight), 2), 0.7) if "lora" in parts else None
    head = Head(weight, bias, 0.3 if "scale" in parts else 1.0, 1.5 if "softcap" in parts else None, low_rank)
    trained = [weight, bias, *([] if low_rank is None else low_rank[:2])]
    return head, [t for t in trained if t is not None and t.requires_grad]


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    """The head's formula, written without the package."""
    logits = head.scale * (hidden @ head.weight_VD.T)
    if head.low_rank is not None:
        a, b, scaling = head.low_rank
        logits = logits + head.scale * scaling * ((hidden @ a.T) @ b.T)
    if head.bias_V is not None:
        logits = logits + head.bias_V
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def naive(
    logits: Tensor, evidence: PositionEvidence, terms: list[TermAtStep], scales: list[float], weight_KN: Tensor
) -> tuple[Tensor, list[float]]:
    sums = []
    for settled, weights in zip(terms, weight_KN, strict=True):
        if settled.label == "cross_entropy":
            values = F.cross_entropy(logits, evidence.targets_N, reduction="none")
        else:
            signal = evidence.teacher
            teacher = plain_logits(signal.hidden_NE, signal.head)
            values = divergence(settled.label, teacher, logits, targets_N=evidence.targets_N, **settled.params)
        sums.append((values * weights).sum())
    return sum(scale * value for scale, value in zip(scales, sums, strict=True)), [value.item() for value in sums]


def agrees(leaves: list[Tensor], head: Head, hidden: Tensor, terms: list[TermAtStep], scales: list[float], weight_KN: Tensor, evidence: PositionEvidence) -> None:  # fmt: skip
    got = fused_loss(hidden, head, terms, scales, weight_KN, evidence)
    want, sums = naive(plain_logits(hidden, head), evidence, terms, scales, weight_KN)
    torch.testing.assert_close(got.loss, want, rtol=1e-11, atol=0)
    assert list(got.sums.values()) == pytest.approx(sums, rel=1e-11)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (got.loss, want)), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


MIXTURE = [
    term("forward_kl"),
    term("jsd", teacher_share=0.3),
    term("cross_entropy"),
    term("dkd"),
    term("taid", temperature=2.0),
]
SCALES = [0.5, 0.25, 2.0, 0.3, 1.0]
PARTS = ["", "bias", "scale", "softcap", "lora", "lora bias scale softcap"]


def mixture(weights: Tensor) -> Tensor:
    """A row of weights per term: all tokens, some, and those that are left."""
    noise = torch.Generator().manual_seed(2)
    return torch.stack(
        [
            weights * torch.randint(0, 2, weights.shape, generator=noise) if k % 2 else weights / (k + 1)
            for k in range(5)
        ]
    )


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_each_term_equals_autograd_of_the_naive_loss(monkeypatch, name):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", V * 5)
    hidden, weight, teacher, targets, weights = setting()
    agrees(
        [hidden, weight], Head(weight), hidden, [term(name)], [0.4], weights[None], PositionEvidence(targets, teacher)
    )


@pytest.mark.parametrize("block", [1, V * 2, V * 3 + 1, 10**6])
@pytest.mark.parametrize("chunk", [1, V * 4, V * 5 - 1, V * 13, 10**6])
def test_a_mixture_equals_the_naive_loss_whatever_the_chunks(monkeypatch, chunk, block):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", block)
    hidden, weight, teacher, targets, weights = setting()
    head, leaves = make_head(weight, "lora bias scale softcap")
    agrees([hidden, *leaves], head, hidden, MIXTURE, SCALES, mixture(weights), PositionEvidence(targets, teacher))


@pytest.mark.parametrize("frozen", ["nothing", "hidden", "head"])
@pytest.mark.parametrize("parts", PARTS)
def test_every_part_of_the_head_gets_its_gradient_unless_it_is_frozen(monkeypatch, parts, frozen):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", V * 5)
    hidden, weight, teacher, targets, weights = setting()
    head, leaves = make_head(
        weight.detach() if frozen == "head" else weight, parts
    )  # a frozen W may have a LoRA that is trained
    hidden = hidden.detach() if frozen == "hidden" else hidden
    leaves = [t for t in (hidden, *leaves) if t.requires_grad]
    agrees(leaves, head, hidden, MIXTURE, SCALES, mixture(weights), PositionEvidence(targets, teacher))
    fused_loss(hidden, head, MIXTURE, SCALES, mixture(weights), PositionEvidence(targets, teacher)).loss.backward()
    assert (weight.grad is None) == (frozen == "head")


def test_tied_embeddings_add_the_gradient_of_both_their_uses():
    _, weight, teacher, targets, weights = setting()
    ids = torch.arange(N) % V
    got = fused_loss(
        weight[ids].tanh(), Head(weight), MIXTURE[:1], [1.0], weights[None], PositionEvidence(targets, teacher)
    ).loss
    want, _ = naive(
        weight[ids].tanh() @ weight.T, PositionEvidence(targets, teacher), MIXTURE[:1], [1.0], weights[None]
    )
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in (got, want)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parts", PARTS)
def test_a_cut_vocabulary_is_the_head_of_its_first_tokens(parts):
    """A teacher whose vocabulary is padded further; the student is cut to it, or the other way round."""
    hidden, weight, _, targets, weights = setting()
    noise = torch.Generator().manual_seed(3)
    wide, states = (
        torch.randn(V + 7, 4, generator=noise, dtype=torch.float64),
        torch.randn(N, 4, generator=noise, dtype=torch.float64),
    )
    head, leaves = make_head(weight, parts)
    small, narrow = head.cut(V - 4), Head(wide).cut(V - 4)
    assert (small.vocab_size, narrow.vocab_size, head.cut(V)) == (V - 4, V - 4, head)
    teacher, targets = DenseSignal(states, narrow), targets % (V - 4)
    agrees([hidden, *leaves], small, hidden, MIXTURE, SCALES, mixture(weights), PositionEvidence(targets, teacher))
    torch.testing.assert_close(small.logits(hidden), plain_logits(hidden, head)[:, : V - 4])


def test_top_tokens_go_through_the_head_like_a_dense_teacher(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", V * 5)
    hidden, weight, teacher, targets, weights = setting()
    values, ids = torch.log_softmax(plain_logits(teacher.hidden_NE, teacher.head), -1).topk(V)
    grads = []
    for signal in (teacher, TopK(ids, values)):
        total = fused_loss(
            hidden, Head(weight), MIXTURE[:2], [1.0, 1.0], mixture(weights)[:2], PositionEvidence(targets, signal)
        )
        grads.append((total.loss, *torch.autograd.grad(total.loss, (hidden, weight))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.promise("R5")
def test_split_into_micro_batches_changes_nothing():
    hidden, weight, teacher, targets, weights = setting()
    head, leaves = make_head(weight, "lora bias")
    leaves = [hidden, *leaves]
    rows = mixture(weights)
    whole = torch.autograd.grad(
        fused_loss(hidden, head, MIXTURE, SCALES, rows, PositionEvidence(targets, teacher)).loss, leaves
    )
    summed = [torch.zeros_like(t) for t in leaves]
    for part in (slice(0, 2), slice(2, 9), slice(9, 13)):
        evidence = PositionEvidence(targets[part], DenseSignal(teacher.hidden_NE[part], teacher.head))
        loss = fused_loss(hidden[part], head, MIXTURE, SCALES, rows[:, part], evidence).loss
        for total, gradient in zip(summed, torch.autograd.grad(loss, leaves), strict=True):
            total += gradient
    for total, gradient in zip(summed, whole, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.promise("R5")
def test_no_position_gives_exactly_zero_with_a_gradient_path():
    hidden, weight, _, targets, weights = setting()
    head, leaves = make_head(weight, "lora bias scale softcap")
    total = fused_loss(
        hidden[:0], head, [term("cross_entropy")], [1.0], weights[None, :0], PositionEvidence(targets[:0])
    )
    assert total.loss.item() == 0.0 and total.sums == {"cross_entropy": 0.0}
    total.loss.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (hidden, *leaves))


def test_weights_of_zero_give_exactly_zero():
    hidden, weight, teacher, targets, weights = setting()
    total = fused_loss(
        hidden, Head(weight), MIXTURE, SCALES, torch.zeros(5, N).double(), PositionEvidence(targets, teacher)
    )
    total.loss.backward()
    assert total.loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


def test_outer_factor_scales_the_gradient():
    hidden, weight, _, targets, weights = setting()
    one, three = (
        torch.autograd.grad(
            f * fused_loss(hidden, Head(weight), MIXTURE[2:3], [1.0], weights[None], PositionEvidence(targets)).loss,
            (hidden, weight),
        )
        for f in (1, 3)
    )
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(b, 3 * a)


def test_backward_twice_accumulates_twice():
    hidden, weight, _, targets, weights = setting()
    loss = fused_loss(hidden, Head(weight), MIXTURE[2:3], [1.0], weights[None], PositionEvidence(targets)).loss
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", ["bias", "lora bias scale softcap"])
def test_bf16_models_give_fp32_sums(parts, adapter):
    """As they come from PEFT: the base in bf16, the adapter in bf16 or in fp32."""
    exact = setting(dtype=torch.float32)
    hidden, weight, teacher, targets, weights = (
        x.detach().bfloat16().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in exact
    )
    head, leaves = make_head(weight, parts)
    if head.low_rank is not None:
        a, b, scaling = head.low_rank
        head = Head(head.weight_VD, head.bias_V, head.scale, head.softcap, (a.to(adapter), b.to(adapter), scaling))
    terms, rows = MIXTURE[:3], mixture(weights)[:3]
    got = fused_loss(hidden, head, terms, SCALES[:3], rows, PositionEvidence(targets, teacher))
    want, sums = naive(
        plain_logits(hidden.float(), head_in_fp32(head)), PositionEvidence(targets, teacher), terms, SCALES[:3], rows
    )
    assert got.loss.dtype == torch.float32
    assert list(got.sums.values()) == pytest.approx(sums, rel=1e-2)
    for a, b in zip(*(torch.autograd.grad(loss, [hidden, *leaves]) for loss in (got.loss, want)), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def head_in_fp32(head: Head) -> Head:
    low_rank = None if head.low_rank is None else (head.low_rank[0].float(), head.low_rank[1].float(), head.low_rank[2])
    return Head(
        head.weight_VD.float(), None if head.bias_V is None else head.bias_V.float(), head.scale, head.softcap, low_rank
    )


def test_logits_of_weights_in_a_shorter_type_are_the_products_of_the_rounded_numbers_in_fp32(monkeypatch):
    """On every device as CUDA sums them: of logits of 40 bfloat16 would keep two digits."""
    monkeypatch.setattr("limbeck.objectives.precision.COPIED", 64 * 7)  # several chunks, the last one smaller
    noise = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=noise).bfloat16() for n in (9, 40))
    exact = 4 * hidden.double() @ weight.double().T
    assert exact.abs().max() > 40
    head, targets = Head(weight, scale=4.0), torch.arange(9)  # a power of two: hidden states are rounded no further
    log_probs = token_log_probs(hidden, head, targets)
    want = exact.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(head.logits(hidden).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_losses_stay_fp32_and_close(hidden_dtype):
    hidden, weight, teacher, targets, weights = setting(dtype=torch.float32)
    head, leaves = make_head(weight, "lora bias scale softcap")
    evidence = PositionEvidence(targets, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = hidden.to(hidden_dtype)
        total = fused_loss(states, head, MIXTURE, SCALES, mixture(weights), evidence)
        log_probs = token_log_probs(states, head, targets)
    want, sums = naive(plain_logits(hidden, head), evidence, MIXTURE, SCALES, mixture(weights))
    want_log_probs = torch.log_softmax(plain_logits(hidden, head), -1).gather(-1, targets[:, None])[:, 0]
    assert total.loss.dtype == log_probs.dtype == torch.float32
    assert list(total.sums.values()) == pytest.approx(sums, rel=2e-2)
    for got, exact in ((total.loss, want), (log_probs.sum(), want_log_probs.sum())):
        for a, b in zip(
            *(torch.autograd.grad(loss, [hidden, *leaves], retain_graph=True) for loss in (got, exact)), strict=True
        ):
            assert a.dtype == torch.float32 and (a - b).norm() < 0.03 * b.norm()


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("what", ["fused", "log_probs"])
def test_no_tensor_is_larger_than_a_chunk(monkeypatch, what):
    """Neither forward nor backward holds [positions, vocabulary], nor anything else of that size."""
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 101 * 16)
    hidden, weight, teacher, targets, weights = setting(n=200, v=101)
    head, leaves = make_head(weight, "lora bias scale softcap")
    terms = [term(name) for name in [*DIVERGENCES, "cross_entropy"]]
    with Largest() as seen:
        if what == "fused":
            rows = weights.expand(len(terms), -1)
            fused_loss(
                hidden, head, terms, [1.0] * len(terms), rows, PositionEvidence(targets, teacher)
            ).loss.backward()
        else:
            token_log_probs(hidden, head, targets).exp().sum().backward()
    bins = 1017 * 16  # adaptive_kl's histogram: fixed, for any vocabulary
    assert (
        101 * 16
        <= seen.elements
        <= max(101 * 16, bins if what == "fused" else 0, hidden.numel(), len(terms) * 200)
        < 200 * 101
    )
    assert all(leaf.grad is not None for leaf in (hidden, *leaves))


@pytest.mark.parametrize("frozen", ["nothing", "hidden", "head"])
@pytest.mark.parametrize("parts", PARTS)
def test_token_log_probs_equal_log_softmax_under_an_outer_function(monkeypatch, parts, frozen):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", V * 4)
    hidden, weight, _, targets, weights = setting()
    head, leaves = make_head(weight.detach() if frozen == "head" else weight, parts)
    hidden = hidden.detach() if frozen == "hidden" else hidden
    leaves = [t for t in (hidden, *leaves) if t.requires_grad]
    got = token_log_probs(hidden, head, targets)
    want = torch.log_softmax(plain_logits(hidden, head), -1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    grads = (
        torch.autograd.grad(F.logsigmoid((x * weights).cumsum(0)).sum() + (x[:5].sum() - x[5:].sum()) ** 2, leaves)
        for x in (got, want)
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_token_log_probs_of_no_position_are_none_at_all():
    hidden, weight, _, targets, _ = setting(dtype=torch.float32)
    got = token_log_probs(hidden.bfloat16()[:0], Head(weight.bfloat16()), targets[:0])
    assert got.shape == (0,) and got.dtype == torch.float32
    got.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch asks for it while it compiles
def test_compiled_equals_eager(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", V * 5)
    torch._dynamo.reset()
    hidden, weight, teacher, targets, weights = setting()
    evidence = PositionEvidence(targets, teacher)

    def loss(states: Tensor, matrix: Tensor) -> Tensor:
        fused = fused_loss(states.tanh(), Head(matrix), MIXTURE, SCALES, mixture(weights), evidence).loss
        return 2 * fused + token_log_probs(states.tanh(), Head(matrix), targets).exp().sum()

    got, want = torch.compile(loss, backend="aot_eager")(hidden, weight), loss(hidden, weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_compared_walks_all_positions_once(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", V * 5)
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", V * 2)
    hidden, weight, teacher, _, _ = setting()
    head, _ = make_head(weight.detach(), "lora bias scale softcap")
    seen = []
    for part, q, p in distribution_pairs(hidden.detach(), head, teacher):
        seen += range(N)[part]
        torch.testing.assert_close(q.log, torch.log_softmax(plain_logits(hidden, head), -1)[part].detach())
        torch.testing.assert_close(p.log, torch.log_softmax(plain_logits(teacher.hidden_NE, teacher.head), -1)[part])
    assert seen == list(range(N))


PINNED = {
    "forward_kl": 16.926063627, "reverse_kl": 16.930324688, "jsd": 2.4308123011, "cross_entropy": 29.867903888,
    "symmetric_kl": 16.928193878, "jsd_rescaled": 9.7232490842, "tvd": 4.6144235793, "hellinger": 2.943206022,
    "skew_kl": 8.0304591934, "skew_reverse_kl": 8.2917880897, "skew_reverse_kl_fixed": 8.2917880897, "taid": 2.846197434,
    "adaptive_kl": 17.027164881, "dkd": 9.6913882435, "todi": 33.856387756, "alpha_beta": 18.081160376,
    "logit_mse": 28.926914204, "entropy_aware_kl": 33.222628176, "uld": 4.0638151489,
}  # fmt: skip


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_pinned_loss(name):
    hidden, weight, teacher, targets, weights = setting(dtype=torch.float32)
    got = fused_loss(hidden, Head(weight), [term(name)], [1.0], weights[None], PositionEvidence(targets, teacher))
    assert got.sums[name] == pytest.approx(PINNED[name], rel=2e-6)
