"""What a judge said of the student's answers, and how far it can be believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.config.significance import LEAST_ITEMS
from limbeck.report.grids import Grid
from limbeck.report.metrics import label, percent

LEAST_CONSISTENCY = 0.6
MOST_CORRELATION = 0.5
MOST_UNPARSABLE = 0.5
OUTCOMES = {
    "first": ("Wins", ""),
    "tie": ("Ties", ""),
    "second": ("Losses", ""),
    "unparsable": ("Unparsable", "counts for nothing"),
    "too_long": ("Too long", "not asked"),
}
SHARES = {
    "swap_consistency": ("Agreement", "when swapped"),
    "first_position_share": ("First place", "of verdicts, fair is 50 %"),
    "longer_wins": ("Longer wins", "of decided pairs"),
}

Pair = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """A table with a row per system that the student was held against, and two sentences."""

    told: str
    belief: str
    grid: Grid


def judged(summary: dict[str, Any]) -> Judged | None:
    """What `summary["judge"]` says; None where no judge was asked."""
    found = summary.get("judge") or {}
    pairs: dict[str, Pair] = {
        name.removeprefix("student - "): pair for name, pair in (found.get("pairs") or {}).items()
    }
    if not pairs:
        return None
    told = (
        f"{found.get('model', 'A model')} compared the student's greedy answers with those of every other system, each"
        " pair in both orders. A verdict that changes with the order counts as a tie."
    )
    return Judged(told, _belief(pairs), _grid(pairs))


def _grid(pairs: dict[str, Pair]) -> Grid:
    """A row per system; pairs that were too long are a column only where there are some."""
    counted = {name: [(pair.get("outcomes") or {}).get(name, 0) for pair in pairs.values()] for name in OUTCOMES}
    kept = [name for name in OUTCOMES if name != "too_long" or any(counted[name])]
    columns = [
        ("Win rate", "a tie counts half"),
        *(OUTCOMES[name] for name in kept),
        *SHARES.values(),
        ("Length", "correlation, −1 to 1"),
    ]
    rows = []
    for place, (name, pair) in enumerate(pairs.items()):
        shares = ["" if pair.get(share) is None else percent(pair[share]) for share in SHARES]
        counts = [f"{counted[outcome][place]:,}" for outcome in kept]
        rows.append(
            (label(name), [pair.get("win_rate"), *counts, *shares, _correlation(pair.get("length_correlation"))])
        )
    return Grid("Student against", columns, rows)


def _correlation(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _belief(pairs: dict[str, Pair]) -> str:
    """How far the judge can be believed, by what was checked of it."""
    if not any(pair.get("win_rate") for pair in pairs.values()):
        return "It gave no verdict that can be read, so nothing follows from it."
    doubts = (
        ["it is the teacher itself and may favour its own manner"]
        if any(p.get("judge_is_teacher") for p in pairs.values())
        else []
    )
    for words, doubted, shown in _CHECKS:
        if named := [f"{label(name).lower()} ({shown(pair)})" for name, pair in pairs.items() if doubted(pair)]:
            doubts.append(f"{words} the {' and the '.join(named)}")
    if doubts:
        return f"How far it can be believed: with care, since {'; '.join(doubts)}."
    return (
        "How far it can be believed: it is not the teacher, keeps to most of its verdicts when the answers change"
        " places, and does not just prefer the longer answer. Whether its taste is yours is not measured."
    )


def _readable(pair: Pair) -> int:
    return int((pair.get("win_rate") or {}).get("n", 0))


_Check = tuple[str, Callable[[Pair], bool], Callable[[Pair], str]]
_CHECKS: tuple[_Check, ...] = (
    (
        "most of its verdicts can't be read against",
        lambda pair: (pair.get("unparsable_share") or 0) > MOST_UNPARSABLE,
        lambda pair: percent(pair["unparsable_share"]),
    ),
    ("few pairs could be read against", lambda pair: _readable(pair) < LEAST_ITEMS, lambda pair: str(_readable(pair))),
    (
        "when the answers change places it keeps to too few of its verdicts against",
        lambda pair: pair.get("swap_consistency") is not None and pair["swap_consistency"] < LEAST_CONSISTENCY,
        lambda pair: percent(pair["swap_consistency"]),
    ),
    (
        "its verdicts go with length against",
        lambda pair: abs(pair.get("length_correlation") or 0) > MOST_CORRELATION,
        lambda pair: f"correlation {_correlation(pair['length_correlation'])}",
    ),
)
