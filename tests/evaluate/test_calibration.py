"""Reliability tables add up, and the scores agree with their definitions."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from limbeck.evaluate.calibration import Reliability, brier, curve, ece, ece_interval, merged
from limbeck.types import UserError


def test_bins_by_hand():
    got = Reliability.of(np.array([0.0, 0.05, 0.1, 0.95, 1.0]), np.array([0, 1, 1, 1, 0]))
    assert got.count == (2, 1, 0, 0, 0, 0, 0, 0, 0, 2)
    assert got.correct == (1, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert got.confidence == pytest.approx((0.05, 0.1, 0, 0, 0, 0, 0, 0, 0, 1.95))


def test_ece_by_hand():
    """Bins hold (0.6, 0.7, one of two right) and (0.95, right): |0.5 - 0.65| * 2/3 + |1 - 0.95| / 3."""
    table = Reliability.of(np.array([0.6, 0.7, 0.95]), np.array([1, 0, 1]), bins=2)
    assert table.count == (0, 3)
    assert ece(table) == pytest.approx(abs(2 / 3 - 2.25 / 3))
    table = Reliability.of(np.array([0.62, 0.68, 0.95]), np.array([1, 0, 1]))
    assert ece(table) == pytest.approx(0.15 * 2 / 3 + 0.05 / 3)


def test_ece_agrees_with_a_loop_over_masks():
    noise = np.random.default_rng(0)
    sure, right = noise.uniform(0, 1, 500), noise.integers(0, 2, 500)
    expected, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        here = (sure >= low) & (sure < high)
        if here.any():
            expected += here.mean() * abs(right[here].mean() - sure[here].mean())
    assert ece(Reliability.of(sure, right, bins=15)) == pytest.approx(expected)


def test_perfect_calibration_tends_to_zero_and_false_sureness_is_measured():
    noise = np.random.default_rng(1)
    sure = noise.uniform(0, 1, 400_000)
    right = noise.uniform(0, 1, 400_000) < sure
    small, large = ece(Reliability.of(sure[:400], right[:400])), ece(Reliability.of(sure, right))
    assert large < 0.005 < small
    assert ece(Reliability.of(np.full(1000, 0.9), noise.uniform(0, 1, 1000) < 0.6)) == pytest.approx(0.3, abs=0.05)


def test_merging_equals_pooling_and_survives_json():
    noise = np.random.default_rng(2)
    parts = [(noise.uniform(0, 1, size), noise.integers(0, 2, size)) for size in (3, 0, 40, 7)]
    tables = [Reliability.of(sure, right) for sure, right in parts]
    pooled = Reliability.of(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    again = [Reliability.from_rows(json.loads(json.dumps(table.rows()))) for table in tables]
    assert again == tables
    both = merged(again)
    assert both.count == pooled.count and both.correct == pooled.correct
    assert both.confidence == pytest.approx(pooled.confidence)
    assert tables[0] + tables[2] == merged([tables[0], tables[2]])
    assert Reliability.from_rows([]) + tables[0] == tables[0]


def test_curve_holds_the_bins_that_are_not_empty():
    points = curve(Reliability.of(np.array([0.62, 0.68, 0.95]), np.array([1, 0, 1])))
    assert [(p["low"], p["high"], p["count"]) for p in points] == [(0.6, 0.7, 2), (0.9, 1.0, 1)]
    assert [p["confidence"] for p in points] == pytest.approx([0.65, 0.95])
    assert [p["accuracy"] for p in points] == [0.5, 1.0]


def test_interval_of_ece_holds_what_such_a_sample_gives():
    """Over 200 samples, the intervals hold the average ECE of a sample in about 95 % of the cases."""
    noise = np.random.default_rng(3)

    def sample() -> list[Reliability]:
        sure = noise.uniform(0.3, 1, (40, 30))
        right = noise.uniform(0, 1, (40, 30)) < sure - 0.1 + noise.normal(0, 0.1, (40, 1))
        return [Reliability.of(s, r) for s, r in zip(sure, right, strict=True)]

    usual = np.mean([ece(merged(sample())) for _ in range(200)])
    intervals = [ece_interval(sample()) for _ in range(200)]
    assert 0.90 <= np.mean([one.low <= usual <= one.high for one in intervals]) <= 0.985
    assert all(one.n == 40 and 0 <= one.low <= one.value <= one.high for one in intervals)


def test_interval_of_ece_lies_around_the_value():
    """Of calibrated predictions all of the ECE is chance, which resamples hold twice: their mean is 1.4 times the value."""
    noise, middles, values = np.random.default_rng(5), [], []
    for _ in range(20):
        sure = noise.uniform(0.3, 1, (50, 30))
        got = ece_interval([Reliability.of(s, noise.uniform(0, 1, 30) < s) for s in sure])
        middles.append((got.low + got.high) / 2)
        values.append(got.value)
    assert np.mean(middles) == pytest.approx(np.mean(values), rel=0.1)


def test_brier_by_hand_and_of_two_choices():
    assert brier(np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]), np.array([0, 2])) == pytest.approx(
        (0.09 + 0.04 + 0.01) / 2
    )
    assert brier(np.array([[0.0, 1.0]]), np.array([0])) == 2.0
    prob, right = np.array([0.9, 0.4, 0.0]), np.array([True, False, False])
    assert brier(np.stack([1 - prob, prob], 1), right.astype(int)) == pytest.approx(2 * (0.01 + 0.16) / 3)


def test_brier_is_least_for_the_true_probability():
    noise = np.random.default_rng(4)
    right = noise.uniform(0, 1, 20_000) < 0.3
    scores = {share: brier(np.tile([1 - share, share], (20_000, 1)), right.astype(int)) for share in (0.1, 0.3, 0.5)}
    assert min(scores, key=scores.__getitem__) == 0.3 and scores[0.3] == pytest.approx(2 * 0.21, abs=0.02)


@pytest.mark.parametrize(
    ("sure", "right"),
    [([0.5], [1, 0]), ([1.2], [1]), ([float("nan")], [1]), ([0.5], [0.5]), ([[0.5]], [[1]]), ([-0.1], [0])],
)
def test_what_is_no_prediction_is_refused(sure, right):
    with pytest.raises(UserError):
        Reliability.of(np.array(sure), np.array(right))


@pytest.mark.parametrize(
    ("prob", "answer"),
    [([[0.5, 0.4]], [0]), ([[0.5, 0.5]], [2]), ([[0.5, 0.5]], [0, 1]), ([[1.5, -0.5]], [0]), ([[0.5, 0.5]], [0.0])],
)
def test_what_is_no_distribution_is_refused(prob, answer):
    with pytest.raises(UserError):
        brier(np.array(prob), np.array(answer))


def test_no_prediction_has_no_score():
    empty = Reliability.of(np.array([]), np.array([]))
    for undefined in (lambda: ece(empty), lambda: ece_interval([empty]), lambda: merged([]), lambda: ece_interval([])):
        with pytest.raises(UserError):
            undefined()
    with pytest.raises(UserError):
        brier(np.zeros((0, 2)), np.array([], int))
    with pytest.raises(UserError, match="same number of bins"):
        merged([empty, Reliability.of(np.array([0.5]), np.array([1]), bins=15)])
    assert curve(empty) == []


def test_errors_of_trainings_do_not_cancel():
    """One too modest, one too sure: each is 0.2 off, and so is their mean."""
    right = [np.arange(100) < count for count in (95, 55)]
    trainings = [[Reliability.of(np.array([0.75]), np.array([hit])) for hit in hits] for hits in right]
    assert ece_interval(*trainings).value == pytest.approx(0.2)
    alone = ece_interval(trainings[0])
    assert ece_interval(trainings[0], trainings[0]).value == alone.value
