"""Intervals cover what they should, tests agree with enumeration, and what has no answer is refused."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from limbeck.evaluate.statistics import (
    RESAMPLES,
    McNemar,
    PairedDifference,
    holm,
    mcnemar,
    ndcg,
    nested_difference,
    nested_interval,
    paired_difference,
    pass_at_k,
    ratio_interval,
    recovered,
)
from limbeck.types import UserError


def test_value_is_the_ratio_of_sums_and_the_interval_is_seeded():
    got = ratio_interval([2.0, 6.0, 1.0], [1.0, 2.0, 1.0])
    assert got.value == 9 / 4 and got.n == 3 and got.low <= got.value <= got.high
    assert got == ratio_interval([2.0, 6.0, 1.0], [1.0, 2.0, 1.0])


def test_resampling_is_the_plain_percentile_bootstrap():
    """The numbers of a run do not change with the code: written out once more, with the same draws."""
    noise = np.random.default_rng(4)
    values, weights = noise.normal(3, 1, 37), noise.uniform(1, 9, 37)
    picks = np.random.default_rng(5).integers(0, 37, (RESAMPLES, 37))
    low, high = np.quantile(values[picks].sum(1) / weights[picks].sum(1), [0.025, 0.975])
    got = ratio_interval(values, weights, seed=5)
    assert (got.low, got.high) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_coverage_on_synthetic_ratios():
    """Of 300 samples of 60 answers, about 95 % of the intervals hold the true ratio, 2."""
    noise, hits = np.random.default_rng(0), 0
    for _ in range(300):
        tokens = noise.integers(5, 60, 60).astype(float)
        values = tokens * (2 + noise.normal(0, 0.5, 60))
        got = ratio_interval(values, tokens)
        hits += got.low <= 2 <= got.high
    assert 0.90 <= hits / 300 <= 0.98


def test_width_agrees_with_the_normal_approximation():
    noise = np.random.default_rng(1)
    values = noise.normal(0, 1, 400)
    got = ratio_interval(values, np.ones(400))
    assert got.high - got.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_pairing_removes_what_both_share():
    noise = np.random.default_rng(2)
    shared, tokens = noise.normal(0, 5, 80), np.ones(80)
    got = paired_difference(shared - 0.1, shared, tokens)
    assert got.value == pytest.approx(-0.1) and got.high < 0
    alone = ratio_interval(shared, tokens)
    assert got.high - got.low < (alone.high - alone.low) / 10


def test_coverage_of_a_paired_difference():
    noise, hits = np.random.default_rng(6), 0
    for _ in range(300):
        hard, tokens = noise.normal(2, 1, 60), noise.integers(5, 60, 60).astype(float)
        first, second = hard + noise.normal(0.3, 0.4, 60), hard + noise.normal(0, 0.4, 60)
        got = paired_difference(tokens * first, tokens * second, tokens)
        hits += got.low <= 0.3 <= got.high
    assert 0.90 <= hits / 300 <= 0.98


@pytest.mark.parametrize(
    ("values", "weights"), [([], []), ([1.0], [0.0]), ([float("nan")], [1.0]), ([1.0, 2.0], [1.0])]
)
def test_undefined_is_an_error_and_never_a_number(values, weights):
    with pytest.raises(UserError):
        ratio_interval(values, weights)


@pytest.mark.parametrize("n", [1, 20, 200])
def test_a_share_of_all_or_of_none_has_a_width(n):
    """The exact limits: with a share there, all of n items are the same in 2.5 % of the cases."""
    every, none = (ratio_interval(np.full(n, value), np.ones(n), of_share=True) for value in (1.0, 0.0))
    assert (every.value, every.high, none.value, none.low) == (1, 1, 0, 0)
    assert every.low**n == pytest.approx(0.025) and none.high == pytest.approx(1 - every.low)
    seeds = nested_interval(np.ones((3, n)), np.ones((3, n)), of_share=True)
    assert seeds == every  # the seeds answer the same items


def test_only_a_share_of_all_or_of_none_is_widened():
    rest, ones = np.array([1.0] * 19 + [0.0]), np.ones(20)
    assert ratio_interval(rest, ones, of_share=True) == ratio_interval(rest, ones)
    for got in (ratio_interval(ones, ones), paired_difference(ones, ones, ones)):
        assert got.low == got.value == got.high
    assert ratio_interval(np.full(20, 3.0), np.full(20, 3.0), of_share=True).low == 1  # no weights of one


def test_an_item_without_tokens_does_not_poison_the_resamples():
    got = ratio_interval([0.0, 1.0], [0.0, 1.0])
    assert got.value == got.low == got.high == 1.0


def test_one_seed_is_resampled_over_items_only():
    values, tokens = np.random.default_rng(3).normal(2, 1, 50), np.full(50, 3.0)
    assert nested_interval([values], [tokens]) == ratio_interval(values, tokens)


def test_seeds_that_agree_add_nothing_and_seeds_that_differ_do():
    values, tokens = np.random.default_rng(3).normal(2, 1, 50), np.ones(50)
    same = nested_interval([values] * 4, [tokens] * 4)
    alone = ratio_interval(values, tokens)
    assert (same.value, same.low, same.high) == pytest.approx(
        (alone.value, alone.low, alone.high), rel=1e-12
    ) and same.n == 50
    spread = nested_interval([values + shift for shift in (-1, -0.3, 0.4, 0.9)], [tokens] * 4)
    assert spread.high - spread.low > 2 * (alone.high - alone.low)


def crossed(
    noise: np.random.Generator, seeds: int, items: int, by_seed: float, by_item: float, rest: float
) -> np.ndarray:
    """Values whose true mean is 0: an effect per seed, one per item, and noise."""
    return (
        noise.normal(0, by_seed, (seeds, 1))
        + noise.normal(0, by_item, (1, items))
        + noise.normal(0, rest, (seeds, items))
    )


@pytest.mark.parametrize(("seeds", "by_seed", "by_item"), [(3, 1.0, 0.5), (5, 1.0, 0.5), (4, 0.2, 1.0), (10, 0.3, 1.0)])
def test_coverage_over_seeds_and_items(seeds, by_seed, by_item):
    """Also with few seeds that differ much, where a plain percentile interval of 3 seeds covers 74 %."""
    noise, hits = np.random.default_rng(7), 0
    for _ in range(250):
        values = crossed(noise, seeds, 40, by_seed, by_item, 0.3)
        got = nested_interval(values, np.ones_like(values))
        hits += got.low <= 0 <= got.high
    assert 0.90 <= hits / 250 <= 0.985


@pytest.mark.parametrize(("first_seeds", "second_seeds"), [(3, 3), (5, 3)])
def test_coverage_of_a_difference_over_seeds_and_its_p_value(first_seeds, second_seeds):
    """Under no difference p is below 0.05 in about 5 % of the cases, and just where the interval leaves out 0."""
    noise, hits, small = np.random.default_rng(8), 0, 0
    for _ in range(250):
        hard = noise.normal(0, 1, (1, 40))
        first, second = (
            hard + crossed(noise, first_seeds, 40, 0.3, 0, 0.3),
            hard + crossed(noise, second_seeds, 40, 0.3, 0, 0.3),
        )
        got = nested_difference(first, np.ones_like(first), second, np.ones_like(second))
        hits += got.low <= 0 <= got.high
        small += got.p < 0.05
    assert 0.90 <= hits / 250 <= 0.99
    assert abs((250 - hits) - small) <= 3


def test_a_difference_pairs_items_and_seeds():
    noise = np.random.default_rng(9)
    base = crossed(noise, 3, 60, 1.0, 2.0, 0.2)
    got = nested_difference(base + 0.05, np.ones_like(base), base, np.ones_like(base))
    assert isinstance(got, PairedDifference) and got.value == pytest.approx(0.05)
    assert got.low == pytest.approx(0.05) and got.high == pytest.approx(0.05)
    assert got.p == 2 / (RESAMPLES + 1)
    finer = nested_difference(base + 0.05, np.ones_like(base), base, np.ones_like(base), resamples=5000)
    assert finer.p == 2 / 5001
    assert got.as_dict().keys() == {"value", "low", "high", "n", "p"}


def test_systems_that_are_equal_have_p_1_and_a_difference_needs_no_equal_weights():
    values, tokens = np.array([[3.0, 5.0, 8.0]]), np.array([[1.0, 2.0, 3.0]])
    assert nested_difference(values, tokens, values, tokens).p == 1.0
    got = nested_difference(values, tokens, [[2.0, 2.0, 2.0]], [[1.0, 1.0, 1.0]])
    assert got.value == pytest.approx(16 / 6 - 2)


def test_three_seeds_do_not_make_a_tiny_p_value():
    """Means 0.2, 1.0, 1.8 against 0: Student's t of 2.2 with 2 degrees of freedom, p = 0.16."""
    values = np.repeat([[0.2], [1.0], [1.8]], 30, axis=1)
    zero = np.zeros_like(values)
    got = nested_difference(values, np.ones_like(values), zero, np.ones_like(values))
    assert 0.08 < got.p < 0.3 and got.low < 0 < got.high


@pytest.mark.parametrize(
    ("values", "weights"),
    [([[1.0, 2.0], [1.0]], [[1.0, 1.0], [1.0]]), ([[1.0], [1.0]], [[1.0]]), ([], []), ([[math.inf]], [[1.0]])],
)
def test_seeds_must_have_the_same_items(values, weights):
    with pytest.raises(UserError):
        nested_interval(values, weights)


def test_methods_must_have_the_same_items():
    with pytest.raises(UserError, match="same items"):
        nested_difference([[1.0, 2.0]], [[1.0, 1.0]], [[1.0]], [[1.0]])
    with pytest.raises(UserError, match="same items"):
        paired_difference([1.0], [1.0, 2.0], [1.0])


def test_recovered_share_and_its_coverage():
    """The student wins 70 % of a teacher's lead of 1 nat, whichever side is better."""
    noise, hits, values = np.random.default_rng(10), 0, []
    for repeat in range(200):
        sign = 1 if repeat % 2 else -1
        hard, tokens = noise.normal(0, 1, 80), noise.integers(1, 20, 80).astype(float)
        untouched = hard + noise.normal(0, 0.8, 80)
        teacher, student = hard + sign + noise.normal(0, 0.8, 80), hard + 0.7 * sign + noise.normal(0, 0.8, 80)
        sides = [([tokens * values], [tokens]) for values in (student, untouched, teacher)]
        got = recovered(*sides, better="high" if sign > 0 else "low")
        hits += got.low <= 0.7 <= got.high
        values.append(got.value)
    assert 0.90 <= hits / 200 <= 0.985
    assert np.median(values) == pytest.approx(0.7, abs=0.05)


def test_recovered_is_the_ratio_of_differences_of_ratios():
    got = recovered(
        ([[6.0, 6.0]], [[2.0, 2.0]]), ([[2.0, 2.0]], [[1.0, 1.0]]), ([[5.0, 5.0]], [[1.0, 1.0]]), better="high"
    )
    assert got.value == got.low == got.high == pytest.approx((3 - 2) / (5 - 2))


def test_resamples_whose_lead_changes_its_sign_have_no_share():
    """A lead of 2.2 standard errors: about 1 resample in 70 has none. Written out with the same draws."""
    noise, ones, zero = np.random.default_rng(13), np.ones(40), np.zeros(40)
    lead = noise.normal(0, 1, 40)
    lead += 2.2 * lead.std() / np.sqrt(40) - lead.mean()
    drawn = lead[np.random.default_rng(0).integers(0, 40, (RESAMPLES, 40))].mean(1)
    assert 0 < (drawn <= 0).sum() < 0.025 * RESAMPLES
    low, high = np.quantile(0.01 / drawn[drawn > 0], [0.025, 0.975])
    got = recovered(([zero + 0.01], [ones]), ([zero], [ones]), ([lead], [ones]), better="high")
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))


def test_recovered_is_undefined_without_a_clear_lead():
    noise, ones = np.random.default_rng(11), np.ones(50)
    teacher, untouched = noise.normal(0, 1, 50), noise.normal(0, 1, 50)
    equal = teacher - teacher.mean() + untouched.mean()
    worse = untouched - 1
    for better, other in (("high", equal), ("high", untouched), ("high", worse), ("low", untouched + 1)):
        sides = [([values], [ones]) for values in (teacher, untouched, other)]
        assert recovered(*sides, better=better) is None


def test_recovered_has_the_spread_of_its_seeds():
    """Three trainings that end far apart on items that hardly differ."""
    noise, ones = np.random.default_rng(12), np.ones(200)
    untouched, teacher = noise.normal(0, 0.05, 200), 1 + noise.normal(0, 0.05, 200)
    students = [level + noise.normal(0, 0.05, 200) for level in (0.95, 0.55, 0.75)]
    got = recovered((students, [ones] * 3), ([untouched], [ones]), ([teacher], [ones]), better="high")
    assert got.value == pytest.approx(0.75, abs=0.03) and got.low < 0.55 and got.high > 0.95


def binomial_p(b: int, c: int) -> Fraction:
    """Two-sided exact p from all 2^(b+c) ways the discordant items may fall."""
    n = b + c
    extreme = sum(1 for ways in itertools.product((0, 1), repeat=n) if abs(2 * sum(ways) - n) >= abs(b - c))
    return Fraction(extreme, 2**n)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (3, 3), (2, 7), (9, 1)])
def test_mcnemar_by_enumeration(b, c):
    first = [True] * b + [False] * c + [True] * 4 + [False] * 3
    second = [False] * b + [True] * c + [True] * 4 + [False] * 3
    assert mcnemar(first, second) == McNemar(b, c, float(binomial_p(b, c)))


def test_mcnemar_known_value_size_and_refusal():
    assert mcnemar([True] * 6 + [False], [False] * 6 + [True]).p == pytest.approx(2 * (1 + 7) / 128)
    wins = np.arange(20_000) < 9_800
    large = mcnemar(wins, ~wins)
    assert large.p == pytest.approx(math.erfc((400 - 1) / math.sqrt(2 * 20_000)), rel=0.01)
    with pytest.raises(UserError, match="same items"):
        mcnemar([True], [True, False])


def test_holm_against_a_table_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 are 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06."""
    got = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(got) == ["a", "b", "c", "d"]
    assert got == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_holm_agrees_with_the_closed_test_of_all_subsets():
    """Holm is the closure of Bonferroni: a hypothesis' adjusted p is the largest of its subsets' Bonferroni p-values."""
    noise = np.random.default_rng(12)
    for _ in range(20):
        p_values = {str(place): float(p) for place, p in enumerate(noise.uniform(0, 1, 5) ** 2)}
        for name, adjusted in holm(p_values).items():
            subsets = (s for size in range(1, 6) for s in itertools.combinations(p_values, size) if name in s)
            assert adjusted == pytest.approx(
                max(min(1.0, len(s) * min(p_values[other] for other in s)) for s in subsets)
            )


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(UserError, match="bad"):
        holm({"good": 0.5, "bad": p})


def test_pass_at_k_by_enumeration_of_all_draws():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations(range(n), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws), abs=1e-15)


def test_pass_at_k_of_many_answers_and_of_too_few():
    assert pass_at_k(100_000, 1, 100) == pytest.approx(0.001, rel=1e-12)
    assert pass_at_k(2000, 1000, 1000) == 1.0 and pass_at_k(10, 0, 5) == 0.0
    for n, c, k in ((4, 1, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0)):
        with pytest.raises(UserError, match="undefined"):
            pass_at_k(n, c, k)


def test_ndcg_by_hand_and_against_all_orders():
    """Grades 3, 2, 3, 0, 1, 2: gains 7, 3, 7, 0, 1, 3 over log2 of 2 to 7, and the best order 7, 7, 3, 3, 1, 0."""
    log = math.log2
    ours = 7 + 3 / log(3) + 7 / 2 + 1 / log(6) + 3 / log(7)
    best = 7 + 7 / log(3) + 3 / 2 + 3 / log(5) + 1 / log(6)
    assert ndcg([3, 2, 3, 0, 1, 2]) == pytest.approx(ours / best)
    assert ndcg([3, 2, 3, 0, 1, 2], 2) == pytest.approx((7 + 3 / log(3)) / (7 + 7 / log(3)))
    assert ndcg([0, 0, 1], 2) == 0.0 and ndcg([1], 10) == 1.0
    orders = set(itertools.permutations([2, 1, 1, 0]))
    scores = {order: ndcg(order) for order in orders}
    assert scores[max(scores, key=scores.__getitem__)] == 1.0 == scores[2, 1, 1, 0]
    assert sum(score == 1.0 for score in scores.values()) == 1


@pytest.mark.parametrize(
    ("relevances", "k"), [([], None), ([0, 0], None), ([1, -1], None), ([1, 0], 0), ([float("nan")], None)]
)
def test_ndcg_without_an_answer_is_refused(relevances, k):
    with pytest.raises(UserError):
        ndcg(relevances, k)
