"""Intervals for what was measured: the item (a prompt with its answer) is the unit that is resampled.

A metric per token is a ratio, sum of values over sum of tokens; resampling items keeps the tokens of one answer
together, since they are not independent. Percentile bootstrap (Efron 1979), seeded, so a page can be made again.

Shapes: I items, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 2**22


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over `n` items."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def ratio_interval(values: Sequence[float], weights: Sequence[float], seed: int = 0) -> Interval:
    """sum(values) / sum(weights) over items, with its bootstrap interval.

    Args:
        values: one sum per item (nats of an answer, say).
        weights: one weight per item (its tokens).
    """
    return _interval(np.asarray(values, float), np.asarray(weights, float), seed)


def paired_difference(first: Sequence[float], second: Sequence[float], weights: Sequence[float], seed: int = 0) -> Interval:
    """sum(first - second) / sum(weights) over the same items in the same order: below 0, the first is the smaller."""
    return _interval(np.asarray(first, float) - np.asarray(second, float), np.asarray(weights, float), seed)


def _interval(values_I: np.ndarray, weights_I: np.ndarray, seed: int) -> Interval:
    if len(values_I) != len(weights_I):
        raise ValueError(f"{len(values_I)} values for {len(weights_I)} weights: one of each per item")
    if len(values_I) == 0 or weights_I.sum() <= 0:
        raise ValueError("there is nothing to average: no item has a weight")
    if not (np.isfinite(values_I).all() and np.isfinite(weights_I).all()):
        raise ValueError("a value is not finite; mark the item instead of averaging over it")
    noise = np.random.default_rng(seed)
    ratios: list[np.ndarray] = []
    for start in range(0, RESAMPLES, size := max(1, CHUNK // len(values_I))):
        picks_RI = noise.integers(0, len(values_I), (min(size, RESAMPLES - start), len(values_I)))
        totals_R = weights_I[picks_RI].sum(1)
        ratios.append(values_I[picks_RI].sum(1)[totals_R > 0] / totals_R[totals_R > 0])
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values_I.sum() / weights_I.sum()), float(low), float(high), len(values_I))
