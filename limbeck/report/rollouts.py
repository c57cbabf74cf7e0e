"""The text that the student wrote while it trained, as a report shows it: curves by step, means of the first and last
steps, advice.

The facts are those of `metrics.jsonl` under "rollout"; a step in which the student wrote nothing has none, or only some
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.figures import TRAININGS, Figure
from limbeck.report.grids import Grid
from limbeck.report.metrics import label, number, percent
from limbeck.report.plots import Point, Series, Text, curves
from limbeck.storage.files import read_jsonl
from limbeck.storage.metrics_log import Record, is_number, mean_of, rollout_of, writing_share


@dataclass(frozen=True)
class Measure:
    """How a fact is called and written; shares are written in per cent. Shown only where it ever differed from
    `usual`."""

    title: str
    unit: str
    share: bool = False
    usual: float | None = None


MEASURES = {
    "length": Measure("Length", "tokens an answer"),
    "finished": Measure("Ended by itself", "% of answers", share=True),
    "repetition": Measure("Repetition", "% of 4-grams", share=True),
    "distinct_2": Measure("Distinct pairs", "% of 2-grams", share=True),
    "teacher_log_prob": Measure("Teacher's log-probability", "nats a token"),
    "student_log_prob": Measure("Student's log-probability", "nats a token"),
    "overlap": Measure("Likeliest tokens shared", "% of 16", share=True),
    "teacher_entropy": Measure("Teacher's entropy", "nats"),
    "entropy": Measure("Student's entropy", "nats"),
    "age": Measure("Age", "steps", usual=0.0),
    "own": Measure("Student's own tokens", "% of tokens", share=True, usual=1.0),
    "validation_loss": Measure("Validation loss", ""),
    "share": Measure("Student's share", "% of the text", share=True),
}
WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Plot:
    """One figure: its lines as (fact, label, style) and the sentence under it."""

    key: str
    title: str
    y_title: str
    caption: str
    lines: tuple[tuple[str, str, str], ...]
    limits: Point | None = None


PLOTS = (
    Plot(
        "length", "Length of an answer", "tokens", "Mean over the answers of a step.", (("length", "tokens", "accent"),)
    ),
    Plot(
        "form",
        "Endings and repetition",
        "share",
        "Answers that ended by themselves (the others ran into max_tokens), 2-grams that are distinct within a step,"
        " and 4-grams that an answer repeats.",
        (
            ("finished", "ended by itself", "accent"),
            ("distinct_2", "distinct pairs", "ink"),
            ("repetition", "repeated", "grey"),
        ),
        WHOLE,
    ),
    Plot(
        "log-prob",
        "Log-probability of the student's text",
        "nats a token",
        "How likely the student's tokens are to each of the two. The farther the teacher's line lies below the"
        " student's, the stranger the text is to the teacher.",
        (("teacher_log_prob", "Teacher", "ink"), ("student_log_prob", "Student", "accent")),
    ),
    Plot(
        "overlap",
        "Likeliest tokens shared",
        "share",
        "Of the 16 tokens that each of the two finds likeliest to come next, the share that both name.",
        (("overlap", "shared", "accent"),),
        WHOLE,
    ),
    Plot(
        "entropy",
        "Entropy on the student's text",
        "nats",
        "How undecided each of the two is about the next token. A student far below its teacher is narrower than it.",
        (("teacher_entropy", "Teacher", "ink"), ("entropy", "Student", "accent")),
    ),
    Plot(
        "age",
        "Age of the text",
        "steps",
        "Steps since it was written: ahead of its step, or read again.",
        (("age", "age", "accent"),),
    ),
    Plot(
        "own",
        "Tokens of the student's own",
        "share",
        "Tokens that the student itself proposed; the others are the teacher's.",
        (("own", "own", "accent"),),
        WHOLE,
    ),
    Plot(
        "validation",
        "Validation loss",
        "loss",
        "On prompts kept out of the training; it moves the student's share.",
        (("validation_loss", "loss", "accent"),),
    ),
    Plot(
        "share",
        "The student's share",
        "share",
        "The part of the text that the student writes.",
        (("share", "share", "accent"),),
        WHOLE,
    ),
)


@dataclass(frozen=True)
class OwnText:
    """What a report says of one training in which the student wrote. `key` makes ids; advice is (step, sentence)."""

    key: str
    title: str
    told: str
    figures: list[Figure]
    grid: Grid | None
    advice: list[tuple[int, str]]


def own_texts(folder: Path) -> list[OwnText]:
    """Every training of a run in which the student wrote."""
    found = []
    for name, place in TRAININGS.items():
        records = read_jsonl(folder / place / "metrics.jsonl")
        if any(map(rollout_of, records)):
            advice = [
                (record["step"], str(words)) for record in records for words in rollout_of(record).get("advice", ())
            ]
            found.append(OwnText(name, label(name), _told(records), _figures(name, records), _grid(records), advice))
    return found


def own_text_grid(comparison: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """The text of each method's student towards the end of its training; a method whose student wrote nothing has no
    row."""
    found = {method: values for method, values in (comparison.get("rollout") or {}).items() if values}
    kept = [key for key in MEASURES if any(is_number(values.get(key)) for values in found.values())]
    rows = [
        (names.get(method, method), [_cell(key, values.get(key)) for key in kept]) for method, values in found.items()
    ]
    note = "Means over the last third of the steps, and over seeds."
    if comparison.get("methods", {}).keys() - found.keys():
        note += " A method that is not here was trained on text of others."
    return Grid("Method", [(MEASURES[key].title, MEASURES[key].unit) for key in kept], rows, note) if kept else None


def _told(records: Sequence[Record]) -> str:
    """How much the student wrote, and what part of the time that took."""
    facts = [rollout_of(record) for record in records]
    written = sum(told.get("written", 0) for told in facts)
    steps = sum("answers" in told for told in facts)
    took = writing_share(records)
    time = f" Writing took {percent(took)} of the training's time." if took is not None else ""
    answers = "answer" if written == 1 else "answers"
    return (
        f"The student wrote {written:,} {answers}; text of its own was trained on in {steps:,} of {len(records):,}"
        f" steps.{time}"
    )


def _figures(name: str, records: Sequence[Record]) -> list[Figure]:
    found = []
    for plot in PLOTS:
        lines = [
            (fact, Series(words, _points(fact, records), style))
            for fact, words, style in plot.lines
            if _is_shown(fact, records)
        ]
        spoken = "; ".join(_spoken(fact, records) for fact, _ in lines)
        text = Text(f"{name}-own-{plot.key}", plot.title, f"{plot.caption} {spoken}.", "step", plot.y_title)
        svg = curves(text, [line for _, line in lines], y_limits=plot.limits)
        found += [Figure(plot.title, svg, plot.caption)] if svg else []
    return found


def _spoken(fact: str, records: Sequence[Record]) -> str:
    """The ends of a curve, for those who hear the page."""
    begin, end = (_cell(fact, mean_of(part, fact)) or "nothing" for part in _thirds(records))
    measure = MEASURES[fact]
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.title}{unit} {begin} in the first third of the steps, {end} in the last"


def _points(fact: str, records: Sequence[Record]) -> list[Point]:
    return [
        (record["step"], float(told[fact])) for record in records if is_number((told := rollout_of(record)).get(fact))
    ]


def _is_shown(fact: str, records: Sequence[Record]) -> bool:
    return any(value != MEASURES[fact].usual for _, value in _points(fact, records))


def _grid(records: Sequence[Record]) -> Grid | None:
    """Every measure in the first and in the last third of the steps."""
    parts = _thirds(records)
    rows = [
        (", ".join(filter(None, (measure.title, measure.unit))), [_cell(fact, mean_of(part, fact)) for part in parts])
        for fact, measure in MEASURES.items()
        if _is_shown(fact, records)
    ]
    shares = [writing_share(part) for part in parts]
    rows.append(("Time writing, % of the training", ["" if share is None else _percent(share) for share in shares]))
    columns = [
        (title, f"steps {part[0]['step']:,} to {part[-1]['step']:,}")
        for title, part in zip(("First third", "Last third"), parts, strict=True)
    ]
    note = (
        "Over the steps in which the student wrote; probabilities, likeliest tokens and entropies at a few places of"
        " each step."
    )
    return Grid("Mean of", list(columns), rows, note)


def _thirds(records: Sequence[Record]) -> tuple[Sequence[Record], Sequence[Record]]:
    """The first and the last third of the steps, at least one step each."""
    count = max(1, len(records) // 3)
    return records[:count], records[-count:]


def _cell(fact: str, value: float | None) -> str:
    if not is_number(value):
        return ""
    return _percent(value) if MEASURES[fact].share else number(float(value)).replace("-", "−")


def _percent(share: float) -> str:
    """One decimal, unlike `percent`: a repetition of 0.4 % is not none."""
    return f"{100 * share:.1f}"
