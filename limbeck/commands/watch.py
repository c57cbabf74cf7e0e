"""`limbeck watch RUN`: a run folder at a glance, drawn anew every second. Reads files only; the run may be another
process's, or done.

Not covered: whether the other process still lives. The age of the last step says as much as a folder can.
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

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from limbeck.storage.metrics_log import (
    Metrics,
    Record,
    evaluation,
    is_number,
    mean_of,
    rollout_of,
    trainings,
    values_of,
    writing_share,
)
from limbeck.types import UserError

SECONDS_BETWEEN = 1.0
RECENT_STEPS = 10  # the rate, the time left and what the student writes are over these
BARS = "▁▂▃▄▅▆▇█"
BAR_COUNT = 32
SHOWN = ("forward_kl", "reverse_kl", "jsd", "top1_agreement", "perplexity")


@dataclass(frozen=True)
class Written:
    """The student's own text in the recent steps: tokens an answer, shares (0 to 1) of answers that ended by
    themselves, of likeliest tokens shared with the teacher, and of the time spent writing; None where no recent step
    tells. `advice` is the latest of all."""

    length: float | None
    finished: float | None
    overlap: float | None
    time: float | None
    advice: str


@dataclass(frozen=True)
class Training:
    """What one training's records say. `steps` is None where the folder does not tell how many there will be; `written`
    is None where the student has written nothing."""

    name: str
    step: int
    steps: int | None
    values: dict[str, float]
    losses: tuple[float, ...]
    tokens_per_second: float | None
    seconds_left: float | None
    finished: bool
    written: Written | None = None


@dataclass(frozen=True)
class View:
    """A run folder at one moment. `age` is the seconds since the last step; None before the first, and at the end."""

    name: str
    stage: str
    answers: dict[str, int]
    trainings: tuple[Training, ...]
    measured: dict[str, dict[str, float]]
    age: float | None


class Watcher:
    """Looks at a run folder again and again, reading only what is new of its metrics.

    Raises:
        UserError: there is no such folder, or no run in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}; `limbeck run RECIPE --out {folder}` makes one")
        if not (folder / "recipe.yaml").exists():
            raise UserError(f"{folder} holds no run: there is no recipe.yaml in it")
        self.folder = folder
        self.recipe: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())
        self.metrics: dict[str, Metrics] = {}

    def look(self) -> View:
        found = []
        newest = 0.0
        for name, place in trainings(self.folder).items():
            metrics = self.metrics.setdefault(name, Metrics(place / "metrics.jsonl"))
            finished = (place / "student").is_dir()
            if records := metrics.update():
                found.append(summary(name, records, finished, self.recipe.get("train", {}).get("steps")))
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, metrics.path.stat().st_mtime)
        measured = evaluation(self.folder)
        answers = count_answers(self.folder / "store.sqlite")
        stage = self._stage(found, measured, answers)
        running = any(not training.finished for training in found)
        return View(
            str(self.recipe.get("name")),
            stage,
            answers,
            tuple(found),
            measured,
            time.time() - newest if running else None,
        )

    def _stage(self, found: Sequence[Training], measured: dict[str, Any], answers: dict[str, int]) -> str:
        if measured:
            return "done" if (self.folder / "report.html").exists() else "report"
        if unfinished := [training.name for training in found if not training.finished]:
            return f"training: {unfinished[0]}"
        if (self.folder / "evaluation").is_dir():
            return "evaluation"
        if found:
            return f"trained: {', '.join(training.name for training in found)}"
        if (self.folder / "start.json").exists():
            return "student's start"
        return "teacher's text" if answers else "beginning"


def summary(name: str, records: Sequence[Record], finished: bool, steps: int | None) -> Training:
    """The last step of a training with its recent rate. `steps` is what the recipe asks for, where it does."""
    last = records[-1]
    total = last["step"] if finished else last.get("steps") or steps
    recent = [
        r
        for r in records[-RECENT_STEPS:]
        if is_number(r.get("seconds")) and is_number(r.get("tokens")) and r["seconds"] > 0
    ]
    seconds = sum(record["seconds"] for record in recent)
    left = (total - last["step"]) * seconds / len(recent) if recent and is_number(total) and not finished else None
    return Training(
        name=name,
        step=last["step"],
        steps=total,
        values=values_of(last),
        losses=tuple(float(record["loss"]) for record in records if is_number(record.get("loss"))),
        tokens_per_second=sum(record["tokens"] for record in recent) / seconds if recent else None,
        seconds_left=max(0.0, left) if left is not None else None,
        finished=finished,
        written=written(records),
    )


def written(records: Sequence[Record]) -> Written | None:
    """What the recent steps tell of the student's own text; None where no step tells anything."""
    if not any(map(rollout_of, records)):
        return None
    recent = records[-RECENT_STEPS:]
    given = [
        f"step {record['step']:,}: {words}" for record in records for words in rollout_of(record).get("advice", ())
    ]
    length, finished, overlap = (mean_of(recent, fact) for fact in ("length", "finished", "overlap"))
    return Written(length, finished, overlap, writing_share(recent), given[-1] if given else "")


def count_answers(store: Path) -> dict[str, int]:
    """How many answers the store holds of each finish; empty where there is none yet, or it is being made."""
    if not store.exists():
        return {}
    try:
        with contextlib.closing(sqlite3.connect(f"{store.resolve().as_uri()}?mode=ro", uri=True)) as db:
            return dict(db.execute("select finish, count(*) from answers group by finish order by finish"))
    except sqlite3.Error:
        return {}


def sparkline(values: Sequence[float], width: int = BAR_COUNT) -> str:
    """The values as `width` bars at most, each the mean of its stretch, from the lowest to the highest."""
    count = min(width, len(values))
    edges = [round(number * len(values) / count) for number in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low = min(means, default=0.0)
    high = max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def draw(view: View) -> Group:
    """The view for a terminal. Names out of files are shown as plain text, control characters left out."""
    age = f", last step {_duration(view.age)} ago" if view.age is not None else ""
    parts: list[Any] = [Text.assemble((_plain(view.name), "bold"), f"  {_plain(view.stage)}{age}")]
    if view.answers:
        counts = ", ".join(f"{number:,} {_plain(finish)}" for finish, number in view.answers.items())
        parts.append(Text(f"answers stored: {counts}"))
    if view.trainings:
        parts.append(_training_table(view.trainings))
        parts += [
            line
            for training in view.trainings
            if training.written
            for line in _own_text(training.name, training.written)
        ]
    if view.measured:
        parts.append(_evaluation_table(view.measured))
    return Group(*parts)


def _training_table(found: Sequence[Training]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for training in found:
        table.add_column(Text(_plain(training.name)), no_wrap=True)
    table.add_row("step", *(f"{t.step:,} of {t.steps:,}" if t.steps else f"{t.step:,}" for t in found))
    table.add_row("loss", *(_number(t.values.get("loss")) for t in found))
    table.add_row("", *(sparkline(t.losses) for t in found))
    for name in dict.fromkeys(name for t in found for name in t.values if "/" in name):
        table.add_row(Text(_plain(name.removeprefix("terms/"))), *(_number(t.values.get(name)) for t in found))
    table.add_row("lr", *(f"{t.values['lr']:.2e}" if "lr" in t.values else "" for t in found))
    table.add_row("grad norm", *(_number(t.values.get("grad_norm")) for t in found))
    table.add_row("tokens/s", *(f"{t.tokens_per_second:,.0f}" if t.tokens_per_second else "" for t in found))
    table.add_row("left", *("done" if t.finished else _duration(t.seconds_left) for t in found))
    return table


def _own_text(name: str, written: Written) -> list[Text]:
    """A line on what the student writes, and one with the latest advice."""
    told = [
        (written.length, 1, "{:,.0f} tokens an answer"),
        (written.finished, 100, "{:.0f} % ended"),
        (written.overlap, 100, "overlap {:.0f} %"),
        (written.time, 100, "{:.0f} % of the time"),
    ]
    words = ", ".join(form.format(factor * value) for value, factor, form in told if value is not None)
    if written.length is None:
        words = f"nothing in the last {RECENT_STEPS} steps"
    advice = [Text(f"advice, {_plain(written.advice, 300)}")] if written.advice else []
    return [Text(f"{_plain(name)} writes: {words}"), *advice]


def _evaluation_table(measured: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("evaluation", no_wrap=True)
    for system in measured:
        table.add_column(Text(_plain(system)), no_wrap=True)
    for metric in SHOWN:
        if any(metric in values for values in measured.values()):
            table.add_row(metric, *(_number(values.get(metric)) for values in measured.values()))
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
    """Show the folder until Ctrl-C, or once.

    Raises:
        UserError: there is no run to watch.
    """
    watcher = Watcher(folder)
    if once:
        screen.print(draw(watcher.look()))
        return
    with _interrupt() as asked, Live(draw(watcher.look()), console=screen, auto_refresh=False) as live:
        while not asked.wait(SECONDS_BETWEEN):
            live.update(draw(watcher.look()), refresh=True)


@contextlib.contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets: to stop watching is no fault."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
