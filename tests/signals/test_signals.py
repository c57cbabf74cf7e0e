"""Signals of a few tokens per position: top tokens with a bucket, sampled tokens, the text alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import limbeck
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.objectives.head import Head
from limbeck.objectives.supervised import cross_entropy
from limbeck.signals.dense import DenseSignal
from limbeck.signals.sparse import Sampled, TextSignal, TopK
from tests.objectives.test_divergence import AT_ONE, DEFINITIONS, close, log, logits

BUCKETED = [case for case in AT_ONE if DIVERGENCES[case[0]].buckets]
REVERSE_END = ("jsd_rescaled", {"teacher_share": 1})
ONE_HOT = [case for case in BUCKETED if DIVERGENCES[case[0]].one_hot and case != REVERSE_END]
F_DIVERGENCES = [
    ("forward_kl", {}), ("reverse_kl", {}), ("symmetric_kl", {}), ("jsd", {"teacher_share": 0.3}), ("jsd_rescaled", {}), ("tvd", {}),
    ("hellinger", {}), ("skew_kl", {}), ("skew_reverse_kl", {}), ("skew_reverse_kl_fixed", {}), ("alpha_beta", {"alpha": 0.3, "beta": 0.7}),
]  # fmt: skip
NO_TARGETS = torch.empty(0, dtype=torch.long)


def whole(name: str, params: dict[str, float], teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    return DIVERGENCES[name](Distribution(teacher), Distribution(student), checked_params(name, params))


def compared(signal: Any, name: str, params: dict[str, float], student: Tensor) -> tuple[Tensor, Tensor]:
    return signal.compare(DIVERGENCES[name], checked_params(name, params), Distribution(student), NO_TARGETS)


def top(teacher: Tensor, k: int) -> TopK:
    values, ids = torch.log_softmax(teacher, -1).topk(k, -1)
    return TopK(ids, values)


# -- top tokens ---------------------------------------------------------------------------------------------------------


def test_every_divergence_either_has_a_bucket_or_says_what_to_use():
    assert {name for name, known in DIVERGENCES.items() if not known.buckets} == {
        "taid",
        "dkd",
        "logit_mse",
        "entropy_aware_kl",
        "uld",
    }


@pytest.mark.parametrize(("name", "params"), BUCKETED)
def test_all_tokens_as_top_tokens_equal_the_dense_signal(name, params):
    teacher, student = logits(5, 9, seed=1)
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    signal = TopK(order, torch.log_softmax(teacher, -1).gather(-1, order))
    for got, want in zip(compared(signal, name, params, student), whole(name, params, teacher, student), strict=True):
        close(got, want)


def bucketed(signal: TopK, row: int, rest: float | None, student: Tensor) -> tuple[list[Any], list[Any]]:
    """One position's K + 1 outcomes of teacher and student, written out."""
    ids = signal.ids_NK[row].tolist()
    p = signal.log_prob_NK[row].exp().tolist()
    q = torch.softmax(student[row], -1)
    others = [v for v in range(len(q)) if v not in ids]
    return [*p, 1 - sum(p) if rest is None else rest], [*(q[v] for v in ids), sum(q[v] for v in others)]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize(("name", "params"), BUCKETED)
def test_top_tokens_equal_the_definition_over_them_and_the_bucket(name, params, k, given):
    teacher, student = logits(4, 8, seed=2)
    signal = top(teacher, k)
    rest = 1 - signal.log_prob_NK.exp().sum(-1)
    signal = TopK(signal.ids_NK, signal.log_prob_NK, rest) if given else signal
    got = compared(signal, name, params, student)
    student.requires_grad_()
    values = []
    for row in range(4):
        p, q = bucketed(signal, row, rest[row].item() if given else None, student)
        values.append(DEFINITIONS[name]([torch.tensor(x, dtype=torch.float64) for x in p], q, **params))
    close(got[0], torch.stack(values).detach())
    close(got[1], torch.autograd.grad(sum(values), student)[0])


@pytest.mark.parametrize(("name", "params"), F_DIVERGENCES)
def test_fewer_outcomes_are_never_further_apart(name, params):
    """The data processing inequality; and each token that leaves the bucket brings the value up to the whole."""
    teacher, student = logits(50, 12, seed=3)
    last = torch.zeros(50, dtype=torch.float64)
    for k in range(1, 12):
        values, _ = compared(top(teacher, k), name, params, student)
        assert (values >= last - 1e-12).all()
        last = values
    full, _ = whole(name, params, teacher, student)
    assert (last <= full + 1e-10).all(), (
        "up to the rounding of the bucket, which is 1 less a sum and here as small as 3e-5"
    )
    close(last, full)  # 11 tokens and a bucket of one are all there is


def test_the_bucket_penalises_what_the_top_tokens_leave_out():
    """A student with the right ratios among the top tokens and too much elsewhere: renormalised top-k would see nothing."""
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.1, 0.4, 0.3]], dtype=torch.float64).log()
    value, gradient = compared(top(teacher, 2), "forward_kl", {}, student)
    assert value.item() == pytest.approx(0.9 * log(0.9 / 0.3) + 0.1 * log(0.1 / 0.7), rel=1e-12)
    close(
        gradient,
        torch.tensor([[0.2 - 0.6, 0.1 - 0.3, 0.4 * (1 - 0.1 / 0.7), 0.3 * (1 - 0.1 / 0.7)]], dtype=torch.float64),
    )


@pytest.mark.parametrize(("name", "params"), BUCKETED)
def test_a_rest_within_rounding_of_zero_stays_finite(name, params):
    """Stored log-probabilities whose sum is rounded to 1 or a little above it."""
    student = torch.tensor([[0.3, -0.2, 1.0, 0.1]])
    for total in (1.0, 1.0 + 3e-7, 1.0 - 1e-7, 1.002):
        stored = (torch.tensor([[0.7, 0.3]]) * total).log()
        value, gradient = compared(TopK(torch.tensor([[2, 0]]), stored), name, params, student)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert gradient.sum().abs() < 1e-4 * (1 + gradient.abs().max())


@pytest.mark.parametrize(("name", "params"), ONE_HOT)
def test_a_rest_that_is_given_as_zero_is_zero(name, params):
    teacher, student = (
        torch.tensor([[0.7, 0.3]], dtype=torch.float64),
        torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64),
    )
    signal = TopK(torch.tensor([[2, 0]]), teacher.log(), torch.zeros(1, dtype=torch.float64))
    value, gradient = compared(signal, name, params, student)
    tiny = TopK(torch.tensor([[2, 0]]), (teacher * (1 - 1e-14)).log(), torch.full((1,), 1e-14, dtype=torch.float64))
    want, want_gradient = compared(tiny, name, params, student)
    close(value, want, rel=1e-5, abs=1e-6)
    close(gradient, want_gradient, rel=1e-5, abs=1e-6)


def test_stored_log_probs_may_be_of_lower_precision():
    teacher, student = logits(6, 20, seed=4)
    signal = top(teacher.float(), 5)
    half = TopK(signal.ids_NK, signal.log_prob_NK.half())
    (value, gradient), (want, want_gradient) = (compared(s, "jsd", {}, student.float()) for s in (half, signal))
    assert value.dtype == gradient.dtype == torch.float32
    close(value, want, rel=5e-3, abs=5e-3)
    close(gradient, want_gradient, rel=5e-3, abs=5e-3)


# -- sampled tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_expected_gradient_of_sampled_tokens_is_exactly_the_dense_one(draws):
    """Every outcome of the draws with its probability: value and gradient add up to those of the whole distribution."""
    teacher, student = logits(1, 5, seed=5)
    p = torch.softmax(teacher, -1)[0]
    entropy = -(p * p.log()).sum()[None]
    value, gradient = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    for ids in itertools.product(range(5), repeat=draws):
        row = torch.tensor([ids])
        v, g = compared(Sampled(row, torch.full(row.shape, 1 / draws), entropy), "forward_kl", {}, student)
        chance = p[list(ids)].prod()
        value, gradient = value + chance * v, gradient + chance * g
    want, want_gradient = whole("forward_kl", {}, teacher, student)
    close(value, want, rel=1e-7, abs=1e-7)
    close(gradient, want_gradient, rel=1e-7, abs=1e-7)


def test_many_draws_come_near_the_dense_gradient_and_renormalised_top_tokens_do_not():
    teacher, student = logits(1, 30, seed=6, scale=1.0)
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    n = 20_000
    drawn = torch.multinomial(p[0], n, replacement=True, generator=torch.Generator().manual_seed(7))[:, None]
    _, gradients = compared(Sampled(drawn, torch.ones(n, 1)), "forward_kl", {}, student.expand(n, -1))
    error = gradients.mean(0) - (q - p)[0]
    assert (error.abs() < 4 * gradients.std(0) / n**0.5).all()
    kept, ids = p.topk(8, -1)
    _, biased = compared(Sampled(ids, kept / kept.sum()), "forward_kl", {}, student)
    bias = (biased - (q - p)).abs().sum()
    close(bias, 2 * (1 - kept.sum()))  # the mass that was left out comes in again on the top tokens
    assert bias > 0.5 > 10 * error.abs().sum()


def test_draws_from_a_proposal_are_unbiased_with_their_importance_weights():
    teacher, student = logits(1, 6, seed=8)
    p, proposal = torch.softmax(teacher, -1)[0], torch.softmax(0.5 * teacher, -1)[0]
    gradient = torch.zeros(1, 6, dtype=torch.float64)
    for v in range(6):
        weight = (p[v] / proposal[v])[None, None]
        gradient += proposal[v] * compared(Sampled(torch.tensor([[v]]), weight), "forward_kl", {}, student)[1]
    close(gradient, whole("forward_kl", {}, teacher, student)[1])


def test_repeated_tokens_add_up_and_padding_counts_for_nothing():
    _, student = logits(1, 6, seed=9)
    repeated = Sampled(torch.tensor([[4, 1, 4, 0]]), torch.tensor([[0.25, 0.5, 0.25, 0.0]]))
    merged = Sampled(torch.tensor([[4, 1]]), torch.tensor([[0.5, 0.5]]))
    for got, want in zip(*(compared(s, "forward_kl", {}, student) for s in (repeated, merged)), strict=True):
        close(got, want)


def test_any_weights_give_the_gradient_of_the_value():
    _, student = logits(3, 6, seed=15)
    ids, weight = (
        torch.tensor([[0, 5, 5], [1, 2, 3], [4, 4, 4]]),
        torch.tensor([[0.5, 2.0, 0.1], [0.0, 0.0, 0.0], [1.0, 1.0, 3.0]]).double(),
    )
    value, gradient = compared(Sampled(ids, weight, torch.ones(3)), "forward_kl", {}, student)
    student.requires_grad_()
    want = -(weight * torch.log_softmax(student, -1).gather(-1, ids)).sum(-1) - 1
    close(value, want.detach())
    close(gradient, torch.autograd.grad(want.sum(), student)[0])


def test_without_the_entropy_the_value_is_the_cross_entropy():
    teacher, student = logits(3, 6, seed=10)
    everything = Sampled(torch.arange(6).expand(3, -1), torch.softmax(teacher, -1))
    close(
        compared(everything, "forward_kl", {}, student)[0],
        -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1),
    )


# -- the text alone -----------------------------------------------------------------------------------------------------


def test_forward_kl_on_the_text_is_the_cross_entropy():
    _, student = logits(5, 7, seed=11)
    ids = torch.tensor([0, 6, 3, 3, 1])
    for got, want in zip(
        compared(TextSignal(ids), "forward_kl", {}, student), cross_entropy(Distribution(student), ids), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize(("name", "params"), ONE_HOT)
def test_the_text_is_a_teacher_that_is_certain(name, params):
    """Against the dense signal of a teacher that gives all but e^-60 to the written token; and tvd is 1 - q."""
    _, student = logits(5, 7, seed=12)
    ids = torch.tensor([0, 6, 3, 3, 1])
    teacher = torch.full((5, 7), -60.0, dtype=torch.float64).scatter(1, ids[:, None], 0.0)
    got = compared(TextSignal(ids), name, params, student)
    for a, b in zip(got, whole(name, params, teacher, student), strict=True):
        close(a, b, rel=1e-8, abs=1e-10)
    if name == "tvd":
        close(got[0], 1 - torch.softmax(student, -1).gather(-1, ids[:, None])[:, 0])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_jsd_on_the_text_equals_its_definition(share):
    _, student = logits(3, 4, seed=13)
    got, _ = compared(TextSignal(torch.tensor([2, 0, 1])), "jsd", {"teacher_share": share}, student)
    for row, y in enumerate((2, 0, 1)):
        q = torch.softmax(student[row], -1)[y].item()
        m = share + (1 - share) * q
        want = share * -log(m) + (1 - share) * (q * log(q / m) + (1 - q) * log(1 / (1 - share)))
        assert got[row].item() == pytest.approx(want, rel=1e-10)


# -- all of them --------------------------------------------------------------------------------------------------------


def test_chunks_and_rows_are_the_same_positions():
    teacher, student = logits(9, 6, seed=14)
    values, ids = torch.log_softmax(teacher, -1).topk(3, -1)
    rest, dense = 1 - values.exp().sum(-1), DenseSignal(teacher, Head(torch.eye(6, dtype=torch.float64)))
    for signal in (TopK(ids, values), TopK(ids, values, rest), Sampled(ids, values.exp(), rest), Sampled(ids, values.exp()), TextSignal(ids[:, 0]), dense):  # fmt: skip
        want = compared(signal.chunk(slice(0, 9)).rows(slice(0, 9)), "forward_kl", {}, student)
        for start, stop in ((0, 4), (4, 9)):
            for row in range(stop - start):
                part = signal.chunk(slice(start, stop)).rows(slice(row, row + 1))
                here = slice(start + row, start + row + 1)
                for got, whole_of_it in zip(compared(part, "forward_kl", {}, student[here]), want, strict=True):
                    close(got, whole_of_it[here])


WORDS = "dense signal|whole distribution"
SIGNALS = {"top": TopK(torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]])), "sampled": Sampled(torch.tensor([[1]]), torch.ones(1, 1)),
           "written": TextSignal(torch.tensor([1]))}  # fmt: skip


@pytest.mark.parametrize(
    ("signal", "name", "params", "words"),
    [
        ("top", "taid", {}, WORDS), ("top", "dkd", {}, WORDS), ("top", "logit_mse", {}, WORDS), ("top", "forward_kl", {"temperature": 2}, "temperature 2"),
        ("sampled", "reverse_kl", {}, "forward_kl"), ("sampled", "jsd", {}, "forward_kl"), ("sampled", "forward_kl", {"temperature": 2}, "temperature 1"),
        ("written", "reverse_kl", {}, "cross_entropy, jsd or tvd"), ("written", "forward_kl", {"temperature": 2}, "temperature 2"),
        ("written", "taid", {}, WORDS), ("written", *REVERSE_END, "cross_entropy"), *(("written", name, {}, "cross_entropy") for name, known in DIVERGENCES.items() if not known.one_hot),
    ],
)  # fmt: skip
def test_what_a_signal_cannot_carry_is_refused_by_name(signal, name, params, words):
    with pytest.raises(limbeck.UserError, match=words) as error:
        compared(SIGNALS[signal], name, params, torch.zeros(1, 4))
    assert name in str(error.value)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_few_tokens_are_no_whole_distribution(signal):
    with pytest.raises(limbeck.UserError, match="teacher itself"):
        _ = SIGNALS[signal].chunk(slice(0, 1)).rows(slice(0, 1)).p
