"""The results of a run or a comparison, read from its folder: verdict, metrics with intervals, worth, single items."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.evaluate.statistics import Interval
from limbeck.report import data
from limbeck.report.item_files import all_items, item_files
from limbeck.report.page import is_comparison, verdict_of
from limbeck.report.worth import worth
from limbeck.storage.rounds import rounds_in
from limbeck.types import UserError, nearest

Systems = dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class RunResult:
    """A run's folder and what it holds. It stands for the folder where a path is asked for (`os.fspath`, `open`,
    `Path`).

    Everything is read from the folder when it is asked for; what was not measured yet is a `UserError`.
    """

    folder: Path

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def student(self) -> Path:
        """The trained student, a Hugging Face folder (`AutoModelForCausalLM.from_pretrained(run.student)`)."""
        return self.folder / "student"

    @property
    def report(self) -> Path:
        """The page with everything."""
        return self.folder / "report.html"

    @property
    def rounds(self) -> tuple[RunResult, ...]:
        """The runs of the rounds that have begun, the first one first; empty for a recipe without rounds."""
        return tuple(RunResult(home) for home in rounds_in(self.folder).values())

    @property
    def summary(self) -> dict[str, Any]:
        """`evaluation/summary.json` of a run, `comparison.json` of a comparison."""
        return data.read_results(self.folder)

    @property
    def verdict(self) -> str:
        """What may be claimed, in a sentence or two."""
        return verdict_of(self.folder, self.summary)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What to know before believing the verdict, in plain sentences."""
        summary = self.summary
        return (*summary.get("cautions", ()), *summary.get("warnings", ()))

    @property
    def systems(self) -> Systems:
        """{SYSTEM: {METRIC: interval}}; of a run `teacher`, `untouched` (before training), controls and `student`."""
        return {
            system: {name: _interval(facts) for name, facts in values.items() if facts}
            for system, values in self.summary["systems"].items()
        }

    @property
    def worth(self) -> dict[str, Any]:
        """Quality, size, speed, cost and after how many requests the distillation has paid (docs/worth.md).

        Raises:
            UserError: the folder holds a comparison, which has no student to use.
        """
        if is_comparison(self.folder):
            raise UserError(f"{self.folder} holds a comparison: the worth is that of one run; load one of its runs")
        return worth(self.folder, self.summary, data.read_recipe(self.folder))

    def metric(self, system: str, name: str) -> Interval:
        """One metric of one system, with its interval.

        Raises:
            UserError: there is no such system, or it was not measured so.
        """
        values = self.systems
        if system not in values:
            raise UserError(f"no system is named {system!r}{nearest(system, values)}")
        if name not in values[system]:
            raise UserError(f"{system} has no metric {name!r}{nearest(name, values[system])}")
        return values[system][name]

    def items(self, system: str) -> Iterator[dict[str, Any]]:
        """Every item of a system: its answers to the held-out prompts (`task` is "") and to the tasks' items, with what
        was asked in `prompt`. A method of a comparison gives those of all its seeds, each named in `system`.

        Raises:
            UserError: no item of such a system is kept.
        """
        folder = self.folder / "evaluation"
        known = dict.fromkeys(name for _, name in item_files(folder))
        chosen = [name for name in known if name == system or _method(name) == system]
        if not chosen:
            raise UserError(f"no items of a system {system!r} are kept{nearest(system, known)}")
        return all_items(folder, chosen)

    def frame(self) -> Any:
        """A pandas DataFrame with a row per system and metric: the columns of `limbeck report --csv`.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("frame() needs pandas: pip install pandas, or use `limbeck report RUN --csv`") from None
        return pandas.DataFrame(data.rows(self.folder), columns=list(data.COLUMNS))


@dataclass(frozen=True)
class ComparisonResult(RunResult):
    """A comparison's folder and what it holds: as a `RunResult`, with a run for every method and seed."""

    @property
    def student(self) -> Path:
        """Of a comparison there is one for every run: see `runs`."""
        raise UserError(f"{self.folder} holds several students: take one of `runs`, such as {self._first()}")

    @property
    def runs(self) -> dict[str, RunResult]:
        """The run of every method and seed, by METHOD-sSEED; a student that was not kept is not in its folder."""
        folders = sorted(path for path in (self.folder / "runs").glob("*") if path.is_dir())
        return {folder.name: RunResult(folder) for folder in folders}

    def _first(self) -> str:
        return next(iter(self.runs), "METHOD-sSEED")


def _interval(facts: dict[str, Any]) -> Interval:
    return Interval(facts["value"], facts["low"], facts["high"], facts.get("n", 0))


def _method(system: str) -> str:
    """The method of METHOD-sSEED, or ""."""
    method, _, seed = system.rpartition("-s")
    return method if seed.isdecimal() else ""
