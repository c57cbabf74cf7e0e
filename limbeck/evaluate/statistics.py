"""Intervals for what was measured: the item (a prompt with its answer) is the unit that is resampled.

A metric per token is a ratio, sum of values over sum of tokens; resampling items keeps the tokens of one answer
together, since they are not independent. Percentile bootstrap (Efron 1979), seeded, so a page can be made again.

A method that was trained with several seeds adds an outer level, the seeds. All of them answer the same items, so the
two levels are crossed: a resample draws seeds and items independently, and takes the same items from every seed it drew
(Owen 2007). Drawing items anew for each seed would treat one hard prompt as several independent ones. Seeds are few,
and S draws of S seeds understate their spread: with 3 seeds that differ much, a plain percentile interval holds the
truth in 74 % of the cases, not 95 %. So each resample's deviation due to its seeds is stretched by sqrt(S / c) with c
drawn from chi-square with S - 1 degrees of freedom: the sqrt(S / (S - 1)) of an unbiased variance times the spread that
makes a normal deviate Student's. Where seeds differ by item noise alone the interval is too wide rather than too
narrow.

Shapes: I items, S seeds, R resamples, K tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from limbeck.config.significance import CONFIDENCE, LEAST_ITEMS
from limbeck.types import UserError

RESAMPLES = 2000
CHUNK = 2**22

Numbers = Sequence[float] | np.ndarray
Rows = Sequence[Numbers] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over `n` items."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def exponential(self) -> Interval:
        """The same of e to that power: a perplexity from nats. Cut off at e^700, near the largest float."""
        value, low, high = (math.exp(min(nats, 700.0)) for nats in (self.value, self.low, self.high))
        return Interval(value, low, high, self.n)


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A difference with its 95 % interval over `n` items and the two-sided p-value of no difference.

    `test` names what p comes from, where that is not the bootstrap.
    """

    p: float
    test: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "test" or value}


@dataclass(frozen=True)
class McNemar:
    """Items that only the first, and only the second, got right, and the two-sided p-value of no difference."""

    only_first: int
    only_second: int
    p: float


def ratio_interval(values: Numbers, weights: Numbers, seed: int = 0, *, of_share: bool = False) -> Interval:
    """sum(values) / sum(weights) over items, with its bootstrap interval.

    Args:
        values: one sum per item (nats of an answer, say).
        weights: one weight per item (its tokens).
        of_share: no value is below 0 or above its weight (see `share_limits`).

    Raises:
        UserError: no item has a weight, a number is not finite, or the lengths differ.
    """
    return nested_interval([values], [weights], seed, of_share=of_share)


def share_limits(share: float, limits: tuple[float, float], items: int) -> tuple[float, float]:
    """The 95 % limits of a share of items. Where it is 0 or 1 no resample differs, so the far limit is the exact one
    (Clopper and Pearson 1934): 1 - 0.025^(1/items), or 0.025^(1/items)."""
    far = ((1 - CONFIDENCE) / 2) ** (1 / max(1, items))
    low, high = limits
    return (min(low, far) if share == 1 else low, max(high, 1 - far) if share == 0 else high)


def paired_difference(first: Numbers, second: Numbers, weights: Numbers, seed: int = 0) -> Interval:
    """sum(first - second) / sum(weights) over the same items in the same order: below 0, the first is the smaller."""
    if len(first) != len(second):
        raise UserError(
            f"{len(first)} items against {len(second)}: a paired difference needs the same items in the same order"
        )
    return ratio_interval(np.asarray(first, float) - np.asarray(second, float), weights, seed)


def nested_interval(values_by_seed: Rows, weights_by_seed: Rows, seed: int = 0, *, of_share: bool = False) -> Interval:
    """sum(values) / sum(weights) over all seeds and items, with its interval over both. One seed: `ratio_interval`.

    Args:
        values_by_seed: [S, I], one row per training seed, the same items in the same order in each.
        weights_by_seed: [S, I].
        of_share: no value is below 0 or above its weight. Where all weights are 1 and all values 0, or all 1, the
            interval is that of `share_limits` over the items, whatever the number of seeds.

    Raises:
        UserError: as `ratio_interval`, or seeds with different numbers of items.
    """
    table = _Table.of(values_by_seed, weights_by_seed)
    (ratios_R,) = _resampled([table], seed, RESAMPLES)
    limits = _limits(ratios_R)
    if of_share and (table.weights_SI == 1).all():
        limits = share_limits(table.ratio, limits, table.items)
    return Interval(table.ratio, *limits, table.items)


def nested_difference(
    first_values: Rows,
    first_weights: Rows,
    second_values: Rows,
    second_weights: Rows,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """The first method's ratio minus the second's on the same items, with its interval over seeds and items.

    Where both have the same number of seeds these are drawn together, pair by pair; else apart from each other.

    The p-value turns the percentile interval around: 2 (1 + min(resamples <= 0, resamples >= 0)) / (R + 1), at most 1.
    So it agrees with the interval: 0 lies outside just where p < 0.05, up to one resample. It is never 0, and never
    below 2 / (R + 1): for very many comparisons raise `resamples`. A method with one seed gives no evidence about its
    seeds: then the interval covers that very training, not the method. Fewer than LEAST_ITEMS items can't tell: p is 1.

    Args:
        first_values, first_weights: [S, I]; second_values, second_weights: [S', I], as in `nested_interval`.
    """
    tables = [_Table.of(first_values, first_weights), _Table.of(second_values, second_weights)]
    first_R, second_R = _resampled(tables, seed, resamples)
    drawn_R = (first_R - second_R)[np.isfinite(first_R - second_R)]
    tail = min((drawn_R <= 0).sum(), (drawn_R >= 0).sum())
    p = min(1.0, 2 * (1 + int(tail)) / (len(drawn_R) + 1)) if tables[0].items >= LEAST_ITEMS else 1.0
    return PairedDifference(tables[0].ratio - tables[1].ratio, *_limits(drawn_R), tables[0].items, p)


def recovered(
    student: tuple[Rows, Rows],
    untouched: tuple[Rows, Rows],
    teacher: tuple[Rows, Rows],
    *,
    better: str,
    seed: int = 0,
) -> Interval | None:
    """The share of the teacher's lead that distillation won: (student - untouched) / (teacher - untouched).

    None where the teacher does not clearly lead: where the interval of the denominator holds 0, or lies on the worse
    side. There is nothing to recover then, so the share is undefined and must not enter a mean. The few resamples in
    which the lead changes its sign have no share and are left out.

    Args:
        student, untouched, teacher: (values, weights) of every seed over the same items, each [S, I]; a system's metric
            is sum(values) / sum(weights).
        better: `high` or `low`, the side of the metric that is.
    """
    tables = [_Table.of(values, weights) for values, weights in (student, untouched, teacher)]
    student_R, untouched_R, teacher_R = _resampled(tables, seed, RESAMPLES)
    lead_R = teacher_R - untouched_R
    low, high = _limits(lead_R)
    if (low <= 0) if better == "high" else (high >= 0):
        return None
    ours, base, theirs = (table.ratio for table in tables)
    usable_R = lead_R * (theirs - base) > 0
    shares_R = (student_R - untouched_R)[usable_R] / lead_R[usable_R]
    return Interval((ours - base) / (theirs - base), *_limits(shares_R), tables[0].items)


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> McNemar:
    """Exact test (McNemar 1947) of two systems' right and wrong answers to the same items, in the same order.

    Of n items that only one got right, each is the first's with probability 1/2 if the two are equal: twice the smaller
    binomial tail, at most 1. Without any such item p is 1.
    """
    if len(first) != len(second):
        raise UserError(
            f"{len(first)} items against {len(second)}: McNemar's test needs the same items in the same order"
        )
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    count = only_first + only_second
    tail = 0
    ways = 1
    for wins in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (count - wins) // (wins + 1)
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**count))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number, by name (Holm 1979): below 0.05 they hold together with 5 % risk of any
    error.

    The i-th smallest of m is multiplied by m - i + 1; none falls below a smaller one's, none exceeds 1.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise UserError(f"{name}: {p} is no p-value; leave out comparisons that have none")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers is right, from n answers of which c are: 1 - C(n-c, k) / C(n, k) (Chen et al.
    2021).

    Unbiased, and exact up to one rounding: the binomials are whole numbers of any size.

    Raises:
        UserError: fewer than k answers, for which there is no unbiased estimate.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(
            f"pass@{k} of {n} answers with {c} right is undefined: it needs at least k answers and k of 1 or more"
        )
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def ndcg(relevances: Sequence[float], k: int | None = None) -> float:
    """Normalised discounted cumulative gain of a ranking, 0 to 1 (Jarvelin and Kekalainen 2002; gains of Burges et al.
    2005).

    sum over ranks i of (2^relevance - 1) / log2(i + 1), divided by the same sum in the best order; both end at rank k.

    Args:
        relevances: one grade (0 or more) per document, in ranked order. Give all judged documents, not the first k
            alone: the best order is taken from them.

    Raises:
        UserError: no relevant document, so no order is better than another.
    """
    gains_N = 2.0 ** np.asarray(relevances, float) - 1
    if not np.isfinite(gains_N).all() or (gains_N < 0).any() or (k is not None and k < 1):
        raise UserError("nDCG needs grades of 0 or more, and k of 1 or more")
    if not gains_N.sum() > 0:
        raise UserError("nDCG is undefined: no document is relevant; leave the query out")
    discounts_K = 1 / np.log2(np.arange(2, len(gains_N) + 2))[:k]
    return float(gains_N[:k] @ discounts_K / (np.sort(gains_N)[::-1][:k] @ discounts_K))


@dataclass(frozen=True)
class _Table:
    """Values and weights of one method, one row per seed."""

    values_SI: np.ndarray
    weights_SI: np.ndarray

    @classmethod
    def of(cls, values_by_seed: Rows, weights_by_seed: Rows) -> _Table:
        lengths = {len(row) for row in (*values_by_seed, *weights_by_seed)}
        if len(values_by_seed) != len(weights_by_seed) or len(lengths) > 1:
            raise UserError(
                f"rows of {sorted(lengths)} numbers: give one value and one weight per item, the same items for every"
                " seed"
            )
        table = cls(np.asarray(values_by_seed, float), np.asarray(weights_by_seed, float))
        if table.weights_SI.sum() <= 0:
            raise UserError("there is nothing to average: no item has a weight")
        if not (np.isfinite(table.values_SI).all() and np.isfinite(table.weights_SI).all()):
            raise UserError("a value is not finite; mark the item instead of averaging over it")
        return table

    @property
    def seeds(self) -> int:
        return len(self.values_SI)

    @property
    def items(self) -> int:
        return int(self.values_SI.shape[1])

    @property
    def ratio(self) -> float:
        return float(self.values_SI.sum() / self.weights_SI.sum())

    def ratios(self, picks_RI: np.ndarray, times_RS: np.ndarray, stretch_R: np.ndarray) -> np.ndarray:
        """[R], NaN where a resample has no weight. `times_RS` says how often each seed was drawn."""
        values_RS = np.stack([row_I[picks_RI].sum(1) for row_I in self.values_SI], 1)
        weights_RS = np.stack([row_I[picks_RI].sum(1) for row_I in self.weights_SI], 1)
        every_R = _ratio(values_RS.sum(1), weights_RS.sum(1))
        drawn_R = _ratio((times_RS * values_RS).sum(1), (times_RS * weights_RS).sum(1))
        return np.asarray(every_R + stretch_R * (drawn_R - every_R))


def _ratio(values_R: np.ndarray, weights_R: np.ndarray) -> np.ndarray:
    ratio_R = np.full(len(values_R), np.nan)
    np.divide(values_R, weights_R, out=ratio_R, where=weights_R > 0)
    return ratio_R


def _resampled(tables: Sequence[_Table], seed: int, resamples: int) -> np.ndarray:
    """[K, R]: every table's ratio in every resample. All share the items drawn; those with equally many seeds share the
    seeds."""
    items = tables[0].items
    if any(table.items != items for table in tables):
        raise UserError(
            f"{sorted({table.items for table in tables})} items: a comparison needs the same items in the same order"
        )
    item_rng = np.random.default_rng(seed)
    seed_rng = np.random.default_rng([seed, 1])
    chunks = []
    for start in range(0, resamples, size := max(1, CHUNK // items)):
        count = min(size, resamples - start)
        picks_RI = item_rng.integers(0, items, (count, items))
        drawn = {seeds: draw_seeds(seeds, count, seed_rng) for seeds in sorted({table.seeds for table in tables})}
        chunks.append([table.ratios(picks_RI, *drawn[table.seeds]) for table in tables])
    return np.concatenate(chunks, axis=1)


def draw_seeds(seeds: int, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """times_RS, how often each seed is drawn, and stretch_R (see the top of this file; 1 for one seed)."""
    times_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    return times_RS, np.sqrt(seeds / rng.chisquare(seeds - 1, resamples)) if seeds > 1 else np.ones(resamples)


def _limits(drawn_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn_R[np.isfinite(drawn_R)], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
