"""Intervals cover what they should, and refuse what has no answer."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.evaluate.statistics import paired_difference, ratio_interval


def test_value_is_the_ratio_of_sums_and_the_interval_is_seeded():
    got = ratio_interval([2.0, 6.0, 1.0], [1.0, 2.0, 1.0])
    assert got.value == 9 / 4 and got.n == 3 and got.low <= got.value <= got.high
    assert got == ratio_interval([2.0, 6.0, 1.0], [1.0, 2.0, 1.0])


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


@pytest.mark.parametrize(("values", "weights"), [([], []), ([1.0], [0.0]), ([float("nan")], [1.0]), ([1.0, 2.0], [1.0])])
def test_undefined_is_an_error_and_never_a_number(values, weights):
    with pytest.raises(ValueError):
        ratio_interval(values, weights)


def test_an_item_without_tokens_does_not_poison_the_resamples():
    got = ratio_interval([0.0, 1.0], [0.0, 1.0])
    assert got.value == got.low == got.high == 1.0
