"""The metrics of a system, each declared once: what it is called, which way is better, and how it is computed.

To add one, add an entry to METRICS (a kind of task has metrics of its own; see `task.TaskKind`). `summary.json` carries
title, unit, direction and group of every metric that it holds, and the report reads them there.

Shapes: R response positions of a block, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from limbeck.evaluate import calibration
from limbeck.evaluate.calibration import Reliability
from limbeck.evaluate.records import ItemResult, SystemRecords
from limbeck.evaluate.statistics import Interval
from limbeck.evaluate.token_sums import TokenBlock, TokenSum, dot

Better = Literal["low", "high", "none"]
HELD_OUT = "Fidelity on held-out text of the teacher"
OWN = "On text that it writes itself"


@dataclass(frozen=True)
class Column:
    """One metric of one training: a value and a weight per item; the metric is sum of values / sum of weights."""

    ids: tuple[str, ...]
    values: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[str], values: Sequence[float], weights: Sequence[float] | None = None) -> Column:
        return cls(
            tuple(ids), np.asarray(values, float), np.ones(len(ids)) if weights is None else np.asarray(weights, float)
        )

    @property
    def is_binary(self) -> bool:
        """Whether every item is 0 or 1 and counts once."""
        return bool(np.isin(self.values, (0, 1)).all() and (self.weights == 1).all())


class MetricSource:
    """Where a metric's numbers come from: one of `column` and `interval` is overridden.

    `sums` are the quantities that must be added up over the tokens of every answer for it.
    """

    sums: tuple[TokenSum, ...] = ()

    def column(self, records: SystemRecords) -> Column | None:
        """A value and a weight per item, for a metric that is a ratio over items."""
        return None

    def interval(self, seeds: Sequence[SystemRecords]) -> Interval | None:
        """The whole metric with its interval, for any other; it has no paired differences."""
        return None


class TokenRatio(MetricSource):
    """sum of `top` / sum of `per` (by default the number of tokens), over held-out or over the system's own text."""

    def __init__(self, text: Literal["held_out", "own"], top: TokenSum, per: TokenSum | None = None) -> None:
        self.text = text
        self.top = top
        self.per = per
        self.sums = (top,) if per is None else (top, per)

    def column(self, records: SystemRecords) -> Column | None:
        items = records.fidelity if self.text == "held_out" else records.own
        if self.per is not None:
            items = [item for item in items if item.sums.get(self.per.name, 0) > 0 and self.top.name in item.sums]
        elif not all(self.top.name in item.sums for item in items):
            return None
        weights = [item.tokens if self.per is None else item.sums[self.per.name] for item in items]
        return Column.of([item.sample_id for item in items], [item.sums[self.top.name] for item in items], weights)


class OwnTextMean(MetricSource):
    """The mean over the system's own answers of `value`, a function of an answer's facts (text, tokens, finished,
    repetition); None counts for nothing."""

    def __init__(self, value: Callable[[Mapping[str, Any]], float | None]) -> None:
        self.value = value

    def column(self, records: SystemRecords) -> Column:
        pairs = [
            (item.sample_id, float(value))
            for item, facts in zip(records.own, records.own_text, strict=True)
            if (value := self.value(facts)) is not None
        ]
        return Column.of([sample_id for sample_id, _ in pairs], [value for _, value in pairs])


class CalibrationError(MetricSource):
    """ECE over the reliability tables of held-out answers."""

    def interval(self, seeds: Sequence[SystemRecords]) -> Interval | None:
        return calibration.ece_interval(*reliability_by_item(seeds)) if seeds[0].fidelity else None


def reliability_by_item(seeds: Sequence[SystemRecords]) -> list[list[Reliability]]:
    """Of each seed one reliability table per held-out answer that all of them have."""
    tables = [{item.sample_id: item.reliability for item in records.fidelity if item.reliability} for records in seeds]
    common = [ident for ident in tables[0] if all(ident in each for each in tables)]
    return [[each[ident] for ident in common] for each in tables]


@dataclass(frozen=True)
class SystemMetric:
    """A metric of a system as a whole. With `exponential_of` it is e to the power of that metric, which stands in for
    it in paired differences."""

    title: str
    unit: str
    better: Better
    group: str
    source: MetricSource = field(default_factory=MetricSource)
    exponential_of: str = ""


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a kind of task: by default the mean of the items' scores under its name.

    Args:
        interval: for a metric that is no mean over items: from the task's settings and all results; None where it is
            undefined.
    """

    title: str
    better: Better
    interval: Callable[[Any, Sequence[ItemResult]], Interval | None] | None = None


def _common_choices(block: TokenBlock) -> Any:
    ours_RK, theirs_RK = block.choices[1], block.teacher_choices[1]
    return (ours_RK[:, :, None] == theirs_RK[:, None]).any(-1).float().mean(-1)


FORWARD_KL = TokenSum("forward_kl", lambda block: dot(block.teacher.prob, block.log_ratio), is_distance=True)
REVERSE_KL = TokenSum("reverse_kl", lambda block: -dot(block.q.prob, block.log_ratio), is_distance=True)
JSD = TokenSum(
    "jsd",
    lambda block: (
        0.5
        * (
            dot(block.teacher.prob, block.teacher.log - block.log_mixture)
            + dot(block.q.prob, block.q.log - block.log_mixture)
        )
    ),
    is_distance=True,
)
TVD = TokenSum("tvd", lambda block: 0.5 * (block.teacher.prob - block.q.prob).abs_().sum(-1), is_distance=True)
NLL = TokenSum("nll", lambda block: -block.q.log.gather(-1, block.targets_R1)[:, 0], reads_teacher=False)
TEACHER_NLL = TokenSum("teacher_nll", lambda block: -block.teacher.log.gather(-1, block.targets_R1)[:, 0])
ENTROPY = TokenSum("entropy", lambda block: -dot(block.q.prob, block.q.log), reads_teacher=False)
SAME_FIRST = TokenSum("top1", lambda block: (block.first == block.teacher_first).float())
COMMON_FIVE = TokenSum("top5", _common_choices)
WRONG = TokenSum("wrong", lambda block: block.is_wrong.float(), reads_teacher=False)
SAME_WRONG = TokenSum("same_wrong", lambda block: (block.is_wrong & (block.first == block.teacher_first)).float())


def _held_out(title: str, unit: str, better: Better, top: TokenSum, per: TokenSum | None = None) -> SystemMetric:
    return SystemMetric(title, unit, better, group=HELD_OUT, source=TokenRatio("held_out", top, per))


def _own(title: str, unit: str, better: Better, top: TokenSum) -> SystemMetric:
    return SystemMetric(title, unit, better, group=OWN, source=TokenRatio("own", top))


# the order is that of the report's columns
METRICS: dict[str, SystemMetric] = {
    "forward_kl": _held_out("Forward KL", "nats a token", "low", FORWARD_KL),
    "reverse_kl": _held_out("Reverse KL", "nats a token", "low", REVERSE_KL),
    "jsd": _held_out("Jensen-Shannon", "nats, at most 0.69", "low", JSD),
    "tvd": _held_out("Total variation", "0 to 1", "low", TVD),
    "top1_agreement": _held_out("Same first choice", "share of tokens", "high", SAME_FIRST),
    "top5_overlap": _held_out("Common among first five", "share", "high", COMMON_FIVE),
    "entropy": _held_out("Entropy", "nats a token", "none", ENTROPY),
    "nll": _held_out("Negative log-likelihood", "nats a token", "low", NLL),
    "perplexity": SystemMetric("Perplexity", "of the teacher's text", "low", HELD_OUT, exponential_of="nll"),
    "own_forward_kl": _own("Forward KL", "nats a token", "low", FORWARD_KL),
    "own_reverse_kl": _own("Reverse KL", "nats a token", "low", REVERSE_KL),
    "own_top1_agreement": _own("Same first choice", "share of tokens", "high", SAME_FIRST),
    "own_entropy": _own("Entropy", "nats a token", "none", ENTROPY),
    "own_teacher_nll": _own("Teacher's negative log-likelihood", "nats a token", "low", TEACHER_NLL),
    "own_teacher_perplexity": SystemMetric(
        "Teacher's perplexity", "of its text", "low", OWN, exponential_of="own_teacher_nll"
    ),
    "agree_when_wrong": _held_out("Same error as the teacher", "share of its errors", "none", SAME_WRONG, per=WRONG),
    "own_tokens": SystemMetric("Length", "tokens an answer", "none", OWN, source=OwnTextMean(itemgetter("tokens"))),
    "own_finished": SystemMetric(
        "Finished", "share of answers", "none", OWN, source=OwnTextMean(itemgetter("finished"))
    ),
    "own_repetition": SystemMetric(
        "Repetition", "share of 4-grams", "low", OWN, source=OwnTextMean(itemgetter("repetition"))
    ),
    "ece": SystemMetric("Calibration error", "ECE, 10 bins, first choices", "low", HELD_OUT, source=CalibrationError()),
}


def token_sums() -> dict[str, TokenSum]:
    """What the metrics need to have added up over tokens, by name."""
    return {each.name: each for metric in METRICS.values() for each in metric.source.sums}


def exponentials() -> dict[str, str]:
    """{metric: its exponential}: the second is what tables of values show."""
    return {metric.exponential_of: name for name, metric in METRICS.items() if metric.exponential_of}
