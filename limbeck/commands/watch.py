"""`limbeck watch RUN`: a live view of a run folder.

Reads files only; the run may belong to another process, or be done.
Not covered: whether the other process is alive. The age of the last step is all that a folder can tell.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as ConsoleTable
from rich.text import Text

from limbeck.config.yaml_text import read_yaml
from limbeck.storage.files import read_from
from limbeck.storage.metrics_log import (
    Metrics,
    Record,
    evaluation,
    is_number,
    mean_of,
    read_json,
    rollout_of,
    trainings,
    values_of,
    writing_share,
)
from limbeck.storage.rounds import current_round
from limbeck.storage.store import Store
from limbeck.types import UserError

SECONDS_BETWEEN = 1.0
RECENT_STEPS = 10  # speed, time left and the student's own text are averaged over these
BARS = "▁▂▃▄▅▆▇█"
BAR_COUNT = 32
METRICS = ("forward_kl", "reverse_kl", "jsd", "top1_agreement", "perplexity")


@dataclass(frozen=True)
class RolloutSummary:
    """The text that the student wrote in the recent steps.

    `length` is in tokens per answer. The others are shares (0 to 1): of answers that ended by themselves, of top tokens
    shared with the teacher, and of the time spent writing. All are None if no recent step has the number. `advice` is
    the latest of all steps.
    """

    length: float | None
    finished: float | None
    overlap: float | None
    time: float | None
    advice: str


@dataclass(frozen=True)
class TrainingView:
    """The state of one training. `steps` is None if their number is unknown, `rollout` if the student has written
    nothing."""

    name: str
    step: int
    steps: int | None
    values: dict[str, float]
    losses: tuple[float, ...]
    tokens_per_second: float | None
    seconds_left: float | None
    finished: bool
    rollout: RolloutSummary | None = None


@dataclass(frozen=True)
class RunView:
    """The state of a run folder. `age` is the seconds since the last step: None before the first, and at the end.
    `asked` is about how many answers there will be, None if no plan was kept."""

    name: str
    stage: str
    answers: dict[str, int]
    trainings: tuple[TrainingView, ...]
    evaluation: dict[str, dict[str, float]]
    age: float | None
    asked: int | None = None


class Watcher:
    """Reads a run folder again and again, and of its metrics only what is new.

    Raises:
        UserError: there is no such folder, or no run in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}; `limbeck run RECIPE --out {folder}` makes one")
        if not (folder / "recipe.yaml").exists():
            raise UserError(f"there is no run in {folder}: it has no recipe.yaml")
        self.run = folder
        self.folder = folder  # of the round that is under way, if there are rounds
        self.recipe: dict[str, Any] = read_yaml(folder / "recipe.yaml")
        self.metrics: dict[str, Metrics] = {}

    def look(self) -> RunView:
        """Read the folder's state as it is now; of a run in rounds, that of its newest round."""
        newest_round = current_round(self.run)
        if newest_round != self.folder and (newest_round / "recipe.yaml").exists():
            self.folder = newest_round
            self.metrics = {}
        views = []
        newest = 0.0
        for name, place in trainings(self.folder).items():
            metrics = self.metrics.setdefault(name, Metrics(place / "metrics.jsonl"))
            finished = (place / "student").is_dir()
            if records := metrics.update():
                steps = self.recipe.get("train", {}).get("steps")
                views.append(training_view(name, records, finished=finished, steps=steps))
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, metrics.path.stat().st_mtime)
        values = evaluation(self.folder)
        answers = count_answers(self.run / "store.sqlite")
        stage = self._stage(views, values, answers)
        running = any(not view.finished for view in views)
        return RunView(
            name=str(self.recipe.get("name")),
            stage=stage if self.folder == self.run else f"round {self.folder.name}, {stage}",
            answers=answers,
            trainings=tuple(views),
            evaluation=values,
            age=time.time() - newest if running else None,
            asked=self._asked(),
        )

    def _asked(self) -> int | None:
        """The requests that the run planned for."""
        requests = (read_json(self.folder / "plan.json") or {}).get("requests")
        return requests if isinstance(requests, int) and not isinstance(requests, bool) else None

    def _stage(self, views: Sequence[TrainingView], values: dict[str, Any], answers: dict[str, int]) -> str:
        if values:
            return "done" if (self.folder / "report.html").exists() else "report"
        if unfinished := [view.name for view in views if not view.finished]:
            return f"training: {unfinished[0]}"
        if (self.folder / "evaluation").is_dir():
            return "evaluation"
        if views:
            return f"trained: {', '.join(view.name for view in views)}"
        if (self.folder / "start.json").exists():
            return "student's initial weights"
        return "teacher's text" if answers else "starting"


def training_view(name: str, records: Sequence[Record], *, finished: bool, steps: int | None) -> TrainingView:
    """A training's last step with its recent speed. `steps` is the recipe's number of steps, if it has one."""
    last = records[-1]
    total = last["step"] if finished else last.get("steps") or steps
    timed = [
        record
        for record in records[-RECENT_STEPS:]
        if is_number(record.get("seconds")) and is_number(record.get("tokens")) and record["seconds"] > 0
    ]
    seconds = sum(record["seconds"] for record in timed)
    left = (total - last["step"]) * seconds / len(timed) if timed and is_number(total) and not finished else None
    return TrainingView(
        name=name,
        step=last["step"],
        steps=total,
        values=values_of(last),
        losses=tuple(float(record["loss"]) for record in records if is_number(record.get("loss"))),
        tokens_per_second=sum(record["tokens"] for record in timed) / seconds if timed else None,
        seconds_left=max(0.0, left) if left is not None else None,
        finished=finished,
        rollout=rollout_summary(records),
    )


def rollout_summary(records: Sequence[Record]) -> RolloutSummary | None:
    """The student's own text in the recent steps; None if it has never written."""
    if not any(map(rollout_of, records)):
        return None
    recent = records[-RECENT_STEPS:]
    advice = [
        f"step {record['step']:,}: {sentence}"
        for record in records
        for sentence in rollout_of(record).get("advice", ())
    ]
    return RolloutSummary(
        length=mean_of(recent, "length"),
        finished=mean_of(recent, "finished"),
        overlap=mean_of(recent, "overlap"),
        time=writing_share(recent),
        advice=advice[-1] if advice else "",
    )


def count_answers(store: Path) -> dict[str, int]:
    """The number of stored answers by how they ended; empty if there is no store, or it is just being made."""
    if not store.exists():
        return {}
    try:
        return Store.count(store)
    except sqlite3.Error:
        return {}


def sparkline(values: Sequence[float], width: int = BAR_COUNT) -> str:
    """At most `width` bars between the lowest and the highest value, each the mean of neighbouring values."""
    count = min(width, len(values))
    edges = [round(number * len(values) / count) for number in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low = min(means, default=0.0)
    high = max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def draw(view: RunView) -> Group:
    """The view for a terminal. Names from files are shown as plain text, without control characters."""
    age = f", last step {_duration(view.age)} ago" if view.age is not None else ""
    parts: list[Any] = [Text.assemble((_plain(view.name), "bold"), f"  {_plain(view.stage)}{age}")]
    if view.answers:
        counts = ", ".join(f"{number:,} {_plain(finish)}" for finish, number in view.answers.items())
        parts.append(Text(f"answers stored: {_progress(view)}{counts}"))
    if view.trainings:
        parts.append(_training_table(view.trainings))
        for training in view.trainings:
            if training.rollout:
                parts += _rollout_lines(training.name, training.rollout)
    if view.evaluation:
        parts.append(_evaluation_table(view.evaluation))
    return Group(*parts)


def _progress(view: RunView) -> str:
    """How many of the planned answers are there, until the training begins: `40 of about 204; `."""
    if view.asked is None or view.trainings or view.evaluation:
        return ""
    return f"{sum(view.answers.values()):,} of about {view.asked:,}; "


def _training_table(views: Sequence[TrainingView]) -> ConsoleTable:
    table = ConsoleTable(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for view in views:
        table.add_column(Text(_plain(view.name)), no_wrap=True)
    table.add_row("step", *(f"{v.step:,} of {v.steps:,}" if v.steps else f"{v.step:,}" for v in views))
    table.add_row("loss", *(_number(v.values.get("loss")) for v in views))
    table.add_row("", *(sparkline(v.losses) for v in views))
    for name in dict.fromkeys(name for v in views for name in v.values if "/" in name):
        table.add_row(Text(_plain(name.removeprefix("terms/"))), *(_number(v.values.get(name)) for v in views))
    table.add_row("learning rate", *(f"{v.values['lr']:.2e}" if "lr" in v.values else "" for v in views))
    table.add_row("gradient norm", *(_number(v.values.get("grad_norm")) for v in views))
    table.add_row("tokens/s", *(f"{v.tokens_per_second:,.0f}" if v.tokens_per_second else "" for v in views))
    table.add_row("time left", *("done" if v.finished else _duration(v.seconds_left) for v in views))
    return table


def _rollout_lines(name: str, rollout: RolloutSummary) -> list[Text]:
    """A line about the student's own text, and one with the latest advice."""
    facts = [
        (rollout.length, 1, "{:,.0f} tokens per answer"),
        (rollout.finished, 100, "{:.0f} % ended by themselves"),
        (rollout.overlap, 100, "{:.0f} % of top tokens shared"),
        (rollout.time, 100, "{:.0f} % of the time"),
    ]
    summary = ", ".join(form.format(factor * value) for value, factor, form in facts if value is not None)
    if rollout.length is None:
        summary = f"nothing in the last {RECENT_STEPS} steps"
    advice = [Text(f"advice, {_plain(rollout.advice, 300)}")] if rollout.advice else []
    return [Text(f"{_plain(name)} writes: {summary}"), *advice]


def _evaluation_table(systems: dict[str, dict[str, float]]) -> ConsoleTable:
    table = ConsoleTable(box=None, pad_edge=False)
    table.add_column("evaluation", no_wrap=True)
    for name in systems:
        table.add_column(Text(_plain(name)), no_wrap=True)
    for metric in METRICS:
        if any(metric in values for values in systems.values()):
            table.add_row(metric, *(_number(values.get(metric)) for values in systems.values()))
    return table


def _plain(text: str, most: int = 60) -> str:
    return "".join(character for character in text if character.isprintable())[:most]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def watch(folder: Path, screen: Console, once: bool = False) -> None:
    """Show a run folder until Ctrl-C; once where that is asked for, or where no terminal could show a change.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    watcher = Watcher(folder)
    with read_from(folder):
        first = draw(watcher.look())
        if once or not screen.is_terminal:
            screen.print(first)
            return
        with _interrupt() as interrupted, Live(first, console=screen, auto_refresh=False) as live:
            while not interrupted.wait(SECONDS_BETWEEN):
                live.update(draw(watcher.look()), refresh=True)


@contextlib.contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets: it ends the display without an error."""
    interrupted = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
