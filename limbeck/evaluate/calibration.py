"""Calibration: is a model right as often as it is sure? Reliability tables that can be added up, ECE and Brier score.

Shapes: N predictions, I items, C choices, R resamples, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from limbeck.config.significance import CONFIDENCE
from limbeck.evaluate.statistics import CHUNK, RESAMPLES, Interval, draw_seeds
from limbeck.types import UserError

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Predictions sorted into bins of equal width over their confidence: their number, summed confidence, how many were
    right.

    Bin b of B holds confidences in [b / B, (b + 1) / B); the last one holds 1 as well. Tables of items add up to the
    table of all their predictions, so a record per item loses nothing.
    """

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    correct: tuple[float, ...]

    @classmethod
    def of(cls, confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = BINS) -> Reliability:
        """
        Args:
            confidence_N: the probability of what was predicted, 0 to 1.
            correct_N: 1 or True where the prediction was right.

        Raises:
            UserError: other lengths, or a confidence that is no probability.
        """
        sure_N = np.asarray(confidence_N, float)
        right_N = np.asarray(correct_N, float)
        if sure_N.shape != right_N.shape or sure_N.ndim != 1:
            raise UserError(
                f"confidences of shape {sure_N.shape} for answers of shape {right_N.shape}: give one of each per"
                " prediction"
            )
        if bins < 1 or not ((sure_N >= 0) & (sure_N <= 1)).all() or not np.isin(right_N, (0, 1)).all():
            raise UserError(
                "a confidence must lie in 0 to 1 and an answer be right (1) or wrong (0); at least one bin is needed"
            )
        bin_N = np.minimum((sure_N * bins).astype(int), bins - 1)
        count_B, sure_B, right_B = (np.bincount(bin_N, weight_N, bins) for weight_N in (None, sure_N, right_N))
        return cls(tuple(map(int, count_B)), tuple(map(float, sure_B)), tuple(map(float, right_B)))

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> Reliability:
        """The table that `rows` returned. No rows at all: an empty table."""
        count, confidence, correct = zip(*(rows or [[0, 0.0, 0.0]] * BINS), strict=True)
        return cls(tuple(map(int, count)), tuple(map(float, confidence)), tuple(map(float, correct)))

    def rows(self) -> list[list[float]]:
        """[count, sum of confidence, number right] per bin, as JSON keeps it."""
        return [list(row) for row in zip(self.count, self.confidence, self.correct, strict=True)]

    def __add__(self, other: Reliability) -> Reliability:
        return merged([self, other])


def merged(tables: Sequence[Reliability]) -> Reliability:
    """The table of all predictions together.

    Raises:
        UserError: no table, or tables with other numbers of bins.
    """
    return Reliability.from_rows(_stacked(tables).sum(0).tolist())


def ece(table: Reliability) -> float:
    """Expected calibration error, 0 to 1 (Naeini et al. 2015; Guo et al. 2017): the share-weighted |accuracy -
    confidence| of the bins.

    It is never negative, so chance alone keeps it above 0; compare systems over the same number of predictions.

    Raises:
        UserError: there is no prediction.
    """
    return float(_ece(np.array([table.rows()]))[0])


def ece_interval(*trainings: Sequence[Reliability], seed: int = 0) -> Interval:
    """The mean of the trainings' ECEs, with its bootstrap interval over items and trainings; an item's predictions stay
    together.

    A resample's ECE is larger on average than that of the data, since it contains chance twice. That surplus (the
    resamples' mean minus the value) is taken off both limits, which are cut off at 0.

    Args:
        trainings: each one table per item, the same items in the same order.

    Raises:
        UserError: there is no prediction.
    """
    tables = [_stacked(tables) for tables in trainings]  # [I, B, 3] each
    items = len(tables[0])
    value = float(np.mean([_ece(table_IB3.sum(0, keepdims=True))[0] for table_IB3 in tables]))
    item_rng, seed_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    chunks = []
    for start in range(0, RESAMPLES, size := max(1, CHUNK // items)):
        times_RI = item_rng.multinomial(items, np.full(items, 1 / items), min(size, RESAMPLES - start)).astype(float)
        drawn = [np.tensordot(times_RI, table_IB3, 1) for table_IB3 in tables]  # [R, B, 3] each
        usable_R = np.min([table_RB3[:, :, 0].sum(1) for table_RB3 in drawn], axis=0) > 0
        ece_RS = np.stack([_ece(table_RB3[usable_R]) for table_RB3 in drawn], 1)
        times_RS, stretch_R = draw_seeds(len(tables), len(ece_RS), seed_rng)
        every_R = ece_RS.mean(1)
        chunks.append(every_R + stretch_R * ((times_RS * ece_RS).mean(1) - every_R))
    drawn_R = np.concatenate(chunks)
    low, high = np.quantile(drawn_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) - (drawn_R.mean() - value)
    return Interval(value, max(0.0, min(float(low), value)), max(float(high), value), items)


def curve(table: Reliability) -> list[dict[str, float]]:
    """Points of the reliability diagram, one per bin that holds a prediction: its limits, mean confidence, accuracy and
    count."""
    bins = len(table.count)
    return [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "confidence": sure / count,
            "accuracy": right / count,
            "count": count,
        }
        for place, (count, sure, right) in enumerate(table.rows())
        if count
    ]


def brier(prob_IC: np.ndarray, answer_I: np.ndarray) -> float:
    """The mean over items of sum over choices of (probability - truth)^2 (Brier 1950): 0 is best, 2 worst.

    Args:
        prob_IC: the probability of every choice; each row sums to 1.
        answer_I: the number of the right choice, 0 to C - 1.

    Raises:
        UserError: no item, other lengths, rows that are no distribution, or an answer that is no choice.
    """
    prob_IC, answer_I = np.asarray(prob_IC, float), np.asarray(answer_I)
    if prob_IC.ndim != 2 or not prob_IC.size or answer_I.shape != prob_IC.shape[:1]:
        raise UserError(
            f"probabilities of shape {prob_IC.shape} for answers of shape {answer_I.shape}: the Brier score needs [I,"
            " C] and [I]"
        )
    if not (prob_IC >= 0).all() or not np.allclose(prob_IC.sum(1), 1, atol=1e-3):
        raise UserError("the probabilities of an item's choices must not be negative and must sum to 1")
    if answer_I.dtype.kind not in "iu" or not ((answer_I >= 0) & (answer_I < prob_IC.shape[1])).all():
        raise UserError(f"an answer is no number of a choice: give 0 to {prob_IC.shape[1] - 1}")
    return float(((prob_IC - np.eye(prob_IC.shape[1])[answer_I]) ** 2).sum(1).mean())


def _stacked(tables: Sequence[Reliability]) -> np.ndarray:
    """[I, B, 3]: counts, confidences, number right."""
    if len({len(table.count) for table in tables}) != 1:
        raise UserError(
            "reliability tables add up only where there is one at least and all have the same number of bins"
        )
    return np.array([table.rows() for table in tables])


def _ece(table_RB3: np.ndarray) -> np.ndarray:
    total_R = table_RB3[:, :, 0].sum(1)
    if not (total_R > 0).all():
        raise UserError("calibration is undefined: there is no prediction")
    return np.asarray(np.abs(table_RB3[:, :, 1] - table_RB3[:, :, 2]).sum(1) / total_R)
