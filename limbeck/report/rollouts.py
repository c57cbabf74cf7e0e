"""The text that the student wrote while it trained: curves by step, means of the first and last steps, and advice.

The numbers are those of `metrics.jsonl` under "rollout". Steps in which the student wrote nothing lack all or some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.figures import Figure, trainings_of
from limbeck.report.grids import Grid
from limbeck.report.metrics import label, number, percent, tenths
from limbeck.report.plots import Label, Point, Series, curves
from limbeck.storage.files import read_jsonl
from limbeck.storage.metrics_log import Record, is_number, mean_of, rollout_of, writing_share


@dataclass(frozen=True)
class Measure:
    """How a number is named and written; shares in per cent. A number that always equals `usual` is not shown."""

    title: str
    unit: str
    share: bool = False
    usual: float | None = None


MEASURES = {
    "length": Measure("Length", "tokens per answer"),
    "finished": Measure("Ended by itself", "% of answers", share=True),
    "repetition": Measure("Repetition", "% of 4-grams", share=True),
    "distinct_2": Measure("Distinct pairs", "% of 2-grams", share=True),
    "teacher_log_prob": Measure("Teacher's log-probability", "nats per token"),
    "student_log_prob": Measure("Student's log-probability", "nats per token"),
    "overlap": Measure("Shared top tokens", "% of 16", share=True),
    "teacher_entropy": Measure("Teacher's entropy", "nats"),
    "entropy": Measure("Student's entropy", "nats"),
    "age": Measure("Age", "steps", usual=0.0),
    "reward": Measure("Reward", "mean of the answers"),
    "reward_deviation": Measure("Deviation of the reward", "over the answers"),
    "equal_groups": Measure("Equal groups", "% of prompts", share=True),
    "unread_rewards": Measure("Answers without a reward", "of a step"),
    "own": Measure("Student's own tokens", "% of tokens", share=True, usual=1.0),
    "validation_loss": Measure("Validation loss", ""),
    "share": Measure("Student's share", "% of the text", share=True),
}
ZERO_TO_ONE = (0.0, 1.0)


@dataclass(frozen=True)
class Line:
    """One line of a plot: a number of MEASURES by step."""

    fact: str
    name: str
    style: str = "accent"


@dataclass(frozen=True)
class Plot:
    """One figure of this section."""

    key: str
    title: str
    y_title: str
    caption: str
    lines: tuple[Line, ...]
    limits: Point | None = None


PLOTS = (
    Plot(
        key="reward",
        title="Reward",
        y_title="reward",
        caption="Mean over the answers of a step, and the standard deviation.",
        lines=(Line("reward", "reward"), Line("reward_deviation", "deviation", "grey")),
    ),
    Plot(
        key="equal-groups",
        title="Groups that teach nothing",
        y_title="share of prompts",
        caption="Prompts all of whose answers have the same reward, so that none is better than another.",
        lines=(Line("equal_groups", "equal"),),
        limits=ZERO_TO_ONE,
    ),
    Plot(
        key="length",
        title="Length of an answer",
        y_title="tokens",
        caption="Mean over the answers of a step.",
        lines=(Line("length", "tokens"),),
    ),
    Plot(
        key="form",
        title="Endings and repetition",
        y_title="share",
        caption=(
            "Answers that ended by themselves (the others reached max_tokens), distinct 2-grams among all of a step,"
            " and repeated 4-grams within an answer."
        ),
        lines=(
            Line("finished", "ended by itself"),
            Line("distinct_2", "distinct pairs", "ink"),
            Line("repetition", "repeated", "grey"),
        ),
        limits=ZERO_TO_ONE,
    ),
    Plot(
        key="log-prob",
        title="Log-probability of the student's text",
        y_title="nats per token",
        caption=(
            "How likely teacher and student find the tokens that the student wrote. The further the teacher's line is"
            " below the student's, the more unusual the text is for the teacher."
        ),
        lines=(Line("teacher_log_prob", "Teacher", "ink"), Line("student_log_prob", "Student")),
    ),
    Plot(
        key="overlap",
        title="Shared top tokens",
        y_title="share",
        caption="The share of the 16 most likely next tokens that teacher and student have in common.",
        lines=(Line("overlap", "shared"),),
        limits=ZERO_TO_ONE,
    ),
    Plot(
        key="entropy",
        title="Entropy on the student's text",
        y_title="nats",
        caption=(
            "How uncertain teacher and student are about the next token. A student far below its teacher may be losing"
            " diversity."
        ),
        lines=(Line("teacher_entropy", "Teacher", "ink"), Line("entropy", "Student")),
    ),
    Plot(
        key="age",
        title="Age of the text",
        y_title="steps",
        caption="Steps between writing a text and training on it.",
        lines=(Line("age", "age"),),
    ),
    Plot(
        key="own",
        title="The student's own tokens",
        y_title="share",
        caption="Tokens that the student proposed. The others are the teacher's.",
        lines=(Line("own", "own"),),
        limits=ZERO_TO_ONE,
    ),
    Plot(
        key="validation",
        title="Validation loss",
        y_title="loss",
        caption="On prompts kept out of training. It controls the student's share.",
        lines=(Line("validation_loss", "loss"),),
    ),
    Plot(
        key="share",
        title="The student's share",
        y_title="share",
        caption="The share of the training text that the student writes.",
        lines=(Line("share", "share"),),
        limits=ZERO_TO_ONE,
    ),
)


@dataclass(frozen=True)
class OwnText:
    """What a report says about one training in which the student wrote.

    `key` is the prefix of its element ids; `advice` is (step, sentence).
    """

    key: str
    title: str
    summary: str
    figures: list[Figure]
    grid: Grid | None
    advice: list[tuple[int, str]]


def own_texts(folder: Path) -> list[OwnText]:
    """Every training of a run in which the student wrote."""
    texts = []
    for name, place in trainings_of(folder).items():
        records = read_jsonl(folder / place / "metrics.jsonl")
        if not any(map(rollout_of, records)):
            continue
        text = OwnText(
            key=name,
            title=label(name),
            summary=_summary(records),
            figures=_figures(name, records),
            grid=_grid(records),
            advice=[
                (record["step"], str(sentence))
                for record in records
                for sentence in rollout_of(record).get("advice", ())
            ],
        )
        texts.append(text)
    return texts


def own_text_grid(comparison: dict[str, Any], names: dict[str, str]) -> Grid | None:
    """The text that each method's student wrote late in its training. Methods whose student wrote nothing are left
    out."""
    by_method = {method: values for method, values in (comparison.get("rollout") or {}).items() if values}
    facts = [fact for fact in MEASURES if any(is_number(values.get(fact)) for values in by_method.values())]
    if not facts:
        return None
    rows = [
        (names.get(method, method), [_cell(fact, values.get(fact)) for fact in facts])
        for method, values in by_method.items()
    ]
    note = "Means over the last third of the steps, and over seeds."
    if comparison.get("methods", {}).keys() - by_method.keys():
        note += " Methods not listed trained on text that others wrote."
    return Grid("Method", [(MEASURES[fact].title, MEASURES[fact].unit) for fact in facts], rows, note)


def _summary(records: Sequence[Record]) -> str:
    """How much the student wrote, and what share of the time that took."""
    rollouts = [rollout_of(record) for record in records]
    answers = sum(rollout.get("written", 0) for rollout in rollouts)
    steps = sum("answers" in rollout for rollout in rollouts)
    share = writing_share(records)
    time = f" Writing took {percent(share)} of the training time." if share is not None else ""
    return (
        f"The student wrote {answers:,} {'answer' if answers == 1 else 'answers'}, and trained on its own text in"
        f" {steps:,} of {len(records):,} steps.{time}"
    )


def _figures(name: str, records: Sequence[Record]) -> list[Figure]:
    figures = []
    for plot in PLOTS:
        lines = [line for line in plot.lines if _is_shown(line.fact, records)]
        ends = "; ".join(_curve_ends(line.fact, records) for line in lines)
        plot_label = Label(
            key=f"{name}-own-{plot.key}",
            title=plot.title,
            about=f"{plot.caption} {ends}.",
            x_title="step",
            y_title=plot.y_title,
        )
        series = [Series(line.name, _points(line.fact, records), line.style) for line in lines]
        if svg := curves(plot_label, series, y_limits=plot.limits):
            figures.append(Figure(plot.title, svg, plot.caption))
    return figures


def _curve_ends(fact: str, records: Sequence[Record]) -> str:
    """Where a curve starts and ends, for screen readers."""
    first, last = (_cell(fact, mean_of(part, fact)) or "nothing" for part in _thirds(records))
    measure = MEASURES[fact]
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.title}{unit} {first} in the first third of the steps, {last} in the last"


def _points(fact: str, records: Sequence[Record]) -> list[Point]:
    return [
        (record["step"], float(rollout[fact]))
        for record in records
        if is_number((rollout := rollout_of(record)).get(fact))
    ]


def _is_shown(fact: str, records: Sequence[Record]) -> bool:
    return any(value != MEASURES[fact].usual for _, value in _points(fact, records))


def _grid(records: Sequence[Record]) -> Grid | None:
    """Every number in the first and in the last third of the steps."""
    parts = _thirds(records)
    rows = [
        (", ".join(filter(None, (measure.title, measure.unit))), [_cell(fact, mean_of(part, fact)) for part in parts])
        for fact, measure in MEASURES.items()
        if _is_shown(fact, records)
    ]
    shares = [writing_share(part) for part in parts]
    rows.append(("Writing time, % of training", ["" if share is None else tenths(share) for share in shares]))
    columns = [
        (title, f"steps {part[0]['step']:,} to {part[-1]['step']:,}")
        for title, part in zip(("First third", "Last third"), parts, strict=True)
    ]
    note = (
        "Over the steps in which the student wrote. Log-probabilities, top tokens and entropies are measured at a few"
        " positions per step."
    )
    return Grid("Mean of", columns, rows, note)


def _thirds(records: Sequence[Record]) -> tuple[Sequence[Record], Sequence[Record]]:
    """The first and the last third of the steps, at least one step each."""
    count = max(1, len(records) // 3)
    return records[:count], records[-count:]


def _cell(fact: str, value: float | None) -> str:
    if not is_number(value):
        return ""
    return tenths(value) if MEASURES[fact].share else number(float(value)).replace("-", "−")
