"""A judge's verdicts on the student's answers, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.config.significance import LEAST_ITEMS
from limbeck.report.grids import Grid
from limbeck.report.metrics import label, percent

MIN_CONSISTENCY = 0.6
MAX_CORRELATION = 0.5
MAX_LONGER_WINS = 0.9  # where the correlation is undefined
MAX_UNPARSABLE = 0.5
OUTCOMES = {
    "first": ("Wins", ""),
    "tie": ("Ties", ""),
    "second": ("Losses", ""),
    "unparsable": ("Unreadable", "not counted"),
    "too_long": ("Too long", "not judged"),
}
SHARES = {
    "swap_consistency": ("Consistency", "when swapped"),
    "first_position_share": ("First answer wins", "50 % is fair"),
    "longer_wins": ("Longer answer wins", "of decided pairs"),
}

Pair = dict[str, Any]


@dataclass(frozen=True)
class JudgeSection:
    """A table with a row per system that the student was compared with, and text above and below it."""

    intro: str
    trust: str
    grid: Grid


def judge_section(summary: dict[str, Any]) -> JudgeSection | None:
    """The section on `summary["judge"]`; None if there was no judge."""
    judge = summary.get("judge") or {}
    pairs: dict[str, Pair] = {
        name.removeprefix("student - "): pair for name, pair in (judge.get("pairs") or {}).items()
    }
    if not pairs:
        return None
    intro = (
        f"{judge.get('model', 'A model')} compared the student's greedy answers with those of every other system, each"
        " pair in both orders. A verdict that changes with the order counts as a tie."
    )
    if judge.get("scores"):
        intro = (
            f"{judge.get('model', 'A model')} scored the greedy answers of every system, each by itself; the student"
            " wins a pair where its answer has the higher score."
        )
    return JudgeSection(intro, _trust(pairs, bool(judge.get("scores"))), _grid(pairs))


def _grid(pairs: dict[str, Pair]) -> Grid:
    """A row per system. Pairs that were too long get a column only if there are any."""
    counts = {name: [(pair.get("outcomes") or {}).get(name, 0) for pair in pairs.values()] for name in OUTCOMES}
    outcomes = [name for name in OUTCOMES if name != "too_long" or any(counts[name])]
    columns = [
        ("Win rate", "a tie counts half"),
        *(OUTCOMES[name] for name in outcomes),
        *SHARES.values(),
        ("Length", "correlation, −1 to 1"),
    ]
    rows = []
    for index, (name, pair) in enumerate(pairs.items()):
        shares = ["" if pair.get(share) is None else percent(pair[share]) for share in SHARES]
        cells = [f"{counts[outcome][index]:,}" for outcome in outcomes]
        correlation = _correlation(pair.get("length_correlation"))
        rows.append((label(name), [pair.get("win_rate"), *cells, *shares, correlation]))
    return Grid("Student against", columns, rows)


def _correlation(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _trust(pairs: dict[str, Pair], scores: bool) -> str:
    """How far the judge can be trusted, by the checks that were made of it. One that gives `scores` sees no order."""
    if not any(pair.get("win_rate") for pair in pairs.values()):
        return "The judge gave no readable verdict, so nothing follows from it."
    doubts = []
    if any(pair.get("judge_is_teacher") for pair in pairs.values()):
        doubts.append("it is the teacher itself and may prefer its own style")
    for check in _CHECKS:
        doubtful = [f"{label(name).lower()} ({check.value(pair)})" for name, pair in pairs.items() if check.fails(pair)]
        if doubtful:
            doubts.append(f"{check.doubt} the {' and the '.join(doubtful)}")
    if doubts:
        return f"Trust the judge with care: {'; '.join(doubts)}."
    passed = ["it is not the teacher"]
    if not scores:
        passed.append("it mostly keeps its verdicts when the two answers are swapped")
    if all(pair.get("length_correlation") is not None for pair in pairs.values()):
        passed.append("it does not just prefer the longer answer")
    said = " and ".join([", ".join(passed[:-1]), passed[-1]] if len(passed) > 1 else passed)
    return f"The judge passed its checks: {said}. Whether you share its taste is not measured."


def _readable(pair: Pair) -> int:
    return int((pair.get("win_rate") or {}).get("n", 0))


@dataclass(frozen=True)
class _Check:
    """A reason to doubt a judge: the pairs that fail it, and the value to show."""

    doubt: str
    fails: Callable[[Pair], bool]
    value: Callable[[Pair], str]


_CHECKS = (
    _Check(
        "most of its verdicts are unreadable against",
        fails=lambda pair: (pair.get("unparsable_share") or 0) > MAX_UNPARSABLE,
        value=lambda pair: percent(pair["unparsable_share"]),
    ),
    _Check(
        "few of its verdicts are readable against",
        fails=lambda pair: _readable(pair) < LEAST_ITEMS,
        value=lambda pair: str(_readable(pair)),
    ),
    _Check(
        "it keeps too few of its verdicts when answers are swapped, against",
        fails=lambda pair: pair.get("swap_consistency") is not None and pair["swap_consistency"] < MIN_CONSISTENCY,
        value=lambda pair: percent(pair["swap_consistency"]),
    ),
    _Check(
        "its verdicts correlate with length against",
        fails=lambda pair: abs(pair.get("length_correlation") or 0) > MAX_CORRELATION,
        value=lambda pair: f"correlation {_correlation(pair['length_correlation'])}",
    ),
    _Check(
        "the longer answer wins nearly always against",
        fails=lambda pair: pair.get("length_correlation") is None and (pair.get("longer_wins") or 0) > MAX_LONGER_WINS,
        value=lambda pair: percent(pair["longer_wins"]),
    ),
)
