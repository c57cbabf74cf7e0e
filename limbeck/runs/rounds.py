"""Runs a recipe once or, if it has rounds, again and again: each round an ordinary run in a folder of its own, which
starts from, is taught by or compares itself with the student of the round before.

All rounds share one store of answers; its keys hold the fingerprint of the model that was asked, so that no round reads
another's. A killed run goes on in the round where it ended, as that round's run does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from limbeck.config.named_models import PREVIOUS
from limbeck.config.recipe import Recipe
from limbeck.config.rounds import Rounds
from limbeck.evaluate.collapse import collapse
from limbeck.models.load import model_contents, model_identity
from limbeck.progress import Reporter, Silent, StoppedError
from limbeck.report.item_files import over_common_items
from limbeck.runs import pipeline
from limbeck.runs.at_once import at_once
from limbeck.runs.claim import claim, follow_names, run_folder
from limbeck.runs.outcome import follow, publish, started_from
from limbeck.runs.resolve import resolve
from limbeck.storage import checkpoint
from limbeck.storage.files import exclusive, read_jsonl, write_json, write_text
from limbeck.storage.metrics_log import read_json
from limbeck.storage.rounds import (
    RECORD,
    at_once_folder,
    round_folder,
    rounds_record,
    stage_folder,
    trained_rounds,
)
from limbeck.types import NothingLeftError, UserError

ELICIT, TRAIN, EVALUATE, REPORT = pipeline.STAGES


class CollapsedError(UserError):
    """A round's student writes no text that could teach the next one."""


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    stages: Sequence[str] = pipeline.STAGES,
) -> Path:
    """Run the stages of a recipe that are not done yet, in all of its rounds. Returns the run folder.

    Args:
        out: the run folder; by default runs/NAME.
        stop: called between two steps; if it returns true, the state is saved and `StoppedError` raised.
        stages: which of elicit, train, evaluate, report; a stage also does what it needs of earlier ones.

    Raises:
        UserError: the recipe or the folder can't be used, a round has nothing to train on, or its student has
            collapsed; finished work is kept.
    """
    reporter = reporter or Silent()
    if recipe.rounds is None:
        return pipeline.run(recipe, out, reporter, stop, stages=stages)
    resolve(recipe)  # what a later round couldn't do is refused before the first
    folder = run_folder(recipe, out)
    with exclusive(folder / ".lock"):
        RoundsRun(recipe, recipe.rounds, folder, reporter=reporter, stop=stop, stages=tuple(stages)).run()
    return folder


@dataclass
class RoundsRun:
    """The rounds of one recipe in one folder; `record` is what `rounds.json` holds (see `storage.rounds`)."""

    recipe: Recipe
    rounds: Rounds
    folder: Path
    reporter: Reporter
    stop: Callable[[], bool]
    stages: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Do what is left of every round, and put the last one's student and evaluation into the run folder."""
        self.claim()
        if self.stages == (ELICIT,):  # the text of a round may need the student before it
            untrained = [number for number in self.rounds.numbers if not self.student(number).is_dir()]
            self.round(untrained[0] if untrained else self.rounds.n)
            return
        for number in self.rounds.numbers:
            self.reporter.stage(f"Round {number} of {self.rounds.n}")
            try:
                self.round(number)
            except NothingLeftError as error:
                if not self.has(number - 1):
                    raise
                words = f"round {number}: {error}"
                raise NothingLeftError(f"{words}; {self.finish(number - 1, words)}") from error
            self.note(number)
            if words := collapse(self.summary(number)):
                words = f"the student of round {number} has collapsed: {words}"
                stands = self.finish(number - 1 if self.has(number - 1) else number, words)
                raise CollapsedError(f"{words}; train it for less, or at a lower train.lr, in a new --out; {stands}")
            if words := self.no_more(number):
                kept = number if self.is_same(number) or not self.has(number - 1) else number - 1
                self.control()
                end = "the last round" if number == self.rounds.n else "no round follows"
                self.reporter.note(f"{end}: {words}; {self.finish(kept, words)}")
                return
        self.control()
        self.finish(self.rounds.n, "")

    def claim(self) -> None:
        """Bind the folder to the recipe and the student's start, or refuse that of another run."""
        follow_names(self.folder)
        claim(self.folder, self.recipe, lambda: dict(self.start), lambda: None)
        self.record = rounds_record(self.folder)
        place = str(self.folder.resolve())
        if (before := str(self.record.get("place", place))) != place:
            follow(self.folder, before, place)
        self.write(place=place)

    def write(self, **facts: Any) -> None:
        """Keep facts in `rounds.json`."""
        record = {**self.record, **facts}
        if record != self.record:
            write_json(self.folder / RECORD, record)
        self.record = record

    def has(self, number: int) -> bool:
        """Whether there is such a round."""
        return number in self.rounds.numbers

    def student(self, number: int) -> Path:
        """Where a round's student is, or will be."""
        return round_folder(self.folder, number) / "student"

    def summary(self, number: int) -> dict[str, Any]:
        """A round's evaluation; empty before it."""
        return read_json(round_folder(self.folder, number) / "evaluation" / "summary.json") or {}

    @cached_property
    def start(self) -> dict[str, str]:
        return self._start()

    def _start(self) -> dict[str, str]:
        """The identity of the weights that the first round starts from, if they are there before it."""
        student = self.recipe.student
        source = student.start.pretrained
        return {} if source is None else {"start": model_identity(source, template=student.template)}

    def round(self, number: int) -> None:
        """Do what is left of the stages of one round.

        Raises:
            NothingLeftError: it has no text to train on.
            UserError: the start has changed since the first round, or what its run raises.
        """
        home = round_folder(self.folder, number)
        base = None if self.rounds.first is None or number == 0 else str(self.student(0).resolve())
        before = str(self.student(number - 1).resolve()) if self.has(number - 1) else None
        if number > 1 and self.rounds.restart == "base" and base is None:
            if self._start() != self.start:
                raise UserError("the weights in student.start have changed since round 1: give another --out")
            first = round_folder(self.folder, 1) / "start.json"
            if first.exists() and not (home / "start.json").exists():  # the same layers, whatever this round's text
                write_text(home / "start.json", first.read_text(encoding="utf-8"))
        stages = self.staged(number, before)
        if waits := [name for name, folder in stages.items() if not (Path(folder) / "student").is_dir()]:
            self.reporter.note(f"the text of round {number} waits for the training of {waits[0]}: run `limbeck train`")
            return
        recipe = self.recipe.of_round(number, before, base, stages)
        judged = self.rounds.stop is not None and TRAIN in self.stages and EVALUATE not in self.stages
        to_do = (*self.stages, EVALUATE) if judged and number > 0 else self.stages
        try:
            pipeline.run(recipe, home, self.reporter, self.stop, stages=to_do, store=self.folder)
        except (StoppedError, NothingLeftError):
            raise
        except UserError as error:
            if before is None:
                raise
            raise UserError(f"round {number}: {error}") from error
        if self.student(number).is_dir():
            checkpoint.prune(home / "checkpoints", 0)

    def staged(self, number: int, before: str | None) -> dict[str, str]:
        """Do what is left of the stages of a round. Returns their folders by name."""
        if number == 0:
            return {}
        for name in self.rounds.stages or ():
            home = stage_folder(self.folder, name, number)
            self.reporter.stage(f"Round {number}: {name}")
            try:
                recipe = self.recipe.of_stage(name, before, self.stages_of(number - 1))
                pipeline.run(recipe, home, self.reporter, self.stop, stages=self.stages, store=self.folder)
            except StoppedError:
                raise
            except NothingLeftError as error:
                raise NothingLeftError(f"{name}: {error}") from error
            except UserError as error:
                raise UserError(f"round {number}, {name}: {error}") from error
            if (home / "student").is_dir():
                checkpoint.prune(home / "checkpoints", 0)
        return self.stages_of(number)

    def stages_of(self, number: int) -> dict[str, str]:
        """The run folders of a round's stages, by name; empty before the first round."""
        names = self.rounds.stages or () if number > 0 else ()
        return {name: str(stage_folder(self.folder, name, number).resolve()) for name in names}

    def control(self) -> None:
        """Run the control that stands for all rounds, where the recipe asks for it and there is more than one."""
        count = trained_rounds(self.folder, self.rounds.n)
        if self.rounds.at_once is None or count < 2:
            return
        self.reporter.stage(f"{count} rounds at once")
        homes = [round_folder(self.folder, number) for number in range(1, count + 1)]
        steps = sum(len(read_jsonl(home / "metrics.jsonl")) for home in homes)
        base = None if self.rounds.first is None else str(self.student(0).resolve())
        home = at_once_folder(self.folder, count)
        if (homes[0] / "start.json").exists() and not (home / "start.json").exists():  # the rounds' layers
            home.mkdir(parents=True, exist_ok=True)
            write_text(home / "start.json", (homes[0] / "start.json").read_text(encoding="utf-8"))
        recipe = at_once(self.recipe, count, steps, base)
        pipeline.run(recipe, home, self.reporter, self.stop, stages=self.stages, store=self.folder)
        if (home / "student").is_dir():
            checkpoint.prune(home / "checkpoints", 0)

    def note(self, number: int) -> None:
        """Keep which weights a round began with and which it left.

        Raises:
            UserError: they can't be told from others of this run, so that answers would be mixed up.
        """
        source = str(self.student(number))
        start = number - 1 if self.rounds.restart == PREVIOUS else 0
        made = started_from(round_folder(self.folder, number), self.start)
        facts = {
            "start": model_identity(str(self.student(start))) if number and self.has(start) else made,
            "student": model_identity(source),
            "contents": model_contents(source),
        }
        others = {key: other for key, other in self.record.get("rounds", {}).items() if key != str(number)}
        for key, other in others.items():
            if other["student"] == facts["student"] and other["contents"] != facts["contents"]:
                raise UserError(
                    f"the students of rounds {key} and {number} have other weights and one fingerprint, so that their"
                    " answers would be mixed up: train more of the weights"
                )
        self.write(rounds=dict(sorted({**others, str(number): facts}.items(), key=lambda entry: int(entry[0]))))

    def is_same(self, number: int) -> bool:
        """Whether a round's student is the one before it, to the bit."""
        now, before = (self.record["rounds"].get(str(key)) for key in (number, number - 1))
        return before is not None and bool(now["contents"] == before["contents"])

    def no_more(self, number: int) -> str:
        """Why the rounds end with this one, or with the one before it; empty if they don't, or this is the last and the
        best."""
        if number == 0:
            return ""
        if number < self.rounds.n and self.is_same(number):
            return f"the student of round {number} is that of round {number - 1} to the bit, and so would all others be"
        metric = self.rounds.stop
        if metric is None or not (summary := self.summary(number)):
            return ""
        earlier = ("untouched", summary) if number == 1 else ("student", self.summary(number - 1))
        now, before = (_value(facts, system, metric) for system, facts in (("student", summary), earlier))
        if now is None or before is None:
            return ""
        if number > 1:  # each round has left out what its own text gives away
            places = {key: (round_folder(self.folder, key) / "evaluation", "student") for key in (number, number - 1)}
            common = over_common_items(places, metric)
            now, before = common.get(number, now), common.get(number - 1, before)
        is_better = now < before if summary["metrics"][metric]["better"] == "low" else now > before
        whose = "before training" if number == 1 else f"of round {number - 1}"
        return "" if is_better else f"{metric} of round {number} is {now:.4g}, no better than {before:.4g} {whose}"

    def finish(self, kept: int, ended: str) -> str:
        """Put a round's student and evaluation into the run folder, and write its page. Returns what stands there.

        Args:
            ended: why there are fewer rounds than the recipe's; empty if there aren't.
        """
        self.write(kept=kept, ended=ended)
        publish(self.folder, self.recipe, kept, page=REPORT in self.stages)
        return f"the student of round {kept} is in {self.folder / 'student'}"


def _value(summary: dict[str, Any], system: str, metric: str) -> float | None:
    value = (summary.get("systems", {}).get(system, {}).get(metric) or {}).get("value")
    return None if value is None else float(value)
